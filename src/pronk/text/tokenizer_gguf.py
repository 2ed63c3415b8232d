"""The vocabulary inside a GGUF file: its `tokenizer.*` metadata.

Only `tokenizer.ggml.model` "gpt2", which is byte-level BPE; SentencePiece ("llama") and the rest
are refused by name.
Source: gguf's constants.py for the keys; llama.cpp's src/llama-vocab.cpp for what they mean and
for what holds where one is missing.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pronk.core.errors import CheckpointError
from pronk.text.tokenizer_bpe import (
    PRE_TOKENIZERS,
    BpeTokenizer,
    Guarded,
    check_tokens,
    in_byte_alphabet,
    looks_special,
    make_core,
    marks_turns,
    pre_tokenizer,
    short,
)
from pronk.text.vocabulary import Roles, Tokenizer

_KEYS = "tokenizer.ggml"
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
T = TypeVar("T")


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)
"""Values of tokenizer.ggml.token_type that a byte-level vocabulary may have."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """All tokens by id, and those that are not ordinary."""

    texts: list[str]
    special: dict[int, str]
    unused: dict[int, str]
    literal: dict[int, str]
    """Plain text that is found before any merging (HTML tags, runs of spaces)."""


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The vocabulary of a GGUF's metadata; a `CheckpointError` where it is inconsistent or of a
    kind that is not supported.

    Without `tokenizer.ggml.add_bos_token` a raw prompt gets a BOS only with the pre-tokenizer
    'llama-bpe'; without `tokenizer.ggml.pre` the pre-tokenizer is 'default'. Both as in llama.cpp.
    """
    model = _get(metadata, "model", str, "")
    if model != "gpt2":
        kind = " (a SentencePiece vocabulary)" if model == "llama" else ""
        raise CheckpointError(
            f"{_KEYS}.model is {short(model)}{kind}; only 'gpt2' (byte-level BPE) is supported"
        )
    pre = _get(metadata, "pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{_KEYS}.pre is {short(pre)}, a pre-tokenizer that is not supported;"
            f" {', '.join(PRE_TOKENIZERS)} are"
        )
    texts = list(_array(metadata, "tokens", str))
    if not texts or not all(texts):
        what = f"has an empty token at {texts.index('')}" if texts else "is empty"
        raise CheckpointError(f"{_KEYS}.tokens {what}")
    ids = {key: _id(metadata, key, len(texts)) for key in ("bos_token_id", *_STOP_KEYS)}
    template = _chat_template(metadata)
    tokens = _sorted_tokens(texts, _types(metadata, texts), set(ids.values()), template)
    roles = Roles(
        special_ids={text: id for id, text in tokens.special.items()},
        unused=tokens.unused,
        bos_id=ids["bos_token_id"],
        eos_id=ids["eos_token_id"],
        stop_ids={id for key in _STOP_KEYS if (id := ids[key]) is not None},
        add_bos=_get(metadata, "add_bos_token", bool, pre == "llama-bpe"),
        chat_template=template,
    )
    return _make(tokens, _merges(metadata), pre, roles)


def _make(tokens: _Tokens, merges: list[tuple[str, str]], pre: str, roles: Roles) -> Tokenizer:
    from tokenizers import AddedToken

    is_llama3 = pre == "llama-bpe"
    vocab = _vocab(tokens)
    core = make_core(f"{_KEYS}.merges", vocab, merges, ignore_merges=is_llama3)
    core.pre_tokenizer = pre_tokenizer(pre)
    with Guarded(CheckpointError, f"{_KEYS}.tokens"):
        core.add_tokens([AddedToken(text, normalized=False) for text in tokens.literal.values()])
    texts = list(tokens.texts)
    for id, text in tokens.literal.items():
        texts[id] = in_byte_alphabet(text.encode())
    return BpeTokenizer(core, texts, roles, cut_at_spaces=not tokens.literal, meta_slices=is_llama3)


def _vocab(tokens: _Tokens) -> dict[str, int]:
    """What merging may make: every token but the special and the unused ones."""
    vocab = {text: id for id, text in enumerate(tokens.texts)}
    if len(vocab) != len(tokens.texts):
        repeated = next(text for id, text in enumerate(tokens.texts) if vocab[text] != id)
        raise CheckpointError(f"{_KEYS}.tokens has {short(repeated)} twice")
    for text in (*tokens.special.values(), *tokens.unused.values()):
        del vocab[text]
    check_tokens(f"{_KEYS}.tokens", vocab.keys() - set(tokens.literal.values()))
    return vocab


def _sorted_tokens(
    texts: list[str], types: Sequence[int], named: Set[int | None], template: str | None
) -> _Tokens:
    """`named` are the ids with a role of their own (BOS, EOS, ...): special whatever their type,
    as is a user-defined token that looks special or that the chat template writes."""
    tokens = _Tokens(texts, {}, {}, {})
    for id, kind in enumerate(types):
        if kind == _NORMAL and id not in named:
            continue
        text = texts[id]
        if kind == _UNUSED:
            tokens.unused[id] = text
        elif kind == _USER_DEFINED and id not in named and not _is_control(text, template):
            tokens.literal[id] = text
        else:
            tokens.special[id] = text
    return tokens


def _is_control(text: str, template: str | None) -> bool:
    return looks_special(text) or marks_turns(text, template)


def _types(metadata: Mapping[str, Any], texts: list[str]) -> list[int]:
    """The type of each token, guessed from its text where the file gives none."""
    if f"{_KEYS}.token_type" not in metadata:
        return [_CONTROL if looks_special(text) else _NORMAL for text in texts]
    types = list(_array(metadata, "token_type", int))
    if len(types) != len(texts):
        raise CheckpointError(f"{_KEYS}.token_type has {len(types)} entries, tokens {len(texts)}")
    if wrong := set(types) - set(range(_NORMAL, _UNUSED + 1)):
        raise CheckpointError(
            f"{_KEYS}.token_type is {min(wrong)} for token {types.index(min(wrong))}; a byte-level"
            f" vocabulary has {_NORMAL} to {_UNUSED}"
        )
    return types


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in _array(metadata, "merges", str)]
    return cast("list[tuple[str, str]]", pairs)  # `make_core` finds those that are no pairs


def _chat_template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"tokenizer.chat_template must be text, got {type(template).__name__}"
        )
    return template


def _get(metadata: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    value = metadata.get(f"{_KEYS}.{key}", default)
    if type(value) is not kind:
        raise CheckpointError(
            f"{_KEYS}.{key} must be of type {kind.__name__}, got {short(str(value))}"
        )
    return value


def _id(metadata: Mapping[str, Any], key: str, n_tokens: int) -> int | None:
    if f"{_KEYS}.{key}" not in metadata:
        return None
    id = _get(metadata, key, int, -1)
    if not 0 <= id < n_tokens:
        raise CheckpointError(f"{_KEYS}.{key} is {id}, but the file has {n_tokens} tokens")
    return id


def _array(metadata: Mapping[str, Any], key: str, kind: type[T]) -> Sequence[T]:
    values = metadata.get(f"{_KEYS}.{key}")
    if not isinstance(values, list | tuple):
        found = "is missing" if values is None else f"is a {type(values).__name__}"
        raise CheckpointError(f"{_KEYS}.{key} {found}; an array of {kind.__name__} is needed")
    if wrong := set(map(type, values)) - {kind}:
        raise CheckpointError(
            f"{_KEYS}.{key} holds a {wrong.pop().__name__}; an array of {kind.__name__} is needed"
        )
    return values
