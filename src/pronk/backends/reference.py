"""The NumPy backend: the specification of every op, and the fallback where nothing is compiled.

Written to be read and to be exact, not to be fast. A row's numbers never depend on the other rows
of its step: matrix products run row by row, because BLAS takes other paths for other heights.
"""

import hashlib
import math
import platform
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
from pronk.core.errors import PronkError

name = "reference"


def packed_bytes(kind: str, rows: int, cols: int) -> int:
    """Bytes that a weight takes once it is loaded: everything is float32 here."""
    del kind
    return 4 * rows * cols


def make_weight(tensors: Sequence[RawTensor]) -> F32:
    return np.concatenate([dequantize(t.kind, t.data) for t in tensors])


def make_table(tensor: RawTensor) -> RawTensor:
    return tensor


def make_vector(tensor: RawTensor) -> F32:
    return dequantize(tensor.kind, tensor.data).reshape(-1)


def embed(ids_T: I32, table: RawTensor) -> F32:
    return dequantize(table.kind, table.data[ids_T])


def rms_norm(x_TD: F32, w_D: F32, eps: float, residual: F32 | None = None) -> Any:
    if residual is not None:
        x_TD = x_TD + residual
    mean_square_T1 = np.mean(x_TD * x_TD, axis=-1, keepdims=True, dtype=np.float32)
    y_TD = x_TD * (1 / np.sqrt(mean_square_T1 + np.float32(eps))) * w_D
    return y_TD if residual is None else (y_TD, x_TD)


def linear(x_TD: F32, weight: F32) -> F32:
    y_TO = np.empty((len(x_TD), len(weight)), dtype=np.float32)
    for row, x_D in enumerate(x_TD):
        np.matmul(weight, x_D, out=y_TO[row])
    return y_TO


def rope(q_THK: F32, k_TGK: F32, cos_sin: F32, positions_T: I32) -> tuple[F32, F32]:
    return _rotate(q_THK, cos_sin[positions_T]), _rotate(k_TGK, cos_sin[positions_T])


def _rotate(x_THK: F32, cos_sin_TJ2: F32) -> F32:
    cos, sin = cos_sin_TJ2[:, None, :, 0], cos_sin_TJ2[:, None, :, 1]
    even, odd = x_THK[..., 0::2], x_THK[..., 1::2]
    y_THK = np.empty(x_THK.shape, dtype=np.float32)
    y_THK[..., 0::2] = even * cos - odd * sin
    y_THK[..., 1::2] = even * sin + odd * cos
    return y_THK


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of one layer, `[n_blocks * BLOCK, G, K]`, in the dtype asked for.

    int8 has one float32 scale for each position and head: the largest magnitude over 127. Its keys
    are stored rotated, because rounding then costs less; queries meet them rotated, too."""

    k: npt.NDArray[Any]
    v: npt.NDArray[Any]
    k_scale: F32 | None
    v_scale: F32 | None


def make_kv(config: ModelConfig, n_blocks: int, dtype: KvDtype) -> list[KvCache]:
    shape = (n_blocks * BLOCK, config.n_kv_heads, config.head_dim)
    stored = {"f32": np.float32, "f16": np.float16, "int8": np.int8}[dtype]

    def layer() -> KvCache:
        scales = [np.zeros(shape[:2], np.float32) if dtype == "int8" else None for _ in "kv"]
        return KvCache(np.zeros(shape, stored), np.zeros(shape, stored), *scales)

    return [layer() for _ in range(config.n_layers)]


def _arrays(kv: Sequence[KvCache]) -> list[npt.NDArray[Any]]:
    found = [array for c in kv for array in (c.k, c.v, c.k_scale, c.v_scale)]
    return [array for array in found if array is not None]


def block_bytes(kv: Sequence[KvCache]) -> int:
    return sum(array[:BLOCK].nbytes for array in _arrays(kv))


def read_block(kv: Sequence[KvCache], block: int) -> U8:
    parts = [array[_slots(array, block)] for array in _arrays(kv)]
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


def write_block(kv: Sequence[KvCache], block: int, data: U8) -> None:
    if len(data) != block_bytes(kv):
        raise ValueError("kv: not as many bytes as a block has")
    at = 0
    for array in _arrays(kv):
        part = array[_slots(array, block)]
        part[...] = data[at : at + part.nbytes].view(array.dtype).reshape(part.shape)
        at += part.nbytes


def _slots(array: npt.NDArray[Any], block: int) -> slice:
    if not 0 <= block < len(array) // BLOCK:
        raise ValueError("kv: block outside the cache")
    return slice(block * BLOCK, (block + 1) * BLOCK)


def checksum(data: U8) -> int:
    return zlib.crc32(data.data)


def numerics() -> str:
    """NumPy and its BLAS choose their code by the processor, and do not tell: a digest of what they
    compute does."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 37, 515), dtype=np.float32)
    results = [np.matmul(a, b.transpose(0, 2, 1)), a @ b[0, 0], np.exp(a), np.mean(a, axis=-1)]
    digest = hashlib.blake2b(b"".join(x.tobytes() for x in results), digest_size=16)
    return f"reference, NumPy {np.__version__}, {platform.machine()}, {digest.hexdigest()}"


def kv_bytes(config: ModelConfig, n_blocks: int, dtype: KvDtype) -> int:
    """Bytes of the KV cache of all layers."""
    per_head = {"f32": 4 * config.head_dim, "f16": 2 * config.head_dim, "int8": config.head_dim + 4}
    return 2 * config.n_layers * n_blocks * BLOCK * config.n_kv_heads * per_head[dtype]


def quantize_int8(x: F32) -> tuple[npt.NDArray[np.int8], F32]:
    """Symmetric int8 over the last axis: codes and float32 scales (x is about codes * scale)."""
    largest = np.abs(x).max(axis=-1)
    inverse = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), 0)
    codes = np.rint(x * inverse.astype(np.float32)[..., None]).astype(np.int8)
    return codes, largest * np.float32(1 / 127)


def rotate(x: F32) -> F32:
    """x `[..., K]` times an orthogonal matrix that is its own inverse: the Hadamard matrix of the
    largest power of two that divides K, along the diagonal (QuaRot, Ashkboos et al. 2024)."""
    K = x.shape[-1]
    size = K & -K
    sums = x.reshape(-1, K // size, size)
    length = 1
    while length < size:
        pairs = sums.reshape(len(sums), -1, 2, length)
        sums = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2)
        length *= 2
    return sums.reshape(x.shape) * np.float32(1 / math.sqrt(size))


def _store(cache: npt.NDArray[Any], scales: F32 | None, slots_T: I32, x_TGK: F32) -> None:
    if scales is None:
        largest = np.finfo(cache.dtype).max  # instead of infinity
        cache[slots_T] = np.clip(x_TGK, -largest, largest)
    else:
        cache[slots_T], scales[slots_T] = quantize_int8(x_TGK)


def _load(cache: npt.NDArray[Any], scales: F32 | None, slots_N: I32) -> F32:
    x_NGK = cache[slots_N].astype(np.float32)
    return x_NGK if scales is None else x_NGK * scales[slots_N][..., None]


def attention(q_THK: F32, k_TGK: F32, v_TGK: F32, kv: KvCache | None, batch: Batch) -> F32:
    o_THK = np.empty(q_THK.shape, dtype=np.float32)
    if kv is not None and kv.k_scale is not None:
        q_THK, k_TGK = rotate(q_THK), rotate(k_TGK)
    for s in range(len(batch.lengths_S)):
        rows = slice(int(batch.starts_S[s]), int(batch.starts_S[s + 1]))
        positions = batch.positions_T[rows]
        if kv is None:
            keys_NGK, values_NGK = k_TGK[rows], v_TGK[rows]
            positions = positions - positions[0] if len(positions) else positions
        else:
            all_N = np.arange(batch.lengths_S[s])
            slots_N = batch.blocks_SB[s][all_N // BLOCK] * BLOCK + all_N % BLOCK
            _store(kv.k, kv.k_scale, slots_N[positions], k_TGK[rows])
            _store(kv.v, kv.v_scale, slots_N[positions], v_TGK[rows])
            keys_NGK = _load(kv.k, kv.k_scale, slots_N)
            values_NGK = _load(kv.v, kv.v_scale, slots_N)
        for row, position in zip(range(rows.start, rows.stop), positions, strict=True):
            o_THK[row] = _attend(q_THK[row], keys_NGK[: position + 1], values_NGK[: position + 1])
    return o_THK


def _attend(q_HK: F32, keys_NGK: F32, values_NGK: F32) -> F32:
    """One query row over N positions; query head h reads key/value head h // (H/G)."""
    H, K = q_HK.shape
    G = keys_NGK.shape[1]
    q_GMK = q_HK.reshape(G, H // G, K) * np.float32(K**-0.5)
    scores_GMN = np.matmul(q_GMK, np.ascontiguousarray(keys_NGK.transpose(1, 2, 0)))
    scores_GMN = np.exp(scores_GMN - scores_GMN.max(axis=-1, keepdims=True))
    o_GMK: F32 = np.matmul(scores_GMN, np.ascontiguousarray(values_NGK.transpose(1, 0, 2)))
    o_GMK = o_GMK / scores_GMN.sum(axis=-1, keepdims=True)
    return o_GMK.reshape(H, K)


def swiglu(gate_up_T2F: F32) -> F32:
    gate_TF, up_TF = np.split(gate_up_T2F, 2, axis=-1)
    with np.errstate(
        over="ignore"
    ):  # exp(-gate) of a very negative gate is inf, and 1/inf is right
        h_TF: F32 = gate_TF / (1 + np.exp(-gate_TF)) * up_TF
    return h_TF


def take_rows(x_TD: F32, rows_R: I32) -> F32:
    rows_RD: F32 = x_TD[rows_R]
    return rows_RD


def to_host(x: F32) -> F32:
    return x


def from_host(x: F32) -> F32:
    return x


def default_threads() -> int:
    """One: NumPy threads by itself where its BLAS does."""
    return 1


def set_threads(n: int) -> None:
    """NumPy's own threads are left as they are."""
    del n


def sample(
    logits_RV: F32, params: Sequence[SampleParams], mask_RV: npt.NDArray[np.bool_] | None = None
) -> list[Sampled]:
    rows = range(len(params))
    return [
        _sample_row(logits_RV[r], params[r], None if mask_RV is None else mask_RV[r]) for r in rows
    ]


def _sample_row(logits_V: F32, p: SampleParams, mask_V: npt.NDArray[np.bool_] | None) -> Sampled:
    if not np.isfinite(logits_V.max()):
        raise PronkError("the model computed logits that are not finite: its weights are damaged")
    scores_V = logits_V
    if len(p.output_ids) or len(p.prompt_ids) or p.logit_bias:
        scores_V = _penalize(logits_V, p)
    if mask_V is not None:
        scores_V = np.where(mask_V, scores_V, np.float32(-np.inf))
        if not mask_V.any():
            raise PronkError("sampling: the mask allows no token at all")
    token = int(np.argmax(scores_V)) if p.temperature == 0 else _draw(scores_V, p)
    if p.top_logprobs < 0:
        return Sampled(token)
    logprobs_V = log_softmax(logits_V)
    best = _largest(logprobs_V, p.top_logprobs)
    return Sampled(
        token, float(logprobs_V[token]), tuple((int(i), float(logprobs_V[i])) for i in best)
    )


def log_softmax(logits: F32) -> F32:
    """Over the last axis, float32, the sum in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted, dtype=np.float64).sum(axis=-1, keepdims=True)
    logprobs: F32 = (shifted - np.log(total)).astype(np.float32)
    return logprobs


def _largest(x_V: npt.NDArray[np.floating[Any]], n: int) -> npt.NDArray[np.int64]:
    """Ids of the n largest values, largest first, the smaller id first among equals."""
    if n == 0:
        return np.empty(0, np.int64)
    n = min(n, len(x_V))
    near = _near_largest(x_V, n)
    x_N = x_V[near]
    threshold = np.partition(x_N, len(x_N) - n)[len(x_N) - n]
    keep = x_N >= threshold
    order = np.argsort(-x_N[keep], kind="stable")[:n]
    largest: npt.NDArray[np.int64] = near[keep][order]
    return largest


_IN_GROUP = 64


def _near_largest(x_V: npt.NDArray[np.floating[Any]], n: int) -> npt.NDArray[np.int64]:
    """Ids in rising order, the n largest and their equals among them, few others: selecting among
    all values would take longer than the rest of a draw. n groups have a maximum of at least
    `floor`, so the n largest values are not below it."""
    groups = len(x_V) // _IN_GROUP
    if n >= groups:
        return np.arange(len(x_V))
    maxima_G = x_V[: groups * _IN_GROUP].reshape(_IN_GROUP, groups).max(axis=0)
    floor = np.partition(maxima_G, groups - n)[groups - n]
    return np.flatnonzero(x_V >= floor)


def _ids(ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """Without going through Python integers where `ids` is an array."""
    return np.asarray(ids).astype(np.int64)


def _penalize(logits_V: F32, p: SampleParams) -> F32:
    """Repetition penalty (Keskar et al. 2019), OpenAI's presence and frequency penalties, bias."""
    scores_V = logits_V.copy()
    if p.repetition_penalty != 1.0:
        seen = np.union1d(_ids(p.prompt_ids), _ids(p.output_ids))
        values = scores_V[seen]
        penalty = np.float32(p.repetition_penalty)
        scores_V[seen] = np.where(values > 0, values / penalty, values * penalty)
    if len(p.output_ids) and (p.presence_penalty or p.frequency_penalty):
        ids, counts = np.unique(_ids(p.output_ids), return_counts=True)
        scores_V[ids] -= (p.presence_penalty + p.frequency_penalty * counts).astype(np.float32)
    for token, bias in p.logit_bias:
        scores_V[token] += np.float32(bias)
    return scores_V


def _draw(scores_V: F32, p: SampleParams) -> int:
    """One token by inverse transform over the candidates in falling order of probability.

    Temperature first, then top-k, top-p and min-p, each on what the one before left (the order of
    Hugging Face's warpers). Only as many tokens are sorted as the draw can reach, and none that a
    mask forbids: a grammar may leave a handful, and all others would be equal candidates.
    """
    uniform = np.random.Generator(np.random.Philox(key=p.seed, counter=p.draw)).random()
    scaled_V = (scores_V.astype(np.float64) - float(scores_V.max())) / p.temperature
    tokens = np.flatnonzero(scaled_V > -np.inf)
    scaled_V = scaled_V[tokens]
    if 0 < p.top_k < len(scaled_V):
        largest = _largest(scaled_V, p.top_k)
        tokens, scaled_V = tokens[largest], scaled_V[largest]
    weights_V = np.exp(scaled_V)
    total = weights_V.sum()
    n = 256
    while True:
        order = _largest(scaled_V, n)
        probs = weights_V[order] / total
        before = np.cumsum(probs) - probs
        if p.top_p < 1.0:
            complete = before[-1] > p.top_p
        elif p.min_p > 0.0:
            complete = probs[-1] < p.min_p * probs[0]
        else:
            complete = before[-1] + probs[-1] > uniform
        if complete or n >= len(scaled_V):
            break
        n *= 8
    # a token stays while the mass before it is within top_p (Meta's rule)
    keep = int(np.count_nonzero(before <= p.top_p)) if p.top_p < 1.0 else len(probs)
    if p.min_p > 0.0:
        keep = min(keep, int(np.count_nonzero(probs >= p.min_p * probs[0])))
    mass = probs[: max(keep, 1)]
    share = mass.sum() if p.top_p < 1.0 or p.min_p > 0.0 else 1.0
    index = int(np.searchsorted(np.cumsum(mass), uniform * share, side="right"))
    return int(tokens[order[min(index, int(np.count_nonzero(mass)) - 1)]])
