"""Guesses at what comes next, so that one step computes several tokens.

A step that computes a few guessed tokens behind the newest one costs little more than a step of
one, and every guess that turns out right is a step saved. What is sampled does not depend on it: a
row is drawn with the logits, the penalties and the random number that it would have had anyway, and
a guess counts only if it is the token drawn. So outputs are the same with and without, token for
token, and no distribution changes. What can go wrong is time only, and that is measured: how often
guesses of a kind were right, and what steps of so many rows take, decide how many tokens are
guessed (plan.py), or none. A small share of the time goes to trying what did not pay lately.

There are three sources: tokens that a grammar leaves no choice about; what followed the same tokens
before (lookup.py); a smaller model (draft_model.py).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

from pronk.engine.estimates import Budget, Costs, Rate
from pronk.engine.lookup import LONGEST_MATCH, READ_BESIDE_PROMPT, READ_BESIDE_TOKEN, Lookup
from pronk.engine.plan import Guess, Plan, make_plan, may_pay
from pronk.engine.request import Request

log = logging.getLogger(__name__)

MOST_DRAFT = 16
SYNCHRONOUS = 32
"""A drafter that lags behind by no more tokens computes them together with its first guess."""
_SURE = 0.98
"""No guess is surer than this."""
_LONG = 8
"""Tokens that agree before a text counts as copied."""
_TRIED = 4
"""Tokens of a trial."""
_WRITES = 32
"""Tokens that a request is expected to write still, if it has not written more already."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """`n` tokens behind the known ones of a request and those given."""

    behind: Sequence[int]
    n: int


class Drafter(Protocol):
    """A model that drafts."""

    share: float
    """How large it is, the model that it drafts for being 1."""
    costs: Costs
    """Of its steps of few rows."""
    row_seconds: float | None
    """Of a token of a prompt that it reads; None before it has read any."""

    def lag(self, request: Request) -> int | None:
        """Known tokens of a request that it has to compute before it can draft the next one, at
        least one; None if it cannot draft for this request."""
        ...

    def catch_up(self, request: Request, most: int) -> None:
        """Computes `most` of the known tokens of a request at most."""
        ...

    def draft(self, wanted: Mapping[Request, Wanted]) -> Mapping[Request, list[int]]:
        """Tokens that may come next, for each request as many as wanted or fewer."""
        ...

    def release(self, request: Request) -> None:
        """The request has ended, or has given its place up."""
        ...

    def reset(self) -> None:
        """Forgets all requests, whatever an exception has left half done."""
        ...


@dataclass(slots=True)
class _Record:
    """How guesses for one request have turned out."""

    model: Rate
    forced: Rate = field(default_factory=lambda: Rate(19, 20))
    short: Rate = field(default_factory=lambda: Rate(1.8, 2))
    """Of what was found with few tokens that agree."""
    long: Rate = field(default_factory=lambda: Rate(1.9, 2))
    tried_at: int = 0

    def lookup(self, length: int) -> Rate:
        """One coincidence says little about a long copy."""
        return self.long if length >= _LONG else self.short


@dataclass(slots=True)
class Tally:
    """Tokens guessed from one source, and those of them that were right."""

    drafted: int = 0
    accepted: int = 0

    def book(self, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted


class Speculator:
    """Guesses for the requests of one engine. Where its drafter raises an exception, that is
    logged, and the drafter is not asked again."""

    def __init__(self, drafter: Drafter | None = None, lookup: Lookup | None = None) -> None:
        self.costs = Costs()
        self.drafter = drafter
        self.sources = {name: Tally() for name in ("forced", "lookup", "model")}
        self.drafted = self.accepted = 0
        self._lookup = Lookup() if lookup is None else lookup
        self._records: WeakKeyDictionary[Request, _Record] = WeakKeyDictionary()
        self._by_length = [Rate(min(1 + 0.12 * n, 2.8), 3) for n in range(LONGEST_MATCH + 1)]
        self._by_model, self._by_grammar = Rate(2, 3), Rate(19, 20)
        self._made: dict[Request, Guess] = {}
        self._trials, self._model_trials = Budget(0.01), Budget(0.03)
        self._n_steps = 0

    def book(self, rows: int, seconds: float) -> None:
        """A step that only decoded has taken so long."""
        self.costs.book(rows, seconds)
        self._trials.earn(seconds)
        self._model_trials.earn(seconds)

    def prepare(self, requests: Iterable[Request]) -> None:
        """Reads texts while their prompts are computed."""
        reading = (request for request in requests if request.params is not None)
        self._lookup.read(reading, READ_BESIDE_PROMPT)

    def propose(self, requests: Iterable[Request], room: int) -> Mapping[Request, Sequence[int]]:
        """Tokens to compute behind the newest one of each request that is about to draw, `room` of
        them at most together. None where guessing would not pay."""
        requests = list(requests)
        self._made = {}
        self._n_steps += 1
        self._lookup.read(requests, READ_BESIDE_TOKEN)
        rows = len(requests)
        trial = self.costs.of(rows + _TRIED) - self.costs.of(rows)
        if room < 1:
            return {}
        if not may_pay(rows, min(room, rows * MOST_DRAFT), self.costs):
            if not self._trials.holds(trial):
                return {}
            self._trials.pay(0.1 * trial)  # for looking, whether there is something to try or not
        plain = {r: guess for r in requests if (guess := self._guess(r))}
        drawn = self._model_guesses(requests, plain, room)
        plan = self._best_plan(plain, drawn, rows, room)
        self._made = plan.made()
        if not self._try(drawn, plan, rows, room, self._model_trials):
            self._try(plain, plan, rows, room, self._trials)
        self._ask_drafter()
        return {r: g.tokens[: g.taken] for r, g in self._made.items()}

    def learn(self, request: Request, n_drafted: int, n_accepted: int) -> None:
        """What came of the guess for a request in the step that has just been computed."""
        guess = self._made.pop(request, None)
        if guess is None or not n_drafted:
            return
        self.drafted += n_drafted
        self.accepted += n_accepted
        record, n_forced = self._record(request), min(guess.n_forced, n_drafted)
        self._learn("forced", n_forced, n_accepted, record.forced, self._by_grammar)
        n_accepted -= n_forced
        if n_accepted < 0:
            return  # nothing is known of what follows a wrong token
        if guess.by_model:
            rates = record.model, self._by_model
        else:
            rates = record.lookup(guess.length), self._by_length[guess.length]
        source = "model" if guess.by_model else "lookup"
        self._learn(source, n_drafted - n_forced, n_accepted, *rates)

    def _learn(self, source: str, n: int, n_accepted: int, *rates: Rate) -> None:
        right = min(n_accepted, n)
        self.sources[source].book(n, right)
        for rate in rates if n else ():
            rate.book(right, min(right + 1, n))

    def remember(self, request: Request) -> None:
        """Keeps the answer of a finished request, to guess from for others."""
        self._lookup.remember(request)

    def release(self, request: Request) -> None:
        """A request has ended, or has given its place up."""
        if self.drafter is not None:
            self.drafter.release(request)

    def reset(self) -> None:
        """Puts everything in order after an exception from anywhere."""
        self._made = {}
        if self.drafter is not None:
            self.drafter.reset()

    def _record(self, request: Request) -> _Record:
        record = self._records.get(request)
        if record is None:
            record = self._records[request] = _Record(Rate(3 * self._by_model.value, 3))
        return record

    def _guess(self, request: Request) -> Guess | None:
        """What the grammar forces, and behind that what was found."""
        most = _most(request)
        try:
            return self._checked_guess(request, most) if most > 0 else None
        except Exception:  # of the constraint: it is reported where its masks are made
            return None

    def _checked_guess(self, request: Request, most: int) -> Guess | None:
        constraint, record = request.constraint, self._record(request)
        tokens = [] if constraint is None else list(constraint.forced())[:most]
        n_forced = len(tokens)
        found, length = self._lookup.find(request, tokens, most - n_forced)
        tokens += found
        if constraint is not None and found:
            del tokens[max(n_forced, constraint.allowed(tokens)) :]
        if not tokens:
            return None
        forced = min(self._by_grammar.value, record.forced.value, _SURE)
        found_right = min(self._by_length[length].value, record.lookup(length).value, _SURE)
        chances = [forced] * n_forced + [found_right] * (len(tokens) - n_forced)
        return Guess(request, tokens, n_forced, length, chances)

    def _model_guesses(
        self, requests: Iterable[Request], plain: Mapping[Request, Guess], room: int
    ) -> dict[Request, Guess]:
        """Guesses with tokens of the drafter, for requests where these are likelier than those that
        were found. The drafter reads what it has to for the others where that promises to pay."""
        guesses: dict[Request, Guess] = {}
        lagging: dict[Request, int] = {}
        for request in requests if self.drafter is not None else ():
            guess, chance = plain.get(request), min(self._record(request).model.value, _SURE)
            n_forced = guess.n_forced if guess else 0
            most = min(room, _most(request)) - n_forced
            if most < 1 or (guess and len(guess.tokens) > n_forced and guess.chances[-1] > chance):
                continue
            lag = self._lag(request)
            if lag is not None and lag <= SYNCHRONOUS:
                forced = guess.chances[:n_forced] if guess else []
                tokens = guess.tokens[:n_forced] if guess else []
                chances = forced + [chance] * most
                guesses[request] = Guess(request, tokens, n_forced, 0, chances, True, lag)
            elif lag is not None:
                lagging[request] = lag
        self._catch_up(lagging)
        return guesses if self.drafter is not None else {}

    def _best_plan(
        self, plain: Mapping[Request, Guess], drawn: Mapping[Request, Guess], rows: int, room: int
    ) -> Plan:
        plan = make_plan([*plain.values()], rows, room, self.costs, self._model_seconds)
        if drawn:
            both = [*{**plain, **drawn}.values()]
            other = make_plan(both, rows, room, self.costs, self._model_seconds)
            if other.speed > plan.speed:
                return other
        return plan

    def _try(
        self, guesses: Mapping[Request, Guess], plan: Plan, rows: int, room: int, budget: Budget
    ) -> bool:
        """Takes a few tokens of a guess that does not seem to pay, the one longest not tried, as
        soon as there is time for that."""
        idle = [guess for r, guess in guesses.items() if r not in self._made]
        guess = min(idle, key=lambda g: self._record(g.request).tried_at, default=None)
        rows += sum(plan.taken)
        n = min(_TRIED, room - sum(plan.taken), len(guess.chances) if guess else 0)
        if guess is None or n < 1:
            return False
        seconds = self.costs.of(rows + n) - self.costs.of(rows)
        if n > len(guess.tokens):
            first = self._model_seconds(guess.lag + len(guess.tokens))
            seconds += first + (n - len(guess.tokens) - 1) * self._model_seconds(1)
        if not budget.holds(seconds):
            return False
        budget.pay(max(0.0, seconds))
        self._record(guess.request).tried_at = self._n_steps
        guess.taken = n
        self._made[guess.request] = guess
        return True

    # The drafter

    def _model_seconds(self, rows: int) -> float:
        """Of a step of the drafter; before there was one, as its size lets expect."""
        if self.drafter is None:
            return 0.0
        costs = self.drafter.costs
        return costs.of(rows) if costs else self.drafter.share * self.costs.of(rows)

    def _row_seconds(self, drafter: Drafter) -> float:
        known = drafter.row_seconds
        return self._model_seconds(8) / 8 if known is None else known

    def _lag(self, request: Request) -> int | None:
        try:
            return None if self.drafter is None else self.drafter.lag(request)
        except Exception:
            self._dismiss()
            return None

    def _catch_up(self, lagging: Mapping[Request, int]) -> None:
        """Lets the drafter read what it has missed of one request, where its guesses are expected
        to save more time than that takes or where there is time for a trial; no more of it at once
        than takes about as long as a step."""
        drafter = self.drafter
        if drafter is None or not lagging:
            return
        request, lag = min(lagging.items(), key=lambda item: item[1])
        row = self._row_seconds(drafter)
        step = self.costs.of(1)
        most = min(lag, max(SYNCHRONOUS, int(step / row)))
        if self._saving(request) < lag * row:
            if not self._model_trials.holds(most * row):
                return
            self._model_trials.pay(most * row)
        try:
            drafter.catch_up(request, most)
        except Exception:
            self._dismiss()

    def _saving(self, request: Request) -> float:
        """Seconds that the drafter is expected to save a request if it is alone."""
        chance, tokens, gain = self._record(request).model.value, 1.0, 1.0
        plain = self.costs.of(1)
        best = plain
        for n in range(1, MOST_DRAFT + 1):
            gain *= chance
            tokens += gain
            seconds = self.costs.of(1 + n) + n * self._model_seconds(1)
            best = min(best, seconds / tokens)
        writes = min(request.limit - request.known, max(_WRITES, request.n_output))
        return writes * (plain - best)

    def _ask_drafter(self) -> None:
        """Fills in what the drafter has to add to the guesses made."""
        asked = {r: guess for r, guess in self._made.items() if guess.n_asked}
        if not asked or self.drafter is None:
            return
        wanted = {r: Wanted(guess.tokens, guess.n_asked) for r, guess in asked.items()}
        try:
            drafts = self.drafter.draft(wanted)
        except Exception:
            self._dismiss()
            drafts = {}
        for request, guess in asked.items():
            guess.tokens = [*guess.tokens, *drafts.get(request, ())]
            guess.taken = len(guess.tokens)
            if not guess.taken:
                del self._made[request]

    def _dismiss(self) -> None:
        log.exception("the draft model has failed and is not used any more")
        self.drafter = None


def _most(request: Request) -> int:
    """Tokens that may be guessed for a request: the one drawn behind them is its last."""
    return min(MOST_DRAFT, request.limit - request.known - 1)
