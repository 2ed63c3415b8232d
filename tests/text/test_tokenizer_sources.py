"""What each source of a vocabulary may say, and what of it is refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pronk.core.errors import CheckpointError, UserError
from pronk.text.tokenizer import (
    Tokenizer,
    tokenizer_from_gguf,
    tokenizer_from_hf,
    tokenizer_from_meta,
)
from pronk.text.tokenizer_bpe import GPT2_PATTERN, Guarded, pre_tokenizer
from pronk.text.tokenizer_meta import LLAMA3_PATTERN
from vocabularies import ORDINARY, SPECIAL, N, hf_json, metadata_of, write_hf, write_meta

TOKENS = metadata_of()["tokenizer.ggml.tokens"]
TYPES = metadata_of()["tokenizer.ggml.token_type"]
MERGES = metadata_of()["tokenizer.ggml.merges"]


def one_line(error: pytest.ExceptionInfo[CheckpointError], expected: str) -> None:
    message = str(error.value)
    assert expected in message
    assert "\n" not in message


# Meta's tokenizer.model


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no token for the single byte 0x00"),
        (b"AA== 0\nAQ== 1\n", "no token for the single byte 0x02"),
        (b"AA== 0\n%%%% 1\n", "line 2 is not '<base64> <rank>'"),
        (b"AA== 0\nAQ==\n", "line 2 has rank b'', expected 1"),
        (b"AA== 0\nAQ== x\n", "line 2 has rank b'x', expected 1"),
        (b"AA== 0\nAQ== 2\n", "line 2 has rank b'2', expected 1"),
        (b"AA== 0\nAA== 1\n", "line 2 repeats the token b'\\x00'"),
        (b" 0\n", "line 1 is not '<base64> <rank>'"),
        (b"\n\x0e\n\x05<unk>\x15", "SentencePiece file is not supported"),
        (b"AA" * (9 << 20), "at most 16777216 are allowed"),
    ],
)
def test_malformed_tokenizer_model(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_meta(path)
    one_line(error, expected)


def test_missing_tokenizer_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_meta(tmp_path / "tokenizer.model")
    one_line(error, "cannot be read: No such file")


def test_the_vocabulary_of_llama_4_is_refused(tmp_path: Path) -> None:
    many = [*ORDINARY, *(n.to_bytes(3, "big") for n in range(1 << 17))]
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_meta(write_meta(tmp_path / "tokenizer.model", list(dict.fromkeys(many))))
    one_line(error, "Llama 3 has 128000")


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = write_meta(tmp_path / "tokenizer.model", ORDINARY)
    expected = tokenizer_from_meta(path).encode("hello world")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert tokenizer_from_meta(path).encode("hello world") == expected


def test_special_tokens_of_meta(tmp_path: Path) -> None:
    ids = tokenizer_from_meta(write_meta(tmp_path / "tokenizer.model", ORDINARY)).special_ids
    assert len(ids) == 256
    assert ids["<|eot_id|>"] == N + 9
    assert ids["<|image|>"] == N + 11
    assert ids["<|reserved_special_token_2|>"] == N + 12
    assert ids["<|reserved_special_token_245|>"] == N + 255


# GGUF


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": None}, "tokenizer.ggml.model is ''; only 'gpt2'"),
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama' (a SentencePiece vocabulary)"),
        ({"model": 7}, "tokenizer.ggml.model must be of type str, got '7'"),
        ({"pre": "qwen2"}, "'qwen2', a pre-tokenizer that is not supported; llama-bpe, smollm"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is a str"),
        ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens holds a int"),
        ({"tokens": ["", *TOKENS[1:]]}, "tokenizer.ggml.tokens has an empty token at 0"),
        ({"tokens": [TOKENS[1], *TOKENS[1:]]}, "tokenizer.ggml.tokens has 'ā' twice"),
        ({"tokens": ["▁x", *TOKENS[1:]]}, "token '▁x' is not written in GPT-2's byte alphabet"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries"),
        ({"token_type": [6, *TYPES[1:]]}, "tokenizer.ggml.token_type is 6 for token 0"),
        ({"token_type": ["1"] * len(TYPES)}, "tokenizer.ggml.token_type holds a str"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": [*MERGES, "h x y"]}, "must name two tokens, got 'h x y'"),
        ({"merges": [*MERGES, "hx"]}, "must name two tokens, got 'hx'"),
        ({"merges": [*MERGES, "h Ω"]}, "needs 'Ω', which is no ordinary token"),
        ({"merges": [*MERGES, "x x"]}, "needs 'xx', which is no ordinary token"),
        ({"eos_token_id": N + 5}, f"tokenizer.ggml.eos_token_id is {N + 5}, but the file has"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id is -1"),
        ({"bos_token_id": 1.0}, "tokenizer.ggml.bos_token_id must be of type int"),
        ({"eot_token_id": True}, "tokenizer.ggml.eot_token_id must be of type int"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be of type bool"),
    ],
)
def test_malformed_gguf_metadata(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_gguf(metadata_of(**{"pre": "llama-bpe", **changes}))
    one_line(error, expected)


def test_a_merge_may_not_make_a_special_token() -> None:
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_gguf(metadata_of(eos_token_id=TOKENS.index("<|")))
    one_line(error, "needs '<|', which is no ordinary token")


def test_chat_template_of_gguf() -> None:
    metadata = metadata_of() | {"tokenizer.chat_template": "{{ messages }}"}
    assert tokenizer_from_gguf(metadata).chat_template == "{{ messages }}"
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_gguf(metadata_of() | {"tokenizer.chat_template": ["a"]})
    one_line(error, "tokenizer.chat_template must be text, got list")


@pytest.mark.parametrize(
    ("pre", "said", "expected"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("smollm", None, False),
        ("smollm", False, False),
        ("smollm", True, True),
        (None, None, False),
    ],
)
def test_bos_before_a_raw_prompt(pre: str | None, said: bool | None, expected: bool) -> None:
    assert tokenizer_from_gguf(metadata_of(pre, add_bos_token=said)).add_bos is expected


def test_stop_ids_of_gguf() -> None:
    """The file's own eos, eot and eom, and the known names."""
    own = tokenizer_from_gguf(
        metadata_of(eos_token_id=N, eot_token_id=N + 1, eom_token_id=N + 2)
    ).stop_ids
    assert own == {N, N + 1, N + 2, N + 3, N + 4}


def test_special_tokens_where_types_are_missing_or_wrong() -> None:
    untyped = tokenizer_from_gguf(metadata_of(token_type=None))
    assert untyped.special_ids == {text: N + n for n, text in enumerate(SPECIAL)}
    mistyped = tokenizer_from_gguf(metadata_of(token_type=[1] * N + [4] * len(SPECIAL)))
    assert mistyped.special_ids == untyped.special_ids
    assert mistyped.encode("<|eot_id|>") == untyped.encode("<|eot_id|>") != [N + 3]


def test_a_special_token_that_is_one_word_stays_out_of_text(tmp_path: Path) -> None:
    """The pre-tokenizer gives the word as one piece, and Llama 3 looks whole pieces up."""
    spec = hf_json()
    spec["added_tokens"].append({"id": N + 5, "content": "STOP", "special": True})
    spec["model"]["vocab"]["STOP"] = N + 5
    sources = [
        tokenizer_from_gguf(metadata_of(tokens=[*TOKENS, "STOP"], token_type=[*TYPES, 3])),
        tokenizer_from_hf(write_hf(tmp_path, spec)),
    ]
    for tokenizer in sources:
        assert tokenizer.encode("STOP") == [ORDINARY.index(bytes([byte])) for byte in b"STOP"]
        assert tokenizer.encode("STOP", special=True) == [N + 5]


def test_the_longest_special_token_wins() -> None:
    tokens = [*TOKENS, "<|a", "<|a|>", "<|a|>b"]
    tokenizer = tokenizer_from_gguf(metadata_of(tokens=tokens, token_type=[*TYPES, 3, 3, 3]))
    x = tokenizer.encode("x")
    ids = tokenizer.encode("<|a|>b<|a|>x<|ax", special=True)
    assert ids == [N + 7, N + 6, *x, N + 5, *x]


def test_literal_and_unused_tokens_of_gguf() -> None:
    tokenizer = tokenizer_from_gguf(
        metadata_of(tokens=[*TOKENS, "<br> é", "[PAD]"], token_type=[*TYPES, 4, 5])
    )
    literal = N + len(SPECIAL)
    assert tokenizer.encode("hello<br> é") == [*tokenizer.encode("hello"), literal]
    assert not tokenizer.is_special(literal)
    assert tokenizer.token_bytes(literal) == "<br> é".encode()
    assert tokenizer.decode([literal, literal + 1]) == "<br> é[PAD]"
    assert tokenizer.decode([literal, literal + 1], skip_special=True) == "<br> é"
    for special in (False, True):
        assert literal + 1 not in tokenizer.encode("[PAD]", special=special)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", "a|  | |123|45|+=|x|'S| I|'m|!!\n\n| |2²"),
        ("smollm", "a|   |1|2|3|4|5|+=|x|'|S| I|'m|!!|\n\n |2|²"),
        ("gpt-2", "a|  | 12345|+=|x|'|S| I|'m|!!|\n\n| 2²"),
        ("default", "a|  | |123|45|+=|x|'|S| I|'|m|!!|\n\n| |2²"),
    ],
)
def test_pre_tokenizers(pre: str, expected: str) -> None:
    text = "a   12345+=x'S I'm!!\n\n 2²"
    pieces = [text[start:end] for _, (start, end) in pre_tokenizer(pre).pre_tokenize_str(text)]
    assert pieces == expected.split("|")


# Hugging Face folders


def changed(path: str, value: Any) -> dict[str, Any]:
    """tokenizer.json with one entry changed."""
    spec = hf_json()
    *parents, last = path.split(".")
    part = spec
    for parent in parents:
        part = part[parent]
    part[last] = value
    return spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ([], "tokenizer.json: must be a JSON object, is a list"),
        ({}, "tokenizer.json: missing or empty"),
        (changed("model", None), "model is 'None'; only byte-level BPE is supported"),
        (changed("model.type", "Unigram"), "model is 'Unigram'; only byte-level BPE"),
        (changed("model.byte_fallback", True), "model.byte_fallback is 'True'"),
        (changed("model.dropout", 0.1), "model.dropout is '0.1'"),
        (changed("decoder", {"type": "Metaspace"}), "decoder 'Metaspace' is not supported"),
        (changed("pre_tokenizer", None), "pre_tokenizer is not ByteLevel"),
        (
            changed("pre_tokenizer.pretokenizers", [{"type": "ByteLevel"}]),
            "tokenizer.json: 'missing",
        ),
        (changed("model.vocab", {}), "model.vocab must map token texts to ids"),
        (changed("model.vocab", {"a": "0"}), "model.vocab must map token texts to ids"),
        (changed("model.vocab.▁a", 9999), "token '▁a' is not written in GPT-2's byte alphabet"),
        (changed("model.vocab.a", 0), "id 0 has two tokens"),
        (changed("model.vocab.a", 1 << 30), "token ids must be from 0 to 4194303"),
        (changed("model.vocab.a", -1), "token ids must be from 0 to 4194303"),
        (changed("model.merges", "a b"), "model.merges must be a list of pairs"),
        (changed("model.merges", [1, 2]), "model.merges must be a list of pairs"),
        (changed("model.merges", [["a", 1]]), "model.merges must be a list of pairs"),
        (changed("model.merges", [["a"]]), "merge 0 must name two tokens, got 'a'"),
        (changed("model.merges", ["a b"]), "merge 0 needs 'ab', which is no ordinary token"),
        (changed("added_tokens", [{"id": N}]), "has no id or no text of its own"),
        (changed("added_tokens", {"id": N}), "has no id or no text of its own"),
        (changed("added_tokens", [{"id": 5, "content": "q"}]), "token 'q' has ids"),
        (changed("added_tokens", []), "'<|begin_of_text|>' is BOS or EOS, but no token"),
        (changed("added_tokens", [{"id": N, "content": "\ud800"}]), "lone surrogate"),
    ],
)
def test_malformed_tokenizer_json(tmp_path: Path, spec: Any, expected: str) -> None:
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_hf(write_hf(tmp_path, spec))
    one_line(error, expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"{", "not JSON"), (b"[" * 100_000, "not JSON"), (b"\xff", "cannot be read: not UTF-8")],
)
def test_unreadable_tokenizer_json(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_hf(tmp_path)
    one_line(error, expected)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_hf(tmp_path)
    one_line(error, "the folder has no tokenizer")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [N, "x"]}}, "eos_token_id 'x' is no id from 0 to"),
        ({"config": {"eos_token_id": 10**9}}, "eos_token_id '1000000000' is no id"),
        ({"tokenizer_config": {"bos_token": 5}}, "bos_token must be text, got '5'"),
        ({"tokenizer_config": {"eos_token": "<eos>"}}, "'<eos>' is BOS or EOS, but no token"),
        ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token must be true or false"),
        ({"tokenizer_config": {"chat_template": {}}}, "chat_template must be text, got '{}'"),
        ({"special_tokens_map": [1]}, "special_tokens_map.json: must be a JSON object"),
    ],
)
def test_malformed_files_beside_it(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_hf(write_hf(tmp_path, hf_json(), **files))
    one_line(error, expected)


def test_roles_from_the_files_beside_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_hf(
        write_hf(
            tmp_path,
            hf_json(),
            tokenizer_config={"add_bos_token": False},
            special_tokens_map={"bos_token": "<|im_end|>", "eos_token": {"content": SPECIAL[0]}},
            generation_config={"eos_token_id": [7, N]},
            config={"eos_token_id": 8},
        )
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (N + 4, N, False)
    assert tokenizer.stop_ids == {7, 8, N, N + 1, N + 2, N + 3, N + 4}


def test_chat_templates_of_hf(tmp_path: Path) -> None:
    def template(**files: Any) -> str | None:
        return tokenizer_from_hf(write_hf(tmp_path, hf_json(), **files)).chat_template

    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert template() is None
    assert template(tokenizer_config={"chat_template": "S"}) == "S"
    assert template(tokenizer_config={"chat_template": named}) == "D"
    assert template(tokenizer_config={"chat_template": named[:1]}) is None
    (tmp_path / "chat_template.jinja").write_text("J")
    assert template(tokenizer_config={"chat_template": "S"}) == "J"


def test_added_tokens_and_gaps_of_hf(tmp_path: Path) -> None:
    spec = hf_json()
    literal = {"id": N + 9, "content": "<br>", "special": False, "rstrip": True}
    hidden = {"id": N + 10, "content": "<|tool|>", "special": False}
    spec["added_tokens"] += [literal, hidden]
    tokenizer = tokenizer_from_hf(write_hf(tmp_path, spec))
    assert tokenizer.vocab_size == N + 11
    assert tokenizer.encode("x<br>  x") == [*tokenizer.encode("x"), N + 9, *tokenizer.encode("x")]
    assert tokenizer.decode([N + 8, N + 9]) == "<br>"
    assert tokenizer.is_special(N + 8)
    assert N + 10 not in tokenizer.encode("<|tool|>")
    assert tokenizer.encode("<|tool|>", special=True) == [N + 10]


def test_merges_as_text_and_a_normalizer(tmp_path: Path) -> None:
    spec = hf_json()
    expected = tokenizer_from_hf(write_hf(tmp_path, spec)).encode("hello naïve 日本")
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    spec["normalizer"] = {"type": "NFC"}
    tokenizer = tokenizer_from_hf(write_hf(tmp_path, json.loads(json.dumps(spec))))
    assert tokenizer.encode("hello nai\u0308ve 日本") == expected


# Tokens that are not marked as special, but are

MARKS = ("[INST]", "</s>", "<user>", "<\uff5cUser\uff5c>")
PLAIN = ("   \n", "user", "<br>", "--")
TEMPLATE = "{{ '" + "".join(MARKS) + "' }}   \n{# user -- #}"


def test_tokens_of_the_template_never_come_from_text(tmp_path: Path) -> None:
    added = (*MARKS, *PLAIN)
    spec = hf_json()
    spec["added_tokens"] += [
        {"id": N + 5 + n, "content": text, "special": False} for n, text in enumerate(added)
    ]
    config = {"chat_template": TEMPLATE}
    metadata = metadata_of(tokens=[*TOKENS, *added], token_type=[*TYPES, *[4] * len(added)])
    for tokenizer in (
        tokenizer_from_hf(write_hf(tmp_path, spec, tokenizer_config=config)),
        tokenizer_from_gguf(metadata | {"tokenizer.chat_template": TEMPLATE}),
    ):
        for n, text in enumerate(added):
            id, ids = N + 5 + n, tokenizer.encode(f"x{text}x")
            assert tokenizer.is_special(id) == (text in MARKS)
            assert (id in ids) == (text in PLAIN)
            assert id in tokenizer.encode(f"x{text}x", special=True)
    alone = tokenizer_from_gguf(metadata)
    assert alone.is_special(N + 8)  # full-width bars say so themselves
    assert not alone.is_special(N + 5)


# Hostile files


@pytest.mark.parametrize(
    ("key", "step", "expected"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "'Precompiled' is"),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
            "normalizer 'Replace' is not supported; NFC",
        ),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "'FixedLength' is not supported"),
        ("decoder", {"type": "Strip", "content": "x", "start": 0, "stop": 0}, "decoder 'Strip' is"),
        *(
            ("pre_tokenizer", split, "which no known vocabulary")
            for split in (
                {"type": "Split", "pattern": {"Regex": "(a|a)*$b|(a+)+$"}},
                {"type": "Split", "pattern": {"Regex": r"\\s?(\\s+)+x"}},
                {"type": "Split", "pattern": {"Regex": "("}},
                {"type": "Split", "pattern": {"String": ""}},
                {"type": "Split"},
            )
        ),
    ],
)
def test_steps_that_crash_or_never_end(
    tmp_path: Path, key: str, step: dict[str, Any], expected: str
) -> None:
    spec = hf_json()
    if key == "normalizer":
        spec[key] = step
    else:
        parts = "pretokenizers" if key == "pre_tokenizer" else "decoders"
        spec[key] = {"type": "Sequence", parts: [step, spec[key]]}
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_hf(write_hf(tmp_path, spec))
    one_line(error, expected)


@pytest.mark.parametrize(
    "pattern",
    [
        LLAMA3_PATTERN,
        LLAMA3_PATTERN.replace("{1,3}", ""),
        GPT2_PATTERN,
        "[0-9][0-9][0-9]",
        r"\p{N}{1,3}",
        "[\r\n]",
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?[!-/:-~]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00]+",
    ],
)
def test_patterns_of_published_models(tmp_path: Path, pattern: str) -> None:
    spec = changed("pre_tokenizer.pretokenizers", hf_json()["pre_tokenizer"]["pretokenizers"])
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    tokenizer = tokenizer_from_hf(write_hf(tmp_path, spec))
    text = "hello 2024\r\n\u4e00!"
    assert tokenizer.decode(tokenizer.encode(text)) == text


class Panic(BaseException):
    """As a panic of Rust arrives."""


class Panicking:
    def encode(self, *_: object, **__: object) -> None:
        raise Panic("index out of bounds:\n the len is 53")


def test_a_panic_is_an_error_of_one_line() -> None:
    tokenizer = tokenizer_from_gguf(metadata_of())
    tokenizer._core = Panicking()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="text: this vocabulary cannot encode it: 'index out of"):
        tokenizer.encode("x")
    with pytest.raises(KeyboardInterrupt), Guarded(CheckpointError, "file"):
        raise KeyboardInterrupt


def damaged(content: bytes, rng: random.Random) -> bytes:
    """With some bytes changed, cut out, repeated, or another place's put there."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(out) + 1), rng.randint(0, 40)
        other = rng.randrange(len(content))
        out[at : at + rng.choice([0, 1, n])] = rng.choice(
            [b"", rng.randbytes(1), b"null", b"-1", b"{}", b'""', content[other : other + n]]
        )
    return bytes(out)


def changed_somewhere(spec: Any, rng: random.Random) -> None:
    """One value of a JSON object replaced by another kind of value."""
    part = spec
    while isinstance(part, dict | list) and part:
        key = rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))
        if not isinstance(part[key], dict | list) or not part[key] or rng.random() < 0.2:
            values = [None, -1, 0, 5000, 1 << 40, 0.5, "", "x", "\ud800", [], {}, [[]], True]
            part[key] = rng.choice(values)
            return
        part = part[key]


def complaint(read: Callable[[], Tokenizer]) -> str | None:
    """What is said of a file that cannot be read or used; anything but a UserError is a failure."""
    try:
        tokenizer = read()
        tokenizer.decode(tokenizer.encode("hello  world 123 \u65e5\n", special=True))
    except UserError as error:
        return str(error)
    return None


def check_complaints(complaints: list[str | None]) -> None:
    """Some files are as good as before, most are refused in one line."""
    said = [text for text in complaints if text is not None]
    assert 20 < len(said) < len(complaints)
    assert not [text for text in said if "\n" in text]


def test_damaged_tokenizer_json(tmp_path: Path) -> None:
    rng = random.Random(41)
    folder = write_hf(tmp_path, hf_json())
    content = (folder / "tokenizer.json").read_bytes()
    complaints = []
    for case in range(600):
        if case % 2:
            spec = hf_json()
            changed_somewhere(spec, rng)
            (folder / "tokenizer.json").write_text(json.dumps(spec))
        else:
            (folder / "tokenizer.json").write_bytes(damaged(content, rng))
        complaints.append(complaint(lambda: tokenizer_from_hf(folder)))
    check_complaints(complaints)


def test_damaged_tokenizer_model(tmp_path: Path) -> None:
    rng = random.Random(42)
    path = write_meta(tmp_path / "tokenizer.model", ORDINARY)
    content = path.read_bytes()
    complaints = []
    for _ in range(400):
        path.write_bytes(damaged(content, rng))
        complaints.append(complaint(lambda: tokenizer_from_meta(path)))
    check_complaints(complaints)
