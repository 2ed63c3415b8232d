"""POST /v1/embeddings by OpenAI's client: the vectors of `LLM.embed`, in both encodings."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from live import Live
from sdk import client, llm_of, refusal

from pronk.engine.llm import LLM

PATH = "/v1/embeddings"
TEXTS = ["hello world", "", "a longer text, of more than one block of tokens " * 3, "hello world"]


@pytest.fixture
def sdk(tiny_server: Live) -> Iterator[openai.OpenAI]:
    with client(tiny_server) as sdk:
        yield sdk


@pytest.fixture
def llm(tiny_server: Live) -> Iterator[LLM]:
    with llm_of(tiny_server) as llm:
        yield llm


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors(sdk: openai.OpenAI, llm: LLM, encoding: Any, pooling: Any) -> None:
    texts = [text or " " for text in TEXTS]
    found = sdk.embeddings.create(
        model="tiny", input=texts, encoding_format=encoding, extra_body={"pooling": pooling}
    )
    vectors = [item.embedding for item in found.data]
    if encoding == "base64":
        vectors = [np.frombuffer(base64.b64decode(v), "<f4").tolist() for v in vectors]  # type: ignore[arg-type]
    np.testing.assert_allclose(vectors, llm.embed(texts, pooling=pooling), atol=1e-6)
    assert [item.index for item in found.data] == [0, 1, 2, 3]
    assert vectors[0] == vectors[3]
    n_tokens = sum(len(llm.tokenizer.encode(t, bos=llm.tokenizer.add_bos)) for t in texts)
    assert found.usage.prompt_tokens == found.usage.total_tokens == n_tokens


def test_one_text_and_tokens(sdk: openai.OpenAI, llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello", bos=llm.tokenizer.add_bos)
    one = sdk.embeddings.create(model="tiny", input="hello").data
    same = sdk.embeddings.create(model="tiny", input=ids, dimensions=llm.config.dim).data
    both = sdk.embeddings.create(model="tiny", input=[ids, ids]).data
    assert [item.embedding for item in both] == [one[0].embedding] * 2
    assert same[0].embedding == one[0].embedding


def test_the_body_is_what_the_document_says(tiny_server: Live) -> None:
    answer = httpx.post(tiny_server.url + PATH, json={"model": "tiny", "input": ["a", "b"]})
    assert answer.headers["content-type"] == "application/json"
    body = json.loads(answer.content)
    assert sorted(body) == ["data", "model", "object", "usage"]
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert [item["object"] for item in body["data"]] == ["embedding"] * 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 7}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(tiny_server: Live, body: dict[str, Any], param: str) -> None:
    status, found, _, message = refusal(tiny_server, PATH, {"model": "tiny", **body})
    assert (status, found) == (400, param)
    assert message.startswith(param)
