"""Perplexity of a text under a model, and how far a second model's predictions are from it.

Every token of the text is scored exactly once, by overlapping windows: a window holds `ctx` tokens,
windows start `stride` tokens apart, and of each only the tokens that no window before has scored
count. So each scored token has at least `ctx - stride` tokens before it, except in the first
window. Where the vocabulary wants a BOS, each window starts with one (it takes one of the `ctx`
places and is not scored); without one the first token of the text has nothing before it and is the
only one that is not scored. (`stride` = `ctx` / 2 is close to what llama.cpp's tool does, which
scores the second halves of windows that do not overlap; a small stride is the convention of the
Hugging Face documentation.)

Against a reference, KL divergence is the mean over the scored tokens of
sum_v p(v) (log p(v) - log q(v)), p the reference's distribution and q the model's, in nats.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pronk.backends.protocol import F32
from pronk.core.errors import UserError
from pronk.core.progress import Progress, silent

F64: TypeAlias = npt.NDArray[np.float64]

Predict: TypeAlias = Callable[[Sequence[int]], F32]
"""Logits of a model for every position, float32 `[T, V]`."""

_ROWS = 16
"""Rows of logits that are brought to float64 at a time."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens start to stop of the text; those from `scored` on count."""

    start: int
    stop: int
    scored: int


def windows(n_tokens: int, ctx: int, stride: int, *, bos: bool) -> Iterator[Window]:
    """The windows of a text; `bos` says that each has a BOS in front.

    Raises UserError where `stride` leaves a token without one before it, or where nothing is left
    to score.
    """
    if ctx < 2:
        raise UserError(f"--ctx: {ctx} is too small; a window needs at least 2 tokens")
    if not 1 <= stride < ctx:
        raise UserError(f"--stride: {stride} is not from 1 to {ctx - 1} (below --ctx)")
    if n_tokens + bos < 2:
        raise UserError(f"FILE: {n_tokens} tokens are too few; at least {2 - bos} are needed")
    room = ctx - bos
    start, scored = 0, 0 if bos else 1
    while scored < n_tokens:
        stop = min(start + room, n_tokens)
        yield Window(start, stop, scored)
        start, scored = start + stride, stop


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a model predicts the same tokens as its reference."""

    reference_perplexity: float
    kl_divergence: float
    """Mean, in nats a token."""
    kl_divergence_p99: float
    """99 of 100 tokens are below it."""
    top1_agreement: float
    """Fraction of the tokens for which both find the same token likeliest."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    perplexity: float
    """exp of the mean negative log probability."""
    standard_error: float
    """Of the perplexity, as if the tokens were independent."""
    n_scored: int
    comparison: Comparison | None = None


def measure_perplexity(
    predict: Predict,
    ids: Sequence[int],
    *,
    ctx: int,
    stride: int,
    bos_id: int | None,
    reference: Predict | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """Scores the token ids of a text (without BOS); see the top of this file.

    Memory: the logits of one window, of two with a reference: 4 ctx V bytes each.
    """
    bos = [] if bos_id is None else [bos_id]
    scores: list[Scores] = []
    plan = list(windows(len(ids), ctx, stride, bos=bool(bos)))
    for done, window in enumerate(plan):
        progress(done, len(plan), "scoring")
        tokens = [*bos, *ids[window.start : window.stop]]
        first = window.scored - window.start + len(bos) - 1  # row i predicts token i + 1
        targets = np.array(tokens[first + 1 :])
        model_NV = predict(tokens)[first:-1]
        reference_NV = None if reference is None else reference(tokens)[first:-1]
        scores.append(score(targets, model_NV, reference_NV))
    progress(len(plan), len(plan), "scoring")
    return summary(scores)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of the N scored tokens of a window: natural log probabilities and, against a reference, KL
    divergences and whether the likeliest tokens agree."""

    logprobs_N: F64
    reference_logprobs_N: F64
    kl_N: F64
    agree_N: npt.NDArray[np.bool_]


def score(targets_N: npt.NDArray[np.int_], q_NV: F32, p_NV: F32 | None) -> Scores:
    parts = []
    for at in range(0, len(targets_N), _ROWS):
        rows = slice(at, at + _ROWS)
        targets = targets_N[rows]
        log_q = log_softmax(q_NV[rows])
        chosen = log_q[np.arange(len(targets)), targets]
        if p_NV is None:
            nothing = np.empty(0)
            parts.append((chosen, nothing, nothing, np.empty(0, np.bool_)))
            continue
        log_p = log_softmax(p_NV[rows])
        kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        agree = log_p.argmax(axis=1) == log_q.argmax(axis=1)
        parts.append((chosen, log_p[np.arange(len(targets)), targets], kl, agree))
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def log_softmax(logits_NV: F32) -> F64:
    shifted = logits_NV.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def summary(scores: list[Scores]) -> Perplexity:
    logprobs = np.concatenate([part.logprobs_N for part in scores])
    kl = np.concatenate([part.kl_N for part in scores])
    perplexity = _exp(-logprobs.mean())
    n = len(logprobs)
    error = perplexity * float(logprobs.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if not len(kl):
        return Perplexity(perplexity, error, n)
    reference = np.concatenate([part.reference_logprobs_N for part in scores])
    agree = np.concatenate([part.agree_N for part in scores])
    comparison = Comparison(
        reference_perplexity=_exp(-reference.mean()),
        kl_divergence=float(kl.mean()),
        kl_divergence_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(agree.mean()),
    )
    return Perplexity(perplexity, error, n, comparison)


def _exp(x: np.float64) -> float:
    with np.errstate(over="ignore"):  # a model that is sure and wrong: infinite, not an exception
        return float(np.exp(x))
