"""Turns the work of one step into packed rows, and runs the model over them.

The only place of the engine that touches arrays, apart from the loading of weights. It runs for
every token, so it does a few array copies for each request and nothing for each position.
"""

import os
import threading
from collections.abc import Sequence

import numpy as np

from pronk.backends.protocol import F32, I32, Batch, KvDtype, Ops, Sampled, SampleParams
from pronk.core.config import ModelConfig
from pronk.engine.blocks import blocks_for
from pronk.engine.request import Observer
from pronk.engine.scheduler import Outcome, Slice
from pronk.model.llama import LlamaWeights, forward

_step_lock = threading.Lock()
"""The threads of a backend belong to the process: engines that share them take turns."""


def _new_step_lock() -> None:
    """For a forked child: the thread that holds the lock is not there to release it."""
    global _step_lock
    _step_lock = threading.Lock()


os.register_at_fork(after_in_child=_new_step_lock)


class Runner:
    """A model and its KV cache on one backend, which computes with `threads` threads. Tokens are
    drawn from the first `n_tokens` of the vocabulary: some models have rows for more tokens than
    their tokenizer knows."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        weights: LlamaWeights,
        *,
        n_blocks: int,
        n_tokens: int,
        threads: int,
        kv_dtype: KvDtype = "f16",
    ) -> None:
        self.ops = ops
        self.config = config
        self._weights = weights
        self._kv = ops.make_kv(config, n_blocks, kv_dtype)
        self._n_tokens = n_tokens
        self._threads = threads

    def run(self, slices: Sequence[Slice]) -> list[Outcome]:
        """Computes every slice; the drawn token of each that has `sample`, None for the others, and
        the exception of one whose logits are not finite or whose observer raised it. Observers
        are called with the logits of their slices on the host."""
        ids_T, batch = pack(slices)
        rows_R, draws_R = wanted_rows(slices, batch.starts_S)
        with _step_lock:
            self.ops.set_threads(self._threads)
            logits_RV = forward(
                self.ops, self.config, self._weights, ids_T, batch, self._kv, rows_R
            )
            errors = self._observe(slices, logits_RV)
            params = [s.request.sample_params() for s in slices if s.sample]
            if len(draws_R) < len(logits_RV):
                logits_RV = self.ops.take_rows(logits_RV, draws_R)
            drawn = iter(self._draw(logits_RV[:, : self._n_tokens], params))
        outcomes = [next(drawn) if s.sample else None for s in slices]
        return [e if e is not None else o for e, o in zip(errors, outcomes, strict=True)]

    def _observe(self, slices: Sequence[Slice], logits_RV: F32) -> list[Exception | None]:
        """What the observer of each slice raised."""
        errors: list[Exception | None] = []
        row = 0
        for s in slices:
            observer = observer_of(s)
            errors.append(None)
            if observer is not None:
                n_prompt = min(s.n, s.request.n_prompt - s.start)
                try:
                    observer(s.start, self.ops.to_host(logits_RV[row : row + n_prompt]))
                except Exception as error:
                    errors[-1] = error
            row += s.n if observer is not None else s.sample
        return errors

    def _draw(self, logits_RV: F32, params: Sequence[SampleParams]) -> list[Sampled | Exception]:
        """A token for each row, or why there is none."""
        if not params:
            return []
        try:
            return [*self.ops.sample(logits_RV, params)]
        except Exception:  # of some row; the others get the tokens that they would get anyway
            return [self._draw_one(logits_RV[i : i + 1], p) for i, p in enumerate(params)]

    def _draw_one(self, logits_1V: F32, params: SampleParams) -> Sampled | Exception:
        try:
            return self.ops.sample(logits_1V, [params])[0]
        except Exception as error:
            return error


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
