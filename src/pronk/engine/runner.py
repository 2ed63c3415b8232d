"""Turns the work of one step into packed rows, and runs the model over them.

The only place of the engine that touches arrays, apart from the loading of weights. It runs for
every token, so it does a few array copies for each request and nothing for each position.
"""

import threading
from collections.abc import Sequence

import numpy as np

from pronk.backends.protocol import F32, I32, Batch, KvDtype, Ops, Sampled
from pronk.core.config import ModelConfig
from pronk.engine.blocks import blocks_for
from pronk.engine.request import Observer
from pronk.engine.scheduler import Slice
from pronk.model.llama import LlamaWeights, forward

_step_lock = threading.Lock()
"""The threads of a backend belong to the process: engines that share them take turns."""


class Runner:
    """A model and its KV cache on one backend. `threads`: of the backend; None: its default."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: LlamaWeights,
        *,
        n_blocks: int,
        kv_dtype: KvDtype = "f16",
        threads: int | None = None,
    ) -> None:
        self.ops = ops
        self.config = config
        self._weights = weights
        self._kv = ops.make_kv(config, n_blocks, kv_dtype)
        self._threads = threads

    def run(self, slices: Sequence[Slice]) -> list[Sampled | None]:
        """Computes every slice; the drawn token of each that has `sample`, None for the others.
        Observers of the slices are called with their logits on the host."""
        ids_T, batch = pack(slices)
        rows_R, draws_R = wanted_rows(slices, batch.starts_S)
        with _step_lock:
            if self._threads is not None:
                self.ops.set_threads(self._threads)
            logits_RV = forward(
                self.ops, self.config, self._weights, ids_T, batch, self._kv, rows_R
            )
            self._observe(slices, logits_RV)
            params = [s.request.sample_params() for s in slices if s.sample]
            if len(draws_R) < len(logits_RV):
                logits_RV = self.ops.take_rows(logits_RV, draws_R)
            drawn = iter(self.ops.sample(logits_RV, params) if params else [])
        return [next(drawn) if s.sample else None for s in slices]

    def _observe(self, slices: Sequence[Slice], logits_RV: F32) -> None:
        row = 0
        for s in slices:
            observer = observer_of(s)
            if observer is not None:
                n_prompt = min(s.n, s.request.n_prompt - s.start)
                observer(s.start, self.ops.to_host(logits_RV[row : row + n_prompt]))
            row += s.n if observer is not None else s.sample


def observer_of(s: Slice) -> Observer | None:
    """Who wants the logits of every row of a slice."""
    return s.request.observer if s.start < s.request.n_prompt else None


def pack(slices: Sequence[Slice]) -> tuple[I32, Batch]:
    """Token ids and positions of all slices one after another, and whose rows they are."""
    lengths_S = np.array([s.start + s.n for s in slices], dtype=np.int32)
    starts_S = np.zeros(len(slices) + 1, dtype=np.int32)
    np.cumsum([s.n for s in slices], out=starts_S[1:])
    ids_T = np.empty(starts_S[-1], dtype=np.int32)
    positions_T = np.empty(starts_S[-1], dtype=np.int32)
    blocks_SB = np.full((len(slices), blocks_for(int(lengths_S.max()))), -1, dtype=np.int32)
    row = 0
    for i, s in enumerate(slices):
        request, stop = s.request, s.start + s.n
        used = blocks_for(stop)
        ids_T[row : row + s.n] = request.ids[s.start : stop]
        positions_T[row : row + s.n] = np.arange(s.start, stop)
        blocks_SB[i, :used] = request.blocks[:used]
        row += s.n
    return ids_T, Batch(positions_T, starts_S, lengths_S, blocks_SB)


def wanted_rows(slices: Sequence[Slice], starts_S: I32) -> tuple[I32 | None, I32]:
    """Rows that need logits (None: all of them), and which of those a token is drawn from."""
    rows: list[int] = []
    draws: list[int] = []
    for s, stop in zip(slices, starts_S[1:].tolist(), strict=True):
        if observer_of(s) is not None:
            rows.extend(range(stop - s.n, stop))
        elif s.sample:
            rows.append(stop - 1)
        if s.sample:
            draws.append(len(rows) - 1)
    everything = len(rows) == starts_S[-1]
    return None if everything else np.array(rows, np.int32), np.array(draws, np.int32)
