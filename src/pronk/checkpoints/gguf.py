"""Reads GGUF files, versions 2 and 3, little-endian; also models split into several files.

Nothing in a file is trusted: every count, length and offset is checked against the size of the
file before it is used, and nothing is allocated by a number that the file merely claims.
Format: ggml's docs/gguf.md. Not the tokenizer: its keys are handed on in `Checkpoint.metadata`.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from pronk.backends.formats import KIND_BY_ID
from pronk.backends.protocol import U8
from pronk.checkpoints.checkpoint import Checkpoint, Stored
from pronk.checkpoints.fields import Fields, brief
from pronk.checkpoints.mapped import MappedFile, quoted
from pronk.core.config import ModelConfig
from pronk.core.errors import CheckpointError

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

_MAX_NAME: Final = 65_535
_MAX_STRING: Final = 1 << 26
_MAX_ELEMENTS: Final = 1 << 22
"""Far above any vocabulary; keeps a damaged count from walking through gigabytes of weights."""
_MAX_NESTING: Final = 4

_OTHER_KINDS: Final = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    40: "NVFP4", 42: "Q2_0",
}  # fmt: skip
"""Names for the message only: types that exist and that Pronk does not read."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where a tensor lies: `start` is a byte of the file, `shape` has the rows first."""

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: MappedFile

    def stored(self) -> Stored:
        return Stored(self.kind, self.shape, self.nbytes, self.read)

    def read(self) -> tuple[U8, Callable[[], None]]:
        rows = self.file.view(self.start, self.nbytes)
        n_rows = self.shape[0] if len(self.shape) == 2 else 1
        return rows.reshape(n_rows, -1), self.file.releaser(self.start, self.nbytes)


def open_gguf(path: Path) -> Checkpoint:
    """The model in a GGUF file, or in all parts of the split whose first part `path` is."""
    file = MappedFile(path)
    metadata, tensors = _parse(file)
    files = [file]
    for part in _other_parts(path, metadata):
        files.append(MappedFile(part))
        for name, tensor in _parse(files[-1])[1].items():
            if name in tensors:
                raise CheckpointError(f"{part}: tensor {quoted(name)} is in an earlier part too")
            tensors[name] = tensor
    config = _config(path, metadata, tensors)
    stored = {name: tensor.stored() for name, tensor in tensors.items()}
    return Checkpoint(path, "gguf", config, metadata, stored, files)


class _Cursor:
    """Reads a mapped file from the front; every method fails when the file ends too early."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.buffer, self.size, self.at = file, file.buffer, file.size, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {what}")

    def skip(self, length: int, what: str) -> int:
        """The start of the next `length` bytes."""
        start = self.at
        if length > self.size - start:
            raise self.fail(
                f"truncated: {what} at byte {start} needs {length} bytes, {self.size - start} left"
            )
        self.at = start + length
        return start

    def u32(self, what: str) -> int:
        start = self.skip(4, what)
        return int.from_bytes(self.buffer[start : start + 4], "little")

    def u64(self, what: str) -> int:
        start = self.skip(8, what)
        return int.from_bytes(self.buffer[start : start + 8], "little")

    def string(self, what: str, limit: int) -> str:
        length = self.u64(what)
        if length > limit:
            raise self.fail(f"{what} claims to have {length} bytes; at most {limit} are allowed")
        start = self.skip(length, what)
        return self._text(self.buffer[start : start + length], what)

    def _text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not valid UTF-8") from None

    def value(self, kind: int, what: str, nesting: int = 0) -> Any:
        """A value of metadata: int, float, bool, str, or a list of them."""
        if kind == _STRING:
            return self.string(what, _MAX_STRING)
        if kind == _ARRAY:
            return self.array(what, nesting + 1)
        return self.numbers(kind, 1, what)[0]

    def numbers(self, kind: int, count: int, what: str) -> list[Any]:
        if kind not in _NUMBERS:
            raise self.fail(f"{what} has a value of unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        start = self.skip(count * dtype.itemsize, what)
        values = np.frombuffer(self.buffer, dtype, count, start)
        result: list[Any] = (values != 0 if kind == _BOOL else values).tolist()
        return result

    def array(self, what: str, nesting: int) -> list[Any]:
        if nesting > _MAX_NESTING:
            raise self.fail(f"{what} has arrays nested more than {_MAX_NESTING} deep")
        kind, count = self.u32(what), self.u64(what)
        if count > _MAX_ELEMENTS:
            raise self.fail(f"{what} claims {count} elements; at most {_MAX_ELEMENTS} are allowed")
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _ARRAY:
            return [self.array(what, nesting + 1) for _ in range(count)]
        return self.numbers(kind, count, what)

    def strings(self, count: int, what: str) -> list[str]:
        """As `string` does, in one tight loop: vocabularies have hundreds of thousands."""
        length_at = struct.Struct("<Q").unpack_from
        buffer, at, last = self.buffer, self.at, self.size - 8
        result: list[str] = []
        append = result.append
        try:
            for _ in range(count):
                if at > last:
                    raise self.fail(f"truncated: {what} ends after {len(result)} of {count}")
                end = at + 8 + length_at(buffer, at)[0]
                if end > self.size:
                    raise self.fail(f"truncated: {what} ends inside string {len(result)}")
                append(buffer[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            raise self.fail(f"{what}: string {len(result)} is not valid UTF-8") from None
        self.at = at
        return result


def _parse(file: MappedFile) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Metadata and tensors of one file."""
    cursor = _Cursor(file)
    n_tensors, n_keys = _header(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string("a metadata key", _MAX_NAME)
        if key in metadata:
            raise cursor.fail(f"metadata key {quoted(key)} is given twice")
        what = f"metadata key {quoted(key)}"
        metadata[key] = cursor.value(cursor.u32(what), what)
    infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = cursor.string("a tensor name", _MAX_NAME)
        if name in infos:
            raise cursor.fail(f"tensor {quoted(name)} is given twice")
        infos[name] = _tensor_info(cursor, f"tensor {quoted(name)}")
    return metadata, _place(cursor, _alignment(cursor, metadata), infos)


def _header(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.file.bytes(cursor.skip(4, "the magic number"), 4)
    if magic != b"GGUF":
        raise cursor.fail(f"not a GGUF file: it starts with {magic!r}, not with b'GGUF'")
    version = cursor.u32("the version")
    if version not in (2, 3):
        if version and version & 0xFFFF == 0:
            raise cursor.fail("a big-endian GGUF file; only little-endian ones are read")
        raise cursor.fail(f"GGUF version {version}; versions 2 and 3 are read")
    return cursor.u64("the number of tensors"), cursor.u64("the number of metadata keys")


def _tensor_info(cursor: _Cursor, what: str) -> tuple[int, tuple[int, ...], int]:
    """Type number, shape with the rows first, offset in the data section."""
    n_dims = cursor.u32(what)
    if not 1 <= n_dims <= 4:
        raise cursor.fail(f"{what} has {n_dims} dimensions; 1 to 4 are possible")
    dims = [cursor.u64(what) for _ in range(n_dims)]
    if 0 in dims or any(dim != 1 for dim in dims[2:]):
        raise cursor.fail(f"{what} has shape {dims[::-1]}; Llama has only vectors and matrices")
    return cursor.u32(what), tuple(dims[:2][::-1]), cursor.u64(what)


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment must be a power of two, got {alignment!r:.40}")
    return alignment


def _place(
    cursor: _Cursor, alignment: int, infos: Mapping[str, tuple[int, tuple[int, ...], int]]
) -> dict[str, _Tensor]:
    """Tensors at their bytes of the file: aligned, inside it, and none over another."""
    data = cursor.at + -cursor.at % alignment
    placed: dict[str, _Tensor] = {}
    for name, (type_id, shape, offset) in infos.items():
        what = f"tensor {quoted(name)}"
        kind = KIND_BY_ID.get(type_id)
        if kind is None:
            known = _OTHER_KINDS.get(type_id, "unknown")
            raise cursor.fail(f"{what} has type {known} (number {type_id}), which is not supported")
        if shape[-1] % kind.elements:
            raise cursor.fail(
                f"{what} has {shape[-1]} columns; {kind.name} needs a multiple of {kind.elements}"
            )
        nbytes = kind.row_bytes(shape[-1]) * (shape[0] if len(shape) == 2 else 1)
        if offset % alignment:
            raise cursor.fail(f"{what} has offset {offset}, no multiple of {alignment}")
        if data + offset + nbytes > cursor.size:
            raise cursor.fail(
                f"truncated: {what} ends at byte {data + offset + nbytes}"
                f" of a file of {cursor.size}"
            )
        placed[name] = _Tensor(kind.name, shape, data + offset, nbytes, cursor.file)
    in_order = sorted(placed.items(), key=lambda item: item[1].start)
    for (name, one), (after, other) in pairwise(in_order):
        if one.start + one.nbytes > other.start:
            raise cursor.fail(f"tensors {quoted(name)} and {quoted(after)} overlap")
    return placed


def _other_parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """Parts 2 to N of a model split as NAME-00001-of-0000N.gguf; none of a whole one."""
    keys = _Keys(path, metadata)
    count = keys.integer("split.count", 1)
    if count <= 1:
        return []
    number = keys.integer("split.no", 0) + 1
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or (int(match[2]), int(match[3])) != (number, count):
        raise CheckpointError(
            f"{path}: part {number} of {count} must be called"
            f" NAME-{number:05}-of-{count:05}.gguf, beside the other parts"
        )
    if number != 1:
        raise CheckpointError(
            f"{path}: part {number} of {count}; name the first, {match[1]}-00001-of-{count:05}.gguf"
        )
    return [path.with_name(f"{match[1]}-{n:05}-of-{count:05}.gguf") for n in range(2, count + 1)]


class _Keys(Fields):
    """Metadata, where a list that repeats one number for each layer counts as that number."""

    def get(self, key: str, default: Any = None) -> Any:
        value = super().get(key, default)
        if not isinstance(value, list) or not value:
            return value
        if any(element != value[0] for element in value):
            raise CheckpointError(
                f"{self.path}: {key} differs from layer to layer, which is not supported"
            )
        return value[0]


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, _Tensor]) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path}: general.architecture is {brief(architecture)}; only 'llama' is supported"
        )
    keys = _Keys(path, metadata)
    _refuse_variants(keys)
    dim = keys.integer("llama.embedding_length")
    n_heads = keys.integer("llama.attention.head_count")
    head_dim = _head_dim(keys, dim, n_heads)
    return ModelConfig(
        dim=dim,
        n_layers=keys.integer("llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=keys.integer("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=keys.integer("llama.feed_forward_length"),
        vocab_size=_vocab_size(keys),
        context=keys.integer("llama.context_length"),
        norm_eps=keys.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("llama.rope.freq_base", 10_000.0),
        rope_divisors=_rope_divisors(keys, tensors.get("rope_freqs.weight"), head_dim),
        tied_embeddings="output.weight" not in tensors,
    )


_NEUTRAL: Final = {
    "llama.expert_count": 0, "llama.attention.sliding_window": 0, "llama.attention.scale": 0,
    "llama.logit_scale": 1, "llama.residual_scale": 1, "llama.embedding_scale": 1,
    "llama.attention.causal": 1,
}  # fmt: skip
"""Keys by which other models change the forward pass, and the value that changes nothing."""


def _refuse_variants(keys: _Keys) -> None:
    for key, neutral in _NEUTRAL.items():
        value = keys.values.get(key, neutral)
        if value != neutral:
            raise CheckpointError(f"{keys.path}: {key} is {brief(value)}, which is not supported")


def _head_dim(keys: _Keys, dim: int, n_heads: int) -> int:
    """The head size, on which key_length, value_length and the rotary dimensions must agree."""
    key = "llama.attention.key_length"
    if key not in keys.values and (n_heads < 1 or dim % n_heads):
        raise CheckpointError(
            f"{keys.path}: embedding_length {dim} is no multiple of head_count {n_heads},"
            f" and {key} is missing"
        )
    size = keys.head_dim(key, dim // n_heads if n_heads > 0 else None)
    for other in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if keys.integer(other, size) != size:
            raise CheckpointError(
                f"{keys.path}: {other} is {keys.integer(other)}, heads have {size} dimensions;"
                " models where the two differ are not supported"
            )
    return size


def _vocab_size(keys: _Keys) -> int:
    tokens = keys.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    return keys.integer("llama.vocab_size")


def _rope_divisors(keys: _Keys, freqs: _Tensor | None, head_dim: int) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies: the file's own tensor, times a linear factor."""
    factor = _linear_factor(keys)
    if freqs is None:
        return None if factor == 1 else (factor,) * (head_dim // 2)
    if freqs.kind != "F32" or freqs.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{keys.path}: tensor 'rope_freqs.weight' is {freqs.kind} {list(freqs.shape)},"
            f" expected F32 [{head_dim // 2}]"
        )
    values = freqs.read()[0].view("<f4")[0]
    if not (np.isfinite(values) & (values > 0)).all():
        raise CheckpointError(f"{keys.path}: tensor 'rope_freqs.weight' has values not above 0")
    return tuple((values.astype(np.float64) * factor).tolist())


def _linear_factor(keys: _Keys) -> float:
    """The divisor of all positions. As in llama.cpp's load_hparams (src/llama-model.cpp), scaling
    without a type is linear, its factor has an older key too, and none or 0 of it is 1."""
    kind = keys.values.get("llama.rope.scaling.type", "linear")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise CheckpointError(
            f"{keys.path}: llama.rope.scaling.type is {brief(kind)}; 'none' and 'linear' are"
            " supported (Llama 3.1's scaling is the tensor rope_freqs.weight)"
        )
    key = "llama.rope.scaling.factor"
    if key not in keys.values:
        key = "llama.rope.scale_linear"
    factor = keys.number(key, 0.0)
    if factor < 0:
        raise CheckpointError(f"{keys.path}: {key} must be at least 0, got {factor}")
    return factor or 1.0
