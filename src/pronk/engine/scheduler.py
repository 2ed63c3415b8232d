"""Decides what each step computes. Knows requests and blocks, no arrays and no text.

A request is `computed` tokens chasing `known` ones; a step moves each running request on by as many
tokens as the budget leaves it: a long prompt in chunks, a request that has caught up by one. So
chunked prefill, decoding, a stored prefix and the recomputation after a preemption are one case.

First come, first served: running requests are ordered by arrival, and all of them came before all
waiting ones. Where blocks run out the youngest running request gives its own back and waits again;
its tokens are kept, only their keys and values are computed once more.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
        self.waiting: deque[Request] = deque()

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
        self.waiting.append(request)

    @property
    def _positions(self) -> int:
        return self.pool.n_blocks * BLOCK

    def schedule(self) -> list[Slice]:
        """The work of the next step, empty only if there are no requests.

        Requests may start (with the blocks of a stored prefix) or be preempted here, and the blocks
        that the step writes to are then in the tables of its requests. How far a running request
        is computed, and which blocks can be found by key, changes in `commit` only.
        """
        slices: list[Slice] = []
        room = _Room(self.token_budget)
        drafts = self._propose()
        turn = 0
        while room.tokens and turn < len(self.running):
            request = self.running[turn]
            if most := room.holds(request):
                chunk = self._chunk(request, most)
                if not self._make_room(request, chunk.n):
                    break  # it was the youngest, and waits again
                if draft := drafts.get(request):
                    chunk = self._extend(chunk, draft)
                slices.append(chunk)
                room.book(chunk)
            turn += 1
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            if not room.holds(request) or not self._admit(request):
                break
            chunk = self._chunk(request, room.holds(request))
            made = self._make_room(request, chunk.n)
            assert made, f"request {request.id} was admitted without room"
            slices.append(chunk)
            room.book(chunk)
        return slices

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
        self.waiting = deque(request for request in requests if not request.finished)
        self.running = []
        self.pool.forget_references()

    def _propose(self) -> Mapping[Request, Sequence[int]]:
        """Guesses, if the step will have nothing to do but decode."""
        decodes = all(r.known - r.computed == 1 and not r.observed for r in self.running)
        may_start = self.waiting and len(self.running) < self.max_batch
        room = min(self.token_budget - len(self.running), MOST_DRAFTED)
        if self.drafts is None or not self.running or not decodes or may_start or room < 1:
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
        """Gives a running request the blocks of its next n tokens, taking them from the youngest
        where none is left; False if that was the request itself."""
        missing = max(0, blocks_for(request.computed + n) - len(request.blocks))
        while (blocks := self.pool.take(missing)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        request.blocks.extend(blocks)
        return True

    def _admit(self, request: Request) -> bool:
        """Lets the first waiting request run if there is room for all its tokens and one more:
        with less it would soon have to go again."""
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
        if request.cached is None:
            request.cached = n_stored
        request.state = State.RUNNING
        self.running.append(request)  # first, so that it is never in neither
        self.waiting.popleft()
        return True

    def _load(self, request: Request, found: list[int]) -> list[int]:
        """Blocks that go on where those `found` in the pool end, from outside; there is room for
        them, as for all tokens of the request. An adapter is known by its name only, which may
        stand for other weights by now: nothing from before is right for it."""
        if self.stored is None or request.observer is not None or request.adapter is not None:
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

    def _preempt(self, youngest: Request) -> None:
        assert youngest is self.running[-1]
        self.waiting.appendleft(youngest)  # first, so that it is never in neither
        self.running.pop()
        self._take_back(youngest)
        youngest.state = State.WAITING
        youngest.preemptions += 1

    def _take_back(self, request: Request) -> None:
        self.pool.give_back(request.blocks)
        del request.blocks[:]
        request.computed = 0
