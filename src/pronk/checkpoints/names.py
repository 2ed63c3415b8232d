"""The names, shapes and row order of a Llama model's tensors, in Pronk and in each file format.

Everything above the readers uses the canonical names: "embed", "norm", "output" and
"layers.{i}." + "attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w_gate", "w_up", "w_down".
This file is also the only place that knows the rotary permutation of Hugging Face's wq and wk.
"""

import re
from collections.abc import Iterator
from typing import Final, Literal

import numpy as np

from pronk.backends.protocol import U8
from pronk.core.config import ModelConfig

Format = Literal["gguf", "hf", "meta"]

_TOP: Final[dict[str, dict[Format, str]]] = {
    "embed": {
        "gguf": "token_embd.weight",
        "hf": "model.embed_tokens.weight",
        "meta": "tok_embeddings.weight",
    },
    "norm": {"gguf": "output_norm.weight", "hf": "model.norm.weight", "meta": "norm.weight"},
    "output": {"gguf": "output.weight", "hf": "lm_head.weight", "meta": "output.weight"},
}

_PREFIX: Final[dict[Format, str]] = {"gguf": "blk.", "hf": "model.layers.", "meta": "layers."}

_LAYER: Final[dict[str, dict[Format, str]]] = {
    "attn_norm": {"gguf": "attn_norm", "hf": "input_layernorm", "meta": "attention_norm"},
    "wq": {"gguf": "attn_q", "hf": "self_attn.q_proj", "meta": "attention.wq"},
    "wk": {"gguf": "attn_k", "hf": "self_attn.k_proj", "meta": "attention.wk"},
    "wv": {"gguf": "attn_v", "hf": "self_attn.v_proj", "meta": "attention.wv"},
    "wo": {"gguf": "attn_output", "hf": "self_attn.o_proj", "meta": "attention.wo"},
    "ffn_norm": {"gguf": "ffn_norm", "hf": "post_attention_layernorm", "meta": "ffn_norm"},
    "w_gate": {"gguf": "ffn_gate", "hf": "mlp.gate_proj", "meta": "feed_forward.w1"},
    "w_up": {"gguf": "ffn_up", "hf": "mlp.up_proj", "meta": "feed_forward.w3"},
    "w_down": {"gguf": "ffn_down", "hf": "mlp.down_proj", "meta": "feed_forward.w2"},
}

_IGNORED: Final[dict[Format, re.Pattern[str]]] = {
    "gguf": re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?"),
    "hf": re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    "meta": re.compile(r"rope\.freqs"),
}
"""Tensors that hold nothing but rotary frequencies, which the configuration gives already."""


def tensor_names(config: ModelConfig) -> Iterator[str]:
    """Canonical names of every tensor that a model of this shape has, one at a time: the number
    of layers may come from a hostile file."""
    yield "embed"
    for layer in range(config.n_layers):
        for part in _LAYER:
            yield f"layers.{layer}.{part}"
    yield "norm"
    if not config.tied_embeddings:
        yield "output"


def native_name(name: str, fmt: Format) -> str:
    """What a file of this format calls the tensor `name`."""
    if name in _TOP:
        return _TOP[name][fmt]
    _, layer, part = name.split(".")
    return f"{_PREFIX[fmt]}{layer}.{_LAYER[part][fmt]}.weight"


def is_ignored(native: str, fmt: Format) -> bool:
    return _IGNORED[fmt].fullmatch(native) is not None


def tensor_shape(name: str, config: ModelConfig) -> tuple[int, int]:
    """(rows, columns) of a tensor: (out, in) of a linear layer, (1, D) of a norm."""
    dim, ffn = config.dim, config.ffn_dim
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    match name.rpartition(".")[2]:
        case "embed" | "output":
            return config.vocab_size, dim
        case "wq":
            return queries, dim
        case "wk" | "wv":
            return keys, dim
        case "wo":
            return dim, queries
        case "w_gate" | "w_up":
            return ffn, dim
        case "w_down":
            return dim, ffn
        case "norm" | "attn_norm" | "ffn_norm":
            return 1, dim
    raise AssertionError(f"no tensor is called {name!r}")


def rotated_heads(name: str, config: ModelConfig) -> int:
    """Heads whose rows Hugging Face stores in another order: all of wq and wk, 0 elsewhere."""
    part = name.rpartition(".")[2]
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(part, 0)


READER_VERSION: Final = 1
"""Of what a reader makes of a file's tensors. Raise it whenever the same file gives other rows than
before (another permutation, another tensor behind a name): packed weights that are kept on disk
were made from the old ones."""


def to_interleaved(rows: U8, heads: int) -> U8:
    """A copy of raw rows `[heads * K, bytes]` in Meta's order, from Hugging Face's.

    Meta rotates the pair of rows (2j, 2j+1) of a head, Hugging Face the pair (j, j + K/2).
    Whole rows move, so this holds for every block format.
    """
    n, size = rows.shape
    halves = rows.reshape(heads, 2, n // heads // 2, size)
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(n, size)


def to_half_split(rows: U8, heads: int) -> U8:
    """The inverse of `to_interleaved`."""
    n, size = rows.shape
    pairs = rows.reshape(heads, n // heads // 2, 2, size)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(n, size)
