"""The block formats by themselves: hand-made blocks, Q1_0 against its description, odd inputs.
Every other format is compared with the `gguf` package in tests/conformance."""

import struct
import tracemalloc

import numpy as np
import pytest

from pronk.backends.formats import KIND_BY_ID, KINDS, dequantize
from pronk.core.errors import CheckpointError


def rows(*blocks: bytes) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(blocks), np.uint8).reshape(1, -1)


def test_ids_are_unique() -> None:
    assert len(KIND_BY_ID) == len(KINDS) == 19
    assert all(KINDS[kind.name] is kind for kind in KIND_BY_ID.values())


def test_q1_0_is_one_sign_bit_a_weight() -> None:
    rng = np.random.default_rng(0)
    blocks = [(float(np.float16(rng.normal())), rng.bytes(16)) for _ in range(6)]
    expected = [d if bits[j // 8] >> (j % 8) & 1 else -d for d, bits in blocks for j in range(128)]
    decoded = dequantize("Q1_0", rows(*[struct.pack("<e", d) + bits for d, bits in blocks]))
    assert decoded.tolist() == [expected]


def test_q4_0_low_nibbles_come_first() -> None:
    decoded = dequantize("Q4_0", rows(struct.pack("<e", 0.5), bytes(range(0x10, 0x20))))
    assert decoded[0, :16].tolist() == [(q - 8) * 0.5 for q in range(16)]
    assert decoded[0, 16:].tolist() == [-3.5] * 16


def test_q8_0_codes_are_signed() -> None:
    codes = [-128, 127, 0, -1] * 8
    decoded = dequantize("Q8_0", rows(struct.pack("<e32b", 0.25, *codes)))
    assert decoded[0].tolist() == [code * 0.25 for code in codes]


def test_q6_k_scale_is_at_the_end() -> None:
    block = bytes(192) + struct.pack("<16b", *range(-8, 8)) + struct.pack("<e", 2.0)
    decoded = dequantize("Q6_K", rows(block))
    assert decoded[0, ::16].tolist() == [2.0 * scale * -32 for scale in range(-8, 8)]


@pytest.mark.parametrize("kind", KINDS)
def test_long_tensors_are_decoded_in_pieces(kind: str) -> None:
    """Rows beyond one piece, and a view that skips rows and bytes, decode as each row alone."""
    block = KINDS[kind]
    row_bytes = 4096 // block.elements * block.bytes
    data = np.random.default_rng(3).integers(0, 256, (75, row_bytes + 5), np.uint8)[::2, :-5]
    together = dequantize(kind, data)
    assert together.shape == (38, 4096)
    alone = np.concatenate([dequantize(kind, row[None].copy()) for row in data])
    np.testing.assert_array_equal(together.view(np.uint32), alone.view(np.uint32))


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q6_K"])
def test_no_rows(kind: str) -> None:
    assert dequantize(kind, np.empty((0, KINDS[kind].bytes), np.uint8)).size == 0


def test_temporaries_stay_small() -> None:
    data = np.zeros((2048, 4096 // 256 * 144), np.uint8)
    tracemalloc.start()
    out = dequantize("Q4_K", data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out.nbytes + (4 << 20)


def test_columns_must_be_whole_blocks() -> None:
    assert KINDS["Q4_K"].row_bytes(512) == 288
    with pytest.raises(CheckpointError, match="Q4_K has blocks of 256 weights; 300 columns"):
        KINDS["Q4_K"].row_bytes(300)
