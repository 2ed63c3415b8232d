"""How many guessed tokens a step takes: those that yield the most tokens a second."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from pronk.engine.estimates import Costs
from pronk.engine.request import Request

WORTH = 1.03
"""Times faster that guesses must make a step: less is within what is known of costs."""
_LEAST_GAIN = 0.005
"""Of a token that is worth a row."""

Seconds = Callable[[int], float]
"""Of a step of so many rows."""


@dataclass(slots=True)
class Guess:
    """What one request may go on with, and how likely it is."""

    request: Request
    tokens: list[int]
    """Forced ones and those looked up. What a model drafts comes behind them later."""
    n_forced: int
    length: int
    """Tokens that agreed where those looked up were found; 0: there are none."""
    chances: list[float]
    """That each token is right if those before it are, the ones that a model would draft too."""
    by_model: bool = False
    lag: int = 0
    """Tokens that the model has to compute first."""
    taken: int = 0

    @property
    def n_asked(self) -> int:
        """Tokens, of those taken, that the model has to draft."""
        return max(0, self.taken - len(self.tokens))


@dataclass(slots=True)
class Plan:
    """What a step takes of each guess, and the tokens a second that are to be expected."""

    guesses: Sequence[Guess]
    taken: list[int]
    speed: float

    def made(self) -> dict[Request, Guess]:
        """The guesses of which something is taken."""
        for guess, n in zip(self.guesses, self.taken, strict=True):
            guess.taken = n
        return {guess.request: guess for guess in self.guesses if guess.taken}


def may_pay(rows: int, most: int, costs: Costs) -> bool:
    """Whether up to `most` guesses would make a step faster if all were right."""
    least = WORTH * rows / costs.of(rows)
    return any(rows + n > least * costs.of(rows + n) for n in range(1, most + 1))


def make_plan(
    guesses: Sequence[Guess], rows: int, room: int, costs: Costs, model_seconds: Seconds
) -> Plan:
    """Takes the likeliest tokens of all guesses, `room` of them at most, as many as give the most
    tokens a second. The cost of a row is not the same everywhere, so all numbers are looked at."""
    taken = [0] * len(guesses)
    order: list[int] = []
    model = _ModelTime(model_seconds)
    tokens = float(rows)
    best, speed = 0, tokens / costs.of(rows)
    least = WORTH * speed
    queue = [(-guess.chances[0], i) for i, guess in enumerate(guesses)]
    heapify(queue)
    while queue and len(order) < room:
        gain, i = heappop(queue)
        if -gain < _LEAST_GAIN:
            break
        guess = guesses[i]
        if taken[i] >= len(guess.tokens):
            model.deepen(taken[i] - len(guess.tokens), guess.lag + len(guess.tokens))
        taken[i] += 1
        order.append(i)
        tokens -= gain
        if taken[i] < len(guess.chances):
            heappush(queue, (gain * guess.chances[taken[i]], i))
        faster = tokens / (costs.of(rows + len(order)) + model.seconds)
        if faster > least:
            best, speed = len(order), faster
            least = faster
    for i in order[best:]:
        taken[i] -= 1
    return Plan(guesses, taken, speed)


class _ModelTime:
    """Seconds that a model takes to draft some tokens for several requests at once."""

    def __init__(self, of: Seconds) -> None:
        self.seconds = 0.0
        self._of = of
        self._rows: list[int] = []
        """Of each step of the model."""

    def deepen(self, depth: int, first_rows: int) -> None:
        """One token more for a request, the `depth`-th (from 0), whose first step takes so many
        rows."""
        if depth == len(self._rows):
            self._rows.append(0)
        before = self._rows[depth]
        self._rows[depth] += 1 if depth else max(1, first_rows)
        self.seconds += self._of(self._rows[depth]) - (self._of(before) if before else 0.0)
