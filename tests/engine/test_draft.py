"""Guesses: found where the text repeats, made as far as they pay, and never in the answer."""

import random
from array import array
from collections.abc import Callable, Iterable, Sequence

import pytest

from engine.test_runner import answers, make_engine, make_prompts, make_requests, random_weights
from pronk.backends.select import select_backend
from pronk.engine.draft import MOST_DRAFT, Speculator
from pronk.engine.estimates import Budget, Costs
from pronk.engine.lookup import GRAM, LONGEST_MATCH, Lookup, SuffixIndex
from pronk.engine.plan import Guess, make_plan, may_pay
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


# Lookup


def request_of(ids: Sequence[int], *, salt: bytes = b"", limit: int = 1000) -> Request:
    request = Request(ids, SamplingParams(max_tokens=100), salt=salt)
    request.limit = limit
    return request


def finished(prompt: Sequence[int], answer: Sequence[int], *, salt: bytes = b"") -> Request:
    request = request_of(prompt, salt=salt)
    request.ids.extend(answer)
    return request


def test_a_long_text_is_read_in_parts() -> None:
    """What has been read can be found, long before all is."""
    lookup = Lookup()
    text = [*range(100, 400), *range(1000, 1300)] * 20
    request = request_of([*text, 150, 151, 152, 153])
    lookup.read([request], 64)
    assert lookup.find(request, (), 5) == ([154, 155, 156, 157, 158], 4)
    later = request_of([*text, 1150, 1151, 1152])
    lookup.read([later], 64)
    assert lookup.find(later, (), 5) == ([], 0)
    for _ in range(10):
        lookup.read([later], 64)
    assert lookup.find(later, (), 2) == ([1153, 1154], 3)


def test_reading_in_parts_finds_the_same_in_the_end() -> None:
    rng = random.Random(1)
    ids = array("i", [rng.randrange(30) for _ in range(3000)])
    at_once, in_parts = SuffixIndex(ids), SuffixIndex(ids)
    at_once.update(10_000)
    while len(in_parts._before) < len(ids):
        in_parts.update(rng.randrange(1, 50))
    assert in_parts._before == at_once._before
    assert in_parts._last == at_once._last


def test_ids_that_share_their_low_bits_are_told_apart() -> None:
    large = 1 << 20
    lookup, request = Lookup(), request_of([1, 2, 3, 4, 9, 9, 9, 1 + large, 2 + large, 3 + large])
    lookup.read([request], 100)
    assert lookup.find(request, (), 3) == ([], 0)
    assert lookup.find(request, (1, 2, 3), 3) == ([4, 9, 9], 3)


def test_answers_do_not_run_into_each_other_nor_from_salt_to_salt() -> None:
    lookup = Lookup()
    lookup.remember(finished([1], [20, 21, 22, 23, 24], salt=b"a"))
    lookup.remember(finished([1], [30, 31, 32, 33, 34], salt=b"a"))
    asked = request_of([5, 20, 21, 22], salt=b"a")
    assert lookup.find(asked, (), 9) == ([23, 24], 3)
    assert lookup.find(request_of([5, 20, 21, 22], salt=b"b"), (), 9) == ([], 0)
    assert lookup.find(request_of([5, 23, 24, 30], salt=b"a"), (), 9) == ([], 0)


def test_only_so_much_is_remembered() -> None:
    lookup = Lookup()
    for salt in range(20):
        lookup.remember(finished([1], range(10), salt=bytes([salt])))
    known = [
        bool(lookup.find(request_of([2, 3, 4], salt=bytes([salt])), (), 3)[1]) for salt in range(20)
    ]
    assert known == [False] * 12 + [True] * 8
    for _ in range(30):
        lookup.remember(finished([1], range(5000)))
        assert len(lookup._histories[b""].ids) < 80_000


def test_a_copy_goes_on_after_a_change() -> None:
    """One token instead of another, one more, two fewer; not far away, and not for ever."""
    text = list(range(100, 160))
    cases = {
        (*text[:10], 7, text[11]): (text[12:15], 1),
        (*text[:10], 7, text[10]): (text[11:14], 1),
        (*text[:10], text[12]): (text[13:16], 1),
        (*text[:10], 7, text[11], text[12]): (text[13:16], 2),
        (*text[:10], 7): ([], 0),
        (*text[:10], text[40]): ([], 0),
    }
    for answer, wanted in cases.items():
        lookup, request = Lookup(), request_of(text)
        for token in answer:
            request.ids.append(token)
            lookup.read([request], 100)
            found = lookup.find(request, (), 3)
        assert found == wanted, answer
    lookup, request = Lookup(), request_of(text)
    for token in [*text[:10], *range(1, 9), text[12]]:
        request.ids.append(token)
        lookup.read([request], 100)
        found = lookup.find(request, (), 3)
    assert found == ([], 0)


# Plans


def guess_of(chances: list[float], *, by_model: bool = False, lag: int = 1) -> Guess:
    tokens = [] if by_model else [7] * len(chances)
    return Guess(request_of([1]), tokens, 0, 0, chances, by_model, lag)


class Table(Costs):
    def __init__(self, of: Callable[[int], float]) -> None:
        super().__init__()
        self.of = of  # type: ignore[method-assign]


def test_the_likeliest_tokens_are_taken_first() -> None:
    cheap = Table(lambda rows: 1 + 0.05 * rows)
    guesses = [guess_of([0.9] * 5), guess_of([0.2] * 5), guess_of([0.5] * 5)]
    plan = make_plan(guesses, 3, 6, cheap, lambda rows: 0.0)
    assert sum(plan.taken) == 6
    assert plan.taken == [5, 0, 1]
    assert plan.speed == pytest.approx((3 + 0.9 + 0.81 + 0.729 + 0.6561 + 0.59049 + 0.5) / 1.45)


def test_a_model_pays_where_it_is_fast_and_right() -> None:
    costs = Table(lambda rows: 1 + 0.02 * rows)
    guess = guess_of([0.8] * 10, by_model=True)
    (fast,) = make_plan([guess], 1, 30, costs, lambda rows: 0.05).taken
    (slow,) = make_plan([guess], 1, 30, costs, lambda rows: 0.3).taken
    assert fast > slow > 0
    assert make_plan([guess], 1, 30, costs, lambda rows: 0.9).taken == [0]
    unlikely = guess_of([0.05] * 10, by_model=True)
    assert make_plan([unlikely], 1, 30, costs, lambda rows: 0.1).taken == [0]


def test_steps_of_a_model_are_shared_by_requests() -> None:
    costs = Table(lambda rows: 1 + 0.02 * rows)
    guesses = [guess_of([0.8] * 2, by_model=True) for _ in range(4)]
    together = make_plan(guesses, 4, 30, costs, lambda rows: 0.1)
    assert together.taken == [2] * 4
    assert together.speed == pytest.approx(4 * (1 + 0.8 + 0.64) / (1.24 + 2 * 0.1))
    reading = [guess_of([0.8] * 10, by_model=True, lag=30) for _ in range(4)]
    assert make_plan(reading, 4, 30, costs, lambda rows: 0.1 * rows).taken == [0] * 4


def test_whether_right_guesses_could_pay() -> None:
    assert may_pay(1, 4, Table(lambda rows: 1 + 0.3 * rows))
    assert not may_pay(8, 24, Table(float))
    stairs = Table(lambda rows: float(-(-rows // 8)))  # 8 rows cost as much as 1
    assert may_pay(1, 1, stairs)
    assert not may_pay(8, 8, stairs)


# Trials


def test_what_did_not_pay_is_tried_again_now_and_then() -> None:
    """And comes back once it is right."""
    request, speculator = repeating(100_000), Speculator()
    right, tried, drafted = False, 0, 0
    speculator.costs = Table(lambda rows: 1 + 0.15 * (rows - 1))
    for step in range(6000):
        drafts = speculator.propose([request], 100)
        if request in drafts:
            n = len(drafts[request])
            speculator.learn(request, n, n if right else 0)
            tried += 500 < step < 3000
            drafted += n if step >= 5000 else 0
        speculator.book(1, 1.0)
        right = step >= 3000
    assert 10 < tried < 250
    assert drafted > 4000


def test_a_constraint_that_fails_is_left_to_the_runner() -> None:
    class Broken:
        def masks(self, draft: Sequence[int], first: int = 0) -> Sequence[bytes | None]:
            raise AssertionError

        def allowed(self, draft: Sequence[int]) -> int:
            raise ValueError("broken")

        def forced(self) -> Sequence[int]:
            raise ValueError("broken")

        def advance(self, token: int) -> None:
            raise AssertionError

    request = repeating()
    request.constraint = Broken()
    assert not Speculator().propose([request, repeating(1)], 100)


def test_forced_tokens_come_first_and_what_was_found_behind_them() -> None:
    class Forcing:
        def masks(self, draft: Sequence[int], first: int = 0) -> Sequence[bytes | None]:
            return [None] * (len(draft) + 1 - first)

        def allowed(self, draft: Sequence[int]) -> int:
            return next((i for i, token in enumerate(draft) if token == 6), len(draft))

        def forced(self) -> Sequence[int]:
            return [2, 3]

        def advance(self, token: int) -> None: ...

    speculator = Speculator()
    for rows in range(1, MOST_DRAFT + 2):
        speculator.costs.book(rows, 1 + 0.001 * rows)
    request = request_of([1, 2, 3, 4, 5, 6, 7, 8, 1])
    request.constraint = Forcing()
    assert list(speculator.propose([request], 100)[request]) == [2, 3, 4, 5]
    speculator.learn(request, 4, 3)
    assert (speculator.sources["forced"].drafted, speculator.sources["forced"].accepted) == (2, 2)
    assert (speculator.sources["lookup"].drafted, speculator.sources["lookup"].accepted) == (2, 1)
    speculator.propose([request], 100)
    speculator.learn(request, 4, 1)
    assert (speculator.sources["forced"].drafted, speculator.sources["forced"].accepted) == (4, 3)
    assert speculator.sources["lookup"].drafted == 2  # nothing is known of those
