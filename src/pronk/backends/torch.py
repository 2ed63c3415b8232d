"""The PyTorch backend: the ops contract on the CPU, on CUDA and ROCm, and on Apple's MPS; in
float32 or bfloat16, with gradients.

A backend is an object here, not a module: it has a device and a dtype. What each op means is
written in `backends/reference.py`. The plain version of everything; where there are no keys and
values to keep (`kv` None: training) all of it can be differentiated. Rows are not independent of
each other bit for bit, as they are on the other backends: the library's matrix products take other
paths for other heights. Nothing offers it to users yet.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pronk.backends import reference
from pronk.backends.formats import dequantize
from pronk.backends.protocol import (
    BLOCK,
    F32,
    I32,
    U8,
    Batch,
    KvDtype,
    RawTensor,
    Sampled,
    SampleParams,
)
from pronk.core.config import ModelConfig
from pronk.core.errors import UserError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_STORED = {"f32": torch.float32, "f16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of one layer, `[n_blocks * BLOCK, G, K]`; int8 with a scale for each position
    and head, as the reference has it."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None]


def best_device() -> str:
    """The accelerator of this machine, or its CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class TorchOps:
    """`device` None: the best there is. `dtype` None: bf16 on an accelerator, else f32. Norms,
    softmax and logits are float32 in any case."""

    name = "torch"

    def __init__(self, device: str | None = None, dtype: str | None = None) -> None:
        self.device = _device(best_device() if device is None else device)
        if dtype is None:
            dtype = "f32" if self.device.type == "cpu" else "bf16"
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]

    # Weights and memory.

    def packed_bytes(self, kind: str, rows: int, cols: int) -> int:
        """Bytes that a weight takes once it is loaded."""
        del kind
        return rows * cols * self.dtype.itemsize

    def make_weight(self, tensors: Sequence[RawTensor]) -> Tensor:
        parts = [self._floats(dequantize(t.kind, t.data)).to(self.dtype) for t in tensors]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def make_table(self, tensor: RawTensor) -> Tensor:
        return self.make_weight([tensor])

    def make_vector(self, tensor: RawTensor) -> Tensor:
        return self._floats(dequantize(tensor.kind, tensor.data).reshape(-1))

    def make_kv(self, config: ModelConfig, n_blocks: int, dtype: KvDtype) -> list[KvCache]:
        shape = (n_blocks * BLOCK, config.n_kv_heads, config.head_dim)

        def zeros(*size: int, stored: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=stored, device=self.device)

        def layer() -> KvCache:
            pair = [zeros(*shape, stored=_STORED[dtype]) for _ in "kv"]
            scales = [
                zeros(*shape[:2], stored=torch.float32) if dtype == "int8" else None for _ in "kv"
            ]
            return KvCache(*pair, *scales)

        return [layer() for _ in range(config.n_layers)]

    kv_bytes = staticmethod(reference.kv_bytes)

    def block_bytes(self, kv: Sequence[KvCache]) -> int:
        return sum(t[:BLOCK].numel() * t.element_size() for c in kv for t in c.tensors)

    def read_block(self, kv: Sequence[KvCache], block: int) -> U8:
        parts = [t[_slots(t, block)].cpu().contiguous() for c in kv for t in c.tensors]
        return np.concatenate([part.view(torch.uint8).reshape(-1).numpy() for part in parts])

    def write_block(self, kv: Sequence[KvCache], block: int, data: U8) -> None:
        if len(data) != self.block_bytes(kv):
            raise ValueError("kv: not as many bytes as a block has")
        at = 0
        for tensor in (t for c in kv for t in c.tensors):
            part = tensor[_slots(tensor, block)]
            n = part.numel() * part.element_size()
            raw = torch.from_numpy(data[at : at + n].copy()).view(part.dtype)
            part.copy_(raw.reshape(part.shape))
            at += n

    checksum = staticmethod(reference.checksum)

    def numerics(self) -> str:
        """What the numbers of a cache depend on."""
        chip = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "host"
        return f"torch {torch.__version__}, {self.device.type}, {chip}, {self.dtype}"

    # The forward pass.

    def embed(self, ids_T: I32, table: Tensor) -> Tensor:
        return F.embedding(self._ids(ids_T), table)

    def rms_norm(
        self, x_TD: Tensor, w_D: Tensor, eps: float, residual: Tensor | None = None
    ) -> Any:
        if residual is not None:
            x_TD = x_TD + residual
        x32_TD = x_TD.float()
        scale_T1 = torch.rsqrt(x32_TD.square().mean(dim=-1, keepdim=True) + eps)
        y_TD = (x32_TD * scale_T1 * w_D).to(x_TD.dtype)
        return y_TD if residual is None else (y_TD, x_TD)

    def linear(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x_TD, weight)

    def rope(
        self, q_THK: Tensor, k_TGK: Tensor, cos_sin: Tensor, positions_T: I32
    ) -> tuple[Tensor, Tensor]:
        cos_sin_TJ2 = cos_sin[self._ids(positions_T)]
        return _rotate(q_THK, cos_sin_TJ2), _rotate(k_TGK, cos_sin_TJ2)

    def attention(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, kv: KvCache | None, batch: Batch
    ) -> Tensor:
        starts = batch.starts_S.tolist()
        rotated = kv is not None and kv.k_scale is not None
        if rotated:
            q_THK, k_TGK = _hadamard(q_THK), _hadamard(k_TGK)
        outputs = []
        for s, (start, stop) in enumerate(itertools.pairwise(starts)):
            rows = slice(start, stop)
            if kv is None:
                keys, values = k_TGK[rows], v_TGK[rows]
            else:
                keys, values = self._cached(kv, s, rows, k_TGK, v_TGK, batch)
            outputs.append(_attend(q_THK[rows], keys.to(q_THK.dtype), values.to(q_THK.dtype)))
        return torch.cat(outputs)

    def _cached(
        self, kv: KvCache, s: int, rows: slice, k_TGK: Tensor, v_TGK: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Stores the rows of a sequence; its keys and values from the beginning, `[N, G, K]`."""
        all_N = np.arange(batch.lengths_S[s])
        slots_N = batch.blocks_SB[s][all_N // BLOCK] * BLOCK + all_N % BLOCK
        new_T = self._ids(slots_N[batch.positions_T[rows]])
        _store(kv.k, kv.k_scale, new_T, k_TGK[rows])
        _store(kv.v, kv.v_scale, new_T, v_TGK[rows])
        known_N = self._ids(slots_N)
        return _load(kv.k, kv.k_scale, known_N), _load(kv.v, kv.v_scale, known_N)

    def swiglu(self, gate_up_T2F: Tensor) -> Tensor:
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF

    def take_rows(self, x_TD: Tensor, rows_R: I32) -> Tensor:
        return x_TD[self._ids(rows_R)]

    # Between the device and the host.

    def sample(
        self, logits_RV: Any, params: Sequence[SampleParams], mask_RV: Any = None
    ) -> list[Sampled]:
        return reference.sample(self.to_host(logits_RV), params, mask_RV)

    def to_host(self, x: Any) -> F32:
        if isinstance(x, np.ndarray):
            return x
        host: F32 = x.detach().float().cpu().numpy()
        return host

    def from_host(self, x: F32) -> Tensor:
        return self._floats(x)

    def default_threads(self) -> int:
        return torch.get_num_threads()

    def set_threads(self, n: int) -> None:
        """Of PyTorch as a whole: it has one pool a process."""
        if self.device.type == "cpu" and n != torch.get_num_threads():
            torch.set_num_threads(n)

    def _floats(self, x: F32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(self.device)

    def _ids(self, ids: Any) -> Tensor:
        return torch.from_numpy(np.asarray(ids, np.int64)).to(self.device)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _slots(tensor: Tensor, block: int) -> slice:
    if not 0 <= block < len(tensor) // BLOCK:
        raise ValueError("kv: block outside the cache")
    return slice(block * BLOCK, (block + 1) * BLOCK)


def _rotate(x_THK: Tensor, cos_sin_TJ2: Tensor) -> Tensor:
    cos, sin = cos_sin_TJ2[:, None, :, 0], cos_sin_TJ2[:, None, :, 1]
    even, odd = x_THK[..., 0::2].float(), x_THK[..., 1::2].float()
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    rotated: Tensor = pairs.flatten(-2).to(x_THK.dtype)
    return rotated


def _hadamard(x: Tensor) -> Tensor:
    """`reference.rotate`."""
    K = x.shape[-1]
    size = K & -K
    sums = x.float().reshape(-1, K // size, size)
    length = 1
    while length < size:
        pairs = sums.reshape(len(sums), -1, 2, length)
        sums = torch.stack(
            (pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2
        )
        length *= 2
    rotated: Tensor = (sums.reshape(x.shape) * size**-0.5).to(x.dtype)
    return rotated


def _store(cache: Tensor, scales: Tensor | None, slots_T: Tensor, x_TGK: Tensor) -> None:
    x_TGK = x_TGK.detach().float()
    if scales is None:
        largest = torch.finfo(cache.dtype).max  # instead of infinity
        cache[slots_T] = x_TGK.clamp(-largest, largest).to(cache.dtype)
        return
    largest_TG = x_TGK.abs().amax(dim=-1)
    inverse_TG = torch.where(largest_TG > 0, 127 / largest_TG.clamp_min(1e-38), 0.0)
    cache[slots_T] = (x_TGK * inverse_TG[..., None]).round().to(torch.int8)
    scales[slots_T] = largest_TG / 127


def _load(cache: Tensor, scales: Tensor | None, slots_N: Tensor) -> Tensor:
    x_NGK: Tensor = cache[slots_N]
    return x_NGK if scales is None else x_NGK.float() * scales[slots_N][..., None]


def _attend(q_THK: Tensor, keys_NGK: Tensor, values_NGK: Tensor) -> Tensor:
    """The rows of one sequence, its newest ones, over all N positions."""
    n_rows, n_known = len(q_THK), len(keys_NGK)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, keys_NGK, values_NGK))
    mask = None
    if 1 < n_rows < n_known:
        mask = torch.ones(n_rows, n_known, dtype=torch.bool, device=q.device).tril(n_known - n_rows)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=n_rows == n_known, enable_gqa=True
    )
    return o[0].transpose(0, 1)
