"""What sampling needs besides the backend's `sample`: the text of an answer as it grows, cut at its
stop strings; log probabilities of tokens that are given, not drawn; fresh seeds.

How a row of logits becomes a token is `sample` of the backend, specified in reference.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pronk.backends.protocol import F32
from pronk.backends.reference import log_softmax
from pronk.core.errors import UserError


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log probability of a token given those before it, and of the likeliest instead."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), the most likely first."""


def token_logprobs(logits_NV: F32, ids_N: Sequence[int]) -> F32:
    """Log-softmax of each row at one token id, float32 `[N]`."""
    out_N = np.empty(len(ids_N), dtype=np.float32)
    for row, token in enumerate(ids_N):  # a row at a time: [N, V] in float64 may be large
        out_N[row] = log_softmax(logits_NV[row])[token]
    return out_N


Pooling: TypeAlias = Literal["mean", "last"]


class Pooler:
    """An observer of hidden states that makes one vector of a text out of them, of length 1."""

    def __init__(self, pooling: Pooling = "mean") -> None:
        if pooling not in ("mean", "last"):
            raise UserError(f"pooling: {pooling!r} is not one of mean, last")
        self._mean = pooling == "mean"
        self._sum_D: npt.NDArray[np.float64] = np.zeros(0)

    def __call__(self, start: int, hidden_ND: F32) -> None:
        if not self._mean:
            self._sum_D = hidden_ND[-1].astype(np.float64)
            return
        if start == 0:  # also when a preempted request begins anew
            self._sum_D = np.zeros(hidden_ND.shape[1])
        for row_D in hidden_ND:  # one by one: the sum does not depend on how the text was cut
            self._sum_D += row_D

    @property
    def vector(self) -> F32:
        """float32 `[D]`, once all has been seen."""
        length = float(np.linalg.norm(self._sum_D))
        vector_D: F32 = (self._sum_D / (length or 1.0)).astype(np.float32)
        return vector_D


def fresh_seed() -> int:
    """A seed nobody chose: 32 random bits, short enough to be typed again."""
    return int.from_bytes(os.urandom(4), "little")


class TokenStream(Protocol):
    """Incremental decoding (text/vocabulary.py's TextStream): never half a character."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


class AnswerText(Protocol):
    """Makes the text of one answer out of its tokens."""

    @property
    def stopped(self) -> bool:
        """The text is at its end, whatever follows."""
        ...

    def feed(self, token: int) -> str:
        """Text that one more token makes certain."""
        ...

    def finish(self) -> str:
        """The rest of the text, now that no token follows."""
        ...


class TextOut:
    """The text of one answer, token by token.

    Text that may turn out to be the start of a stop string is held back until that is decided, so
    whatever `feed` returns is final, and all of it joined is the answer. The answer ends before
    the first stop string found; `stopped` says that one was.
    """

    def __init__(self, stream: TokenStream, stop: tuple[str, ...] = ()) -> None:
        self._stream = stream
        self._stop = stop
        self._held = ""
        self.stop_found: str | None = None
        """The stop string that ended the answer."""

    @property
    def stopped(self) -> bool:
        return self.stop_found is not None

    def feed(self, token: int) -> str:
        return self._advance(self._stream.push(token))

    def finish(self) -> str:
        if self.stopped:
            return ""
        text = self._advance(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _advance(self, piece: str) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stop_found = min(found)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` starts with (fewer than all of `stop`)."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
