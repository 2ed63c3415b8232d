"""One tiny byte-level vocabulary, written down in each form that the tokenizers read.

256 single bytes, a few longer tokens and a few special ones. The merges follow from the ranks, as
they do in the published Llama 3 vocabularies, so that all forms must give the same ids.
"""

import base64
import json
from pathlib import Path
from typing import Any

from pronk.text.tokenizer_bpe import in_byte_alphabet
from pronk.text.tokenizer_meta import LLAMA3_PATTERN

WORDS = [
    " the",
    "hello",
    " world",
    "123",
    "\n\n",
    "    ",
    "é",
    "日本",
    "naïve",
    "🙂🙂",
    "'s",
    "<|",
    "|>",
]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>"]


def _ordinary() -> list[bytes]:
    """By rank; each longer token comes after its own beginnings."""
    tokens = {bytes([byte]): None for byte in range(256)}
    for word in WORDS:
        raw = word.encode()
        tokens |= {raw[:end]: None for end in range(2, len(raw) + 1)}
    return list(tokens)


ORDINARY = _ordinary()
N = len(ORDINARY)


def merges_of(tokens: list[bytes]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order of what they make."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return [(in_byte_alphabet(left), in_byte_alphabet(right)) for left, right in merges]


def metadata_of(pre: str | None = "llama-bpe", **changes: Any) -> dict[str, Any]:
    """GGUF metadata; a change is given without its prefix, and None leaves a key out."""
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [in_byte_alphabet(token) for token in ORDINARY] + SPECIAL,
        "token_type": [1] * N + [3] * len(SPECIAL),
        "merges": [" ".join(pair) for pair in merges_of(ORDINARY)],
        "bos_token_id": N,
        "eos_token_id": N + 1,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def hf_json() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    bos = {"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": N + n, "content": text, "special": True} for n, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "trim_offsets": True}],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A"}}]}
            ],
        },
        "decoder": {**byte_level, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {in_byte_alphabet(token): rank for rank, token in enumerate(ORDINARY)},
            "merges": [list(pair) for pair in merges_of(ORDINARY)],
        },
    }


def write_hf(folder: Path, spec: dict[str, Any], **files: Any) -> Path:
    """A model folder; `files` are the other JSON files by their stem."""
    config = {"bos_token": {"content": SPECIAL[0]}, "eos_token": SPECIAL[3]}
    for stem, content in {"tokenizer": spec, "tokenizer_config": config, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def write_meta(path: Path, tokens: list[bytes]) -> Path:
    lines = [b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path
