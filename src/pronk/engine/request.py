"""One request: what was asked, the tokens known so far, and how far they are computed.

There is no prefill and no decode: `computed` chases `known`, and when it has caught up the next
token is sampled. Plain Python values only, so that a request may be read from any thread.
"""

import hashlib
import itertools
import time
from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal, Protocol, TypeAlias

from pronk.backends.protocol import F32, Sampled, SampleParams
from pronk.core.errors import UserError
from pronk.engine.sampling import AnswerText, TokenLogprob, fresh_seed

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
Observer: TypeAlias = Callable[[int, F32], None]
"""Called as `observer(start, logits_NV)`: the logits of the prompt's positions from `start` on (or
their hidden states `[N, D]`). A position comes again, with the same numbers, when a request was
preempted."""


class Constraint(Protocol):
    """What an answer must look like: which tokens may come next (text/grammar.py)."""

    def masks(self, draft: Sequence[int], first: int = 0) -> Sequence[bytes | None]:
        """For the next token and for those behind each token of a draft that is `allowed`, without
        the first `first` of these: a bit for each token of the vocabulary, the lowest bit of a byte
        first; None: all may come."""
        ...

    def allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft may come, the first behind what was written so far."""
        ...

    def forced(self) -> Sequence[int]:
        """Tokens that will most likely be drawn, since no other text may come next: other tokens of
        the same text may."""
        ...

    def advance(self, token: int) -> None:
        """A token has been written. Raises PronkError if it was not allowed to come."""
        ...


MAX_LOGPROBS = 100
MAX_SEED = 2**63 - 1
GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: logits divided by them leave one token, if not the numbers."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends. Every value is checked here: a bad
    one raises UserError with the parameter, the value and what would work."""

    temperature: float = 0.0
    """0, as anything below GREEDY_BELOW (1e-5), is greedy: always the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability; 1 is off."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the most likely one; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of all tokens seen; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of every token in the output as often as it occurs there."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, amount added to its logit)."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; the text is cut before the first one found."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer, besides those of the model."""
    ignore_eos: bool = False
    """The model's own end tokens do not end the answer."""
    max_tokens: int | None = None
    """Most tokens of the answer; None: as many as the context has room for. (Among the arguments of
    `LLM` None is the default: 16 for `generate`; as many as the context has room for in `chat`.)"""
    seed: int | None = None
    """Of the random numbers; None: a fresh one, which the answer reports."""
    logprobs: int | None = None
    """Report the log probability of each token and of this many of the likeliest; None: off."""

    def __post_init__(self) -> None:
        check = {
            "temperature": _real(0, 100),
            "top_k": _integer(0),
            "top_p": _real(0, 1, positive=True),
            "min_p": _real(0, 1),
            "repetition_penalty": _real(0, 100, positive=True),
            "presence_penalty": _real(-2, 2),
            "frequency_penalty": _real(-2, 2),
            "logit_bias": _bias,
            "stop": _strings,
            "stop_ids": _token_ids,
            "ignore_eos": _boolean,
            "max_tokens": _optional(_integer(1)),
            "seed": _optional(_integer(0, MAX_SEED)),
            "logprobs": _optional(_integer(0, MAX_LOGPROBS)),
        }
        for name, checked in check.items():
            object.__setattr__(self, name, checked(name, getattr(self, name)))

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> "SamplingParams":
        """From keyword arguments; one that is None takes the default. Lists, a single stop string
        and a mapping for `logit_bias` are accepted. Raises TypeError for an unknown name."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"unknown argument {name!r}; known are {', '.join(known)}")
        given = {name: value for name, value in options.items() if value is not None}
        return cls(**{**defaults, **given})

    @property
    def penalizes(self) -> bool:
        """Whether a logit depends on the tokens that came before."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)


Check: TypeAlias = Callable[[str, Any], Any]


def _real(low: float, high: float, *, positive: bool = False) -> Check:
    limits = f"above {low:g} and at most {high:g}" if positive else f"from {low:g} to {high:g}"

    def check(name: str, value: Any) -> float:
        if isinstance(value, Real) and not isinstance(value, bool):
            number = float(value)
            if low <= number <= high and not (positive and number == low):  # false for a NaN
                return number
        raise UserError(f"{name}: {value!r} is not a number {limits}")

    return check


def _integer(low: int, high: int | None = None) -> Check:
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"

    def check(name: str, value: Any) -> int:
        if isinstance(value, Integral) and not isinstance(value, bool):
            number = int(value)
            if number >= low and (high is None or number <= high):
                return number
        raise UserError(f"{name}: {value!r} is not a whole number {limits}")

    return check


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}: {value!r} is neither True nor False")
    return value


def _bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = list(value.items()) if isinstance(value, Mapping) else [(i, b) for i, b in value]
    except (TypeError, ValueError):
        raise UserError(f"{name}: {value!r} does not map token ids to numbers") from None
    token, amount = _integer(0), _real(-100, 100)
    return tuple((token(f"{name} token", i), amount(f"{name}[{i!r}]", b)) for i, b in pairs)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(s, str) and s for s in values):
        raise UserError(f"{name}: {value!r} is not a non-empty string or a list of such")
    return tuple(values)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise UserError(f"{name}: {value!r} is not a list of token ids")
    return tuple(_integer(0)(name, token) for token in value)


class State(Enum):
    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """A prompt on its way to an answer.

    Without `params` nothing is sampled: the request ends once its prompt is computed, and its
    `observer` is what it was for. With an observer no stored prefix is used, since a position has
    to be computed to be seen.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None,
        *,
        eos_ids: frozenset[int] = frozenset(),
        text: AnswerText | None = None,
        observer: Observer | None = None,
        watches: Literal["logits", "hidden"] = "logits",
        constraint: Constraint | None = None,
        adapter: str | None = None,
        salt: bytes = b"",
        priority: int = 0,
        owner: str = "",
        deadline: float | None = None,
    ) -> None:
        """`eos_ids` are the model's end tokens; `text` turns tokens into text and finds stop
        strings, and without it an answer is token ids only; `observer` is called with logits, or
        with the normalized hidden states (`watches`, only without `params`); `constraint` says
        which tokens may come; `adapter` names one of those that the model has loaded.

        Requests of one `salt` and adapter only share what was computed for a prompt. Those of a
        smaller `priority` go first; among equals `owner`s take turns. `deadline`, on the clock of
        `time.monotonic`, ends a request that has not ended before."""
        self.id = next(self._numbers)
        self.params = params
        self.observer = observer
        assert params is None or watches == "logits", "who draws needs logits"
        self.watches = watches
        self.constraint = constraint
        self.adapter = adapter
        self.salt = hashlib.blake2b(salt, digest_size=16).digest() if salt else b""
        """What the keys of its blocks begin with: a hash, since one could choose a salt that
        continues the keys of another text."""
        self._own_salt = salt
        self.priority = priority
        self.owner = owner
        self.deadline = deadline
        self.ids = _as_array(prompt)
        """All known tokens: the prompt, then the answer."""
        self.n_prompt = len(self.ids)
        self.computed = 0
        """Tokens whose keys and values are stored."""
        self.limit = 0
        """Most tokens that may become known; set when the scheduler accepts the request."""
        self.blocks = array("i")
        """KV blocks of positions 0, BLOCK, 2 BLOCK, ..."""
        self.keys: list[bytes] = []
        """Keys of its full blocks, as far as they were needed."""
        self.published = 0
        """Full blocks, from the first, that the pool knows by key."""
        self.state = State.NEW
        self.finish_reason: FinishReason | None = None
        """Set together with the last token; the request has ended when `finished` says so."""
        self.error: Exception | None = None
        """Why the request ended with "error"; it is for the one who made the request."""
        self.torn = False
        """An answer that lost a token on its way to the text cannot go on."""
        self.cached: int | None = None
        """Prompt tokens that were found stored when the request first ran."""
        self.preemptions = 0
        self.pieces: list[str] = []
        """Text of the answer. Grows at its end only."""
        self.logprobs: list[TokenLogprob] = []
        self.seed = fresh_seed() if params is None or params.seed is None else params.seed
        self.added_at = time.perf_counter()
        self.started_at: float | None = None
        """When it first ran."""
        self.first_token_at = self.last_token_at = self.added_at
        self.answer_text = text
        self._prompt = self.ids[:]
        self._output = array("i")
        self._ends = _end_ids(params, eos_ids)
        self._fixed = {} if params is None else _fixed_sample_params(params, self.seed)

    def keep_apart(self, digest: bytes) -> None:
        """What it computes is shared with requests of the same `digest` only: that of its adapter's
        numbers, since another adapter may have the name next."""
        self.salt = hashlib.blake2b(self._own_salt, key=digest, digest_size=16).digest()

    @property
    def known(self) -> int:
        return len(self.ids)

    @property
    def n_output(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def output(self) -> list[int]:
        """Tokens of the answer, with the end token if there was one."""
        return self._output.tolist()

    @property
    def wants_logprobs(self) -> bool:
        return self.params is not None and self.params.logprobs is not None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finished(self) -> bool:
        return self.state is State.FINISHED

    @property
    def observed(self) -> bool:
        """Whether somebody wants the logits of the tokens that are computed next."""
        watched = self.observer is not None and self.watches == "logits"
        return watched and self.computed < self.n_prompt

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return self._ends

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """The scheduler's last word."""
        self.error = error
        self.finish_reason = reason
        self.state = State.FINISHED

    def raise_error(self) -> None:
        """Raises what the request failed with, if it did."""
        if self.error is not None:
            raise self.error

    def sample_params(self, draft: Sequence[int] = ()) -> SampleParams:
        """How the token behind the known ones and a draft is drawn. Without a draft the ids in it
        are the request's own arrays, no copies: they are good until `append`."""
        assert self.params is not None
        draw = self.n_output + len(draft)
        if self.params.penalizes:
            output = self._output + array("i", draft) if draft else self._output
            return SampleParams(
                **self._fixed, draw=draw, prompt_ids=self._prompt, output_ids=output
            )
        return SampleParams(**self._fixed, draw=draw)

    def append(self, sampled: Sampled) -> str:
        """Takes the next token; the text that it makes certain. Sets `finish_reason` if it was
        the last one. An exception on the way leaves the request `torn`."""
        self.torn = True
        self.last_token_at = time.perf_counter()
        if not self.n_output:
            self.first_token_at = self.last_token_at
        self.ids.append(sampled.token)
        self._output.append(sampled.token)
        if self.constraint is not None:
            self.constraint.advance(sampled.token)
        if sampled.token in self._ends:
            self.finish_reason = "stop"
        elif self.known >= self.limit:
            self.finish_reason = "length"
        if sampled.logprob is not None:
            self.logprobs.append(TokenLogprob(sampled.token, sampled.logprob, sampled.top))
        piece = self._read(sampled.token)
        if piece:
            self.pieces.append(piece)
        self.torn = False
        return piece

    def _read(self, token: int) -> str:
        text = self.answer_text
        if text is None:
            return ""
        piece = "" if token in self._ends else text.feed(token)
        if text.stopped or self.finish_reason is not None:
            piece += text.finish()
        if text.stopped:
            self.finish_reason = "stop"
        return piece


def _as_array(prompt: Sequence[int]) -> "array[int]":
    """Raises UserError with the index and the value of what is no token id."""
    if isinstance(prompt, str | bytes | bytearray | Mapping | Set):
        raise UserError(f"prompt: {prompt!r:.60} is not a list of token ids")
    try:
        ids = list(prompt)
    except TypeError:
        raise UserError(f"prompt: {prompt!r:.60} is not a list of token ids") from None
    if not set(map(type, ids)) <= {int}:  # a bool would pass for an int
        token_id = _integer(0)
        ids = [token_id(f"prompt[{i}]", token) for i, token in enumerate(ids)]
    try:
        return array("i", ids)
    except OverflowError:
        wrong = next(i for i, token in enumerate(ids) if not -(2**31) <= token < 2**31)
        raise UserError(f"prompt[{wrong}]: {ids[wrong]} is not a token id") from None


def _end_ids(params: SamplingParams | None, eos_ids: frozenset[int]) -> frozenset[int]:
    if params is None:
        return frozenset()
    return frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else eos_ids)


def _fixed_sample_params(params: SamplingParams, seed: int) -> dict[str, Any]:
    """What stays the same from draw to draw."""
    same = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "logit_bias")  # fmt: skip
    fixed = {name: getattr(params, name) for name in same}
    if params.temperature < GREEDY_BELOW:
        fixed["temperature"] = 0.0
    top_logprobs = -1 if params.logprobs is None else params.logprobs
    return {**fixed, "seed": seed, "top_logprobs": top_logprobs}
