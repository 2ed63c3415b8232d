"""What followed the same tokens before: guesses that cost no model, out of a request's own text and
out of the answers of finished requests.

Prompt lookup: Saxena 2023. By suffix over earlier outputs: SuffixDecoding (Oliaro et al. 2024).
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from pronk.engine.request import Request

GRAM = 3
"""Tokens that must agree before anything is guessed, but for a copy that goes on after a change."""
LONGEST_MATCH = 16
"""Longer agreements count as this long."""
READ_BESIDE_PROMPT, READ_BESIDE_TOKEN = 2048, 256
"""Most tokens of a text that are entered into an index in a step that reads prompts, and in one
that only writes: about 1 ms and 0.1 ms."""
_CANDIDATES = 8
"""Most recent places of a gram that are compared with what was written last."""
_HISTORY = 1 << 16
"""Tokens of finished answers that are kept for requests of one salt."""
_HISTORIES = 8
"""Salts for which answers are kept."""
_CHANGED = 8
"""Tokens of a change in a copy at most, and how far from where it would go on it is looked for."""
_BITS = 20
"""Of a token id in the key of a gram. Ids that agree in these are told apart when texts are
compared."""
_LOW = (1 << _BITS) - 1
_GRAM_BITS = (1 << _BITS * GRAM) - 1


class SuffixIndex:
    """Where every run of GRAM tokens of a growing text ends."""

    def __init__(self, ids: "array[int]") -> None:
        self.ids = ids
        self._last: dict[int, int] = {}
        self._before = array("i")
        """For each position, where the gram that ends there ended the time before; -1: nowhere."""

    def update(self, most: int = READ_BESIDE_PROMPT) -> None:
        """Reads what has been appended to `ids`, `most` tokens of it at once."""
        ids, last, before = self.ids, self._last, self._before
        begin = len(before)
        if begin == len(ids):
            return
        gram = _key(ids[max(0, begin - GRAM) : begin])
        for end, token in enumerate(ids[begin : begin + most], begin):
            gram = (gram << _BITS | token & _LOW) & _GRAM_BITS
            before.append(last.get(gram, -1))
            last[gram] = end

    def find(self, tail: Sequence[int]) -> tuple[int, int]:
        """Where the text goes on that ended like `tail` does, and for how many tokens they agree
        (0: nowhere). Of `tail` no more than the last LONGEST_MATCH tokens count."""
        if len(tail) < GRAM:
            return 0, 0
        end = self._last.get(_key(tail[-GRAM:]), -1)
        best, length = 0, 0
        for _ in range(_CANDIDATES):
            if end < 0 or length == LONGEST_MATCH:
                break
            if end + 1 < len(self.ids):  # else nothing follows
                agreed = self._agreement(end, tail)
                if agreed > length:
                    best, length = end + 1, agreed
            end = self._before[end]
        return (best, length) if length >= GRAM else (0, 0)

    def _agreement(self, end: int, tail: Sequence[int]) -> int:
        most = min(LONGEST_MATCH, end + 1, len(tail))
        n = 0
        while n < most and self.ids[end - n] == tail[-1 - n]:
            n += 1
        return n


def _key(tokens: Sequence[int]) -> int:
    gram = 0
    for token in tokens:
        gram = gram << _BITS | token & _LOW
    return gram


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a text was found to be a copy."""

    source: SuffixIndex
    at: int
    """Of the token there that is the `number`-th of the text, if it goes on like this."""
    number: int


class Lookup:
    """The texts that are looked at: each request's own, and finished answers. Requests of different
    salts share no answers, since how fast one comes would tell of the other."""

    def __init__(self) -> None:
        self._own: WeakKeyDictionary[Request, SuffixIndex] = WeakKeyDictionary()
        self._histories: OrderedDict[bytes, SuffixIndex] = OrderedDict()
        self._places: WeakKeyDictionary[Request, _Place] = WeakKeyDictionary()

    def read(self, requests: Iterable[Request], most: int) -> None:
        """Gets to know the texts of requests, `most` tokens of each at once."""
        for request in requests:
            index = self._own.get(request)
            if index is None:
                index = self._own[request] = SuffixIndex(request.ids)
            index.update(most)
            if history := self._histories.get(request.salt):
                history.update(most)  # what `remember` has left over

    def find(self, request: Request, behind: Sequence[int], most: int) -> tuple[list[int], int]:
        """`most` tokens at most that may follow a request's known ones and those `behind` them; and
        how many tokens before them agree."""
        own, history = self._own.get(request), self._histories.get(request.salt)
        tail = [*request.ids[-LONGEST_MATCH:], *behind]
        at, length = own.find(tail) if own is not None else (0, 0)
        source = own
        if history is not None and length < LONGEST_MATCH:
            other, agreed = history.find(tail)
            if agreed > length:
                at, length, source = other, agreed, history
        number = request.known + len(behind)
        if source is not None and length:
            self._places[request] = _Place(source, at, number)
        elif place := self._places.get(request):
            source, (at, length) = place.source, _resume(place, number, tail)
        if source is None or not length or most < 1:
            return [], 0
        tokens = source.ids[at : at + most].tolist()
        if -1 in tokens:
            del tokens[tokens.index(-1) :]
        if source is own:  # what repeats goes on repeating
            while len(tokens) < most:
                tokens.extend(tokens[: most - len(tokens)])
        return tokens, length if tokens else 0

    def remember(self, request: Request) -> None:
        """Keeps the answer of a finished request, to guess from for others."""
        if request.n_output <= GRAM:
            return
        history = self._histories.get(request.salt)
        if history is None:
            history = SuffixIndex(array("i"))
        elif len(history.ids) > _HISTORY:
            history = SuffixIndex(history.ids[_HISTORY // 2 :])
        history.ids.append(-1)  # no token: answers do not run into each other
        history.ids.extend(request.ids[request.n_prompt :])
        history.update()
        self._histories[request.salt] = history
        self._histories.move_to_end(request.salt)
        if len(self._histories) > _HISTORIES:
            self._histories.popitem(last=False)


def _resume(place: _Place, number: int, tail: Sequence[int]) -> tuple[int, int]:
    """Where a copy goes on after a few tokens that were not copied, with one or two tokens that
    agree again, nearest to where it would be if as many had been put in as left out."""
    if number - place.number > _CHANGED:
        return 0, 0
    ids, expected = place.source.ids, place.at + number - place.number
    low, high = max(1, expected - _CHANGED), min(len(ids) - 1, expected + _CHANGED)
    ends = [at for at in range(low, high + 1) if ids[at - 1] == tail[-1]]
    if not ends:
        return 0, 0
    two = [at for at in ends if at > 1 and ids[at - 2] == tail[-2]]
    return min(two or ends, key=lambda at: abs(at - expected)), 2 if two else 1
