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
    """Seconds of a step that only decodes, by the number of its rows."""

    _GUESSED_SLOPE = 0.1
    """Of the cost of the nearest known number of rows, for each further row."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._known: list[int] = []
        """Its keys in order."""

    def __bool__(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._known)

    def book(self, rows: int, seconds: float) -> None:
        """A step that the system interrupted says little about the next one, so what is new counts
        for a fifth, and for three times what was expected at most."""
        known = self._seconds.get(rows)
        if known is not None:
            seconds = 0.8 * known + 0.2 * min(seconds, 3 * known)
        elif self._known:
            seconds = min(seconds, 3 * self.of(rows))
        if known is None:
            insort(self._known, rows)
        self._seconds[rows] = seconds

    def of(self, rows: int) -> float:
        """Seconds, from the numbers of rows around this one where it has not occurred yet; 1 and a
        little more for each further row where nothing has."""
        known = self._known
        if not known:
            return 1 + self._GUESSED_SLOPE * (rows - 1)
        at = bisect_left(known, rows)
        if at == len(known):
            return self._seconds[known[-1]] * (1 + self._GUESSED_SLOPE * (rows - known[-1]))
        more = known[at]
        if more == rows or not at:
            return self._seconds[more]
        fewer = known[at - 1]
        low, high = self._seconds[fewer], self._seconds[more]
        return low + (high - low) * (rows - fewer) / (more - fewer)


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
