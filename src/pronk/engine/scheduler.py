"""Decides what each step computes. Knows requests and blocks, no arrays and no text.

A request is `computed` tokens chasing `known` ones; a step moves each running request on by as many
tokens as the budget leaves it: a long prompt in chunks, a request that has caught up by one. So
chunked prefill, decoding, a stored prefix and the recomputation after a preemption are one case.

Who goes first: the smaller `priority`; among equals the owner that was given the fewest tokens
lately; for one owner first come, first served. Running requests go on before others of their
priority start. Where blocks run out, or a place in the batch for a smaller priority, the running
request of the largest priority that started last gives its own back and waits again; its tokens are
kept, only their keys and values are computed once more. A request waits, too, while a running one
of no larger priority computes the beginning that both share: then that is there to be found.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from pronk.backends.protocol import BLOCK, Sampled
from pronk.core.errors import ContextLengthError, PronkError, UserError
from pronk.engine.blocks import BlockPool, blocks_for, extend_keys
from pronk.engine.request import FinishReason, Request, State

OBSERVED_CHUNK = 128
"""Most rows of one step, of all requests together, whose logits somebody wants to see: at a
vocabulary of 128,256 they take 66 MB."""
MOST_DRAFTED = 32
"""Most guessed tokens of one step, of all requests together: each has a row of logits, too."""


@dataclass(frozen=True, slots=True)
class Slice:
    """`n` >= 1 tokens of one request, from position `start`, computed in one step."""

    request: Request
    start: int
    n: int
    sample: bool
    """The last of them is the newest known token, and the next one is to be drawn."""
    draft: tuple[int, ...] = ()
    """Guessed tokens, computed behind the known ones where `sample` is set. One is drawn behind
    each of them, too; what is drawn counts as far as the guesses before it were right."""

    @property
    def rows(self) -> int:
        return self.n + len(self.draft)

    @property
    def draws(self) -> int:
        """Rows behind which a token is drawn."""
        return len(self.draft) + 1 if self.sample else 0


Outcome: TypeAlias = Sequence[Sampled] | Exception
"""What came of a slice: the tokens drawn, all but the last of them guessed in its draft; none where
none was to be drawn; or why its request, and only that one, cannot go on."""


class Drafts(Protocol):
    """Guesses at what comes next (draft.py)."""

    def propose(self, requests: Iterable[Request], room: int) -> Mapping[Request, Sequence[int]]:
        """Guessed tokens, `room` at most together, for requests whose newest token is about to be
        computed."""
        ...

    def prepare(self, requests: Iterable[Request]) -> None:
        """These run, and their next step is not one to guess in."""
        ...

    def release(self, request: Request) -> None:
        """The request has ended, or waits again."""
        ...

    def reset(self) -> None:
        """All requests wait again, after an exception from anywhere."""
        ...


class Stored(Protocol):
    """Blocks outside of the pool, by the same keys (disk_blocks.py). They have no say in what is
    computed: whatever is not there is computed anew."""

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of the first `keys` are there."""
        ...

    def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Copies them into blocks of the pool; how many of the first are whole."""
        ...

    def found(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """A request begins with these blocks, which the pool has."""
        ...

    def keep(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        """The pool is about to go; the block that is wanted most comes first."""
        ...

    def close(self) -> None:
        """Nothing is asked any more."""
        ...


@dataclass(slots=True)
class _Room:
    """What is left of a step."""

    tokens: int
    observed: int = OBSERVED_CHUNK

    def holds(self, request: Request) -> int:
        """Most tokens of a request that fit."""
        return min(self.tokens, self.observed) if request.observed else self.tokens

    def book(self, chunk: Slice) -> None:
        self.tokens -= chunk.rows
        if chunk.request.observed:
            self.observed -= chunk.n


@dataclass(slots=True)
class _Step:
    """A step while it is put together."""

    room: _Room
    drafts: Mapping[Request, Sequence[int]]
    slices: list[Slice] = field(default_factory=list)
    full: bool = False
    """Somebody waits for room: nobody starts who came later."""


class Scheduler:
    """`context`: most tokens of a request; `max_batch`: most requests of a step; `token_budget`:
    most tokens of a step; `drafts`: guesses that steps of generated rows only may take along;
    `stored`: where blocks are looked for that the pool does not have."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        context: int,
        max_batch: int = 8,
        token_budget: int = 512,
        drafts: Drafts | None = None,
        stored: Stored | None = None,
    ) -> None:
        sizes = {"ctx": context, "max_batch": max_batch, "token_budget": token_budget}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name}: {value} is not at least 1")
        self.pool = pool
        self.context = context
        self.max_batch = max_batch
        self.token_budget = token_budget
        self.drafts = drafts
        self.stored = stored
        self.running: list[Request] = []
        """By priority; those of one priority as they started."""
        self.waiting: list[Request] = []
        self.preemptions = 0
        self.prompt_tokens = self.cached_tokens = 0
        """Of requests that have started, and how many of those were found stored."""
        self._served: dict[str, int] = {}
        """Tokens computed for each owner that has requests, counted from that of the owner who had
        least when it came."""
        self._coming: dict[bytes, Request] = {}
        """Keys of the blocks that running requests will store, by who computes them."""

    def check(self, request: Request) -> None:
        """Refuses a request that could never run: ContextLengthError, or UserError where it is the
        KV cache that is too small."""
        n, answer = request.n_prompt, 0 if request.params is None else 1
        if n == 0:
            raise UserError("prompt: it has no tokens; at least one is needed")
        if n + answer > self.context:
            raise ContextLengthError(n, self.context)
        if n + answer > self._positions:
            raise UserError(
                f"prompt: {n} tokens do not fit the KV cache of {self._positions} positions"
            )

    def add(self, request: Request) -> None:
        """Queues a request that `check` lets pass."""
        most = request.params.max_tokens if request.params else 0
        limit = self.context if most is None else request.n_prompt + most
        request.limit = min(limit, self.context, self._positions)
        request.state = State.WAITING
        self._served.setdefault(request.owner, min(self._served.values(), default=0))
        self.waiting.append(request)

    def expired(self, now: float) -> list[Request]:
        """Requests whose deadline has passed."""
        queued = (*self.running, *self.waiting)
        return [r for r in queued if r.deadline is not None and r.deadline <= now]

    @property
    def _positions(self) -> int:
        return self.pool.n_blocks * BLOCK

    def schedule(self) -> list[Slice]:
        """The work of the next step, empty only if there are no requests.

        Requests may start (with the blocks of a stored prefix) or be preempted here, and the blocks
        that the step writes to are then in the tables of its requests. How far a running request
        is computed, and which blocks can be found by key, changes in `commit` only.
        """
        step = _Step(_Room(self.token_budget), self._propose())
        for priority in sorted({request.priority for request in (*self.running, *self.waiting)}):
            self._continue(step, priority)
            self._start(step, priority)
        return step.slices

    def _continue(self, step: "_Step", priority: int) -> None:
        """Gives the running requests of a priority their share of a step."""
        turn = sum(1 for request in self.running if request.priority < priority)
        while turn < len(self.running) and self.running[turn].priority == priority:
            request = self.running[turn]
            if most := step.room.holds(request):
                chunk = self._chunk(request, most)
                if not self._make_room(request, chunk.n):
                    return  # it was the last of all, and waits again
                if draft := step.drafts.get(request):
                    chunk = self._extend(chunk, draft)
                self._book(step, chunk)
            turn += 1

    def _start(self, step: "_Step", priority: int) -> None:
        """Lets waiting requests of a priority run. Where one of them has to wait for room, so have
        all after it."""
        while not step.full:
            request = self._next(priority)
            if request is None:
                return
            if not step.room.holds(request) or not self._admit(request):
                step.full = True
                return
            chunk = self._chunk(request, step.room.holds(request))
            made = self._make_room(request, chunk.n)
            assert made, f"request {request.id} was admitted without room"
            self._book(step, chunk)

    def _book(self, step: "_Step", chunk: Slice) -> None:
        step.slices.append(chunk)
        step.room.book(chunk)
        self._served[chunk.request.owner] += chunk.rows

    def _next(self, priority: int) -> Request | None:
        """Whose turn it is among the waiting ones of a priority, apart from those whose beginning
        is being computed."""
        ready = (r for r in self.waiting if r.priority == priority and not self._is_coming(r))
        return min(ready, key=lambda r: (self._served[r.owner], r.id), default=None)

    def _is_coming(self, request: Request) -> bool:
        """Whether a running request is about to store the next block of a waiting one."""
        if not self._coming or request.observer is not None:
            return False
        key = self.pool.first_missing(request.keys, request.ids, request.salt)
        other = None if key is None else self._coming.get(key)
        return other is not None and other.priority <= request.priority  # else it may take for ever

    def commit(self, done: Slice, accepted: int = 0) -> None:
        """The slice's keys and values are stored, and those of the first `accepted` tokens of its
        draft, which are known by now."""
        request = done.request
        request.computed = done.start + done.n + accepted
        full = request.computed // BLOCK
        if self.pool.prefix_cache and full > request.published:
            extend_keys(request.keys, request.ids, full, request.salt)
            for i in range(request.published, full):
                self.pool.publish(request.blocks[i], request.keys[i])
                self._coming.pop(request.keys[i], None)
            request.published = full

    def finish(
        self, request: Request, reason: FinishReason, error: Exception | None = None
    ) -> None:
        """Ends a request, wherever it stands, and takes its blocks back."""
        request.end(reason, error)
        self._take_back(request)
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        if not any(r.owner == request.owner for r in (*self.running, *self.waiting)):
            self._served.pop(request.owner, None)

    def recover(self) -> None:
        """Puts everything in order after an exception that may have come from the middle of any
        other method, or of this one: all requests wait again, in their order, and compute what is
        not stored by key once more. That is right whatever state was left, as long as no request
        is ever in neither queue.
        """
        requests = dict.fromkeys((*self.running, *self.waiting))
        for request in requests:
            if request.torn and not request.finished:
                request.end("error", PronkError("the answer was interrupted while it was written"))
            elif request.finish_reason is not None:
                request.end(request.finish_reason, request.error)
            elif request.state is State.RUNNING:
                request.state = State.WAITING
                request.preemptions += 1
            del request.blocks[:]
            request.computed = 0
        self.waiting = [request for request in requests if not request.finished]
        self.running = []
        self._served = {request.owner: 0 for request in self.waiting}
        self._coming = {}
        self.pool.forget_references()
        if self.drafts is not None:
            self.drafts.reset()

    def _propose(self) -> Mapping[Request, Sequence[int]]:
        """Guesses, if the step will have nothing to do but decode."""
        decodes = all(r.known - r.computed == 1 and not r.observed for r in self.running)
        may_start = self.waiting and (
            len(self.running) < self.max_batch
            or min(r.priority for r in self.waiting) < self.running[-1].priority
        )
        room = min(self.token_budget - len(self.running), MOST_DRAFTED)
        if self.drafts is None or not self.running:
            return {}
        if not decodes or may_start or room < 1:
            self.drafts.prepare(self.running)
            return {}
        return self.drafts.propose([r for r in self.running if r.params is not None], room)

    def _extend(self, chunk: Slice, draft: Sequence[int]) -> Slice:
        """The slice with a draft behind it, if there are blocks for that which nobody has."""
        request = chunk.request
        missing = blocks_for(request.known + len(draft)) - len(request.blocks)
        if not chunk.sample or missing > self.pool.available:
            return chunk
        if missing > 0:
            request.blocks.extend(self.pool.take(missing) or ())
        return replace(chunk, draft=tuple(draft))

    def _chunk(self, request: Request, most: int) -> Slice:
        n = min(request.known - request.computed, most)
        last = request.computed + n == request.known
        return Slice(request, request.computed, n, last and request.params is not None)

    def _make_room(self, request: Request, n: int) -> bool:
        """Gives a running request the blocks of its next n tokens, taking them from the last of
        all where none is left; False if that was the request itself."""
        missing = max(0, blocks_for(request.computed + n) - len(request.blocks))
        while (blocks := self.pool.take(missing)) is None:
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        request.blocks.extend(blocks)
        return True

    def _admit(self, request: Request) -> bool:
        """Lets a waiting request run if there is room for all its tokens and one more (with less it
        would soon have to go again), or if running ones of a larger priority can make some."""
        while True:
            if len(self.running) < self.max_batch and self._take_prefix(request):
                break
            if not self.running or self.running[-1].priority <= request.priority:
                return False
            self._preempt(self.running[-1])
        if request.cached is None:
            request.started_at = time.perf_counter()
            request.cached = request.computed
            self.prompt_tokens += request.n_prompt
            self.cached_tokens += request.cached
        request.state = State.RUNNING
        place = sum(1 for r in self.running if r.priority <= request.priority)
        self.running.insert(place, request)  # first, so that it is never in neither
        self.waiting.remove(request)
        for key in request.keys[request.published : request.known // BLOCK]:
            other = self._coming.get(key)
            if other is None or other.priority > request.priority:
                self._coming[key] = request
        return True

    def _take_prefix(self, request: Request) -> bool:
        """Gives a request the stored blocks that it begins with, if there is room for the rest."""
        blocks: list[int] = []
        n_stored = 0
        if request.observer is None:
            blocks, n_stored = self.pool.take_prefix(request.keys, request.ids, request.salt)
        wanted = blocks_for(min(request.known + 1, request.limit))
        if wanted - len(blocks) > self.pool.available:
            self.pool.give_back(blocks)
            return False
        blocks += self._load(request, blocks)
        n_stored = len(blocks) * BLOCK
        request.blocks.extend(blocks)
        request.computed, request.published = n_stored, len(blocks)
        return True

    def _load(self, request: Request, found: list[int]) -> list[int]:
        """Blocks that go on where those `found` in the pool end, from outside; there is room for
        them, as for all tokens of the request."""
        if self.stored is None or request.observer is not None:
            return []
        if request.cached is None:  # and has not found its own blocks again
            self.stored.found(request.keys[: len(found)], found)
        missing = request.keys[len(found) : (request.known - 1) // BLOCK]
        blocks = self.pool.take(self.stored.count(missing)) or []
        n = self.stored.load(missing[: len(blocks)], blocks) if blocks else 0
        self.pool.give_back(blocks[n:])
        for block, key in zip(blocks[:n], missing, strict=False):
            self.pool.publish(block, key)
        return blocks[:n]

    def _preempt(self, last: Request) -> None:
        assert last is self.running[-1]
        self.waiting.append(last)  # first, so that it is never in neither
        self.running.pop()
        self._take_back(last)
        last.state = State.WAITING
        last.preemptions += 1
        self.preemptions += 1

    def _take_back(self, request: Request) -> None:
        if self.drafts is not None:
            self.drafts.release(request)
        self.pool.give_back(request.blocks)
        del request.blocks[:]
        request.computed = 0
        for key in request.keys:
            if self._coming.get(key) is request:
                del self._coming[key]
