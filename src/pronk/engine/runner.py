"""Turns the work of one step into packed rows, and runs the model over them.

The only place of the engine that touches arrays, apart from the loading of weights. It runs for
every token, so it does a few array copies for each request and nothing for each position.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pronk.backends.protocol import F32, I32, U8, Batch, KvDtype, Ops, Sampled, SampleParams
from pronk.core.config import ModelConfig
from pronk.engine.adapters import Adapters
from pronk.engine.blocks import blocks_for
from pronk.engine.load import LoadOps
from pronk.engine.request import Observer
from pronk.engine.scheduler import Outcome, Slice
from pronk.model.llama import LlamaWeights, forward_hidden

Mask: TypeAlias = npt.NDArray[np.bool_]
Masks: TypeAlias = tuple[Mask | None, Mapping[int, Exception]]
"""Of all rows that are drawn from; and why the masks of single slices could not be made."""

_step_lock = threading.Lock()
"""The threads of a backend belong to the process: engines that share them take turns."""


_mask_thread = ThreadPoolExecutor(1, "pronk-masks")


def _begin_anew() -> None:
    """For a forked child: the thread that holds the lock is not there to release it, nor is the one
    that makes masks."""
    global _step_lock, _mask_thread
    _step_lock = threading.Lock()
    _mask_thread = ThreadPoolExecutor(1, "pronk-masks")


os.register_at_fork(after_in_child=_begin_anew)


class Runner:
    """A model and its KV cache on one backend, which computes with `threads` threads. Tokens are
    drawn from the first `n_tokens` of the vocabulary: some models have rows for more tokens than
    their tokenizer knows."""

    def __init__(
        self,
        ops: LoadOps,
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
        self.adapters = Adapters(ops, config, weights)
        self._kv = ops.make_kv(config, n_blocks, kv_dtype)
        self._n_tokens = n_tokens
        self._threads = threads

    def run(self, slices: Sequence[Slice]) -> list[Outcome]:
        """Computes every slice; the tokens drawn for each that has `sample`, as far as its draft
        was right, and the exception of one whose logits are not finite or whose observer raised
        it. Observers are called with the logits of their slices on the host."""
        ids_T, batch = pack(slices)
        rows_R, draws_R = wanted_rows(slices, batch.starts_S)
        names = [s.request.adapter for s in slices]
        ops, weights = self.adapters.for_step(names, batch.starts_S, rows_R)
        masks = begin_masks(slices, self._n_tokens)  # while the model computes
        with _step_lock:
            self.ops.set_threads(self._threads)
            try:
                with np.errstate(over="ignore", invalid="ignore"):  # sampling tells whose they are
                    hidden_RD = forward_hidden(
                        ops, self.config, weights, ids_T, batch, self._kv, rows_R
                    )
                    logits_RV, rows_of_R = self._logits(ops, weights, slices, hidden_RD)
            finally:
                mask_RV, refusals = end_masks(masks)
            errors = self._observe(slices, hidden_RD, logits_RV)
            draws_R = rows_of_R[draws_R]
            if len(draws_R) < len(logits_RV):
                logits_RV = self.ops.take_rows(logits_RV, draws_R)
            outcomes = self._draw_right(slices, logits_RV[:, : self._n_tokens], mask_RV)
        errors = [e or refusals.get(i) for i, e in enumerate(errors)]
        return [e if e is not None else o for e, o in zip(errors, outcomes, strict=True)]

    @property
    def block_bytes(self) -> int:
        """Of a block of the KV cache."""
        return self.ops.block_bytes(self._kv)

    def read_block(self, block: int) -> U8:
        """A copy of a block of the KV cache. For the thread that steps, as the next one."""
        return self.ops.read_block(self._kv, block)

    def write_block(self, block: int, data: U8) -> None:
        """Puts back what `read_block` gave."""
        self.ops.write_block(self._kv, block, data)

    def _logits(
        self, ops: Ops, weights: LlamaWeights, slices: Sequence[Slice], hidden_RD: Any
    ) -> tuple[F32, I32]:
        """Logits of the rows that somebody wants them of, not the hidden states alone; and for each
        wanted row its row of logits, -1 for none."""
        if not any(map(watches_hidden, slices)):
            return ops.linear(hidden_RD, weights.output), np.arange(len(hidden_RD), dtype=np.int32)
        wants = [not watches_hidden(s) for s in slices for _ in range(wanted_of(s))]
        rows_R = np.where(wants, np.cumsum(wants) - 1, -1).astype(np.int32)
        if not any(wants):
            return np.empty((0, self._n_tokens), np.float32), rows_R
        wanted_RD = ops.take_rows(hidden_RD, np.flatnonzero(wants).astype(np.int32))
        return ops.linear(wanted_RD, weights.output), rows_R

    def _observe(
        self, slices: Sequence[Slice], hidden_RD: Any, logits_RV: F32
    ) -> list[Exception | None]:
        """What the observer of each slice raised."""
        errors: list[Exception | None] = []
        row = logits_row = 0
        for s in slices:
            observer, n = observer_of(s), wanted_of(s)
            hidden = watches_hidden(s)
            errors.append(None)
            if observer is not None:
                n_prompt = min(s.n, s.request.n_prompt - s.start)
                first = row if hidden else logits_row
                seen = (hidden_RD if hidden else logits_RV)[first : first + n_prompt]
                try:
                    observer(s.start, self.ops.to_host(seen))
                except Exception as error:
                    errors[-1] = error
            row += n
            logits_row += 0 if hidden else n
        return errors

    def _draw_right(
        self, slices: Sequence[Slice], logits_RV: F32, mask_RV: Mask | None
    ) -> list[Outcome]:
        """What is drawn behind the known tokens of each slice and, as long as these were guessed
        right, behind those of its draft. All slices together, a token of each at a time: what would
        be drawn behind a wrong guess is not."""
        first_S = list(accumulate((s.draws for s in slices), initial=0))
        outcomes: list[Outcome] = [[] for _ in slices]
        going = [i for i, s in enumerate(slices) if s.draws]
        depth = 0
        while going:
            rows = np.array([first_S[i] + depth for i in going], np.int32)
            some = len(rows) < len(logits_RV)
            params = [slices[i].request.sample_params(slices[i].draft[:depth]) for i in going]
            drawn = self._draw(
                self.ops.take_rows(logits_RV, rows) if some else logits_RV,
                params,
                mask_RV[rows] if some and mask_RV is not None else mask_RV,
            )
            for i, sampled in zip(going, drawn, strict=True):
                before = outcomes[i]
                assert not isinstance(before, Exception)
                if not isinstance(sampled, Exception):
                    outcomes[i] = [*before, sampled]
                elif not before:
                    outcomes[i] = sampled
                # else it comes again in the next step, if it is reached
            going = [
                i
                for i, sampled in zip(going, drawn, strict=True)
                if not isinstance(sampled, Exception)
                and slices[i].draft[depth : depth + 1] == (sampled.token,)
            ]
            depth += 1
        return outcomes

    def _draw(
        self, logits_RV: F32, params: Sequence[SampleParams], mask_RV: Mask | None
    ) -> list[Sampled | Exception]:
        """A token for each row, or why there is none."""
        if not params:
            return []
        try:
            return [*self.ops.sample(logits_RV, params, mask_RV)]
        except Exception:  # of some row; the others get the tokens that they would get anyway
            return [
                self._draw_one(
                    logits_RV[i : i + 1], p, None if mask_RV is None else mask_RV[i : i + 1]
                )
                for i, p in enumerate(params)
            ]

    def _draw_one(
        self, logits_1V: F32, params: SampleParams, mask_1V: Mask | None
    ) -> Sampled | Exception:
        try:
            return self.ops.sample(logits_1V, [params], mask_1V)[0]
        except Exception as error:
            return error


def begin_masks(slices: Sequence[Slice], n_tokens: int) -> "Future[Masks] | None":
    """Finds out which tokens may be drawn, in a thread; nothing to do where all may."""
    if all(s.request.constraint is None for s in slices if s.sample):
        return None
    return _mask_thread.submit(make_masks, slices, n_tokens)


def end_masks(masks: "Future[Masks] | None") -> Masks:
    """Waits: nobody else may touch the constraints of the slices meanwhile."""
    return (None, {}) if masks is None else masks.result()


def make_masks(slices: Sequence[Slice], n_tokens: int) -> Masks:
    """Bool `[R, V]`: the rows that are drawn from, those of a draft one after another. Where a
    constraint raises an exception it is reported, and concerns no other slice."""
    mask_RV = np.ones((sum(s.draws for s in slices), n_tokens), dtype=np.bool_)
    refusals: dict[int, Exception] = {}
    row = 0
    for i, s in enumerate(slices):
        if s.sample and s.request.constraint is not None:
            try:
                allowed = s.request.constraint.masks(s.draft)
            except Exception as error:
                refusals[i], allowed = error, ()
            for at, bits in enumerate(allowed, row):
                if bits is not None:
                    packed = np.frombuffer(bits, np.uint8)
                    mask_RV[at] = np.unpackbits(packed, count=n_tokens, bitorder="little")
        row += s.draws
    return mask_RV, refusals


def wanted_of(s: Slice) -> int:
    """Rows of a slice that go through the whole model."""
    return s.n if observer_of(s) is not None else s.draws  # no drafts where somebody watches


def watches_hidden(s: Slice) -> bool:
    """Whether what is wanted of a slice are its hidden states."""
    return observer_of(s) is not None and s.request.watches == "hidden"


def observer_of(s: Slice) -> Observer | None:
    """Who wants the logits, or the hidden states, of every row of a slice."""
    return s.request.observer if s.start < s.request.n_prompt else None


def pack(slices: Sequence[Slice]) -> tuple[I32, Batch]:
    """Token ids and positions of all slices one after another, and whose rows they are."""
    lengths_S = np.array([s.start + s.rows for s in slices], dtype=np.int32)
    starts_S = np.zeros(len(slices) + 1, dtype=np.int32)
    np.cumsum([s.rows for s in slices], out=starts_S[1:])
    ids_T = np.empty(starts_S[-1], dtype=np.int32)
    positions_T = np.empty(starts_S[-1], dtype=np.int32)
    blocks_SB = np.full((len(slices), blocks_for(int(lengths_S.max()))), -1, dtype=np.int32)
    row = 0
    for i, s in enumerate(slices):
        request, stop = s.request, s.start + s.rows
        used = blocks_for(stop)
        ids_T[row : row + s.n] = request.ids[s.start : s.start + s.n]
        ids_T[row + s.n : row + s.rows] = s.draft
        positions_T[row : row + s.rows] = np.arange(s.start, stop)
        blocks_SB[i, :used] = request.blocks[:used]
        row += s.rows
    return ids_T, Batch(positions_T, starts_S, lengths_S, blocks_SB)


def wanted_rows(slices: Sequence[Slice], starts_S: I32) -> tuple[I32 | None, I32]:
    """Rows that need logits (None: all of them), and which of those a token is drawn from."""
    rows: list[int] = []
    draws: list[int] = []
    for s, stop in zip(slices, starts_S[1:].tolist(), strict=True):
        n_rows = wanted_of(s)
        rows.extend(range(stop - n_rows, stop))
        draws.extend(range(len(rows) - s.draws, len(rows)))
    everything = len(rows) == starts_S[-1]
    return None if everything else np.array(rows, np.int32), np.array(draws, np.int32)
