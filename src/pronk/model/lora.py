"""Low-rank adapters (LoRA, Hu et al. 2021) as weights: `linear` of an adapted weight is W x + B A x
for the rows that use an adapter and W x for the others.

The model is not touched: the layers of an adapted model hold `Adapted` weights, and the operations
of a step are those of its backend with a `linear` that knows them and which rows use what. A and B
are weights of the backend, too, so that a row's numbers depend on nothing but the row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from pronk.backends.protocol import I32, Ops, Weight
from pronk.model.llama import LlamaWeights

Rows: TypeAlias = slice | I32
"""Of a step's activations: a run of them, or their indices, each once."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to some outputs of a linear weight."""

    columns: slice
    """Which outputs: a stacked weight (q, k, v or gate, up) has several parts."""
    a: Weight  # [rank, inputs]
    b: Weight  # [outputs, rank], scaled


@dataclass(frozen=True, slots=True)
class Adapted:
    """A linear weight and what adapters add to it."""

    base: Weight
    added: Mapping[str, Sequence[LowRank]]
    """By the name of the adapter."""
    wanted: bool = False
    """It sees only those rows of a step whose logits are wanted."""


Additions: TypeAlias = Mapping[tuple[int, str], Sequence[LowRank]]
"""What one adapter adds, by layer and field of `LayerWeights`."""

_LINEAR = ("wqkv", "wo", "w_gate_up", "w_down")


def adapt(weights: LlamaWeights, adapters: Mapping[str, Additions]) -> LlamaWeights:
    """The model with adapters. It has no `stack`: a backend's own knows no adapters."""
    last = len(weights.layers) - 1

    def adapted(layer: int, field: str) -> Weight:
        base = getattr(weights.layers[layer], field)
        added = {
            name: additions[layer, field]
            for name, additions in adapters.items()
            if (layer, field) in additions
        }
        wanted = layer == last and field != "wqkv"  # `take_rows` is behind the last attention
        return Adapted(base, added, wanted) if added else base

    layers = [
        replace(layer, **{field: adapted(i, field) for field in _LINEAR})
        for i, layer in enumerate(weights.layers)
    ]
    return replace(weights, layers=layers, stack=None)


def adapted_ops(ops: Ops, rows_T: Mapping[str, Rows], rows_R: Mapping[str, Rows]) -> Ops:
    """The operations of one step. `rows_T`: the rows that use each adapter, among all; `rows_R`:
    those among the wanted ones."""
    return cast(Ops, _AdaptedOps(ops, rows_T, rows_R))


class _AdaptedOps:
    """A backend, but for `linear`."""

    def __init__(self, ops: Ops, rows_T: Mapping[str, Rows], rows_R: Mapping[str, Rows]) -> None:
        self._ops = ops
        self._rows_T = rows_T
        self._rows_R = rows_R

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear(self, x_TD: Any, weight: Weight) -> Any:
        if not isinstance(weight, Adapted):
            return self._ops.linear(x_TD, weight)
        y_TO = self._ops.linear(x_TD, weight.base)
        for name, rows in (self._rows_R if weight.wanted else self._rows_T).items():
            added = weight.added.get(name, ())
            x_ND = x_TD[rows] if added else x_TD
            for part in added:
                y_TO[rows, part.columns] += self._ops.linear(self._ops.linear(x_ND, part.a), part.b)
        return y_TO
