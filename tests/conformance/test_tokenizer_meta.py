"""Llama 3's vocabulary against Meta's own tokenizer (`llama-models`), whatever source it is in."""

import importlib
import random
import unittest
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.text.tokenizer import (
    Tokenizer,
    tokenizer_from_gguf,
    tokenizer_from_hf,
    tokenizer_from_meta,
)
from pronk.text.tokenizer_bpe import in_byte_alphabet
from pronk.text.vocabulary import RUN_CHARS, SLICE_CHARS
from varied_text import LONG_RUNS, SENTENCES, SPACES, documents
from vocabularies import hf_json, merges_of, write_hf

meta_module = pytest.importorskip("llama_models.llama3.tokenizer")
N = 128_000


@pytest.fixture(scope="module")
def theirs() -> Any:
    return meta_module.Tokenizer.get_instance()


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return tokenizer_from_meta(Path(meta_module.__file__).parent / "tokenizer.model")


@pytest.fixture(scope="module")
def tokens(ours: Tokenizer) -> list[str]:
    """The ordinary tokens as GGUF and Hugging Face files write them."""
    return [in_byte_alphabet(ours.token_bytes(id)) for id in range(N)]


@pytest.fixture(scope="module")
def merges(ours: Tokenizer) -> list[tuple[str, str]]:
    found = merges_of([ours.token_bytes(id) for id in range(N)])
    assert len(found) == 280_147
    return found


@pytest.fixture(scope="module")
def gguf(ours: Tokenizer, tokens: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    metadata = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [*tokens, *ours.special_ids],
        "token_type": [1] * N + [3] * 256,
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": N,
        "eos_token_id": N + 9,
    }
    return tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


@pytest.fixture(scope="module")
def hf(
    ours: Tokenizer,
    tokens: list[str],
    merges: list[tuple[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    spec = hf_json()
    spec["added_tokens"] = [
        {"id": id, "content": text, "special": True} for text, id in ours.special_ids.items()
    ]
    spec["model"] |= {"vocab": {t: id for id, t in enumerate(tokens)}, "merges": merges}
    folder = write_hf(
        tmp_path_factory.mktemp("llama"),
        spec,
        generation_config={"eos_token_id": [N + 1, N + 8, N + 9]},
    )
    return tokenizer_from_hf(folder)


def check(ours: Tokenizer, theirs: Any, text: str, what: str) -> None:
    expected, ids = theirs.encode(text, bos=False, eos=False), ours.encode(text)
    if ids != expected:
        first = next(
            n for n, pair in enumerate(zip(ids, expected, strict=False)) if len(set(pair)) > 1
        )
        around = slice(max(0, first - 3), first + 3)
        pytest.fail(f"{what}: {ours.decode(expected[around])!r}: {ids[around]}, {expected[around]}")


@pytest.mark.parametrize("kind", documents())
def test_ids_equal_metas(ours: Tokenizer, theirs: Any, kind: str) -> None:
    for n, text in enumerate(documents()[kind]):
        check(ours, theirs, text, f"{kind} {n}")


def test_ids_equal_metas_on_one_long_text(ours: Tokenizer, theirs: Any) -> None:
    """All documents as one text: tokens across Meta's slices of 400,000 characters are cut."""
    text = "".join(text for texts in documents().values() for text in texts)
    assert len(text) > 5_000_000
    check(ours, theirs, text, "all")


@pytest.mark.parametrize("kind", documents())
def test_ids_from_gguf_equal_metas(gguf: Tokenizer, theirs: Any, kind: str) -> None:
    for n, text in enumerate(documents()[kind]):
        check(gguf, theirs, text, f"{kind} {n}")


@pytest.mark.parametrize("kind", ["contractions", "numbers", "whitespace", "long runs", *SENTENCES])
def test_ids_from_hugging_face_equal_metas(hf: Tokenizer, theirs: Any, kind: str) -> None:
    for n, text in enumerate(documents()[kind]):
        check(hf, theirs, text, f"{kind} {n}")


@pytest.mark.parametrize("source", ["ours", "gguf"])
def test_every_token_alone(request: pytest.FixtureRequest, theirs: Any, source: str) -> None:
    """Some tokens come about only because a whole piece is looked up before any merging."""
    tokenizer = request.getfixturevalue(source)
    for id in range(N):
        text = tokenizer.decode([id])
        assert tokenizer.encode(text) == theirs.encode(text, bos=False, eos=False), text


@pytest.mark.parametrize("seed", range(8))
def test_long_runs_around_the_limits(ours: Tokenizer, theirs: Any, seed: int) -> None:
    rng = random.Random(seed)
    near = [limit + d for limit in (RUN_CHARS, SLICE_CHARS) for d in (-1, 0, 1, 2)]
    parts = [rng.choice(["a", " ", "\n", "日", "\x1c", "ab"]) * rng.choice(near) for _ in range(6)]
    check(ours, theirs, "x ".join(parts), str(seed))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    parts=st.lists(st.text() | st.sampled_from([*SPACES, "<|eot_id|>", "<|image|>", "<|", "'S"]))
)
def test_any_text(ours: Tokenizer, gguf: Tokenizer, theirs: Any, parts: list[str]) -> None:
    text = "".join(parts)
    check(ours, theirs, text, "meta")
    check(gguf, theirs, text, "gguf")
    special = theirs.encode(text, bos=True, eos=True, allowed_special="all")
    assert ours.encode(text, bos=True, eos=True, special=True) == special


def test_special_text_in_sliced_input(ours: Tokenizer, theirs: Any) -> None:
    """Meta cuts first and looks for special tokens then, so that a cut may tear one apart."""
    for text in LONG_RUNS:
        trial = text[:-5] + "<|eot_id|>" + text[:300] + "<|eot_id|>"
        assert ours.encode(trial, special=True) == theirs.encode(
            trial, bos=False, eos=False, allowed_special="all"
        )


@settings(deadline=None, derandomize=True, max_examples=300)
@given(ids=st.lists(st.integers(0, N + 255)))
def test_any_ids_decode_as_metas(
    ours: Tokenizer, hf: Tokenizer, theirs: Any, ids: list[int]
) -> None:
    assert ours.decode(ids) == hf.decode(ids) == theirs.decode(ids)


def test_roles(ours: Tokenizer, hf: Tokenizer, gguf: Tokenizer, theirs: Any) -> None:
    assert dict(ours.special_ids) == theirs.special_tokens
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_id, theirs.eos_id, 128_256)
    for tokenizer in (ours, hf, gguf):
        assert tokenizer.stop_ids == set(theirs.stop_tokens) == {128_001, 128_008, 128_009}
        assert (tokenizer.bos_id, tokenizer.add_bos) == (128_000, True)


def test_known_ids(ours: Tokenizer, hf: Tokenizer, gguf: Tokenizer) -> None:
    words = {"system": 9125, "user": 882, "assistant": 78191, "safe": 19193, "unsafe": 39257}
    signs = {"\n\n": 271, "\n": 198, "A": 32, "D": 35, " A": 362, " D": 423, '{"': 5018, "[": 58}
    known = words | signs
    for tokenizer in (ours, hf, gguf):
        assert {text: tokenizer.encode(text) for text in known} == {
            t: [n] for t, n in known.items()
        }
        assert len(tokenizer.encode("ipython")) > 1
        sentence = tokenizer.encode(SENTENCES["English"][0], bos=True)
        assert sentence[0] == 128_000
        assert 128_000 not in sentence[1:]


class Adapter:
    """Our tokenizer with the face of Meta's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner = tokenizer
        self.special_tokens = dict(tokenizer.special_ids)
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        self.eot_id = self.special_tokens["<|eot_id|>"]
        self.eom_id = self.special_tokens["<|eom_id|>"]

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Collection[str] = (),
        disallowed_special: Collection[str] = (),
    ) -> list[int]:
        assert not disallowed_special
        return self.inner.encode(s, bos=bos, eos=eos, special=allowed_special == "all")

    def decode(self, t: list[int]) -> str:
        return self.inner.decode(t)


def test_metas_own_tests_pass(ours: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = importlib.import_module("llama_models.llama3.tests.api.test_tokenizer")
    monkeypatch.setattr(suite.Tokenizer, "get_instance", lambda: Adapter(ours))
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(suite.TokenizerTests)
    result = tests.run(unittest.TestResult())
    assert result is not None
    assert result.testsRun == 5
    assert result.errors + result.failures == []
