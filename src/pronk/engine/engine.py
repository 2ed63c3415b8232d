"""The engine: requests in, tokens and text out, one step at a time.

Synchronous. Any thread may add, step and abort; a lock makes them take turns, so the thread that
steps is the one that touches arrays at that moment, and all others see Python values only.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pronk.core.errors import DeadlineError, UserError
from pronk.engine.adapters import Adapters, not_loaded
from pronk.engine.blocks import BlockPool
from pronk.engine.draft import Speculator
from pronk.engine.request import FinishReason, Request
from pronk.engine.scheduler import Outcome, Scheduler, Slice, Stored

Result = TypeVar("Result")


class Computes(Protocol):
    """What the engine wants of a model (`Runner`, or a fake one in a test)."""

    def run(self, slices: Sequence[Slice]) -> Sequence[Outcome]:
        """Computes the slices; what was drawn for each that has `sample`, or the exception that
        ends one request. What is raised instead undoes the step for all of them."""
        ...


@dataclass(frozen=True, slots=True)
class Event:
    """One request moved on."""

    request: Request
    tokens: tuple[int, ...]
    """Empty where the request ended without drawing any."""
    text: str
    """Text that became certain; all of a request's texts joined are its answer."""
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where an engine stands; counts are since it was made."""

    running: int
    waiting: int
    blocks: int
    """Of the KV cache."""
    blocks_used: int
    """In the table of some request."""
    blocks_cached: int
    """In none, but found by prompts that begin alike."""
    preemptions: int
    prompt_tokens: int
    """Of requests that have started."""
    cached_tokens: int
    """Of those, the ones that had been computed before."""
    output_tokens: int
    drafted: int
    accepted: int
    """Of the drafted tokens."""


def pending(requests: Sequence[Request]) -> bool:
    """Whether one of them has not ended yet. Raises what one of them failed with."""
    waits = not all(request.finished for request in requests)
    for request in requests:  # afterwards: another thread's step may end them meanwhile
        request.raise_error()
    return waits


class Engine:
    """Runs any number of requests together on one model.

    `n_blocks` is the size of the KV cache that `model` computes with. What a request answers
    depends on neither these numbers nor on the other requests: neither on their failing.
    """

    def __init__(
        self,
        model: Computes,
        *,
        vocab_size: int,
        context: int,
        n_blocks: int,
        max_batch: int = 8,
        token_budget: int = 512,
        prefix_cache: bool = True,
        speculator: Speculator | None = None,
        stored: Stored | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """`adapters`: those that `model` computes with; without, requests cannot name any."""
        self._model = model
        self._adapters = adapters
        self._speculator = speculator
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._in_order = True
        self._n_output = 0
        self.scheduler = Scheduler(
            BlockPool(n_blocks, prefix_cache=prefix_cache),
            context=context,
            max_batch=max_batch,
            token_budget=token_budget,
            drafts=speculator,
            stored=stored,
        )

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def stats(self) -> EngineStats:
        """Numbers to look at, from any thread and without waiting for a step: they may be of
        different moments of it."""
        scheduler, drafts = self.scheduler, self._speculator
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks=scheduler.pool.n_blocks,
            blocks_used=scheduler.pool.n_blocks - scheduler.pool.available,
            blocks_cached=scheduler.pool.n_cached,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            output_tokens=self._n_output,
            drafted=drafts.drafted if drafts else 0,
            accepted=drafts.accepted if drafts else 0,
        )

    def add(self, request: Request) -> None:
        """Queues a request, if `check` has nothing against it."""
        self.check(request)

        def add() -> None:
            if request.adapter is not None:  # once more: it may have gone meanwhile
                request.keep_apart(self._digest(request.adapter))
            self.scheduler.add(request)

        self._alone(add)

    def check(self, request: Request) -> None:
        """Raises UserError for a request that could never run: an empty prompt, one that does not
        fit (ContextLengthError), token ids outside of the vocabulary, an adapter that is not
        loaded."""
        if request.adapter is not None:
            self._digest(request.adapter)
        self.scheduler.check(request)
        self._check_ids("prompt", request.ids)
        if request.params is not None:
            self._check_ids("logit_bias", [token for token, _ in request.params.logit_bias])
            self._check_ids("stop_ids", request.params.stop_ids)

    def step(self) -> list[Event]:
        """Computes the next tokens of the requests whose turn it is. A request that cannot go on
        ends with its exception in `error`; what is raised here concerns none of them alone."""
        return self._alone(self._step)

    def abort(self, request: Request) -> bool:
        """Ends a request where it stands; False if it had ended before."""

        def abort() -> bool:
            if request.finished:
                return False
            self.scheduler.finish(request, "abort")
            return True

        return self._alone(abort)

    def fail_all(self, error: Exception) -> list[Event]:
        """Ends everything with `error`: for whoever steps, when stepping itself keeps failing."""

        def fail() -> list[Event]:
            queued = (*self.scheduler.running, *self.scheduler.waiting)
            return [self._end(request, "error", error) for request in queued]

        return self._alone(fail)

    def run(self, requests: Sequence[Request]) -> None:
        """Adds the requests and steps until all of them have ended. If one is refused or fails, or
        the run is interrupted, none of them stays behind."""
        try:
            for request in requests:
                self.add(request)
            while pending(requests):
                self.step()
        finally:
            for request in requests:
                self.abort(request)

    def close(self) -> None:
        """Hands the blocks that can be found by key to `stored`, where there is one. The engine
        goes on to work, but nothing of it is stored any more."""
        stored = self.scheduler.stored
        if stored is None:
            return
        try:
            self._alone(lambda: stored.keep(self.scheduler.pool.findable()))
        finally:
            stored.close()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return () if self._adapters is None else self._adapters.names

    def load_adapter(self, name: str, path: str | Path, *, keep_free: int = 0) -> None:
        """Reads a PEFT folder; steps go on meanwhile. UserError for a bad or taken name, and for a
        folder that is damaged, unsupported, of another model or too large for the memory, of which
        `keep_free` bytes are promised to others."""
        if self._adapters is None:
            raise UserError(f"adapter: {name!r:.60} cannot be loaded: this model takes none")
        self._adapters.load(name, path, keep_free=keep_free)

    def unload_adapter(self, name: str) -> None:
        """UserError for an adapter that is not loaded, or that an unfinished request uses."""

        def unload() -> None:
            self._digest(name)
            queued = (*self.scheduler.running, *self.scheduler.waiting)
            users = sum(1 for request in queued if request.adapter == name)
            if users:
                raise UserError(
                    f"adapter: {name!r} is in use by {users} unfinished"
                    f" {'request' if users == 1 else 'requests'}; unload it when they have ended"
                )
            assert self._adapters is not None
            self._adapters.unload(name)

        self._alone(unload)

    def _digest(self, name: str) -> bytes:
        if self._adapters is None:
            raise not_loaded(name, ())
        return self._adapters.digest(name)

    def _alone(self, work: Callable[[], Result]) -> Result:
        """Exclusive use of the scheduler. Whatever `work` raises, even a KeyboardInterrupt in the
        middle of book-keeping, leaves everything in order, at the latest for the next turn."""
        with self._lock:  # no context manager in Python: an interruption would leave it locked
            if not self._in_order:
                self.scheduler.recover()
            self._in_order = False
            try:
                result = work()
            except BaseException:
                self.scheduler.recover()
                self._in_order = True
                raise
            self._in_order = True
            return result

    def _step(self) -> list[Event]:
        late = [
            self._end(request, "error", DeadlineError("deadline: the time of this request is up"))
            for request in self.scheduler.expired(time.monotonic())
        ]
        return late + self._compute()

    def _compute(self) -> list[Event]:
        slices = self.scheduler.schedule()
        if not slices:
            return []
        started = time.perf_counter()
        outcomes = self._model.run(slices)
        if self._speculator is not None and all(s.n == 1 for s in slices):
            rows = sum(s.rows for s in slices)
            self._speculator.book(rows, time.perf_counter() - started)
        return [
            event
            for done, outcome in zip(slices, outcomes, strict=True)
            if (event := self._advance(done, outcome))
        ]

    def _advance(self, done: Slice, outcome: Outcome) -> Event | None:
        """Books one slice; None if its request is still reading its prompt."""
        request = done.request
        if isinstance(outcome, Exception):
            return self._end(request, "error", outcome)
        self.scheduler.commit(done)
        if not outcome:
            waits = request.params is not None or request.computed < request.known
            return None if waits else self._end(request, "length")
        texts: list[str] = []
        try:
            for sampled in outcome:
                texts.append(request.append(sampled))
                if request.finish_reason is not None:
                    break
        except Exception as error:  # of whoever reads the text: no business of the other requests
            return self._end(request, "error", error)
        self._accept(done, len(texts) - 1)
        if request.finish_reason is not None:
            self.scheduler.finish(request, request.finish_reason)
        tokens = tuple(sampled.token for sampled in outcome[: len(texts)])
        self._n_output += len(tokens)
        return Event(request, tokens, "".join(texts), request.finish_reason)

    def _accept(self, done: Slice, n: int) -> None:
        """The first `n` tokens of a slice's draft were right."""
        if done.draft:
            self.scheduler.commit(done, n)
        if self._speculator is not None:
            self._speculator.learn(done.request, len(done.draft), n)
            if done.request.finish_reason is not None:
                self._speculator.remember(done.request)

    def _end(self, request: Request, reason: FinishReason, error: Exception | None = None) -> Event:
        """Ends a request without a token."""
        self.scheduler.finish(request, reason, error)
        return Event(request, (), "", reason)

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            wrong = next(token for token in ids if not 0 <= token < self._vocab_size)
            raise UserError(f"{name}: token id {wrong} is not in 0 to {self._vocab_size - 1}")
