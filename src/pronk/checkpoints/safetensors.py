"""Reads a Hugging Face folder: config.json and *.safetensors, whole or in shards.

The header of a safetensors file is read here and not by the `safetensors` package, because weights
stay in the mapped file and because every offset is to be checked. Not the tokenizer, not
generation_config.json. Format: the README of huggingface/safetensors; configuration: transformers'
LlamaConfig, in the spelling before version 5 (`rope_scaling`, `rope_theta`) and since
(`rope_parameters`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from pronk.backends.protocol import U8
from pronk.checkpoints.checkpoint import Checkpoint, Stored
from pronk.checkpoints.fields import Fields, brief
from pronk.checkpoints.mapped import MappedFile, quoted
from pronk.checkpoints.names import native_name, rotated_heads, to_interleaved
from pronk.core.config import ModelConfig, RopeScaling
from pronk.core.errors import CheckpointError
from pronk.core.files import is_unicode, parse_json, read_json

_MAX_HEADER: Final = 100_000_000
"""The format's own limit."""

_ITEM_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where a tensor lies: `start` is a byte of the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: MappedFile

    def stored(self, heads: int) -> Stored:
        """`heads` above 0: rows are put into Meta's order when they are read."""

        def read() -> tuple[U8, Callable[[], None]]:
            n_rows = self.shape[0] if len(self.shape) > 1 else 1
            rows = self.file.view(self.start, self.nbytes).reshape(n_rows, -1)
            release = self.file.releaser(self.start, self.nbytes)
            if not heads:
                return rows, release
            rows = to_interleaved(rows, heads)
            release()
            return rows, lambda: None

        return Stored(self.kind, self.shape, self.nbytes, read)


def open_hf(path: Path) -> Checkpoint:
    """The model in a Hugging Face folder."""
    metadata = read_json(path / "config.json")
    config = read_config(path / "config.json", metadata)
    shards = _shards(path)
    files = [MappedFile(path / name) for name in shards]
    tensors: dict[str, _Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file.path}: tensor {quoted(name)} is in {tensors[name].file.path.name} too"
                )
            tensors[name] = tensor
    _check_index(path, shards, tensors)
    heads = _heads_by_name(config, tensors)
    stored = {name: tensor.stored(heads.get(name, 0)) for name, tensor in tensors.items()}
    return Checkpoint(path, "hf", config, metadata, stored, files)


def _heads_by_name(config: ModelConfig, tensors: Mapping[str, _Tensor]) -> dict[str, int]:
    """Heads of the tensors whose rows are permuted."""
    layers = range(min(config.n_layers, len(tensors)))
    names = (f"layers.{layer}.{part}" for layer in layers for part in ("wq", "wk"))
    return {native_name(name, "hf"): rotated_heads(name, config) for name in names}


def _shards(path: Path) -> dict[str, set[str]]:
    """File names, each with the tensors that the index expects in it (none without an index)."""
    if (path / "model.safetensors").exists():
        return {"model.safetensors": set()}
    index = path / "model.safetensors.index.json"
    if index.exists():
        return _read_index(index)
    alone = [entry.name for entry in path.glob("*.safetensors")]
    if len(alone) == 1:
        return {alone[0]: set()}
    raise CheckpointError(
        f"{path}: {len(alone)} safetensors files but no model.safetensors.index.json"
    )


def _read_index(index: Path) -> dict[str, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that has an entry a tensor")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A file name and nothing else: an index must not reach outside its folder.
        if not isinstance(file, str) or not _is_weights_name(file):
            raise CheckpointError(
                f"{index}: {quoted(name)} points to {brief(file)}, which is no safetensors file"
                " of this folder"
            )
        shards.setdefault(file, set()).add(name)
    return shards


def _is_weights_name(file: str) -> bool:
    separated = any(separator in file for separator in "/\\:\0")
    return file.endswith(".safetensors") and not separated and is_unicode(file)


def _check_index(
    path: Path, shards: Mapping[str, set[str]], tensors: Mapping[str, _Tensor]
) -> None:
    for file, names in shards.items():
        for name in names:
            if name not in tensors or tensors[name].file.path.name != file:
                raise CheckpointError(f"{path / file}: tensor {quoted(name)} is missing")


def read_header(file: MappedFile) -> dict[str, _Tensor]:
    """Tensors of one safetensors file: no hole, no overlap, nothing after the last one."""

    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: {what}")

    length = int.from_bytes(file.bytes(0, 8), "little")
    if file.size < 8 or length > file.size - 8:
        raise fail(f"truncated: a header of {length} bytes in a file of {file.size}")
    if length > _MAX_HEADER:
        raise fail(f"a header of {length} bytes; at most {_MAX_HEADER} are allowed")
    header = parse_json(file.bytes(8, length), file.path)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            word = "overlaps another" if tensor.start < end else "leaves a hole before it"
            raise fail(f"tensor {quoted(name)} at byte {tensor.start} {word}")
        end = tensor.start + tensor.nbytes
    if end != file.size:
        raise fail(
            f"{'truncated: ' if end > file.size else ''}tensors end at byte {end}"
            f" of a file of {file.size}"
        )
    return tensors


def _tensor(file: MappedFile, data: int, name: str, entry: Any) -> _Tensor:
    """One entry of the header; `data` is the byte where tensor data begin."""
    what = f"{file.path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{what} needs dtype, shape and data_offsets, has {brief(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{what} has dtype {brief(dtype)}, which is not supported")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{what} has shape {brief(shape)} and data_offsets {brief(offsets)};"
            " both must be lists of whole numbers"
        )
    nbytes = prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{what} of {dtype} {brief(shape)} needs {nbytes} bytes, its data_offsets are"
            f" {brief(offsets)}"
        )
    return _Tensor(dtype, tuple(shape), data + offsets[0], nbytes, file)


def _is_sizes(value: object) -> bool:
    """A list of at most 8 numbers of at most 63 bits, so that products stay small."""
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def read_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """The shape in a config.json. Whatever would change the forward pass is refused by name."""
    fields = Fields(path, values)
    _refuse_variants(fields)
    dim, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.head_dim("head_dim", dim // n_heads if n_heads > 0 else 0)
    theta, scaling, divisors = _rope(fields, head_dim)
    return ModelConfig(
        dim=dim,
        n_layers=fields.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        ffn_dim=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("max_position_embeddings", 2048),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_divisors=divisors,
        tied_embeddings=fields.boolean("tie_word_embeddings", False),
    )


def _refuse_variants(fields: Fields) -> None:
    values, path = fields.values, fields.path
    architectures = values.get("architectures") or [values.get("model_type")]
    if architectures not in (["LlamaForCausalLM"], ["llama"]):
        raise CheckpointError(
            f"{path}: architectures is {brief(architectures)}; only LlamaForCausalLM is supported"
        )
    if values.get("quantization_config") is not None:
        method = values["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise CheckpointError(
            f"{path}: the weights are quantized ({brief(method)}), which is not supported in a"
            " Hugging Face folder; use the unquantized model or a GGUF of it"
        )
    for key, neutral in (
        ("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),
    ):  # fmt: skip
        if values.get(key, neutral) not in (neutral, None):
            raise CheckpointError(
                f"{path}: {key} is {brief(values[key])}; only {neutral!r} is supported"
            )


_Rope = tuple[float, RopeScaling | None, tuple[float, ...] | None]


def _rope(fields: Fields, head_dim: int) -> _Rope:
    """Base, Llama 3.1 scaling and explicit divisors of the rotary frequencies."""
    section = next(
        (key for key in ("rope_parameters", "rope_scaling") if fields.values.get(key)), None
    )
    values = fields.values[section] if section else {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{fields.path}: {section} must be an object, got {brief(values)}")
    rope = Fields(fields.path, {f"{section}.{key}": value for key, value in values.items()})
    if rope.number(f"{section}.partial_rotary_factor", 1.0) != 1:
        raise CheckpointError(f"{fields.path}: only a partial_rotary_factor of 1 is supported")
    outer = fields.number("rope_theta", 10_000.0)
    theta = rope.number(f"{section}.rope_theta", outer)
    kind = rope.text(f"{section}.rope_type", values.get("type") or "default")
    match kind:
        case "default":
            return theta, None, None
        case "linear":
            return theta, None, _linear(rope, f"{section}.factor", head_dim)
        case "llama3":
            return theta, _llama3(rope, f"{section}."), None
    raise CheckpointError(
        f"{fields.path}: rope type {brief(kind)} is not supported (supported: default, linear,"
        " llama3)"
    )


def _linear(rope: Fields, key: str, head_dim: int) -> tuple[float, ...]:
    factor = rope.number(key)
    if factor <= 0:
        raise CheckpointError(f"{rope.path}: {key} must be above 0, got {factor}")
    return (factor,) * (head_dim // 2)


def _llama3(rope: Fields, prefix: str) -> RopeScaling:
    return RopeScaling(
        factor=rope.number(prefix + "factor"),
        low_freq_factor=rope.number(prefix + "low_freq_factor"),
        high_freq_factor=rope.number(prefix + "high_freq_factor"),
        original_context=rope.integer(prefix + "original_max_position_embeddings"),
    )
