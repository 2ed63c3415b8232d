"""Random tensors of every kind, with scales near a real model's."""

import numpy as np
import numpy.typing as npt

from pronk.backends.formats import KINDS
from pronk.backends.protocol import RawTensor

# byte offsets of the float16 scales within a block
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "MXFP4": (), "Q1_0": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
DENSE = ("F32", "F16", "BF16")


def random_tensor(kind: str, rows: int, cols: int, rng: np.random.Generator) -> RawTensor:
    """A tensor whose blocks are random bits under float16 scales of about 0.01."""
    return RawTensor("w", kind, (rows, cols), _bytes(kind, rows, cols, rng).reshape(rows, -1))


def _bytes(kind: str, rows: int, cols: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    values = rng.standard_normal((rows, cols)).astype(np.float32)
    if kind == "F32":
        return values.view(np.uint8)
    if kind == "F16":
        return values.astype(np.float16).view(np.uint8)
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    block = KINDS[kind]
    data = rng.integers(0, 256, (rows, cols // block.elements, block.bytes), dtype=np.uint8)
    for offset in HALVES[kind]:
        scales = (rng.standard_normal(data.shape[:2]) * 0.01).astype(np.float16)
        data[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    if kind == "MXFP4":
        data[..., 0] = rng.integers(119, 125, data.shape[:2])
    return data
