"""SmolLM2's vocabulary, as its GGUF carries it, against `tokenizers` and `transformers`."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.text.tokenizer import Tokenizer, tokenizer_from_gguf
from varied_text import SENTENCES, SPACES, documents

tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def metadata(smollm2_path: Path) -> dict[str, Any]:
    """The tokenizer's keys, read by the `gguf` package."""
    fields = gguf.GGUFReader(smollm2_path).fields
    return {key: f.contents() for key, f in fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def ours(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(metadata)


@pytest.fixture(scope="module")
def theirs(metadata: dict[str, Any]) -> Any:
    """What SmolLM2's own tokenizer.json makes of the same vocabulary: digits one by one, then
    GPT-2's expression; special tokens are left out, so that text is only text."""
    pre = tokenizers.pre_tokenizers
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    return core


@pytest.mark.parametrize("kind", documents())
def test_ids_equal_tokenizers(ours: Tokenizer, theirs: Any, kind: str) -> None:
    for n, text in enumerate(documents()[kind]):
        assert ours.encode(text) == theirs.encode(text).ids, f"{kind} {n}"


def test_ids_equal_tokenizers_on_one_long_text(ours: Tokenizer, theirs: Any) -> None:
    """Ours is encoded in parts."""
    text = "".join(text for kind in ("whitespace", *SENTENCES) for text in documents()[kind])
    assert ours.encode(text) == theirs.encode(text).ids


@settings(deadline=None, derandomize=True, max_examples=300)
@given(parts=st.lists(st.text() | st.sampled_from([*SPACES, "<|im_end|>", "1 2", "'s"])))
def test_any_text(ours: Tokenizer, theirs: Any, parts: list[str]) -> None:
    text = "".join(parts)
    assert ours.encode(text) == theirs.encode(text).ids


@settings(deadline=None, derandomize=True, max_examples=300)
@given(ids=st.lists(st.integers(17, 49_151)))
def test_any_ordinary_ids_decode_as_theirs(ours: Tokenizer, theirs: Any, ids: list[int]) -> None:
    assert ours.decode(ids) == theirs.decode(ids)


def test_ids_equal_transformers(ours: Tokenizer, smollm2_path: Path) -> None:
    """`transformers` builds GPT-2's pre-tokenizer for this file and so joins a space and a digit;
    texts are compared without digits behind whitespace, and special tokens are parsed."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name
    )
    behind_space = re.compile(r"(?<=\s)[0-9]")
    for language in SENTENCES:
        for text in documents()[language][:20]:
            chat = f"<|im_start|>user\n{behind_space.sub('x', text)}<|im_end|>\n"
            ids = peer(chat, add_special_tokens=False)["input_ids"]
            assert ours.encode(chat, special=True) == ids
            assert ours.decode(ids) == peer.decode(ids)


def test_roles(ours: Tokenizer) -> None:
    ids = ours.special_ids
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (49_152, 1, 2)
    assert ours.stop_ids == {ids["<|im_end|>"], ids["<|endoftext|>"]} == {0, 2}
    assert not ours.add_bos
    assert len(ids) == 17
    assert ours.chat_template is not None
    assert "<|im_start|>assistant" in ours.chat_template


def test_characters_without_tokens_are_dropped(ours: Tokenizer, theirs: Any) -> None:
    """Six control characters, and planes of Unicode that are not in use, have no tokens."""
    text = "a\x04\x06\x13\x14\x16\x1db"
    assert ours.encode(text) == theirs.encode(text).ids == ours.encode("a") + ours.encode("b")


def test_five_megabytes_without_a_space(ours: Tokenizer) -> None:
    """One word to the pre-tokenizer, merged as a whole."""
    text = "a" * 5_000_000
    ids = ours.encode(text)
    assert len(set(ids)) < 10
    assert ours.decode(ids) == text
