"""Reads a folder as Meta publishes it: params.json and consolidated.NN.pth, one file a shard.

Shards are merged when a tensor is read, not before. Not checklist.chk, not the FP8 scales of the
405B FP8 release, not the quantized 1B and 3B. Source: llama-models, models/llama3/args.py,
model.py and checkpoint.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pronk.backends.protocol import U8
from pronk.checkpoints.checkpoint import Checkpoint, Stored
from pronk.checkpoints.fields import Fields
from pronk.checkpoints.mapped import MappedFile, quoted
from pronk.checkpoints.names import native_name
from pronk.checkpoints.pth import PthTensor, read_pth
from pronk.core.config import ModelConfig, RopeScaling
from pronk.core.errors import CheckpointError
from pronk.core.files import read_json

_SPLIT_ROWS: Final = re.compile(
    r"(tok_embeddings|output|.*\.attention\.w[qkv]|.*\.feed_forward\.w[13])\.weight"
)
_SPLIT_COLUMNS: Final = re.compile(r".*\.(attention\.wo|feed_forward\.w2)\.weight")
_KEY_VALUE: Final = re.compile(r".*\.attention\.w[kv]\.weight")

_FACTOR_32: Final = {(2048, 16), (3072, 28)}
"""(dim, layers) of Llama 3.2 1B and 3B. Their params.json says only `use_scaled_rope`, for which
Meta's code has 8 built in, but they were trained with 32, as their Hugging Face files say."""

_CONTEXT, _CONTEXT_SCALED = 8_192, 131_072
"""params.json does not tell the context: Llama 3 has the first, Llama 3.1 and later the second."""


def open_meta(path: Path) -> Checkpoint:
    """The model in a folder of Meta's."""
    params = read_json(path / "params.json")
    files = [MappedFile(path / name) for name in _shard_names(path)]
    merged = _merge(path, [read_pth(file) for file in files])
    config = read_params(path / "params.json", params, merged)
    tensors = {name: tensor.stored(config) for name, tensor in merged.items()}
    return Checkpoint(path, "meta", config, params, tensors, files)


def _shard_names(path: Path) -> list[str]:
    """consolidated.00.pth and so on, none left out."""
    names = sorted(entry.name for entry in path.glob("consolidated.*.pth"))
    expected = [f"consolidated.{number:02}.pth" for number in range(len(names))]
    for name, wanted in zip(names, expected, strict=True):
        if name != wanted:
            raise CheckpointError(f"{path}: {wanted} is missing (found {', '.join(names[:20])})")
    return names


@dataclass(frozen=True, slots=True)
class _Merged:
    """A tensor whose parts lie in all shards, joined along `axis`; None: a copy in each."""

    name: str
    parts: tuple[PthTensor, ...]
    axis: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if self.axis is not None:
            shape[self.axis] *= len(self.parts)
        return tuple(shape)

    def stored(self, config: ModelConfig) -> Stored:
        copies, shape, read = 1, self.shape, self.read
        if _KEY_VALUE.fullmatch(self.name):
            copies = _copies(shape[0], len(self.parts), config)
        if copies > 1:
            shape = (shape[0] // copies, *shape[1:])
            read = self._reader_of_one(copies, config)
        part = self.parts[0]
        n_parts = 1 if self.axis is None else len(self.parts)
        nbytes = part.n_rows * part.row_bytes * n_parts // copies
        return Stored(part.kind, shape, nbytes, read)

    def read(self) -> tuple[U8, Callable[[], None]]:
        """A view of the file when there is one shard, else a copy of the joined parts."""
        if self.axis is None or len(self.parts) == 1:
            return np.ascontiguousarray(self.parts[0].rows()), self.parts[0].release
        joined = np.concatenate([part.rows() for part in self.parts], axis=self.axis)
        for part in self.parts:
            part.release()
        return joined, lambda: None

    def _reader_of_one(
        self, copies: int, config: ModelConfig
    ) -> Callable[[], tuple[U8, Callable[[], None]]]:
        """Reads each key/value head once; that the copies are equal is checked on the way."""

        def read() -> tuple[U8, Callable[[], None]]:
            rows, release = self.read()
            heads = rows.reshape(config.n_kv_heads, copies, -1)
            if not (heads == heads[:, :1]).all():
                raise CheckpointError(
                    f"{self.parts[0].file.path}: {self.name} has {config.n_kv_heads * copies} heads"
                    f" which are not {config.n_kv_heads} heads in {copies} equal copies"
                )
            return np.ascontiguousarray(heads[:, 0]).reshape(len(rows) // copies, -1), release

        return read


def _copies(rows: int, n_shards: int, config: ModelConfig) -> int:
    """How often each key/value head is stored. With more shards than heads every shard has one
    head, and neighbours have the same."""
    repeated = rows == n_shards * config.head_dim and n_shards % config.n_kv_heads == 0
    return n_shards // config.n_kv_heads if repeated else 1


def _merge(path: Path, shards: Sequence[Mapping[str, PthTensor]]) -> dict[str, _Merged]:
    merged = {}
    for number, shard in enumerate(shards):
        if shard.keys() != shards[0].keys():
            name = min(shard.keys() ^ shards[0].keys())
            raise CheckpointError(
                f"{path}: tensor {quoted(name)} is in only one of shards 00 and {number:02}"
            )
    for name in shards[0]:
        parts = tuple(shard[name] for shard in shards)
        for part in parts:
            if (part.kind, part.shape) != (parts[0].kind, parts[0].shape):
                raise CheckpointError(
                    f"{part.file.path}: {quoted(name)} is {part.kind} {list(part.shape)},"
                    f" in shard 00 {parts[0].kind} {list(parts[0].shape)}"
                )
        merged[name] = _Merged(name, parts, _axis(name, parts[0]))
    return merged


def _axis(name: str, part: PthTensor) -> int | None:
    if len(part.shape) == 2 and _SPLIT_ROWS.fullmatch(name):
        return 0
    return 1 if len(part.shape) == 2 and _SPLIT_COLUMNS.fullmatch(name) else None


def read_params(
    path: Path, params: Mapping[str, Any], tensors: Mapping[str, _Merged]
) -> ModelConfig:
    """The shape in a params.json; keys that are not known are ignored, as Meta's code does."""
    fields = Fields(path, params)
    for key in ("quantization_args", "lora_args"):
        if params.get(key) is not None:
            raise CheckpointError(f"{path}: {key} is set; only unquantized weights are supported")
    dim, n_heads = fields.integer("dim"), fields.integer("n_heads")
    n_layers = fields.integer("n_layers")
    if n_heads < 1 or dim % n_heads:
        raise CheckpointError(f"{path}: dim {dim} is no multiple of n_heads {n_heads}")
    scaled = fields.boolean("use_scaled_rope", False)
    factor = 32.0 if (dim, n_layers) in _FACTOR_32 else 8.0
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=_n_kv_heads(fields, n_heads, tensors),
        head_dim=dim // n_heads,
        ffn_dim=_ffn_dim(fields, dim),
        vocab_size=_vocab_size(fields, tensors),
        context=_CONTEXT_SCALED if scaled else _CONTEXT,
        norm_eps=fields.number("norm_eps", 1e-5),
        rope_theta=fields.number("rope_theta", 500_000.0),
        rope_scaling=RopeScaling(factor=factor) if scaled else None,
        tied_embeddings=_is_tied(tensors),
    )


def _n_kv_heads(fields: Fields, n_heads: int, tensors: Mapping[str, _Merged]) -> int:
    """Of the 405B in 16 files params.json may count 16 heads: its 8, each stored twice."""
    n_kv_heads = fields.integer("n_kv_heads", n_heads)
    first = tensors.get(native_name("layers.0.wk", "meta"))
    n_shards = 1 if first is None else len(first.parts)
    is_405b = fields.integer("dim") == 16_384
    return 8 if is_405b and n_kv_heads == n_shards == 16 else n_kv_heads


def _ffn_dim(fields: Fields, dim: int) -> int:
    """Two thirds of 4 dim, times a factor, rounded up to a multiple."""
    multiplier = fields.number("ffn_dim_multiplier", 1.0)
    multiple = fields.integer("multiple_of", 256)
    if not 0 < multiplier < 1000 or multiple < 1:
        raise CheckpointError(
            f"{fields.path}: ffn_dim_multiplier {multiplier} and multiple_of {multiple}"
            " must be above 0 (and below 1000)"
        )
    hidden = int(multiplier * int(2 * (4 * dim) / 3))
    return -(-hidden // multiple) * multiple


def _vocab_size(fields: Fields, tensors: Mapping[str, _Merged]) -> int:
    """params.json may say -1: as many as the embedding has rows."""
    size = fields.integer("vocab_size", -1)
    embed = tensors.get(native_name("embed", "meta"))
    return embed.shape[0] if size == -1 and embed is not None and embed.shape else size


def _is_tied(tensors: Mapping[str, _Merged]) -> bool:
    """No output, or one that is the very same bytes of the file as the embedding."""
    output, embed = (tensors.get(native_name(name, "meta")) for name in ("output", "embed"))
    return output is None or (embed is not None and output.parts == embed.parts)
