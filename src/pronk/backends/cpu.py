"""The CPU backend: packed weights and SIMD kernels behind the ops contract.

The only importer of the compiled module. Activations are NumPy float32; weights and keys/values
are handles that live in native memory. What each op means is written in `backends/reference.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pronk.backends import _cpu
from pronk.backends.formats import KINDS
from pronk.backends.protocol import BLOCK, F32, I32, U8, Batch, KvDtype, RawTensor, Stack
from pronk.backends.reference import from_host, kv_bytes, sample, take_rows, to_host
from pronk.core.config import ModelConfig

__all__ = [
    "attention", "block_bytes", "checksum", "default_threads", "embed", "from_host", "isa",
    "kv_bytes", "linear", "make_kv", "make_stack", "make_table", "make_vector", "make_weight",
    "measure_bandwidth", "measure_int8", "name", "numerics", "packed_bytes", "read_block",
    "rms_norm", "rope", "sample", "set_threads", "swiglu", "take_profile", "take_rows", "to_host",
    "write_block",
]  # fmt: skip

name = "cpu"

isa = _cpu.isa
default_threads = _cpu.hardware_threads
set_threads = _cpu.set_threads
measure_bandwidth = _cpu.measure_bandwidth
measure_int8 = _cpu.measure_int8
take_profile = _cpu.take_profile

LAYOUT_VERSION = _cpu.LAYOUT_VERSION
"""Of packed bytes: what another version has packed must be packed again."""
checksum = _cpu.checksum


def packed_bytes(kind: str, rows: int, cols: int) -> int:
    """Bytes that a weight takes once it is loaded."""
    return int(_cpu.packed_bytes(KINDS[kind].ggml_id, rows, cols))


def make_weight(tensors: Sequence[RawTensor]) -> _cpu.PackedWeight:
    weight = _cpu.PackedWeight(tensors[0].shape[1])
    for tensor in tensors:
        weight.append(KINDS[tensor.kind].ggml_id, tensor.data)
    return weight


def packed_parts(weight: _cpu.PackedWeight) -> list[tuple[int, int, U8]]:
    """What `from_packed` makes the same weight from: for each tensor stacked in it the number of
    its layout, its rows, and the packed bytes as a view."""
    return weight.packed


def from_packed(cols: int, parts: Sequence[tuple[int, int, U8]]) -> _cpu.PackedWeight:
    """A weight whose bytes stay where they are, in a mapped file for instance; each part must begin
    at a multiple of 64. ValueError for parts that cannot be of a weight of so many columns."""
    weight = _cpu.PackedWeight(cols)
    for layout, rows, data in parts:
        weight.append_packed(layout, rows, data)
    return weight


@dataclass(frozen=True, slots=True)
class Table:
    """An embedding that stays in its file; rows are decoded when they are asked for."""

    kind_id: int
    data: U8
    dim: int


def make_table(tensor: RawTensor) -> Table:
    return Table(KINDS[tensor.kind].ggml_id, tensor.data, tensor.shape[1])


def make_vector(tensor: RawTensor) -> F32:
    out = np.empty(tensor.shape, np.float32)
    _cpu.dequantize(KINDS[tensor.kind].ggml_id, tensor.data, out)
    return out.reshape(-1)


def make_kv(config: ModelConfig, n_blocks: int, dtype: KvDtype) -> list[_cpu.KvMemory]:
    G, K = config.n_kv_heads, config.head_dim
    return [_cpu.KvMemory(n_blocks, G, K, dtype) for _ in range(config.n_layers)]


def block_bytes(kv: Sequence[_cpu.KvMemory]) -> int:
    return sum(layer.block_bytes for layer in kv)


def read_block(kv: Sequence[_cpu.KvMemory], block: int) -> U8:
    data = np.empty(block_bytes(kv), np.uint8)
    for layer, part in zip(kv, np.split(data, len(kv)), strict=True):
        layer.read_block(block, part)
    return data


def write_block(kv: Sequence[_cpu.KvMemory], block: int, data: U8) -> None:
    if len(data) != block_bytes(kv):
        raise ValueError("kv: not as many bytes as a block has")
    for layer, part in zip(kv, np.split(data, len(kv)), strict=True):
        layer.write_block(block, part)


def numerics() -> str:
    """The instruction set, and a digest of the compiled code itself: whoever changes a kernel need
    not think of a number."""
    code = Path(_cpu.__file__).read_bytes()
    return f"cpu, {isa()}, {hashlib.blake2b(code, digest_size=16).hexdigest()}"


def embed(ids_T: I32, table: Table) -> F32:
    out_TD = np.empty((len(ids_T), table.dim), np.float32)
    _cpu.embed(table.kind_id, table.data, ids_T, out_TD)
    return out_TD


def rms_norm(x_TD: F32, w_D: F32, eps: float, residual: F32 | None = None) -> Any:
    y_TD = np.empty_like(x_TD)
    if residual is None:
        _cpu.rms_norm(x_TD, w_D, eps, y_TD)
        return y_TD
    sum_TD = np.empty_like(x_TD)
    _cpu.add_rms_norm(x_TD, residual, w_D, eps, sum_TD, y_TD)
    return y_TD, sum_TD


def linear(x_TD: F32, weight: _cpu.PackedWeight) -> F32:
    y_TO = np.empty((len(x_TD), weight.rows), np.float32)
    _cpu.linear(weight, x_TD, y_TO)
    return y_TO


def rope(q_THK: F32, k_TGK: F32, cos_sin: F32, positions_T: I32) -> tuple[F32, F32]:
    """Rotates in place: q and k are slices of the projection that nobody reads unrotated."""
    _cpu.rope(q_THK, cos_sin, positions_T)
    _cpu.rope(k_TGK, cos_sin, positions_T)
    return q_THK, k_TGK


def attention(q_THK: F32, k_TGK: F32, v_TGK: F32, kv: _cpu.KvMemory | None, batch: Batch) -> F32:
    if kv is None:
        kv, batch = _own_rows_only(k_TGK, batch)
    o_THK = np.empty(q_THK.shape, np.float32)
    _cpu.attention(
        q_THK, k_TGK, v_TGK, kv, batch.positions_T, batch.starts_S, batch.lengths_S,
        batch.blocks_SB, o_THK,
    )  # fmt: skip
    return o_THK


def _own_rows_only(k_TGK: F32, batch: Batch) -> tuple[_cpu.KvMemory, Batch]:
    """A float32 cache for this one call, each sequence starting at position 0."""
    _, G, K = k_TGK.shape
    counts_S = np.diff(batch.starts_S)
    blocks_S = -(-counts_S // BLOCK)
    first_S = np.cumsum(blocks_S) - blocks_S
    within_T = np.arange(len(k_TGK)) - np.repeat(batch.starts_S[:-1], counts_S)
    table_SB = first_S[:, None] + np.arange(max(int(blocks_S.max()), 1))
    kv = _cpu.KvMemory(max(int(blocks_S.sum()), 1), G, K, "f32")
    return kv, Batch(
        within_T.astype(np.int32), batch.starts_S, counts_S.astype(np.int32),
        table_SB.astype(np.int32),
    )  # fmt: skip


def swiglu(gate_up_T2F: F32) -> F32:
    y_TF = np.empty((gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2), np.float32)
    _cpu.swiglu(gate_up_T2F, y_TF)
    return y_TF


def make_stack(config: ModelConfig, layers: Sequence[Any], norm_D: F32, cos_sin: F32) -> Stack:
    """The layers of a model (`model.llama.LayerWeights`) and what follows them in native code."""
    stack = _cpu.Stack(
        config.n_heads, config.n_kv_heads, config.head_dim, config.ffn_dim, config.norm_eps,
        norm_D, cos_sin,
    )  # fmt: skip
    for layer in layers:
        stack.append(
            layer.attn_norm, layer.wqkv, layer.wo, layer.ffn_norm, layer.w_gate_up, layer.w_down
        )

    def run(x_TD: F32, batch: Batch, kv: Sequence[_cpu.KvMemory], rows_R: I32 | None) -> F32:
        n_rows = len(x_TD) if rows_R is None else len(rows_R)
        out_RD = np.empty((n_rows, x_TD.shape[1]), np.float32)
        stack.run(
            kv, batch.positions_T, batch.starts_S, batch.lengths_S, batch.blocks_SB, x_TD, rows_R,
            out_RD,
        )  # fmt: skip
        return out_RD

    return run
