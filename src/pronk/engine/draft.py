"""Guesses at what comes next, without a second model: what followed the same tokens before.

A step that computes a few guessed tokens behind the newest one costs little more than a step of
one, and every guess that turns out right is a step saved. What is sampled does not depend on it: a
row is drawn with the logits, the penalties and the random number that it would have had anyway, and
a guess counts only if it is the token drawn. So outputs are the same with and without, token for
token, and no distribution changes. What can go wrong is time only, and that is measured: how often
guesses of a kind were right, and what steps of so many rows take (`Costs`), decide how many tokens
are guessed, or none.

Prompt lookup: Saxena 2023. By suffix over earlier outputs: SuffixDecoding (Oliaro et al. 2024).
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

from pronk.engine.request import Request

GRAM = 3
"""Tokens that must agree before anything is guessed."""
LONGEST_MATCH = 16
"""Longer agreements count as this long."""
MOST_DRAFT = 16
_CANDIDATES = 8
"""Most recent places of a gram that are compared with what was written last."""
_HISTORY = 1 << 16
"""Tokens of finished answers that are kept."""


class SuffixIndex:
    """Where every run of GRAM tokens of a growing text ends."""

    def __init__(self, ids: "array[int]") -> None:
        self.ids = ids
        self._last: dict[tuple[int, ...], int] = {}
        self._before = array("i")
        """For each position, where the gram that ends there ended the time before; -1: nowhere."""

    def update(self) -> None:
        """Reads what has been appended to `ids`."""
        ids, last, before = self.ids, self._last, self._before
        for end in range(len(before), len(ids)):
            gram = tuple(ids[end + 1 - GRAM : end + 1]) if end + 1 >= GRAM else ()
            before.append(last.get(gram, -1) if gram else -1)
            if gram:
                last[gram] = end

    def find(self, context: "array[int]") -> tuple[int, int]:
        """Where the text goes on that ended like `context` does, and for how many tokens they agree
        (0: nowhere). `context` may be the indexed text itself."""
        if len(context) < GRAM:
            return 0, 0
        end = self._last.get(tuple(context[-GRAM:]), -1)
        if context is self.ids and end == len(context) - 1:
            end = self._before[end]
        best, length = 0, 0
        for _ in range(_CANDIDATES):
            if end < 0:
                break
            agreed = self._agreement(end, context)
            if agreed > length:
                best, length = end + 1, agreed
            if length == LONGEST_MATCH:
                break
            end = self._before[end]
        return best, length

    def _agreement(self, end: int, context: "array[int]") -> int:
        most = min(LONGEST_MATCH, end + 1, len(context))
        n = GRAM
        while n < most and self.ids[end - n] == context[-1 - n]:
            n += 1
        return n


class Rate:
    """How often something was right, lately."""

    def __init__(self, right: float, tried: float) -> None:
        self._right, self._tried = right, tried

    @property
    def value(self) -> float:
        return self._right / self._tried

    def book(self, right: int, tried: int) -> None:
        self._right = self._right * 0.95 + right
        self._tried = self._tried * 0.95 + tried


class Costs:
    """Seconds of a step that only decodes, by the number of its rows."""

    _GUESSED_SLOPE = 0.1
    """Of the cost of the nearest known number of rows, for each further row."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def book(self, rows: int, seconds: float) -> None:
        known = self._seconds.get(rows)
        if known is not None:  # a step that the system interrupted says little about the next one
            seconds = 0.8 * known + 0.2 * min(seconds, 3 * known)
        self._seconds[rows] = seconds

    def of(self, rows: int) -> float:
        """Seconds, from the numbers of rows around this one where it has not occurred yet."""
        if not self._seconds:
            return 1 + self._GUESSED_SLOPE * (rows - 1)
        fewer = max((r for r in self._seconds if r <= rows), default=None)
        more = min((r for r in self._seconds if r >= rows), default=None)
        if fewer is None:
            assert more is not None
            return self._seconds[more]
        if more is None:
            return self._seconds[fewer] * (1 + self._GUESSED_SLOPE * (rows - fewer))
        low, high = self._seconds[fewer], self._seconds[more]
        return low if fewer == more else low + (high - low) * (rows - fewer) / (more - fewer)


class _Guess:
    """What one request may go on with, and how likely each next token of it is right."""

    def __init__(self, request: Request, tokens: Sequence[int], length: int, chance: float) -> None:
        self.request = request
        self.tokens = tokens
        self.length = length
        self.chance = chance
        self.taken = 0

    @property
    def gain(self) -> float:
        """Tokens that guessing one more would yield on average."""
        return self.chance ** (self.taken + 1) if self.taken < len(self.tokens) else 0.0


class Speculator:
    """Guesses for the requests of one engine."""

    def __init__(self) -> None:
        self.costs = Costs()
        self._index: WeakKeyDictionary[Request, SuffixIndex] = WeakKeyDictionary()
        self._rates: WeakKeyDictionary[Request, Rate] = WeakKeyDictionary()
        self._by_length = [Rate(1 + 0.1 * n, 3) for n in range(LONGEST_MATCH + 1)]
        self._made: dict[Request, _Guess] = {}
        self._history = SuffixIndex(array("i"))
        self.drafted = self.accepted = 0

    def propose(self, requests: Iterable[Request], room: int) -> Mapping[Request, Sequence[int]]:
        """Tokens to compute behind the newest one of each request that is about to draw, `room` of
        them at most together. None where guessing would not pay."""
        requests = list(requests)
        guesses = [guess for request in requests if (guess := self._guess(request))]
        self._share(guesses, len(requests), room)
        self._made = {guess.request: guess for guess in guesses if guess.taken}
        return {r: g.tokens[: g.taken] for r, g in self._made.items()}

    def _share(self, guesses: Sequence[_Guess], rows: int, room: int) -> None:
        """Takes the likeliest tokens of all guesses, as many as give the most tokens a second. The
        cost of a row is not the same everywhere, so all numbers up to `room` are looked at."""
        order: list[_Guess] = []
        tokens = float(rows)
        best, best_speed = 0, tokens / self.costs.of(rows)
        for n in range(1, room + 1):
            likeliest = max(guesses, key=lambda guess: guess.gain, default=None)
            if likeliest is None or not likeliest.gain:
                break
            tokens += likeliest.gain
            likeliest.taken += 1
            order.append(likeliest)
            speed = tokens / self.costs.of(rows + n)
            if speed > best_speed:
                best, best_speed = n, speed
        for guess in order[best:]:
            guess.taken -= 1

    def learn(self, request: Request, n_drafted: int, n_accepted: int) -> None:
        """What came of the guess for a request in the step that has just been computed."""
        guess = self._made.pop(request, None)
        if guess is None or not n_drafted:
            return
        self.drafted += n_drafted
        self.accepted += n_accepted
        tried = min(n_accepted + 1, n_drafted)  # nothing is known of what follows a wrong one
        self._by_length[guess.length].book(n_accepted, tried)
        self._rates.setdefault(request, Rate(1.5, 2)).book(n_accepted, tried)

    def remember(self, request: Request) -> None:
        """Keeps the answer of a finished request, to guess from for others."""
        if request.n_output <= GRAM:
            return
        if len(self._history.ids) > _HISTORY:
            self._history = SuffixIndex(self._history.ids[_HISTORY // 2 :])
        self._history.ids.append(-1)  # no token: answers do not run into each other
        self._history.ids.extend(request.ids[request.n_prompt :])
        self._history.update()

    def _guess(self, request: Request) -> _Guess | None:
        index = self._index.get(request)
        if index is None:
            index = self._index[request] = SuffixIndex(request.ids)
        index.update()
        at, length = index.find(request.ids)
        source = request.ids
        if length < LONGEST_MATCH:
            other, agreed = self._history.find(request.ids)
            if agreed > length:
                at, length, source = other, agreed, self._history.ids
        if not length:
            return None
        most = min(MOST_DRAFT, request.limit - request.known - 1)
        tokens = source[at : at + max(0, most)]
        if -1 in tokens:
            tokens = tokens[: tokens.index(-1)]
        if source is request.ids and tokens:  # what repeats goes on repeating
            while len(tokens) < most:
                tokens.extend(tokens[: most - len(tokens)])
        if request.constraint is not None and tokens:
            tokens = tokens[: request.constraint.allowed(tokens)]
        rate = self._rates.get(request)
        chance = self._by_length[length].value
        if rate is not None:
            chance = min(chance, rate.value)
        return _Guess(request, tokens, length, min(chance, 0.98)) if tokens else None
