"""Guesses: found where the text repeats, made as far as they pay, and never in the answer."""

import random
from array import array
from collections.abc import Iterable, Sequence

import pytest

from engine.test_runner import answers, make_engine, make_prompts, make_requests, random_weights
from pronk.backends.select import select_backend
from pronk.engine.draft import MOST_DRAFT, Speculator
from pronk.engine.estimates import Budget, Costs
from pronk.engine.lookup import GRAM, LONGEST_MATCH, SuffixIndex
from pronk.engine.request import Request, SamplingParams


def brute_force(text: Sequence[int], context: Sequence[int]) -> int:
    """Longest agreement of the context's end with any place of the text that something follows."""
    best = 0
    for end in range(len(text) - 1 if text is context else len(text)):
        n = 0
        while n < min(end + 1, len(context), LONGEST_MATCH) and text[end - n] == context[-1 - n]:
            n += 1
        best = max(best, n)
    return best if best >= GRAM else 0


@pytest.mark.parametrize("seed", range(20))
def test_the_place_found_agrees(seed: int) -> None:
    """At most _CANDIDATES places are tried, so the longest is found if the gram is rare enough."""
    rng = random.Random(seed)
    ids = array("i", [rng.randrange(12) for _ in range(40)])
    index = SuffixIndex(ids)
    for _ in range(100):
        ids.append(rng.randrange(12))
        index.update()
        at, length = index.find(ids)
        assert length == brute_force(ids, ids)
        if length:
            assert ids[at - length : at] == ids[len(ids) - length :]


def test_nothing_is_found_in_nothing() -> None:
    index = SuffixIndex(array("i"))
    index.update()
    assert index.find(array("i")) == (0, 0)
    assert index.find(array("i", [1, 2, 3, 4])) == (0, 0)


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = Costs()
    assert costs.of(3) > costs.of(1) > 0
    assert not costs
    for _ in range(100):
        costs.book(2, 1.0)
        costs.book(6, 3.0)
    assert costs
    assert costs.of(1) == costs.of(2) == pytest.approx(1.0, rel=0.01)
    assert costs.of(4) == pytest.approx(2.0, rel=0.01)
    assert costs.of(8) > 3.0
    costs.book(2, 1000.0)  # one step that was interrupted
    assert costs.of(2) < 1.5


def test_a_machine_that_slows_down_does_not_change_what_pays() -> None:
    """Only one number of rows occurs for a while; the others are expected to take longer, too."""
    costs = Costs()
    for _ in range(30):
        costs.book(1, 1.0)
        costs.book(5, 1.5)
    for _ in range(60):
        costs.book(5, 3.0)
    assert 2.5 < costs.of(5) < 3.1
    assert 1.5 < costs.of(1) < 2.1
    for _ in range(60):
        costs.book(5, 1.5)
    assert costs.of(5) == pytest.approx(1.5, rel=0.1)
    assert costs.of(1) == pytest.approx(1.0, rel=0.15)


def test_a_first_measurement_in_a_bad_moment_is_forgotten_soon() -> None:
    costs = Costs()
    for _ in range(50):
        costs.book(1, 1.0)
    costs.book(4, 9.0)
    assert costs.of(4) < 4.0
    for _ in range(6):
        costs.book(4, 1.2)
        for _ in range(20):
            costs.book(1, 1.0)
    assert costs.of(4) < 2.5


def test_a_budget_saves_a_share_and_not_forever() -> None:
    budget = Budget(0.01)
    for _ in range(50):
        budget.earn(1.0)
    assert budget.holds(0.49)
    assert not budget.holds(0.51)
    budget.pay(0.4)
    assert not budget.holds(0.2)
    for _ in range(1000):
        budget.earn(1.0)
    assert budget.holds(0.99)
    assert not budget.holds(1.01)


def repeating(n: int = 60) -> Request:
    request = Request([*range(10), *range(10)] * 3, SamplingParams(max_tokens=n))
    request.limit = request.known + n
    return request


def test_cheap_rows_are_filled_and_dear_ones_left() -> None:
    request = repeating()
    cheap, dear = Speculator(), Speculator()
    for rows in range(1, MOST_DRAFT + 2):
        cheap.costs.book(rows, 1 + 0.001 * rows)
        dear.costs.book(rows, float(rows))
    assert list(cheap.propose([request], 100)[request]) == [i % 10 for i in range(MOST_DRAFT)]
    assert not dear.propose([request], 100)
    assert not cheap.propose([request], 0)


def test_wrong_guesses_end_guessing() -> None:
    request, speculator = repeating(), Speculator()
    for rows in range(1, MOST_DRAFT + 2):
        speculator.costs.book(rows, 1 + 0.15 * (rows - 1))
    rounds = 0
    while drafts := speculator.propose([request], 100):
        speculator.learn(request, len(drafts[request]), 0)
        rounds += 1
        assert rounds < 20
    assert rounds > 0


def test_no_guess_goes_beyond_the_last_token() -> None:
    speculator = Speculator()
    assert not speculator.propose([repeating(1)], 100)
    request = repeating(3)
    assert len(speculator.propose([request], 100)[request]) <= 2


def test_answers_of_others_are_guessed_from() -> None:
    speculator = Speculator()
    first = Request([1, 2, 3], SamplingParams(max_tokens=20))
    first.ids.extend(range(40, 60))
    speculator.remember(first)
    other = Request([7, 8, 40, 41, 42, 43], SamplingParams(max_tokens=9))
    other.limit = 50
    drafts = speculator.propose([other], 100)[other]
    assert list(drafts) == list(range(44, 44 + len(drafts)))
    assert len(drafts) > 0


class Oracle(Speculator):
    """Knows the answers, and gets every fourth token wrong."""

    def __init__(self, known: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self._known = known

    def propose(self, requests: Iterable[Request], room: int) -> dict[Request, Sequence[int]]:
        drafts: dict[Request, Sequence[int]] = {}
        for request in requests:
            answer = self._known[tuple(request.ids[: request.n_prompt])]
            n = min(5, room, request.limit - request.known - 1)
            right = answer[request.n_output : request.n_output + n]
            drafts[request] = [(t + 1) % 50 if i % 4 == 3 else t for i, t in enumerate(right)]
            room -= len(drafts[request])
        return drafts

    def learn(self, request: Request, n_drafted: int, n_accepted: int) -> None:
        self.drafted += n_drafted
        self.accepted += n_accepted


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_answers_are_the_same_with_and_without(backend: str, sampled: bool) -> None:
    """Every parameter of sampling, log probabilities too, and a cache too small for all."""
    if backend == "cpu":
        pytest.importorskip("pronk.backends.cpu")
    ops = select_backend(backend)
    weights = random_weights(ops)
    plain = make_requests(sampled)
    make_engine(ops, weights).run(plain)
    outputs = [request.output for request in plain]
    known = {tuple(p): o for p, o in zip(make_prompts(), outputs, strict=True)}
    wanted = answers(make_engine(ops, weights), sampled)
    for options in ({}, {"n_blocks": 6}, {"token_budget": 9}, {"max_batch": 1}):
        oracle = Oracle(known)
        engine = make_engine(ops, weights, speculator=oracle, **options)
        assert answers(engine, sampled) == wanted
        assert oracle.accepted > 20
        assert oracle.drafted > oracle.accepted
    assert answers(make_engine(ops, weights, speculator=Speculator()), sampled) == wanted
