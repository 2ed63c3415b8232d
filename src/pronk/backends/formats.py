"""Block formats of stored weights, and their exact decoding to float32 with NumPy.

This is the specification that every compiled decoder is tested against, and the decoder that is
used where nothing is compiled. It does not encode. All formats are little-endian; a row of a
tensor is a whole number of blocks. Layouts: ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pronk.core.errors import CheckpointError

F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]
Ints: TypeAlias = npt.NDArray[Any]

_CHUNK: Final = 1 << 17
"""Elements decoded at once: temporaries stay near 2 MB, inside the second-level cache."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """`elements` weights are stored in `bytes` bytes."""

    name: str
    ggml_id: int
    elements: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; CheckpointError when that is no whole number of
        blocks."""
        if columns % self.elements:
            raise CheckpointError(
                f"{self.name} has blocks of {self.elements} weights; {columns} columns do not fit"
            )
        return columns // self.elements * self.bytes


_LIST = (
    BlockKind("F32", 0, 1, 4),
    BlockKind("F16", 1, 1, 2),
    BlockKind("Q4_0", 2, 32, 18),
    BlockKind("Q4_1", 3, 32, 20),
    BlockKind("Q5_0", 6, 32, 22),
    BlockKind("Q5_1", 7, 32, 24),
    BlockKind("Q8_0", 8, 32, 34),
    BlockKind("Q2_K", 10, 256, 84),
    BlockKind("Q3_K", 11, 256, 110),
    BlockKind("Q4_K", 12, 256, 144),
    BlockKind("Q5_K", 13, 256, 176),
    BlockKind("Q6_K", 14, 256, 210),
    BlockKind("IQ4_NL", 20, 32, 18),
    BlockKind("IQ4_XS", 23, 256, 136),
    BlockKind("BF16", 30, 1, 2),
    BlockKind("TQ1_0", 34, 256, 54),
    BlockKind("TQ2_0", 35, 256, 66),
    BlockKind("MXFP4", 39, 32, 17),
    BlockKind("Q1_0", 41, 128, 18),
)

KINDS: Final[Mapping[str, BlockKind]] = MappingProxyType({kind.name: kind for kind in _LIST})
KIND_BY_ID: Final[Mapping[int, BlockKind]] = MappingProxyType({k.ggml_id: k for k in _LIST})


def dequantize(kind: str, data: U8) -> F32:
    """Weights `[rows, columns]` of raw rows `[rows, bytes_per_row]`, bit for bit as ggml's NumPy
    code gives them; infinities and NaNs of a scale pass through without a warning."""
    block = KINDS[kind]
    rows, row_bytes = data.shape
    assert data.dtype == np.uint8, data.dtype
    assert row_bytes % block.bytes == 0, (kind, data.shape)
    out = np.empty((rows, row_bytes // block.bytes * block.elements), np.float32)
    decode = _DECODERS[kind]
    step = max(1, _CHUNK // max(1, out.shape[1]))
    with np.errstate(all="ignore"):
        for first in range(0, rows, step):
            raw = np.ascontiguousarray(data[first : first + step])
            target = out[first : first + step]
            target[:] = decode(raw.reshape(-1, block.bytes)).reshape(target.shape)
    return out


# The functions below decode blocks [n, bytes] to weights [n, elements].


def _f32(blocks: U8) -> F32:
    return blocks.view(np.float32)


def _half(blocks: U8) -> F32:
    """Also the decoder of every float16 scale: `[n, 2]` bytes to `[n, 1]`."""
    return blocks.view(np.float16).astype(np.float32)


def _bf16(blocks: U8) -> F32:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _unpack(packed: U8, run: int, bits: int) -> U8:
    """`[n, b]` bytes to `[n, b * 8 / bits]` numbers. Every `run` bytes hold 8 / bits runs of
    elements, the first run in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = packed.reshape(len(packed), -1, 1, run) >> shifts
    parts &= np.uint8((1 << bits) - 1)
    return parts.reshape(len(packed), -1)


def _by_group(q: Ints, scale: F32, minimum: F32 | None = None) -> F32:
    """`scale * q - minimum`, where each of the G columns of `[n, G]` serves E/G elements."""
    grouped = q.reshape(*scale.shape, -1).astype(np.float32)
    grouped = scale[:, :, None] * grouped
    if minimum is not None:
        grouped -= minimum[:, :, None]
    return grouped.reshape(len(q), -1)


def _q4_0(blocks: U8) -> F32:
    q = _unpack(blocks[:, 2:], 16, 4).astype(np.int8) - np.int8(8)
    return _by_group(q, _half(blocks[:, :2]))


def _q4_1(blocks: U8) -> F32:
    q = _unpack(blocks[:, 4:], 16, 4)
    return _by_group(q, _half(blocks[:, :2])) + _half(blocks[:, 2:4])


def _five_bits(high: U8, low: U8) -> U8:
    """Nibbles joined with a fifth bit: bit j of the 4 bytes `high` belongs to element j."""
    return _unpack(low, 16, 4) | np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: U8) -> F32:
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:]).astype(np.int8) - np.int8(16)
    return _by_group(q, _half(blocks[:, :2]))


def _q5_1(blocks: U8) -> F32:
    q = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    return _by_group(q, _half(blocks[:, :2])) + _half(blocks[:, 2:4])


def _q8_0(blocks: U8) -> F32:
    return _by_group(blocks[:, 2:].view(np.int8), _half(blocks[:, :2]))


def _q2_k(blocks: U8) -> F32:
    """scales[16] (low nibble scale, high nibble minimum), qs[64], d, dmin."""
    scales = blocks[:, :16]
    d, dmin = _half(blocks[:, 80:82]), _half(blocks[:, 82:])
    return _by_group(_unpack(blocks[:, 16:80], 32, 2), d * (scales & 15), dmin * (scales >> 4))


def _q3_k(blocks: U8) -> F32:
    """hmask[32], qs[64], scales[12], d. Scales: 16 low nibbles, then 16 pairs of high bits; a
    clear bit in hmask takes 4 off."""
    scales = blocks[:, 96:108]
    six_bits = _unpack(scales[:, :8], 8, 4) | _unpack(scales[:, 8:], 4, 2) << np.uint8(4)
    high = _unpack(blocks[:, :32], 32, 1) << np.uint8(2)
    q = (_unpack(blocks[:, 32:96], 32, 2) | high).astype(np.int8) - np.int8(4)
    return _by_group(q, _half(blocks[:, 108:]) * (six_bits.astype(np.int8) - np.int8(32)))


def _scales_and_mins(packed: U8) -> tuple[U8, U8]:
    """Eight 6-bit scales and eight 6-bit minima, each `[n, 8]`, of Q4_K and Q5_K's 12 bytes: the
    first four of each whole, the last four split into 4 low bits and 2 high bits."""
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, low & 15 | first >> 2 & 48], axis=1)
    mins = np.concatenate([second & 63, low >> 4 | second >> 2 & 48], axis=1)
    return scales, mins


def _scaled(blocks: U8, q: U8) -> F32:
    """The common tail of Q4_K and Q5_K: d, dmin and scales[12] open the block."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    d, dmin = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return _by_group(q, d * scales, dmin * mins)


def _q4_k(blocks: U8) -> F32:
    return _scaled(blocks, _unpack(blocks[:, 16:], 32, 4))


def _q5_k(blocks: U8) -> F32:
    fifth = _unpack(blocks[:, 16:48], 32, 1) << np.uint8(4)
    return _scaled(blocks, _unpack(blocks[:, 48:], 32, 4) | fifth)


def _q6_k(blocks: U8) -> F32:
    """ql[128], qh[64], scales[16] int8, d."""
    high = _unpack(blocks[:, 128:192], 32, 2) << np.uint8(4)
    q = (_unpack(blocks[:, :128], 64, 4) | high).astype(np.int8) - np.int8(32)
    return _by_group(q, _half(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8))


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""The 16 levels of IQ4_NL and IQ4_XS."""


def _iq4_nl(blocks: U8) -> F32:
    return _by_group(_IQ4[_unpack(blocks[:, 2:], 16, 4)], _half(blocks[:, :2]))


def _iq4_xs(blocks: U8) -> F32:
    """d, two high bits of eight scales in 2 bytes, their low nibbles in 4 bytes, qs[128]."""
    six_bits = _unpack(blocks[:, 4:8], 1, 4) | _unpack(blocks[:, 2:4], 1, 2) << np.uint8(4)
    scale = _half(blocks[:, :2]) * (six_bits.astype(np.int8) - np.int8(32))
    return _by_group(_IQ4[_unpack(blocks[:, 8:], 16, 4)], scale)


_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _mxfp4(blocks: U8) -> F32:
    """OCP microscaling: one exponent byte e, worth 2^(e - 127), halved for the doubled levels."""
    exponent = blocks[:, :1].astype(np.uint32)
    # e of 0 and 1 give subnormal scales: 2^-128 and 2^-127.
    bits = np.where(exponent < 2, 0x200000 << exponent, (exponent - 1) << 23)
    q = _E2M1_DOUBLED[_unpack(blocks[:, 1:], 16, 4)]
    return _by_group(q, bits.astype(np.uint32).view(np.float32))


def _q1_0(blocks: U8) -> F32:
    """d, then one sign bit an element: set is +d, clear is -d."""
    d = _half(blocks[:, :2])
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), d, -d)


def _trits(packed: U8, run: int, count: int) -> U8:
    """Base-3 digits: every `run` bytes hold `count` runs of elements. A byte is a fraction of
    256, so times 3^i its overflow is dropped and the next digit stands above the point."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    shifted = packed.reshape(len(packed), -1, 1, run) * powers
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)


def _tq1_0(blocks: U8) -> F32:
    """qs[48] with five digits a byte (runs of 32, then of 16), qh[4] with four, d."""
    parts = (_trits(blocks[:, :32], 32, 5), _trits(blocks[:, 32:48], 16, 5),
             _trits(blocks[:, 48:52], 4, 4))  # fmt: skip
    q = np.concatenate(parts, axis=1).astype(np.int8) - np.int8(1)
    return _by_group(q, _half(blocks[:, 52:]))


def _tq2_0(blocks: U8) -> F32:
    q = _unpack(blocks[:, :64], 32, 2).astype(np.int8) - np.int8(1)
    return _by_group(q, _half(blocks[:, 64:]))


_DECODERS: Final[Mapping[str, Callable[[U8], F32]]] = {
    "F32": _f32, "F16": _half, "BF16": _bf16,
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
    "Q1_0": _q1_0, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0,
}  # fmt: skip
