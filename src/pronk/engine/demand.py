"""What some work asks of a machine at least, and what the machine can do: plain arithmetic.

The bounds are simple on purpose: a step cannot be faster than reading its weights and its keys and
values once from memory, nor than doing its multiply-accumulates at the machine's int8 rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Work:
    """What a run computes: `rows` tokens of `sequences` sequences in `steps` steps, attending to
    `context` positions on average; `answered` of the rows need logits."""

    rows: int
    steps: int
    sequences: int
    context: float
    answered: int


def demands(
    config: ModelConfig, weights: Mapping[str, int], kv_bytes: float, work: Work
) -> dict[str, Demand]:
    """By operation: the products with `weights` (bytes of all layers together by the names of
    `engine.load.MERGED`, and "output"), and attention. `kv_bytes` are those of one position.

    The weights are read once a step; of keys and values a perfect kernel reads each position once
    a step, too. Past the last layer's keys and values only the rows that need logits go on."""
    c = config
    width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    all_layers = work.rows * c.n_layers
    but_for_last = work.rows * (c.n_layers - 1) + work.answered
    macs = {
        "wqkv": all_layers * c.dim * (width + 2 * kv_width),
        "wo": but_for_last * width * c.dim,
        "w_gate_up": but_for_last * c.dim * 2 * c.ffn_dim,
        "w_down": but_for_last * c.ffn_dim * c.dim,
        "output": work.answered * c.dim * c.vocab_size,
    }
    linear = {name: Demand(work.steps * weights[name], n) for name, n in macs.items()}
    context_bytes = work.steps * work.sequences * work.context * kv_bytes
    return linear | {"attention": Demand(context_bytes, 2 * all_layers * work.context * width)}


def total(parts: Mapping[str, Demand]) -> Demand:
    return sum(parts.values(), Demand(0, 0))
