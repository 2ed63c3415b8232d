"""The tokenizers on a tiny vocabulary that comes from each kind of source in turn."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.core.errors import UserError
from pronk.text.tokenizer import (
    Tokenizer,
    tokenizer_from_gguf,
    tokenizer_from_hf,
    tokenizer_from_meta,
)
from pronk.text.vocabulary import RUN_CHARS, SLICE_CHARS, meta_slices
from vocabularies import (
    ORDINARY,
    SPECIAL,
    N,
    hf_json,
    metadata_of,
    write_hf,
    write_meta,
)

PARTS = [" the", "hello", " world", "1234", "\n\n", "  ", "é", "日本", "🙂", "🙂🙂", "'S", "\u0301"]
texts = st.text() | st.lists(st.sampled_from([*PARTS, *SPECIAL, "<|", "|>"])).map("".join)
ordinary_ids = st.integers(0, N - 1)


@pytest.fixture(scope="session", params=["meta", "hf", "gguf"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    make: dict[str, Callable[[], Tokenizer]] = {
        "meta": lambda: tokenizer_from_meta(write_meta(folder / "tokenizer.model", ORDINARY)),
        "hf": lambda: tokenizer_from_hf(write_hf(folder, hf_json())),
        "gguf": lambda: tokenizer_from_gguf(metadata_of()),
    }
    return make[request.param]()


@pytest.fixture(scope="session")
def plain() -> Tokenizer:
    return tokenizer_from_gguf(metadata_of())


@settings(deadline=None, derandomize=True)
@given(text=texts)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@settings(deadline=None, derandomize=True)
@given(text=texts)
def test_all_sources_give_the_same_ids(tokenizer: Tokenizer, plain: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == plain.encode(text)


@settings(deadline=None, derandomize=True)
@given(text=texts)
def test_text_of_a_user_never_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    for tried in (text, SPECIAL[3] + text, text + SPECIAL[0]):
        assert not any(map(tokenizer.is_special, tokenizer.encode(tried)))


@settings(deadline=None, derandomize=True)
@given(parts=st.lists(st.sampled_from([*PARTS, *SPECIAL])))
def test_special_text_becomes_the_token_on_request(tokenizer: Tokenizer, parts: list[str]) -> None:
    expected: list[int] = []
    for is_special, group in itertools.groupby(parts, tokenizer.special_ids.__contains__):
        if is_special:
            expected += [tokenizer.special_ids[text] for text in group]
        else:
            expected += tokenizer.encode("".join(group))
    assert tokenizer.encode("".join(parts), special=True) == expected


@settings(deadline=None, derandomize=True, max_examples=300)
@given(ids=st.lists(st.integers(0, N + len(SPECIAL) - 1)), skip=st.booleans())
def test_streamed_text_joined_is_the_whole(
    tokenizer: Tokenizer, ids: list[int], skip: bool
) -> None:
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.push(id) for id in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@settings(deadline=None, derandomize=True)
@given(text=st.text())
def test_stream_never_emits_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    so_far = ""
    for byte in text.encode():
        so_far += stream.push(ORDINARY.index(bytes([byte])))
        assert text.startswith(so_far)
    assert so_far == text
    assert stream.flush() == ""


def test_a_special_token_ends_an_unfinished_character(tokenizer: Tokenizer) -> None:
    half, stop = ORDINARY.index(b"\xf0"), tokenizer.special_ids["<|eot_id|>"]
    assert tokenizer.decode([half, stop, half]) == "\ufffd<|eot_id|>\ufffd"
    assert tokenizer.decode([half, stop, half], skip_special=True) == "\ufffd\ufffd"
    stream = tokenizer.stream(skip_special=False)
    assert [stream.push(half), stream.push(stop), stream.flush()] == ["", "\ufffd<|eot_id|>", ""]


def test_roles(tokenizer: Tokenizer) -> None:
    ids = tokenizer.special_ids
    assert tokenizer.bos_id == ids["<|begin_of_text|>"] == N
    assert tokenizer.add_bos
    assert tokenizer.stop_ids >= {
        ids[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id")
    }
    assert tokenizer.bos_id not in tokenizer.stop_ids
    assert tokenizer.token_bytes(N) == b"<|begin_of_text|>"
    assert [tokenizer.is_special(id) for id in (0, N - 1, N, N + 1)] == [False, False, True, True]
    assert tokenizer.chat_template is None
    with pytest.raises(TypeError):
        tokenizer.special_ids["x"] = 1  # type: ignore[index]


def test_bos_and_eos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello", bos=True, eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]
    assert tokenizer.encode("", bos=True) == [N]
    assert tokenizer.encode("") == []


def test_missing_bos_and_eos_are_said() -> None:
    bare = tokenizer_from_gguf(metadata_of(bos_token_id=None, eos_token_id=None))
    assert (bare.bos_id, bare.eos_id, bare.add_bos) == (None, None, False)
    with pytest.raises(UserError, match="no beginning-of-text token"):
        bare.encode("x", bos=True)
    with pytest.raises(UserError, match="no end-of-text token"):
        bare.encode("x", eos=True)


@pytest.mark.parametrize("id", [-1, 10**6])
def test_ids_out_of_range(tokenizer: Tokenizer, id: int) -> None:
    message = f"token id {id}: the vocabulary has ids 0 to {tokenizer.vocab_size - 1}"
    with pytest.raises(UserError, match=message):
        tokenizer.decode([0, id])
    with pytest.raises(UserError, match=message):
        tokenizer.token_bytes(id)
    with pytest.raises(UserError, match=message):
        tokenizer.stream().push(id)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    invalid = b"ok\xff".decode("utf-8", "surrogateescape")
    with pytest.raises(UserError, match=r"^text: character 2 .* U\+DCFF; [^\n]+$"):
        tokenizer.encode(invalid)
    with pytest.raises(UserError, match=r"U\+D83D"):
        tokenizer.encode("\ud83d\ude42", special=True)


def naive_slices(text: str) -> list[str]:
    """Character by character, as Meta's code counts."""
    slices = []
    for at in range(0, len(text), SLICE_CHARS):
        piece, length, begin = text[at : at + SLICE_CHARS], 0, 0
        for i, char in enumerate(piece):
            same = i > 0 and char.isspace() == piece[i - 1].isspace()
            length = length + 1 if same else 1
            if length > RUN_CHARS:
                slices.append(piece[begin:i])
                begin, length = i, 1
        slices.append(piece[begin:])
    return slices


@pytest.mark.parametrize("seed", range(30))
def test_slices_of_long_text(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [1, 2, RUN_CHARS - 1, RUN_CHARS, RUN_CHARS + 1, 2 * RUN_CHARS, 60_000, 130_000]
    runs = [rng.choice("a é\n\x1c\u3000") * rng.choice(lengths) for _ in range(rng.randint(0, 12))]
    text = "".join(runs)
    assert list(meta_slices(text)) == naive_slices(text)


def test_long_text_in_parts_is_the_same(plain: Tokenizer) -> None:
    """Encoded at once by a vocabulary that a literal token keeps from cutting."""
    whole = tokenizer_from_gguf(
        metadata_of(
            "gpt-2",
            tokens=[*metadata_of()["tokenizer.ggml.tokens"], "<never seen>"],
            token_type=[*metadata_of()["tokenizer.ggml.token_type"], 4],
        )
    )
    cut = tokenizer_from_gguf(metadata_of("gpt-2"))
    rng = random.Random(0)
    text = "".join(rng.choices([*PARTS, " ", "\n", "\t ", " x", "! "], k=60_000))
    assert cut.encode(text) == whole.encode(text)


def test_a_long_word_is_encoded_without_the_gil() -> None:
    """`encode` keeps it, and every other thread would wait; for a batch it is given back."""
    tokenizer = tokenizer_from_gguf(metadata_of("gpt-2"))
    expected = tokenizer.encode("x" * 1000)
    core = tokenizer._core  # type: ignore[attr-defined]

    class Core:
        def encode(self, text: str, **options: bool) -> Any:
            assert len(text) <= 50_000
            return core.encode(text, **options)

        def encode_batch_fast(self, texts: list[str], **options: bool) -> Any:
            return core.encode_batch_fast(texts, **options)

    tokenizer._core = Core()  # type: ignore[attr-defined]
    assert tokenizer.encode("x" * 1000) == expected
    assert tokenizer.decode(tokenizer.encode("x" * 200_000)) == "x" * 200_000
