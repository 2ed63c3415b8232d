"""What guessing is decided by: how often something was right, how long steps take, and what may be
spent on finding out."""

from bisect import bisect_left, insort

_FORGETS = 0.95
"""What is left of earlier trials with each further booking."""


class Rate:
    """How often something was right, lately."""

    def __init__(self, right: float, tried: float) -> None:
        self._right, self._tried = right, tried

    @property
    def value(self) -> float:
        return self._right / self._tried

    def book(self, right: int, tried: int) -> None:
        self._right = self._right * _FORGETS + right
        self._tried = self._tried * _FORGETS + tried


class Costs:
    """Seconds of a step that only decodes, by the number of its rows.

    A machine that others use is now fast and now slow, and some numbers of rows occur in every
    step, others hardly ever. So what a step took says something about all of them (the pace) and
    something about its own number. What is slower than expected counts for less than what is
    faster: a step may always be interrupted."""

    _GUESSED_SLOPE = 0.1
    """Of the cost of the nearest known number of rows, for each further row."""
    _FASTER, _SLOWER = 0.3, 0.1
    """How much of a surprise (in logarithms) is believed."""
    _PACE = 0.67
    """How much of that concerns all numbers of rows."""
    _MOST = 3.0
    """Times slower or faster that a surprise counts at most."""

    def __init__(self) -> None:
        self._pace = 1.0
        self._shape: dict[int, float] = {}
        """Seconds at a pace of 1."""
        self._known: list[int] = []
        """Its keys in order."""

    def __bool__(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._known)

    def book(self, rows: int, seconds: float) -> None:
        expected = self.of(rows)
        if rows not in self._shape:
            if self._known:
                seconds = min(seconds, self._MOST * expected)
            self._shape[rows] = seconds / self._pace
            insort(self._known, rows)
            return
        surprise = min(max(seconds / expected, 1 / self._MOST), self._MOST)
        weight = self._FASTER if surprise < 1 else self._SLOWER
        self._pace *= surprise ** (weight * self._PACE)
        self._shape[rows] *= surprise ** (weight * (1 - self._PACE))

    def of(self, rows: int) -> float:
        """Seconds, from the numbers of rows around this one where it has not occurred yet; 1 and a
        little more for each further row where nothing has."""
        known = self._known
        if not known:
            return 1 + self._GUESSED_SLOPE * (rows - 1)
        at = bisect_left(known, rows)
        if at == len(known):
            further = 1 + self._GUESSED_SLOPE * (rows - known[-1])
            return self._pace * self._shape[known[-1]] * further
        more = known[at]
        if more == rows or not at:
            return self._pace * self._shape[more]
        fewer = known[at - 1]
        low, high = self._shape[fewer], self._shape[more]
        return self._pace * (low + (high - low) * (rows - fewer) / (more - fewer))


class Budget:
    """A share of all time, for trials of what does not seem to pay: it may by now."""

    _STEPS = 100
    """Steps whose share is saved at most."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._saved = 0.0

    def earn(self, seconds: float) -> None:
        """A step has taken so long."""
        share = self._share * seconds
        self._saved = min(self._saved + share, max(self._saved, self._STEPS * share))

    def holds(self, seconds: float) -> bool:
        return seconds <= self._saved

    def pay(self, seconds: float) -> None:
        self._saved -= seconds
