"""Tiny valid model files of each format, made without the code under test where it matters: the
safetensors and .pth writers here are the tests' own, GGUF comes from Pronk's writer (which
tests/conformance compares with the `gguf` package)."""

import contextlib
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pronk.checkpoints.export import GgufWriter, TensorSpec
from pronk.checkpoints.names import native_name, tensor_names, tensor_shape
from pronk.checkpoints.open import open_checkpoint
from pronk.core.config import ModelConfig
from pronk.core.errors import CheckpointError

CONFIG = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=20,
    context=128, rope_theta=10_000.0,
)  # fmt: skip

Weights = dict[str, npt.NDArray[np.float32]]


def weights(config: ModelConfig = CONFIG) -> Weights:
    """Random tensors by canonical name; vectors have one dimension."""
    rng = np.random.default_rng(7)
    made = {}
    for name in tensor_names(config):
        shape = tensor_shape(name, config)
        made[name] = rng.normal(size=shape[shape[0] == 1 :]).astype(np.float32)
    return made


def gguf_keys(config: ModelConfig = CONFIG) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.context_length": config.context,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
    }


def write_gguf(
    path: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Path:
    """`tensors` has native names; those of dtype uint8 are Q4_0 blocks, others are F32."""
    if tensors is None:
        tensors = {native_name(name, "gguf"): w for name, w in weights().items()}
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    with GgufWriter(path, gguf_keys() if keys is None else keys, specs) as out:
        for tensor in tensors.values():
            out.write([np.ascontiguousarray(tensor).view(np.uint8)])
    return path


def spec_of(name: str, tensor: npt.NDArray[Any]) -> TensorSpec:
    if tensor.dtype == np.uint8:
        return TensorSpec(name, "Q4_0", (tensor.shape[0], tensor.shape[1] // 18 * 32))
    return TensorSpec(name, "F32", tensor.shape)


def hf_config(config: ModelConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
    } | changes


def half_split(w: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows in Hugging Face's order, from Meta's: row j of a half is row 2j (+1) of the head."""
    halves = [np.concatenate([head[0::2], head[1::2]]) for head in np.split(w, heads)]
    return np.concatenate(halves)


def hf_tensors(config: ModelConfig = CONFIG) -> Weights:
    made = {}
    for name, w in weights(config).items():
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.rpartition(".")[2])
        made[native_name(name, "hf")] = half_split(w, heads) if heads else w
    return made


def safetensors_bytes(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        dtype = {4: "F32", 2: "F16", 1: "U8"}[tensor.itemsize]
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    return with_header(header, data)


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_hf(folder: Path, tensors: Mapping[str, npt.NDArray[Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config()))
    blob = safetensors_bytes(hf_tensors() if tensors is None else tensors)
    (folder / "model.safetensors").write_bytes(blob)
    return folder


def params(config: ModelConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    """params.json of a config whose ffn_dim is 2 dim."""
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 16,
        "ffn_dim_multiplier": 0.7,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "unknown_key": "ignored, as Meta does",
    } | changes


def meta_tensors(config: ModelConfig = CONFIG) -> Weights:
    return {native_name(name, "meta"): w for name, w in weights(config).items()}


# Pickles, written by hand so that a test can also write what torch never would.


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def whole(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(10, "little", signed=True)
    return b"\x8a\x0a" + raw


def wholes(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(whole(value) for value in values) + b"t"


def storage(key: str, n_items: int, kind: str = "torch\nFloatStorage") -> bytes:
    return (
        b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text("cpu")
        + whole(n_items) + b"tQ"
    )  # fmt: skip


def tensor(
    place: bytes, shape: Sequence[int], stride: Sequence[int] | None = None, offset: int = 0
) -> bytes:
    if stride is None:
        stride = [int(np.prod(shape[at + 1 :])) for at in range(len(shape))]
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + whole(offset)
    hooks = b"ccollections\nOrderedDict\n)R"
    return call + wholes(shape) + wholes(stride) + b"\x89" + hooks + b"tR"


def dictionary(entries: Mapping[str, bytes]) -> bytes:
    items = b"".join(text(name) + value for name, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


def pickle_of(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    return dictionary(
        {
            name: tensor(storage(str(key), w.size), w.shape)
            for key, (name, w) in enumerate(tensors.items())
        }
    )


def write_pth(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    code: bytes | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """`code` replaces the pickle; storages stay those of `tensors`, called 0, 1, ..."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle_of(tensors) if code is None else code)
        archive.writestr("archive/byteorder", "little")
        for key, w in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", w.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_meta(folder: Path, code: bytes | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params(**changes)))
    write_pth(folder / "consolidated.00.pth", meta_tensors(), code)
    return folder


def split(tensors: Mapping[str, npt.NDArray[Any]], count: int) -> list[Weights]:
    """Shards in Meta's way: wo and w2 by columns, other matrices by rows, norms copied."""
    shards: list[Weights] = [{} for _ in range(count)]
    for name, w in tensors.items():
        axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        parts = [w] * count if w.ndim == 1 else np.split(w, count, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = np.ascontiguousarray(part)
    return shards


def read_all(path: Path) -> Weights:
    """Every tensor of a checkpoint, F32 ones as numbers, in the shape `weights` has."""
    with open_checkpoint(path) as checkpoint:
        read = {}
        for name in checkpoint.names():
            raw = checkpoint.get(name)
            values = raw.data.copy().view(np.float32)
            assert values.shape == raw.shape
            read[name] = values[0] if raw.shape[0] == 1 else values
            raw.release()
    return read


def assert_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for name, w in theirs.items():
        np.testing.assert_array_equal(ours[name], w)


@contextlib.contextmanager
def refused(match: str, limit: int = 4 << 20) -> Iterator[None]:
    """CheckpointError in one line, and no allocation above `limit` bytes on the way there."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=match) as caught:
            yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < limit, peak
