"""Packed weights byte for byte against a slow packer that follows the words of csrc/layout.h.

The packer takes codes, scales and minimums from the NumPy decoder, by giving it blocks with some
fields set to known values: codes are what blocks decode to when all scales are 1.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from backends.random_weights import random_tensor
from pronk.backends.formats import KINDS, dequantize
from pronk.backends.protocol import F32, U8, RawTensor

cpu = pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")

DIGESTS = {1: "881cfe81dedf521e05e5e3bb78157075c72ee74ce16a000db41f8c6c5cc9f2d2"}
"""Of packed bytes, by version of the layouts. What is on disk with a version must stay readable:
bytes that change need a new version (csrc/pack.h)."""

Array: TypeAlias = npt.NDArray[Any]
Fields: TypeAlias = Mapping[int, bytes]
"""Bytes of a block by their offset."""

ONE, NONE = np.float16(1).tobytes(), bytes(2)

UNIT: Mapping[str, Fields] = {
    "Q4_0": {0: ONE}, "Q4_1": {0: ONE + NONE}, "Q5_0": {0: ONE}, "Q5_1": {0: ONE + NONE},
    "Q8_0": {0: ONE}, "Q2_K": {0: b"\1" * 16, 80: ONE + NONE},
    "Q3_K": {96: b"\x11" * 8 + b"\xaa" * 4, 108: ONE},
    "Q4_K": {0: ONE + NONE, 4: b"\1" * 4 + bytes(4) + b"\1" * 4},
    "Q5_K": {0: ONE + NONE, 4: b"\1" * 4 + bytes(4) + b"\1" * 4},
    "Q6_K": {192: b"\1" * 16, 208: ONE}, "IQ4_NL": {0: ONE},
    "IQ4_XS": {0: ONE + b"\xaa\xaa" + b"\x11" * 4}, "MXFP4": {0: b"\x80"}, "Q1_0": {0: ONE},
    "TQ1_0": {52: ONE}, "TQ2_0": {64: ONE},
}  # fmt: skip
"""All scales 1, all minimums 0: the block decodes to its codes (MXFP4: doubled, thus integers)."""

CODES_ONE: Mapping[str, Fields] = {
    "Q4_0": {2: b"\x99" * 16}, "Q4_1": {4: b"\x11" * 16},
    "Q5_0": {2: b"\xff" * 4 + b"\x11" * 16}, "Q5_1": {4: bytes(4) + b"\x11" * 16},
    "Q8_0": {2: b"\1" * 32}, "Q2_K": {16: b"\x55" * 64}, "Q3_K": {0: b"\xff" * 32 + b"\x55" * 64},
    "Q4_K": {16: b"\x11" * 128}, "Q5_K": {16: bytes(32) + b"\x11" * 128},
    "Q6_K": {0: b"\x11" * 128 + b"\xaa" * 64}, "IQ4_NL": {2: b"\x88" * 16},
    "IQ4_XS": {8: b"\x88" * 128}, "MXFP4": {1: b"\x11" * 16}, "Q1_0": {2: b"\xff" * 16},
    "TQ1_0": {0: b"\xff" * 52}, "TQ2_0": {0: b"\xaa" * 64},
}  # fmt: skip
"""All codes 1: the block decodes to its scales, less the minimums."""

CODES_ZERO: Mapping[str, Fields] = {
    "Q4_1": {4: bytes(16)}, "Q5_1": {4: bytes(20)}, "Q2_K": {16: bytes(64)},
    "Q4_K": {16: bytes(128)}, "Q5_K": {16: bytes(160)},
}  # fmt: skip
"""All codes 0, in the kinds with minimums."""

ZERO_POINT = {"Q4_0": 8, "Q4_1": 0, "Q4_K": 0, "Q5_K": 0, "Q6_K": 32}
"""Of the codes that keep their bits; all others are bytes with 128."""


def decoded(tensor: RawTensor, *fields: Fields) -> F32:
    """`[rows, columns]` of the tensor with some fields of every block set."""
    kind = KINDS[tensor.kind]
    blocks = tensor.data.reshape(-1, kind.bytes).copy()
    for offset, value in (item for each in fields for item in each.items()):
        blocks[:, offset : offset + len(value)] = np.frombuffer(value, np.uint8)
    return dequantize(kind.name, blocks.reshape(tensor.data.shape))


def nibble_lines(c: Array) -> Array:
    return c[:4] & 15 | (c[4:] & 15) << 4


def bit_plane(c: Array) -> Array:
    return np.asarray(np.bitwise_or.reduce([(c[g] >> 4 & 1) << g for g in range(8)]))


def pair_plane(c: Array) -> Array:
    lines = [[(c[g] >> 4 & 3) << g // 2 * 2 for g in range(first, 8, 2)] for first in (0, 1)]
    return np.asarray(np.bitwise_or.reduce(np.array(lines, np.uint8), axis=1))


def code_bytes(kind: str, codes: Array) -> bytes:
    """Codes `[16, 32]` of one block: c[g][r][i] is input 4g + i of row r."""
    c = codes.reshape(16, 8, 4).transpose(1, 0, 2)
    if kind not in ZERO_POINT:
        return c.tobytes()
    planes = {"Q5_K": bit_plane, "Q6_K": pair_plane}
    return nibble_lines(c).tobytes() + (planes[kind](c).tobytes() if kind in planes else b"")


class Panel:
    """16 rows of a tensor, those that there are not zero."""

    def __init__(self, tensor: RawTensor, first: int) -> None:
        self.kind = tensor.kind
        self.tensor = tensor
        self.here = slice(first, min(first + 16, tensor.shape[0]))

    def rows(self, values: Array) -> Array:
        real = values[self.here]
        return np.concatenate([real, np.zeros((16 - len(real), real.shape[1]), real.dtype)])

    def raw(self) -> Array:
        """`[16, blocks, bytes]` as stored."""
        return self.rows(self.tensor.data).reshape(16, -1, KINDS[self.kind].bytes)

    def codes(self) -> Array:
        integers = decoded(self.tensor, UNIT[self.kind]) + ZERO_POINT.get(self.kind, 128)
        assert (integers == np.rint(integers)).all()
        return self.rows(integers.astype(np.uint8))

    def scales(self, *fields: Fields) -> F32:
        """Of every input; `fields` set others than the codes."""
        values = decoded(self.tensor, CODES_ONE[self.kind], *fields)
        if self.kind in CODES_ZERO and not fields:
            values = decoded(self.tensor, CODES_ONE[self.kind], {_MIN_AT[self.kind]: NONE})
        return self.rows(values)

    def mins(self, *fields: Fields) -> F32:
        if self.kind != "Q2_K":
            return self.rows(decoded(self.tensor, CODES_ZERO[self.kind], *fields))
        blocks = self.tensor.data.reshape(self.tensor.shape[0], -1, 84)
        dmin = np.ascontiguousarray(blocks[..., 82:]).view(np.float16).astype(np.float32)
        taken_off = dmin * (blocks[..., :16] >> 4)
        return self.rows(np.repeat(-taken_off.reshape(len(blocks), -1), 16, axis=1))  # -0 is -0


_MIN_AT = {"Q4_1": 2, "Q5_1": 2, "Q2_K": 82, "Q4_K": 2, "Q5_K": 2}
"""Where the (outer) minimum is."""


def panel_chunks(panel: Panel) -> Iterator[bytes]:
    kind, codes = panel.kind, panel.codes()
    super_head = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, ())
    for start in range(0, codes.shape[1], 32):
        if super_head and start % 256 == 0:
            for at in super_head:
                yield panel.raw()[:, start // 256, at : at + 2].tobytes()
        yield from head_chunks(panel, start)
        yield code_bytes(kind, codes[:, start : start + 32])


def head_chunks(panel: Panel, start: int) -> Iterator[bytes]:
    """The header of the block of inputs from `start` on."""
    kind = panel.kind
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        for at in (0, 2) if kind == "Q4_1" else (0,):
            yield panel.raw()[:, start // 32, at : at + 2].tobytes()
    elif kind in ("Q4_K", "Q5_K"):
        yield panel.scales({0: ONE + NONE})[:, start].astype(np.uint8).tobytes()
        yield (-panel.mins({0: NONE + ONE}))[:, start].astype(np.uint8).tobytes()
    elif kind == "Q6_K":
        for sub in (0, 16):
            yield panel.scales({208: ONE})[:, start + sub].astype(np.int8).tobytes()
    else:
        subs = (0, 16) if kind in ("Q2_K", "Q3_K") else (0,)
        for values in (panel.scales(), *([panel.mins()] if kind in CODES_ZERO else [])):
            for sub in subs:
                yield np.ascontiguousarray(values[:, start + sub]).tobytes()


def packed_slowly(tensor: RawTensor) -> bytes:
    panels = [Panel(tensor, first) for first in range(0, tensor.shape[0], 16)]
    if tensor.kind in UNIT:
        return b"".join(chunk for panel in panels for chunk in panel_chunks(panel))
    width = KINDS[tensor.kind].bytes
    numbers = [panel.rows(tensor.data).reshape(16, -1, width) for panel in panels]
    return b"".join(each.transpose(1, 0, 2).tobytes() for each in numbers)


def packed(tensor: RawTensor) -> bytes:
    ((_, rows, data),) = cpu.packed_parts(cpu.make_weight([tensor]))
    assert rows == tensor.shape[0]
    return bytes(data)


@pytest.fixture(params=[1, 3], ids=lambda n: f"threads{n}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    cpu.set_threads(request.param)
    yield request.param
    cpu.set_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_bytes(kind: str, threads: int) -> None:
    rng = np.random.default_rng(20)
    for rows, cols in ((1, 256), (15, 512), (16, 256), (37, 768)):
        tensor = random_tensor(kind, rows, cols, rng)
        assert packed(tensor) == packed_slowly(tensor), (rows, cols)


@pytest.mark.parametrize("cols", [1, 3, 4, 7, 8, 13, 33])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_dense_rows_of_any_length(kind: str, cols: int) -> None:
    tensor = random_tensor(kind, 19, cols, np.random.default_rng(21))
    assert packed(tensor) == packed_slowly(tensor)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "MXFP4"])
def test_rows_of_a_few_blocks(kind: str) -> None:
    for cols in (32, 96):
        tensor = random_tensor(kind, 18, cols, np.random.default_rng(22))
        assert packed(tensor) == packed_slowly(tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_lie_apart(kind: str) -> None:
    tensor = random_tensor(kind, 18, 256, np.random.default_rng(23))
    wide = np.full((18, tensor.data.shape[1] + 7), 0xAB, np.uint8)
    wide[:, : tensor.data.shape[1]] = tensor.data
    apart = RawTensor("w", kind, tensor.shape, wide[:, : tensor.data.shape[1]])
    assert packed(apart) == packed(tensor)


def test_the_bytes_are_those_of_this_version() -> None:
    rng = np.random.default_rng(24)
    digest = hashlib.sha256()
    for kind in KINDS:
        digest.update(packed(random_tensor(kind, 21, 512, rng)))
    assert digest.hexdigest() == DIGESTS[cpu.LAYOUT_VERSION]


def parts_of(
    kinds: Mapping[str, int], cols: int
) -> tuple[list[RawTensor], list[tuple[int, int, U8]]]:
    rng = np.random.default_rng(25)
    tensors = [random_tensor(kind, rows, cols, rng) for kind, rows in kinds.items()]
    return tensors, cpu.packed_parts(cpu.make_weight(tensors))


def aligned(data: bytes) -> U8:
    """A copy that begins at a multiple of 64."""
    room = np.empty(len(data) + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return room[start : start + len(data)]


def test_a_weight_of_packed_parts_is_the_same_weight() -> None:
    tensors, parts = parts_of({"Q4_K": 24, "Q6_K": 40, "F16": 9}, 512)
    weight = cpu.make_weight(tensors)
    other = cpu.from_packed(
        512, [(layout, rows, aligned(bytes(data))) for layout, rows, data in parts]
    )
    del parts
    assert (other.rows, other.k, other.nbytes) == (weight.rows, weight.k, weight.nbytes)
    x_TD = np.random.default_rng(26).standard_normal((5, 512)).astype(np.float32)
    np.testing.assert_array_equal(cpu.linear(x_TD, other), cpu.linear(x_TD, weight))


def test_the_view_of_packed_bytes_outlives_its_weight() -> None:
    _, ((_, _, data),) = parts_of({"Q8_0": 40}, 256)
    before = bytes(data)
    for _ in range(4):
        parts_of({"Q8_0": 40}, 256)
    assert bytes(data) == before
    assert not data.flags.writeable


WRONG = ["layout", "negative layout", "rows", "no rows", "bytes", "columns", "alignment"]


@pytest.mark.parametrize("wrong", WRONG)
def test_parts_that_are_no_weight_are_refused(wrong: str) -> None:
    _, ((layout, rows, data),) = parts_of({"Q4_K": 40}, 512)
    cols = 512
    match wrong:
        case "layout":
            layout = 99
        case "negative layout":
            layout = -1
        case "rows":
            rows = 49
        case "no rows":
            rows = 0
        case "bytes":
            data = data[:-1]
        case "columns":
            cols = 513
        case "alignment":
            shifted = aligned(bytes(64) + bytes(data))[32:]
            data = shifted[: len(data)]
    with pytest.raises(ValueError, match="packed: "):
        cpu.from_packed(cols, [(layout, rows, data)])


def test_checksums_tell_what_differs(threads: int) -> None:
    rng = np.random.default_rng(27)
    for size in (0, 1, 63, 64, 65, 4096, (1 << 20) - 1, (1 << 20) + 1, (3 << 20) + 77):
        data = rng.integers(0, 256, size, np.uint8)
        sums = {cpu.checksum(data)}
        assert sums == {cpu.checksum(data.copy())}, "the same wherever it lies"
        variants = [np.append(data, np.uint8(0)), data[:-1] if size else np.zeros(2, np.uint8)]
        for at in {0, size // 2, size - 1} if size else ():
            changed = data.copy()
            changed[at] ^= 1
            variants.append(changed)
        if size > 8192:
            swapped, hole = data.copy(), data.copy()
            swapped[:64], swapped[4096:4160] = data[4096:4160], data[:64]
            hole[-8192:] = 0
            variants += [swapped, hole]
        sums |= {cpu.checksum(variant) for variant in variants}
        assert len(sums) == 1 + len(variants), size
