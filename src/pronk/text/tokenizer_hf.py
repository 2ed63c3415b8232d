"""The vocabulary in a Hugging Face model folder: tokenizer.json and the files beside it.

Only byte-level BPE, as in Llama 3 and SmolLM; vocabularies of other kinds (SentencePiece in
tokenizer.json, WordPiece, Unigram) are refused. The post-processor, which would put a BOS before
every text, is only asked whether it does: chat formats bring their own. Of the steps before merging
only those are taken that vocabularies of the Llama architecture have: `tokenizers` knows others
that crash it or never end on a malicious file. The flags lstrip, rstrip
and single_word of special tokens, which no Llama vocabulary sets, are not looked at.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from pronk.core.errors import CheckpointError
from pronk.core.files import read_json, read_regular_file
from pronk.text.tokenizer_bpe import (
    BYTE_ALPHABET,
    GPT2_PATTERN,
    BpeTokenizer,
    Guarded,
    check_tokens,
    in_byte_alphabet,
    looks_special,
    make_core,
    marks_turns,
    pre_tokenizer_name,
    short,
)
from pronk.text.tokenizer_meta import LLAMA3_PATTERN
from pronk.text.vocabulary import Roles, Tokenizer

if TYPE_CHECKING:
    import tokenizers

Json: TypeAlias = dict[str, Any]

_MAX_IDS = 1 << 22
_MAX_TEMPLATE = 1 << 22
"""Bytes of chat_template.jinja; the longest known have some 20 thousand."""
_OFF = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
"""Settings of the BPE model that byte-level vocabularies leave off."""
_KINDS = {
    "normalizer": {"Sequence", "NFC", "NFD", "NFKC", "NFKD"},
    "pre_tokenizer": {"Sequence", "ByteLevel", "Digits", "Punctuation", "Split"},
    "decoder": {"Sequence", "ByteLevel", "Fuse"},
}
"""The steps that byte-level vocabularies of the Llama architecture have."""
_PATTERNS = frozenset(
    {
        LLAMA3_PATTERN,
        LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),  # Qwen's, in models remade as Llamas
        GPT2_PATTERN,
        r"\s+$",  # DeepSeek LLM
    }
)
_ONE_RUN = re.compile(
    r"(?:\\s\?)?(?:\[(?:\\.|[^\[\]\\&])+\]|\\[pP]\{\w+\}){1,3}(?:\+|\{1,3\})?", re.DOTALL
)
"""Expressions that need no search: up to three classes of characters, the last one repeated. Such
are Falcon 3's threes of digits, and DeepSeek's line ends, letters, punctuation and ideographs."""
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True)
class _Model:
    """The `model` of a tokenizer.json."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    ignore_merges: bool


@dataclass(frozen=True, slots=True)
class _Tokens:
    texts: dict[int, str]
    special: dict[str, int]
    literal: dict[str, Json]
    """Added tokens that are not special: found in the text before any merging."""


def tokenizer_from_hf(folder: Path) -> Tokenizer:
    """The vocabulary of a folder with a tokenizer.json; a `CheckpointError` where a file is
    inconsistent or of a kind that is not supported.

    BOS and EOS come from tokenizer_config.json or special_tokens_map.json; more stop ids from the
    `eos_token_id` of generation_config.json and config.json; the chat template from
    chat_template.jinja or tokenizer_config.json. Each of these files may be missing.
    """
    path = folder / "tokenizer.json"
    spec = _read_json(path)
    if not spec:
        raise CheckpointError(f"{path}: missing or empty; the folder has no tokenizer")
    config = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    model = _read_model(path, spec)
    bos, eos = (_named_token(folder, config, key) for key in ("bos_token", "eos_token"))
    template = _chat_template(folder, config)
    tokens = _all_tokens(path, spec, model.vocab, {bos, eos}, template)
    size = max(tokens.texts) + 1
    roles = Roles(
        special_ids=tokens.special,
        unused={id: "" for id in range(size) if id not in tokens.texts},
        bos_id=None if bos is None else tokens.special[bos],
        eos_id=None if eos is None else tokens.special[eos],
        stop_ids=set(_stop_ids(folder, size)),
        add_bos=_adds_bos(folder, config, spec, bos),
        chat_template=template,
    )
    return _make(path, spec, model, tokens, roles)


def _make(path: Path, spec: Json, model: _Model, tokens: _Tokens, roles: Roles) -> Tokenizer:
    from tokenizers import AddedToken

    vocab = {text: id for text, id in model.vocab.items() if text not in tokens.special}
    vocab |= {text: added["id"] for text, added in tokens.literal.items()}
    core = make_core(str(path), vocab, model.merges, ignore_merges=model.ignore_merges)
    steps = _steps(path, spec)
    if steps.normalizer is not None:
        core.normalizer = steps.normalizer
    core.pre_tokenizer = steps.pre_tokenizer
    for text, added in tokens.literal.items():
        flags = {flag: bool(added.get(flag, False)) for flag in _ADDED_FLAGS}
        with Guarded(CheckpointError, f"{path}: added_tokens"):
            core.add_tokens([AddedToken(text, **flags)])
    name = pre_tokenizer_name(core.pre_tokenizer)
    return BpeTokenizer(
        core,
        [_written(tokens, id) for id in range(max(tokens.texts) + 1)],
        roles,
        cut_at_spaces=name is not None and steps.normalizer is None and not tokens.literal,
        meta_slices=name == "llama-bpe",
    )


def _written(tokens: _Tokens, id: int) -> str:
    text = tokens.texts.get(id, "")
    return in_byte_alphabet(text.encode()) if text in tokens.literal else text


def _read_model(path: Path, spec: Json) -> _Model:
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(
            f"{path}: model is {short(str(kind))}; only byte-level BPE is supported"
        )
    for setting in _OFF:
        if model.get(setting):
            raise CheckpointError(
                f"{path}: model.{setting} is {short(str(model[setting]))};"
                " only byte-level BPE without it is supported"
            )
    for step, known in _KINDS.items():
        if wrong := _kinds(spec.get(step)) - known:
            raise CheckpointError(
                f"{path}: {step} {short(min(wrong))} is not supported;"
                f" {', '.join(sorted(known))} are"
            )
    for step in ("pre_tokenizer", "decoder"):
        if "ByteLevel" not in _kinds(spec.get(step)):
            raise CheckpointError(
                f"{path}: {step} is not ByteLevel; only byte-level BPE is supported"
            )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab or set(map(type, vocab.values())) != {int}:
        raise CheckpointError(f"{path}: model.vocab must map token texts to ids")
    if model.get("unk_token") is not None and not vocab.keys() >= BYTE_ALPHABET:
        raise CheckpointError(
            f"{path}: model.unk_token is set and model.vocab lacks single bytes; not supported"
        )
    return _Model(vocab, _merges(path, model), bool(model.get("ignore_merges", False)))


def _merges(path: Path, model: Json) -> list[tuple[str, str]]:
    """Pairs: older files write "a b", newer ones ["a", "b"]."""
    given = model.get("merges")
    merges: list[Any] = given if isinstance(given, list) else [None]
    kinds = set(map(type, merges))
    if kinds <= {str}:
        pairs = [tuple(merge.split(" ")) for merge in merges]
    elif kinds == {list} and set(map(type, chain.from_iterable(merges))) == {str}:
        pairs = list(map(tuple, merges))
    else:
        raise CheckpointError(f"{path}: model.merges must be a list of pairs of tokens")
    return cast("list[tuple[str, str]]", pairs)  # `make_core` finds those that are no pairs


def _kinds(step: Any) -> set[str]:
    """The types of a pre-tokenizer, decoder or post-processor and of all its parts."""
    return {part["type"] for part in _walk(step) if isinstance(part.get("type"), str)}


def _walk(step: Any) -> Iterator[Json]:
    """`step` and all objects in it."""
    todo = [step]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield part
            todo += part.values()
        elif isinstance(part, list):
            todo += part


def _steps(path: Path, spec: Json) -> "tokenizers.Tokenizer":
    """The normalizer and pre-tokenizer of the file, on an empty vocabulary."""
    from tokenizers import Tokenizer as Core

    _check_patterns(path, spec.get("pre_tokenizer"))
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    kept = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}
    with Guarded(CheckpointError, str(path)):
        return Core.from_str(json.dumps({"version": "1.0", "model": empty, **kept}))


def _check_patterns(path: Path, step: Any) -> None:
    """Expressions that text is split at: only known ones, and those that cannot run for long."""
    for part in _walk(step):
        if part.get("type") != "Split":
            continue
        match part.get("pattern"):
            case {"Regex": str(pattern)} if pattern in _PATTERNS or _ONE_RUN.fullmatch(pattern):
                pass
            case pattern:
                raise CheckpointError(
                    f"{path}: pre_tokenizer splits at {short(str(pattern))}, which no known"
                    " vocabulary of the Llama architecture does; such expressions are refused"
                )


def _all_tokens(
    path: Path,
    spec: Json,
    vocab: Mapping[str, int],
    named: Set[str | None],
    template: str | None,
) -> _Tokens:
    """`named` are the texts of BOS and EOS, which are special whatever the file says, as are those
    that look so or that the chat template writes."""
    added = _added_tokens(path, spec)
    ids = _ids(path, vocab, added)
    for text in sorted(filter(None, named)):
        if text not in ids:
            raise CheckpointError(f"{path}: {short(text)} is BOS or EOS, but no token")
    special = {
        text: ids[text]
        for text, token in added.items()
        if token.get("special") or looks_special(text) or marks_turns(text, template)
    }
    special |= {text: ids[text] for text in named if text is not None}
    literal = {text: token for text, token in added.items() if text not in special}
    check_tokens(str(path), vocab.keys() - added.keys() - special.keys())
    return _Tokens({id: text for text, id in ids.items()}, special, literal)


def _ids(path: Path, vocab: Mapping[str, int], added: Mapping[str, Json]) -> dict[str, int]:
    """The id of each token; no token may have two, and no id two tokens."""
    for text in added.keys() & vocab.keys():
        if added[text]["id"] != vocab[text]:
            raise CheckpointError(
                f"{path}: token {short(text)} has ids {vocab[text]} and {added[text]['id']}"
            )
    ids = {**vocab, **{text: token["id"] for text, token in added.items()}}
    texts = {id: text for text, id in ids.items()}
    if len(texts) != len(ids):
        wrong = next(text for text, id in ids.items() if texts[id] != text)
        raise CheckpointError(f"{path}: id {ids[wrong]} has two tokens, one is {short(wrong)}")
    if min(texts) < 0 or max(texts) >= _MAX_IDS:
        raise CheckpointError(f"{path}: token ids must be from 0 to {_MAX_IDS - 1}")
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: the text of a token has a lone surrogate") from None
    return ids


def _added_tokens(path: Path, spec: Json) -> dict[str, Json]:
    """The entries of `added_tokens` by their text."""
    added: dict[str, Json] = {}
    given = spec.get("added_tokens") or []
    for token in given if isinstance(given, list) else [given]:
        match token:
            case {"id": int(), "content": str(text)} if text and text not in added:
                added[text] = token
            case _:
                raise CheckpointError(
                    f"{path}: added_tokens: {short(str(token))} has no id or no text of its own"
                )
    return added


def _named_token(folder: Path, config: Json, key: str) -> str | None:
    """The text of BOS or EOS, which is written as a string or as an object."""
    token = config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise CheckpointError(f"{folder}: {key} must be text, got {short(str(text))}")
    return text or None


def _stop_ids(folder: Path, size: int) -> Iterator[int]:
    for name in ("generation_config.json", "config.json"):
        given = _read_json(folder / name).get("eos_token_id")
        for id in given if isinstance(given, list) else [] if given is None else [given]:
            if type(id) is not int or not 0 <= id < size:
                raise CheckpointError(
                    f"{folder / name}: eos_token_id {short(str(id))} is no id from 0 to {size - 1}"
                )
            yield id


def _adds_bos(folder: Path, config: Json, spec: Json, bos: str | None) -> bool:
    """What tokenizer_config.json says, else whether the post-processor begins with BOS."""
    said = config.get("add_bos_token")
    if said is not None:
        if not isinstance(said, bool):
            raise CheckpointError(
                f"{folder}: add_bos_token must be true or false, got {said!r:.40}"
            )
        return said
    steps = _walk(spec.get("post_processor"))
    return bos is not None and any(_first_special(step) == bos for step in steps)


def _first_special(template: Json) -> Any:
    """The name of the special token that a template for a single text begins with."""
    match template:
        case {"single": [{"SpecialToken": {"id": name}}, *_]}:
            return name
    return None


def _chat_template(folder: Path, config: Json) -> str | None:
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return _read_template(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder}: chat_template must be text, got {short(str(template))}")
    return template


def _read_template(path: Path) -> str:
    try:
        text = read_regular_file(path, _MAX_TEMPLATE).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: cannot be read: not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as text files are read everywhere


def _read_json(path: Path) -> Json:
    """The object in a file; empty where there is no file."""
    return read_json(path) if os.path.lexists(path) else {}
