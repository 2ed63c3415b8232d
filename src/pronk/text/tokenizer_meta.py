"""Meta's `tokenizer.model` of Llama 3, encoded with `tiktoken`.

The file has one line a token, `base64(bytes) rank`, in the order of the ranks; the 256 special
tokens that follow are not in it but in Meta's code. Not the SentencePiece file of Llama 2 that has
the same name, and not the larger file of Llama 4.
Source: llama-models, models/llama3/tokenizer.py.
"""

import binascii
from collections.abc import Iterable
from pathlib import Path

from pronk.core.errors import CheckpointError
from pronk.core.files import read_regular_file
from pronk.text.vocabulary import Roles, Tokenizer

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What Llama 3 cuts text into before it looks for tokens."""

_MAX_RANKS = 128_000
_MAX_BYTES = 16 << 20
"""Llama 3's tokenizer.model has 2 MB."""
_N_SPECIAL = 256
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)


class MetaTokenizer(Tokenizer):
    """Llama 3's vocabulary: `tokens` by rank, then the 256 special tokens."""

    def __init__(self, tokens: list[bytes]) -> None:
        import tiktoken

        reserved = (f"<|reserved_special_token_{n}|>" for n in range(2, 2 + _N_SPECIAL))
        texts = (*_NAMED, *reserved)[:_N_SPECIAL]
        special_ids = {text: len(tokens) + n for n, text in enumerate(texts)}
        roles = Roles(
            special_ids=special_ids,
            bos_id=special_ids["<|begin_of_text|>"],
            eos_id=special_ids["<|end_of_text|>"],
            add_bos=True,
        )
        super().__init__(len(tokens) + _N_SPECIAL, roles, meta_slices=True)
        self._tokens = tokens
        self._encoding = tiktoken.Encoding(
            name="llama3",
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={},
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def _ordinary_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self._tokens.__getitem__, ids))


def tokenizer_from_meta(path: Path) -> Tokenizer:
    """The vocabulary in Meta's `tokenizer.model`; a `CheckpointError` where a line is not as it
    must be, a rank or a byte is missing, or the file is that of Llama 2 or Llama 4."""
    tokens = _read_tokens(path)
    if len(tokens) > _MAX_RANKS:
        raise CheckpointError(
            f"{path}: {len(tokens)} tokens; Llama 3 has {_MAX_RANKS}, this is another vocabulary"
        )
    missing = set(range(256)) - {token[0] for token in tokens if len(token) == 1}
    if missing:
        raise CheckpointError(f"{path}: no token for the single byte 0x{min(missing):02X}")
    return MetaTokenizer(tokens)


def _read_tokens(path: Path) -> list[bytes]:
    tokens: list[bytes] = []
    seen: set[bytes] = set()
    for number, line in enumerate(read_regular_file(path, _MAX_BYTES).split(b"\n"), 1):
        if not line:
            continue
        encoded, _, rank = line.rstrip(b"\r").partition(b" ")
        try:
            token = binascii.a2b_base64(encoded, strict_mode=True)
        except binascii.Error:
            token = b""
        if not token:
            raise CheckpointError(
                f"{path}: line {number} is not '<base64> <rank>'; expected Llama 3's"
                " tokenizer.model (Llama 2's SentencePiece file is not supported)"
            )
        if rank != b"%d" % len(tokens):
            raise CheckpointError(
                f"{path}: line {number} has rank {rank[:20]!r}, expected {len(tokens)}"
            )
        if token in seen:
            raise CheckpointError(f"{path}: line {number} repeats the token {token[:40]!r}")
        seen.add(token)
        tokens.append(token)
    return tokens
