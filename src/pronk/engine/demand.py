"""What some work asks of a machine at least, and what the machine can do: plain arithmetic.

The bounds are simple on purpose: a step cannot be faster than reading its weights and its keys and
values once from memory, nor than doing its multiply-accumulates at the machine's int8 rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from pronk.core.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do."""

    bandwidth: float
    """Bytes a second read from memory."""
    int8: float
    """Multiply-accumulates a second."""


@dataclass(frozen=True, slots=True)
class Fraction:
    """Parts of the limits that were used, 1 being all."""

    bandwidth: float
    int8: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What some work asks of the machine."""

    nbytes: float
    """Read from memory; weights are shared by the rows of a step."""
    macs: float

    def __add__(self, other: "Demand") -> "Demand":
        return Demand(self.nbytes + other.nbytes, self.macs + other.macs)

    def fraction(self, seconds: float, limits: Limits) -> Fraction:
        """How much of the limits doing it in so many seconds takes."""
        return Fraction(self.nbytes / seconds / limits.bandwidth, self.macs / seconds / limits.int8)


class Chunk(NamedTuple):
    """`n` tokens of one sequence from position `start` on, computed in one step."""

    start: int
    n: int
    answer: bool
    """The last of them needs logits."""


Step: TypeAlias = Sequence[Chunk]
Weights: TypeAlias = Mapping[str, Sequence[int]]
"""Bytes of the linear weights, one number a layer by the names of `engine.load.MERGED`, and one
under "output"."""


def weight_bytes(weights: Weights) -> int:
    return sum(map(sum, weights.values()))


def demands(
    config: ModelConfig, weights: Weights, kv_bytes: float, steps: Sequence[Step]
) -> dict[str, Demand]:
    """By operation: the products with `weights`, and attention. `kv_bytes` are those of one
    position.

    The weights are read once a step; of keys and values a perfect kernel reads each position that
    a chunk attends to once a step, too. Past the last layer's keys and values only the rows that
    need logits go on: in a step without any, that layer's other weights and the output layer's are
    not read."""
    c = config
    width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    chunks = [chunk for step in steps for chunk in step]
    answers = sum(chunk.answer for chunk in chunks)
    answering = sum(any(chunk.answer for chunk in step) for step in steps)
    all_layers = sum(chunk.n for chunk in chunks) * c.n_layers
    but_for_last = all_layers - sum(chunk.n for chunk in chunks) + answers
    read = {
        name: len(steps) * sum(sizes)
        if name == "wqkv"
        else len(steps) * sum(sizes[:-1]) + answering * sizes[-1]
        for name, sizes in weights.items()
    }
    macs = {
        "wqkv": all_layers * c.dim * (width + 2 * kv_width),
        "wo": but_for_last * width * c.dim,
        "w_gate_up": but_for_last * c.dim * 2 * c.ffn_dim,
        "w_down": but_for_last * c.ffn_dim * c.dim,
        "output": answers * c.dim * c.vocab_size,
    }
    positions = sum(chunk.start + chunk.n for chunk in chunks)
    pairs = sum(chunk.n * chunk.start + chunk.n * (chunk.n + 1) / 2 for chunk in chunks)
    attention = Demand(positions * kv_bytes, 2 * c.n_layers * pairs * width)
    return {name: Demand(read[name], n) for name, n in macs.items()} | {"attention": attention}


def total(parts: Mapping[str, Demand]) -> Demand:
    return sum(parts.values(), Demand(0, 0))
