"""LoRA adapters of a loaded model: read while it runs, chosen by each request.

Weights and the operations of a step are in model/lora.py; which requests use an adapter, and so
whether it may go, is the engine's to know.
"""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pronk.backends.protocol import F32, I32, U8, Ops, RawTensor, Weight
from pronk.checkpoints.adapters import AdapterFolder
from pronk.checkpoints.names import tensor_shape
from pronk.core.config import ModelConfig
from pronk.core.errors import UserError
from pronk.engine.load import MERGED, LoadOps
from pronk.engine.memory import check_adapter, free_memory
from pronk.model.llama import LlamaWeights
from pronk.model.lora import Additions, LowRank, Rows, adapt, adapted_ops

MOST_NAME = 200
"""Characters of an adapter's name."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    digest: bytes
    """Of its numbers: what was computed with them must not be taken for another adapter's."""
    additions: Additions = field(repr=False)


@dataclass(frozen=True, slots=True)
class _State:
    """Never changed: another one takes its place, all at once."""

    loaded: Mapping[str, _Loaded]
    weights: LlamaWeights
    """Of the model with all of them."""


class Adapters:
    """The adapters of one model. Any thread may load and unload them while others compute: a step
    sees the adapters that there were when it began."""

    def __init__(self, ops: LoadOps, config: ModelConfig, weights: LlamaWeights) -> None:
        self._ops = ops
        self._config = config
        self._weights = weights
        self._reading = threading.Lock()
        self._changing = threading.Lock()
        self._state = _State({}, weights)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._state.loaded)

    def digest(self, name: str) -> bytes:
        """16 bytes that no other adapter has. UserError for one that is not loaded."""
        return self._state_with([name]).loaded[name].digest

    def _state_with(self, names: Sequence[str]) -> _State:
        """UserError where one of them is not there."""
        state = self._state
        for name in names:
            if not isinstance(name, str) or name not in state.loaded:
                raise not_loaded(name, tuple(state.loaded))
        return state

    def load(self, name: str, path: str | Path, *, keep_free: int = 0) -> None:
        """Reads a PEFT folder. UserError for a bad or taken name, CheckpointError for a bad folder,
        MemoryLimitError where it does not fit beside `keep_free` bytes that are promised to others;
        then nothing has changed."""
        check_name(name)
        with self._reading:  # one after another, or each would take the other's memory for free
            if name in self._state.loaded:
                raise UserError(f"adapter: {name!r} is loaded already; unload it first")
            with AdapterFolder(path, self._config) as folder:
                free = free_memory()
                needed = adapter_bytes(folder, self._ops)
                check_adapter(name, needed, None if free is None else free - keep_free)
                loaded = self._read(folder)
            with self._changing:
                self._replace({**self._state.loaded, name: loaded})

    def unload(self, name: str) -> None:
        """UserError for one that is not loaded. No request that uses it may be at work."""
        with self._changing:
            loaded = dict(self._state_with([name]).loaded)
            del loaded[name]
            self._replace(loaded)

    def for_step(
        self, names: Sequence[str | None], starts_S: I32, rows_R: I32 | None
    ) -> tuple[Ops, LlamaWeights]:
        """What a step computes with. `names`: the adapter of each sequence, whose rows begin at
        `starts_S`; `rows_R`: the rows whose logits are wanted, all without."""
        used = list(dict.fromkeys(name for name in names if name is not None))
        if not used:
            return self._ops, self._weights
        state = self._state_with(used)
        index = {name: i for i, name in enumerate(used)}
        of_S = np.array([-1 if name is None else index[name] for name in names])
        of_T = np.repeat(of_S, np.diff(starts_S))
        of_R = of_T if rows_R is None else of_T[rows_R]
        rows = [
            {name: found for name, i in index.items() if (found := _rows(of == i)) is not None}
            for of in (of_T, of_R)
        ]
        return adapted_ops(self._ops, *rows), state.weights

    def _replace(self, loaded: Mapping[str, _Loaded]) -> None:
        additions = {name: adapter.additions for name, adapter in loaded.items()}
        self._state = _State(loaded, adapt(self._weights, additions))

    def _read(self, folder: AdapterFolder) -> _Loaded:
        """Steps of the model go on meanwhile."""
        digest = hashlib.blake2b(digest_size=16)
        additions: dict[tuple[int, str], list[LowRank]] = {}
        for name in folder.ranks:
            a, b = folder.read(name)
            digest.update(f"{name} {a.shape} {b.shape}".encode())
            digest.update(a.data)
            digest.update(b.data)
            layer, merged, columns = _place(name, self._config)
            part = LowRank(columns, self._weight(name, a), self._weight(name, b))
            additions.setdefault((layer, merged), []).append(part)
        return _Loaded(digest.digest(), additions)

    def _weight(self, name: str, values: F32) -> Weight:
        raw: U8 = values.view(np.uint8)
        return self._ops.make_weight([RawTensor(name, "F32", values.shape, raw)])


def check_name(name: str) -> None:
    """UserError for what cannot name an adapter."""
    proper = isinstance(name, str) and 0 < len(name) <= MOST_NAME
    if not proper or not name.isprintable() or any(letter.isspace() for letter in name):
        raise UserError(
            f"adapter: {name!r:.60} is no name; 1 to {MOST_NAME} characters without spaces are"
        )


def not_loaded(name: object, names: Sequence[str]) -> UserError:
    """The error of who asks for an adapter that is not there."""
    there = f"loaded are {', '.join(names)}" if names else "none are"
    return UserError(f"adapter: {name!r:.{MOST_NAME}} is not loaded; {there}")


def adapters_bytes(adapters: Mapping[str, str | Path], config: ModelConfig, ops: LoadOps) -> int:
    """Bytes that adapters take on a backend, by their names and folders, which are looked at before
    a model is loaded. Raises what `Adapters.load` would raise, apart from the values in them."""
    total = 0
    for name, path in adapters.items():
        check_name(name)
        with AdapterFolder(path, config) as folder:
            total += adapter_bytes(folder, ops)
    return total


def adapter_bytes(folder: AdapterFolder, ops: LoadOps) -> int:
    total = 0
    for name, rank in folder.ranks.items():
        outputs, inputs = tensor_shape(name, folder.config)
        total += ops.packed_bytes("F32", rank, inputs) + ops.packed_bytes("F32", outputs, rank)
    return total


def _place(name: str, config: ModelConfig) -> tuple[int, str, slice]:
    """Layer and field of `LayerWeights` of a linear weight, and which of the field's outputs."""
    _, layer, part = name.split(".")
    for merged, parts in MERGED.items():
        first = 0
        for other in parts:
            outputs = tensor_shape(f"layers.{layer}.{other}", config)[0]
            if other == part:
                return int(layer), merged, slice(first, first + outputs)
            first += outputs
    raise AssertionError(f"{name} is no linear weight of a layer")


def _rows(mine: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Rows | None:
    """A run where they are one: it takes no copy."""
    rows = np.flatnonzero(mine).astype(np.int32)
    if len(rows) == 0:
        return None
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows
