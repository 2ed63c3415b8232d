"""A second, smaller model of the same vocabulary that drafts what the first one may write.

It draws with the parameters, the random numbers and the grammar of the request, so that where both
models find the same tokens likely they mostly draw the same one. Whether a draft counts is decided
by the first model alone (draft.py): unlike in Leviathan et al. 2023 and Chen et al. 2023 nothing is
accepted with a probability, so it is the answer that stays the same, not only its distribution.

For each request there is a shadow: the tokens whose keys and values lie in this model's own cache.
A wrong draft is not undone; the right tokens overwrite it when they are computed.
"""

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from pronk.backends.protocol import BLOCK, SampleParams
from pronk.engine.blocks import BlockPool, blocks_for, extend_keys
from pronk.engine.draft import MOST_DRAFT, SYNCHRONOUS, Wanted
from pronk.engine.engine import Computes
from pronk.engine.estimates import Costs
from pronk.engine.request import Constraint, Request
from pronk.engine.scheduler import Slice


class Shadow(Request):
    """A request as the draft model sees it: its known tokens, and drafted ones behind them."""

    def __init__(self, of: Request) -> None:
        super().__init__((), of.params)
        self.of = of
        self.ids = of.ids[:]
        self.constraint = None if of.constraint is None else _Ahead(of.constraint, self)
        self.refused = False
        """Something was wrong with a draft; there will be no other."""

    @property
    def behind(self) -> list[int]:
        """What follows the known tokens."""
        return self.ids[self.of.known :].tolist()

    def sample_params(self, draft: Sequence[int] = ()) -> SampleParams:
        """As the request draws the same token."""
        return replace(self.of.sample_params([*self.behind, *draft]), top_logprobs=-1)

    def follow(self) -> None:
        """Takes over what the request has written since, and counts as computed what was right."""
        known = self.of.ids
        at = self.published * BLOCK
        right = min(self.computed, len(known) - 1)  # the newest one is computed to draw the next
        if self.ids[at:right] != known[at:right]:
            right = next(i for i in range(at, right) if self.ids[i] != known[i])
        self.computed = right
        del self.ids[right:]
        self.ids.extend(known[right:])


class _Ahead:
    """The constraint of a request behind the drafted tokens."""

    def __init__(self, constraint: Constraint, shadow: Shadow) -> None:
        self._constraint, self._shadow = constraint, shadow

    def masks(self, draft: Sequence[int], first: int = 0) -> Sequence[bytes | None]:
        behind = self._shadow.behind
        return self._constraint.masks([*behind, *draft], len(behind) + first)

    def allowed(self, draft: Sequence[int]) -> int:
        behind = self._shadow.behind
        return self._constraint.allowed([*behind, *draft]) - len(behind)

    def forced(self) -> Sequence[int]:
        return ()

    def advance(self, token: int) -> None:
        raise AssertionError("nothing that is drafted is written")


class DraftModel:
    """Drafts with `model`, which has a cache of `n_blocks` and can tell apart `context` positions.

    `stop_ids` end an answer under a grammar. Not for several threads at once.
    """

    def __init__(
        self,
        model: Computes,
        *,
        context: int,
        n_blocks: int,
        stop_ids: Set[int],
        share: float,
        prefix_cache: bool = True,
    ) -> None:
        self.share = share
        self.costs = Costs()
        self.row_seconds: float | None = None
        self.shadows: dict[Request, Shadow] = {}
        self._model = model
        self._context = context
        self._stop_ids = stop_ids
        self._prefix_cache = prefix_cache
        self.pool = BlockPool(n_blocks, prefix_cache=prefix_cache)

    def lag(self, request: Request) -> int | None:
        shadow = self.shadows.get(request)
        if shadow is None:
            shadow = self.shadows[request] = Shadow(request)
            shadow.salt = request.salt
            blocks, shadow.computed = self.pool.take_prefix(shadow.keys, shadow.ids, shadow.salt)
            shadow.blocks.extend(blocks)
            shadow.published = len(blocks)
        if shadow.refused or request.known + MOST_DRAFT > self._context:
            return None
        shadow.follow()
        self._publish(shadow)
        return request.known - shadow.computed

    def catch_up(self, request: Request, most: int) -> None:
        shadow = self.shadows[request]
        shadow.follow()
        n = min(most, request.known - shadow.computed - 1)
        if n < 1 or not self._make_room(shadow, shadow.computed + n):
            return
        started = time.perf_counter()
        self._model.run([Slice(shadow, shadow.computed, n, sample=False)])
        seconds = (time.perf_counter() - started) / n
        known = self.row_seconds
        self.row_seconds = seconds if known is None else 0.7 * known + 0.3 * min(seconds, 3 * known)
        shadow.computed += n

    def draft(self, wanted: Mapping[Request, Wanted]) -> Mapping[Request, list[int]]:
        drafts: dict[Request, list[int]] = {}
        for request, asked in wanted.items():
            shadow = self.shadows[request]
            shadow.follow()
            shadow.ids.extend(asked.behind)
            if self._make_room(shadow, shadow.known + asked.n - 1):
                drafts[request] = []
        going = list(drafts)
        while going:
            self._step(going, drafts)
            going = [
                r for r in going
                if len(drafts[r]) < wanted[r].n and self.shadows[r].computed < self.shadows[r].known
            ]  # fmt: skip
        return drafts

    def release(self, request: Request) -> None:
        shadow = self.shadows.pop(request, None)
        if shadow is not None:
            self.pool.give_back(shadow.blocks)

    def reset(self) -> None:
        self.shadows = {}
        self.pool.forget_references()

    def _step(self, requests: Sequence[Request], drafts: Mapping[Request, list[int]]) -> None:
        """One more token for each request. The shadow of one that cannot go on has nothing left to
        compute afterwards."""
        shadows = [self.shadows[request] for request in requests]
        slices = [Slice(s, s.computed, s.known - s.computed, sample=True) for s in shadows]
        started = time.perf_counter()
        outcomes = self._model.run(slices)
        rows = sum(s.n for s in slices)
        if rows <= len(requests) + SYNCHRONOUS:
            self.costs.book(rows, time.perf_counter() - started)
        for shadow, outcome in zip(shadows, outcomes, strict=True):
            shadow.computed = shadow.known
            if isinstance(outcome, Exception):
                shadow.refused = True
                continue
            token = outcome[0].token
            if not self._ends(shadow, token):
                drafts[shadow.of].append(token)
                shadow.ids.append(token)

    def _ends(self, shadow: Shadow, token: int) -> bool:
        """Whether nothing follows a token: it need not be drafted then, either."""
        return token in shadow.of.ends or (
            shadow.constraint is not None and token in self._stop_ids
        )

    def _make_room(self, shadow: Shadow, n: int) -> bool:
        """Gives a shadow the blocks of `n` positions, if there are some."""
        blocks = self.pool.take(max(0, blocks_for(n) - len(shadow.blocks)))
        if blocks is None:
            return False
        shadow.blocks.extend(blocks)
        return True

    def _publish(self, shadow: Shadow) -> None:
        """What is computed and right can be found by texts that begin alike."""
        full = shadow.computed // BLOCK
        if not self._prefix_cache or full <= shadow.published:
            return
        extend_keys(shadow.keys, shadow.ids, full, shadow.salt)
        for i in range(shadow.published, full):
            self.pool.publish(shadow.blocks[i], shadow.keys[i])
        shadow.published = full
