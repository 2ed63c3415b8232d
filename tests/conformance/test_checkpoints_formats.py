"""Decoding of every block format against the `gguf` package, bit for bit."""

import numpy as np
import numpy.typing as npt
import pytest

from pronk.backends.formats import KINDS, dequantize

gguf = pytest.importorskip("gguf")

# gguf 0.19 knows the size of Q1_0 but cannot decode it; tests/backends/test_formats.py does.
PEER_KINDS = [name for name in KINDS if name != "Q1_0"]


def peer(kind: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):
        result: npt.NDArray[np.float32] = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    return result


def same_bits(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_sizes(kind: str) -> None:
    block = KINDS[kind]
    theirs = gguf.GGMLQuantizationType[kind]
    assert block.ggml_id == theirs.value
    assert (block.elements, block.bytes) == gguf.GGML_QUANT_SIZES[theirs]


@pytest.mark.parametrize("kind", PEER_KINDS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 5), (700, 4)])
def test_random_bytes(kind: str, rows: int, blocks: int) -> None:
    """Random bytes hold NaN, infinite and subnormal scales at every position."""
    rng = np.random.default_rng(rows)
    data = rng.integers(0, 256, (rows, blocks * KINDS[kind].bytes), np.uint8)
    same_bits(dequantize(kind, data), peer(kind, data))


@pytest.mark.parametrize("kind", PEER_KINDS)
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x3C, 0x7C, 0x7F, 0x80, 0xFC, 0xFF])
def test_extreme_blocks(kind: str, byte: int) -> None:
    data = np.full((2, 3 * KINDS[kind].bytes), byte, np.uint8)
    same_bits(dequantize(kind, data), peer(kind, data))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_every_16_bit_pattern(kind: str) -> None:
    data = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(64, -1)
    same_bits(dequantize(kind, data), peer(kind, data))


def test_every_scale_byte_of_mxfp4() -> None:
    data = np.empty((256, 17), np.uint8)
    data[:, 0] = np.arange(256)
    data[:, 1:] = np.arange(16) * 0x11
    same_bits(dequantize("MXFP4", data), peer("MXFP4", data))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_what_the_peer_encodes(kind: str) -> None:
    weights = np.random.default_rng(1).normal(0, 0.02, (9, 768)).astype(np.float32)
    data = gguf.quantize(weights, gguf.GGMLQuantizationType[kind])
    same_bits(dequantize(kind, data), peer(kind, data))
