"""/tokenize and /detokenize."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live import Live
from sdk import llm_of, refusal

from pronk.engine.llm import LLM

TEXTS = ["", "hello world", "naïve 🙂🙂 日本\n\n\x00", "<|eot_id|> is text", " the " * 300]


@pytest.fixture(scope="module")
def llm(tiny_server: Live) -> Iterator[LLM]:
    with llm_of(tiny_server) as one:
        yield one


def post(server: Live, path: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(server.url + path, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_there_and_back(tiny_server: Live, llm: LLM, text: str) -> None:
    found = post(tiny_server, "/tokenize", prompt=text, model="tiny")
    assert found["tokens"] == llm.tokenizer.encode(text, bos=True)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 2048)
    plain = post(tiny_server, "/tokenize", content=text, add_special_tokens=False)
    assert plain["tokens"] == found["tokens"][1:]
    back = post(tiny_server, "/detokenize", tokens=plain["tokens"])
    assert back == {"prompt": text, "content": text}


def test_special_tokens_and_words(tiny_server: Live, llm: LLM) -> None:
    end = llm.tokenizer.special_ids["<|eot_id|>"]
    body = {"prompt": "a<|eot_id|>", "add_special_tokens": False}
    found = post(tiny_server, "/tokenize", **body, parse_special=True, return_token_strs=True)
    assert found["tokens"] == [ord("a"), end]
    assert found["token_strs"] == ["a", "<|eot_id|>"]
    assert end not in post(tiny_server, "/tokenize", **body)["tokens"]


def test_chats_count_as_they_are_answered(tiny_server: Live) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "F", "strict": True}}
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    found = post(tiny_server, "/tokenize", **chat)
    answer = post(tiny_server, "/v1/chat/completions", model="tiny", max_tokens=1, **chat)
    assert found["count"] == answer["usage"]["prompt_tokens"]
    spelled = post(tiny_server, "/detokenize", tokens=found["tokens"])["prompt"]
    assert spelled.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>")
    assert spelled.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "parse_special": True},
            "parse_special",
        ),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "a", "foo": 1}, "foo"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(tiny_server: Live, path: str, body: Any, param: str) -> None:
    assert refusal(tiny_server, path, body)[:2] == (400, param)


def test_unknown_models(tiny_server: Live) -> None:
    status, param, code, _ = refusal(tiny_server, "/tokenize", {"model": "x", "prompt": "a"})
    assert (status, param, code) == (404, "model", "model_not_found")
