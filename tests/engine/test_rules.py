"""The engine's rules on a fake model without arrays: block accounting, and that an answer depends
on nothing but its own request."""

import hashlib
import itertools
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from pronk.backends.protocol import BLOCK, Sampled
from pronk.core.errors import ContextLengthError, PronkError, UserError
from pronk.engine import blocks as blocks_module
from pronk.engine import engine as engine_module
from pronk.engine import request as request_module
from pronk.engine import scheduler as scheduler_module
from pronk.engine.blocks import BlockPool, blocks_for
from pronk.engine.draft import Speculator
from pronk.engine.engine import Engine
from pronk.engine.request import Request, SamplingParams
from pronk.engine.scheduler import OBSERVED_CHUNK, Outcome, Slice

VOCAB = 50


def mix(before: int, token: int) -> int:
    digest = hashlib.blake2b(f"{before},{token}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def next_token(state: int, draw: int) -> int:
    return mix(state, draw) % VOCAB


class FakeModel:
    """Stores at each position a hash of all tokens up to it, found through the block table only:
    a wrong, stale or shared-and-overwritten block changes every token that follows."""

    def __init__(self, n_blocks: int) -> None:
        self.kv = [-1] * (n_blocks * BLOCK)
        self.steps: list[list[Slice]] = []
        self.fails: Callable[[Slice], bool] = lambda s: False

    def run(self, slices: Sequence[Slice]) -> list[Outcome]:
        self.steps.append(list(slices))
        return [ValueError("bad logits") if self.fails(s) else self._run(s) for s in slices]

    def _run(self, s: Slice) -> list[Sampled]:
        assert s.n >= 1
        request, state = s.request, 0
        if s.start:
            state = self.kv[self._slot(request, s.start - 1)]
        for position in range(s.start, s.start + s.n):
            state = mix(state, request.ids[position])
            self.kv[self._slot(request, position)] = state
        caught_up = s.start + s.n == request.known
        assert s.sample == (caught_up and request.params is not None)
        if not s.sample:
            return []
        drawn = [Sampled(next_token(state, request.n_output))]
        for i, guess in enumerate(s.draft):
            state = mix(state, guess)
            self.kv[self._slot(request, s.start + s.n + i)] = state
            drawn.append(Sampled(next_token(state, request.n_output + i + 1)))
        wrong = (i for i, guess in enumerate(s.draft) if drawn[i].token != guess)
        return drawn[: next(wrong, len(s.draft)) + 1]

    def _slot(self, request: Request, position: int) -> int:
        return request.blocks[position // BLOCK] * BLOCK + position % BLOCK


def expected(prompt: list[int], n: int) -> list[int]:
    """The answer of a model that has no cache at all."""
    state = 0
    for token in prompt:
        state = mix(state, token)
    output: list[int] = []
    for draw in range(n):
        output.append(next_token(state, draw))
        state = mix(state, output[-1])
    return output


def make_engine(n_blocks: int, **options: Any) -> Engine:
    values = {"context": n_blocks * BLOCK, **options}
    return Engine(FakeModel(n_blocks), vocab_size=VOCAB, n_blocks=n_blocks, **values)


def make_request(prompt: Sequence[int], max_tokens: int = 8, **options: Any) -> Request:
    return Request(prompt, SamplingParams(max_tokens=max_tokens), **options)


def check_accounts(engine: Engine) -> None:
    """Every block is in one state, and referenced as often as it is in a table."""
    scheduler, pool = engine.scheduler, engine.scheduler.pool
    assert pool.n_free + pool.n_cached + pool.n_referenced == pool.n_blocks
    assert pool.available == pool.n_free + pool.n_cached
    tables = Counter(block for request in scheduler.running for block in request.blocks)
    assert {block: n for block, n in enumerate(pool._refs) if n} == dict(tables)
    for request in scheduler.running:
        assert len(request.blocks) >= blocks_for(request.computed)
        assert request.computed < request.known <= request.limit
    assert not any(request.blocks or request.computed for request in scheduler.waiting)
    priorities = [request.priority for request in scheduler.running]
    assert priorities == sorted(priorities)
    assert scheduler._served.keys() == {r.owner for r in (*scheduler.running, *scheduler.waiting)}
    for key, request in scheduler._coming.items():
        assert request in scheduler.running
        assert key in request.keys[request.published :]


prompts = st.tuples(
    st.sampled_from([0, 20, 32, 64, 75]), st.lists(st.integers(0, 3), min_size=1, max_size=40)
).map(lambda parts: [1] * parts[0] + parts[1])
"""Many of them share their first blocks."""


class EngineMachine(RuleBasedStateMachine):
    """Random add, step and abort on a cache so small that requests push each other out."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.engine = make_engine(6, max_batch=4, token_budget=50)
        self.all: list[tuple[Request, list[int]]] = []

    @rule(
        target=requests, prompt=prompts, max_tokens=st.integers(1, 70), priority=st.integers(0, 2),
        owner=st.sampled_from(["", "a", "b"]),
    )  # fmt: skip
    def add(self, prompt: list[int], max_tokens: int, priority: int, owner: str) -> Request:
        request = make_request(prompt, max_tokens, priority=priority, owner=owner)
        self.engine.add(request)
        self.all.append((request, expected(prompt, max_tokens)))
        return request

    @rule(n=st.integers(1, 20))
    @precondition(lambda self: self.engine.has_work)
    def step(self, n: int) -> None:
        for _ in range(n):
            before = sum(r.computed for r, _ in self.all)
            preempted = sum(r.preemptions for r, _ in self.all)
            events = self.engine.step()
            moved = sum(r.computed for r, _ in self.all) > before
            assert moved or events or sum(r.preemptions for r, _ in self.all) > preempted
            check_accounts(self.engine)
            if not self.engine.has_work:
                break

    @rule(request=requests)
    def abort(self, request: Request) -> None:
        was_finished = request.finished
        assert self.engine.abort(request) != was_finished
        assert request.finished
        assert not request.blocks

    @invariant()
    def accounts_balance(self) -> None:
        check_accounts(self.engine)

    @invariant()
    def outputs_are_right(self) -> None:
        for request, wanted in self.all:
            assert request.output == wanted[: request.n_output]
            if request.finish_reason == "length":
                assert request.known == request.limit

    def teardown(self) -> None:
        steps = 0
        while self.engine.has_work:
            self.engine.step()
            steps += 1
            assert steps < 20_000, "no progress"
        check_accounts(self.engine)
        assert self.engine.scheduler.pool.n_referenced == 0


class Guesser(Speculator):
    """Guesses the next tokens, every third one wrong."""

    def propose(self, requests: Iterable[Request], room: int) -> dict[Request, Sequence[int]]:
        guesses: dict[Request, Sequence[int]] = {}
        for request in requests:
            n = min(
                request.n_prompt % 5 + request.known % 3, room, request.limit - request.known - 1
            )
            state = 0
            for token in request.ids:
                state = mix(state, token)
            draft = []
            for i in range(n):
                right = next_token(state, request.n_output + i)
                draft.append(right if (request.known + i) % 3 else (right + 1) % VOCAB)
                state = mix(state, draft[-1])
            guesses[request] = draft
            room -= len(draft)
        return guesses


class GuessingMachine(EngineMachine):
    """The same with drafts that are right and wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = make_engine(6, max_batch=4, token_budget=50, speculator=Guesser())


TestGuessingMachine = GuessingMachine.TestCase
TestGuessingMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(st.tuples(prompts, st.integers(1, 50)), min_size=1, max_size=8),
    token_budget=st.sampled_from([1, 7, 512]),
    max_batch=st.sampled_from([1, 2, 8]),
    prefix_cache=st.booleans(),
    n_blocks=st.sampled_from([6, 9, 100]),
    speculator=st.sampled_from([None, Speculator, Guesser]),
)
def test_answers_depend_on_the_request_alone(
    batch: list[tuple[list[int], int]],
    token_budget: int,
    max_batch: int,
    prefix_cache: bool,
    n_blocks: int,
    speculator: type[Speculator] | None,
) -> None:
    engine = make_engine(
        n_blocks, token_budget=token_budget, max_batch=max_batch, prefix_cache=prefix_cache,
        speculator=speculator and speculator(),
    )  # fmt: skip
    requests = [make_request(prompt, n) for prompt, n in batch]
    engine.run(requests)
    for request, (prompt, n) in zip(requests, batch, strict=True):
        assert request.output == expected(prompt, n)
        assert request.finish_reason == "length"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_block_pool_accounts(data: st.DataObject) -> None:
    """The pool alone, driven harder than a scheduler would: shared prefixes, any order."""
    pool = BlockPool(8)
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        which = data.draw(st.integers(0, 2 * len(held)))
        if which < len(held):
            pool.give_back(held.pop(which))
        else:
            token, n = data.draw(st.tuples(st.integers(0, 1), st.integers(1, 200)))
            request = make_request([token] * n)
            blocks, n_tokens = pool.take_prefix(request.keys, request.ids)
            assert n_tokens == len(blocks) * BLOCK < request.known
            fresh = pool.take(blocks_for(request.known) - len(blocks))
            if fresh is None:
                pool.give_back(blocks)
            else:
                held.append(blocks + fresh)
                for block, key in zip(held[-1], request.keys, strict=False):
                    pool.publish(block, key)
        assert pool.n_free + pool.n_cached + pool.n_referenced == pool.n_blocks
        references = Counter(block for blocks in held for block in blocks)
        assert {block: n for block, n in enumerate(pool._refs) if n} == dict(references)


def test_too_few_blocks_take_nothing() -> None:
    pool = BlockPool(3)
    taken = pool.take(2)
    assert taken is not None
    assert pool.take(2) is None
    assert (pool.n_free, pool.n_referenced) == (1, 2)


def test_a_block_cannot_be_given_back_twice() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    assert blocks is not None
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.give_back(blocks)


def test_a_second_turn_computes_only_what_is_new() -> None:
    engine = make_engine(20)
    first = make_request(list(range(40)), 30)
    engine.run([first])
    second = make_request([*first.ids, 1, 2, 3], 5)
    engine.run([second])
    # 70 tokens are known and 69 computed: two full blocks
    assert second.cached == 2 * BLOCK
    assert second.output == expected([*first.ids, 1, 2, 3], 5)


def test_a_stored_prompt_still_computes_one_token() -> None:
    engine = make_engine(20)
    prompt = [5] * (3 * BLOCK)
    engine.run([make_request(prompt)])
    again = make_request(prompt)
    engine.add(again)
    engine.step()
    assert again.cached == 2 * BLOCK
    model = engine._model
    assert isinstance(model, FakeModel)
    assert [s.n for s in model.steps[-1]] == [BLOCK]
    longer = make_request([*prompt, 6])
    engine.run([longer])
    assert longer.cached == 3 * BLOCK
    assert longer.output == expected([*prompt, 6], 8)


def test_requests_share_a_prefix_while_both_run() -> None:
    engine = make_engine(8)
    first, second = make_request([1] * 70, 60), make_request([1] * 70 + [2], 60)
    engine.add(first)
    engine.step()
    engine.add(second)
    engine.step()
    assert second.cached == 64
    assert list(first.blocks[:2]) == list(second.blocks[:2])
    engine.abort(first)
    while engine.has_work:
        engine.step()
    assert second.output == expected([1] * 70 + [2], 60)


def test_the_longest_unused_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    engine = make_engine(6)
    old, new = [1] * 65, [2] * 65
    engine.run([make_request(old, 1)])
    engine.run([make_request(new, 1)])
    assert engine.scheduler.pool.n_cached == 4
    engine.run([make_request([3] * 95, 1)])  # three blocks, two of them free
    again = make_request(new, 1)
    engine.run([again])
    assert again.cached == 64
    again = make_request(old, 1)
    engine.add(again)
    engine.step()
    assert again.cached == 32


def test_preemption_hits_the_youngest_and_loses_nothing() -> None:
    engine = make_engine(4, prefix_cache=False)
    old, young = make_request([1] * 30, 90), make_request([2] * 30, 90)
    engine.run([old, young])
    assert (old.preemptions, young.preemptions > 0) == (0, True)
    assert old.output == expected([1] * 30, 90)
    assert young.output == expected([2] * 30, 90)


def test_long_prompts_are_read_in_chunks_beside_decoding() -> None:
    engine = make_engine(40, token_budget=16)
    talking, reading = make_request([1] * 4, 30), make_request([2] * 100, 1)
    engine.add(talking)
    engine.step()
    engine.add(reading)
    for step in range(1, 7):
        engine.step()
        assert talking.n_output == step + 1
        assert reading.computed == 15 * step


def test_no_more_requests_run_at_once_than_max_batch() -> None:
    engine = make_engine(100, max_batch=3)
    requests = [make_request([i], 5) for i in range(7)]
    engine.run(requests)
    model = engine._model
    assert isinstance(model, FakeModel)
    assert max(len(step) for step in model.steps) == 3


def test_an_observed_request_sees_every_position_once() -> None:
    engine = make_engine(20, token_budget=64)
    engine.run([make_request([3] * 200, 1)])
    seen = Request([3] * 200, None, observer=lambda start, logits: None)
    engine.add(seen)
    sizes = []
    while engine.has_work:
        events = engine.step()
        model = engine._model
        assert isinstance(model, FakeModel)
        sizes += [s.n for s in model.steps[-1]]
    assert sizes == [64, 64, 64, 8]
    assert seen.cached == 0
    assert [(event.tokens, event.finish_reason) for event in events] == [((), "length")]


def test_a_request_that_cannot_fit_is_refused_at_the_door() -> None:
    engine = make_engine(4, context=100)
    with pytest.raises(ContextLengthError, match="100 tokens do not fit the context of 100"):
        engine.add(make_request([1] * 100))
    engine.add(make_request([1] * 99))
    engine.add(Request([1] * 100, None))
    with pytest.raises(UserError, match="no tokens"):
        engine.add(make_request([]))
    with pytest.raises(UserError, match="prompt: token id 50 is not in 0 to 49"):
        engine.add(make_request([1, 50]))
    with pytest.raises(UserError, match="logit_bias: token id 77"):
        engine.add(Request([1], SamplingParams(logit_bias=((77, 1.0),))))
    with pytest.raises(UserError, match="not fit the KV cache of 64 positions"):
        make_engine(2, context=100).add(make_request([1] * 80))


def test_the_context_ends_an_answer() -> None:
    engine = make_engine(4, context=100)
    request = Request([1] * 90, SamplingParams())
    engine.run([request])
    assert (request.n_output, request.finish_reason) == (10, "length")


def test_one_refused_request_takes_its_companions_along() -> None:
    engine = make_engine(4)
    good = make_request([1])
    with pytest.raises(UserError):
        engine.run([good, make_request([])])
    assert good.finish_reason == "abort"
    assert not engine.has_work


def test_an_end_token_stops_and_ignore_eos_does_not() -> None:
    wanted = expected([1, 2], 20)
    end = wanted[4]
    stopped = Request([1, 2], SamplingParams(max_tokens=20), eos_ids=frozenset([end]))
    own = Request([1, 2], SamplingParams(max_tokens=20, stop_ids=(end,)))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    deaf = Request([1, 2], params, eos_ids=frozenset([end]))
    make_engine(8).run([stopped, own, deaf])
    first = wanted.index(end) + 1
    assert stopped.output == own.output == wanted[:first]
    assert stopped.finish_reason == own.finish_reason == "stop"
    assert deaf.output == wanted


def test_threads_share_one_engine() -> None:
    engine = make_engine(12, max_batch=3)

    def answer(seed: int) -> list[int]:
        request = make_request([seed] * 20, 25)
        engine.run([request])
        return request.output

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(answer, range(24)))
    assert answers == [expected([seed] * 20, 25) for seed in range(24)]
    check_accounts(engine)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_the_engine_usable(error: type[BaseException]) -> None:
    """The caller's request ends; what another caller had begun goes on and comes out right."""
    engine = make_engine(8)
    other = make_request([4] * 40, 30)
    engine.add(other)
    engine.step()
    model = engine._model
    assert isinstance(model, FakeModel)
    good_run, n_steps = model.run, 0

    def failing_run(slices: Sequence[Slice]) -> list[Outcome]:
        nonlocal n_steps
        n_steps += 1
        results = good_run(slices)  # what has been computed by then must not count
        if n_steps == 3:
            raise error
        return results

    model.run = failing_run  # type: ignore[method-assign]
    failed = make_request([5] * 50, 20)
    with pytest.raises(error):
        engine.run([failed])
    assert failed.finish_reason == "abort"
    check_accounts(engine)
    while engine.has_work:
        engine.step()
    assert other.output == expected([4] * 40, 30)
    again = make_request([5] * 50, 20)
    engine.run([again])
    assert again.output == expected([5] * 50, 20)


# One request's trouble


class Letter:
    """A text of one letter a token, which cannot read some tokens or not end."""

    stopped = False

    def __init__(self, bad_token: int | None = None, bad_end: bool = False) -> None:
        self._bad_token, self._bad_end = bad_token, bad_end

    def feed(self, token: int) -> str:
        if token == self._bad_token:
            raise ZeroDivisionError("unreadable")
        return "x"

    def finish(self) -> str:
        if self._bad_end:
            raise ZeroDivisionError("unreadable")
        return "."


@pytest.mark.parametrize("bad_end", [False, True], ids=["a token", "the end"])
def test_a_text_that_cannot_be_read_ends_its_own_request_only(bad_end: bool) -> None:
    engine = make_engine(20)
    wanted = expected([7] * 40, 12)
    bad_token = None if bad_end else wanted[5]
    text = Letter(bad_token, bad_end)
    failing = Request([7] * 40, SamplingParams(max_tokens=12), text=text)
    engine.add(failing)
    others = [Request([i] * 40, SamplingParams(max_tokens=20), text=Letter()) for i in (1, 2)]
    for request in others:
        engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step()
        check_accounts(engine)
    (last,) = [e for e in events if e.request is failing and e.finish_reason]
    assert (last.tokens, last.finish_reason) == ((), "error")
    assert failing.output == wanted[: 12 if bad_end else wanted.index(wanted[5]) + 1]
    with pytest.raises(ZeroDivisionError, match="unreadable"):
        failing.raise_error()
    for i, request in zip((1, 2), others, strict=True):
        assert (request.output, request.finish_reason) == (expected([i] * 40, 20), "length")
        assert request.text == "x" * 20 + "."
        request.raise_error()
    assert engine.scheduler.pool.n_referenced == 0


def test_a_failure_is_raised_to_its_owner_and_to_nobody_else() -> None:
    engine = make_engine(20)
    other, failing = make_request([3] * 10, 30), make_request([4] * 10, 30)
    model = engine._model
    assert isinstance(model, FakeModel)
    model.fails = lambda s: s.request is failing and s.start > 12
    engine.add(other)
    with pytest.raises(ValueError, match="bad logits"):
        engine.run([make_request([5] * 10, 30), failing])
    assert failing.finish_reason == "error"
    engine.run([other_too := make_request([6], 5)])
    while engine.has_work:
        engine.step()
    assert other.output == expected([3] * 10, 30)
    assert other_too.output == expected([6], 5)
    check_accounts(engine)


def test_a_failure_in_the_step_of_another_thread_reaches_its_owner() -> None:
    """The owner finds its request ended, and looks why."""
    engine = make_engine(20)
    failing = make_request([4] * 10, 3)
    model = engine._model
    assert isinstance(model, FakeModel)
    model.fails = lambda s: s.request is failing
    step = engine.step

    def two_steps() -> list[Any]:
        return step() + step()

    engine.step = two_steps  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="bad logits"):
        engine.run([failing])


def test_what_a_failed_slice_computed_is_not_found_again() -> None:
    engine = make_engine(20)
    model = engine._model
    assert isinstance(model, FakeModel)
    failing = make_request([4] * 70, 3)
    model.fails = lambda s: s.request is failing and s.sample
    with pytest.raises(ValueError, match="bad logits"):
        engine.run([failing])
    again = make_request([4] * 70, 3)
    engine.run([again])
    assert (again.cached, again.output) == (0, expected([4] * 70, 3))


def test_a_long_enough_answer_ends_whatever_its_text_does() -> None:
    class Silent(Letter):
        def feed(self, token: int) -> str:
            return ""

    request = Request([1], SamplingParams(max_tokens=3), text=Silent())
    make_engine(4).run([request])
    assert (request.text, request.finish_reason) == (".", "length")


# Interruptions


BOOK_KEEPING = {
    module.__file__ for module in (blocks_module, engine_module, request_module, scheduler_module)
}


def _is_atomic(line: str) -> bool:
    """Where the interpreter looks for no signal, though it traces: around taking and releasing a
    lock, and in front of a `try`."""
    return "with self._lock" in line or line.strip() == "try:"


class Interrupter:
    """A trace function that raises KeyboardInterrupt after so many lines of the book-keeping, and
    after so many again. `lines` are those that it saw."""

    def __init__(self, gaps: Sequence[int], only: Sequence[str] = ()) -> None:
        """`only`: names of the functions whose lines count, if not all."""
        self.gaps = list(gaps)
        self.lines: list[tuple[str, int]] = []
        self._only = only

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in BOOK_KEEPING:
            return None
        line = linecache.getline(code.co_filename, frame.f_lineno)
        counts = not self._only or code.co_name in self._only
        if event == "line" and counts and not _is_atomic(line) and self.gaps:
            self.lines.append((code.co_filename, frame.f_lineno))
            self.gaps[0] -= 1
            if self.gaps[0] <= 0:
                self.gaps.pop(0)
                raise KeyboardInterrupt
        return self

    def interrupts(self, call: Callable[[], object]) -> bool:
        if not self.gaps:  # tracing is slow
            call()
            return False
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


ASKED = [([1] * 70, 30), ([1] * 70 + [2], 9), ([3], 40), ([1] * 40, 50), ([4] * 64, 3)]
EXPECTED = [expected(prompt, n) for prompt, n in ASKED]


def check_interrupted(interrupter: Interrupter, prefix_cache: bool) -> None:
    """No block is lost, no request is forgotten; an answer is right, or it is the one (for each
    interruption) that was being written, and says so."""
    engine = make_engine(6, max_batch=3, token_budget=40, prefix_cache=prefix_cache)
    n_interruptions = len(interrupter.gaps)
    requests: list[tuple[Request, list[int]]] = []
    for (prompt, n), wanted in zip(ASKED, EXPECTED, strict=True):
        request = Request(prompt, SamplingParams(max_tokens=n), text=Letter())
        if interrupter.interrupts(lambda r=request: engine.add(r)):  # type: ignore[misc]
            engine.abort(request)  # as its owner does
        else:
            requests.append((request, wanted))
    n_steps = 0
    while engine.has_work:
        interrupter.interrupts(engine.step)
        if engine._in_order:  # else the recovery was interrupted, and the next turn repeats it
            check_accounts(engine)
        n_steps += 1
        assert n_steps < 2000, "no progress"
        if n_steps == 20 and len(requests) > 2:
            interrupter.interrupts(lambda: engine.abort(requests[2][0]))
    engine.abort(make_request([1]))  # a turn that nobody interrupts
    check_accounts(engine)
    assert engine.scheduler.pool.n_referenced == 0
    failed = [request for request, _ in requests if request.finish_reason == "error"]
    assert len(failed) <= n_interruptions - len(interrupter.gaps)
    for request in failed:
        with pytest.raises(PronkError, match="interrupted while it was written"):
            request.raise_error()
    for request, wanted in requests:
        assert request.finished
        assert request.output == wanted[: len(request.output)]
        if request.finish_reason == "length":
            assert request.output == wanted
            assert request.text == "x" * len(wanted) + "."
    after = make_request(*ASKED[0])
    engine.run([after])
    assert after.output == EXPECTED[0]


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_an_interruption_at_any_line_leaves_the_books_in_order(prefix_cache: bool) -> None:
    """The first, the middle and the last time that each line runs."""
    seen = Interrupter([1_000_000])
    check_interrupted(seen, prefix_cache)
    times: dict[tuple[str, int], list[int]] = {}
    for i, line in enumerate(seen.lines, 1):
        times.setdefault(line, []).append(i)
    assert len(times) > 120
    points = {at for line in times.values() for at in (line[0], line[len(line) // 2], line[-1])}
    for point in sorted(points):
        check_interrupted(Interrupter([point]), prefix_cache)


@settings(max_examples=60, deadline=None)
@example(gaps=[522, 400, 12], prefix_cache=False)
@given(gaps=st.lists(st.integers(1, 600), min_size=2, max_size=8), prefix_cache=st.booleans())
def test_several_interruptions_leave_the_books_in_order(
    gaps: list[int], prefix_cache: bool
) -> None:
    check_interrupted(Interrupter(gaps), prefix_cache)


def test_an_interruption_of_the_recovery_is_made_good_in_the_next_turn() -> None:
    """A step fails, and what should put things in order is interrupted at any of its lines."""
    for point in itertools.count(1):
        engine = make_engine(7, max_batch=3, token_budget=40)
        requests = [make_request(prompt, n) for prompt, n in ASKED]
        for request in requests:
            engine.add(request)
        for _ in range(5):
            engine.step()
        assert len(engine.scheduler.running) > 1
        model = engine._model
        assert isinstance(model, FakeModel)
        run = model.run

        def failing(slices: Sequence[Slice]) -> list[Outcome]:
            raise MemoryError

        model.run = failing  # type: ignore[method-assign]
        interrupter = Interrupter([point], only=["recover", "forget_references"])
        try:
            interrupted = interrupter.interrupts(engine.step)
        except MemoryError:
            assert interrupter.gaps, "no more lines"
            break
        assert interrupted
        model.run = run  # type: ignore[method-assign]
        while engine.has_work:
            engine.step()
            check_accounts(engine)
        assert [request.output for request in requests] == EXPECTED
    assert point > 20


# Observers


def test_observed_rows_are_bounded_for_all_requests_of_a_step_together() -> None:
    engine = make_engine(60, token_budget=512)
    watched = [Request([i] * 200, None, observer=lambda *_: None) for i in range(3)]
    quiet = make_request([9] * 300, 2)
    for request in (*watched, quiet):
        engine.add(request)
    model = engine._model
    assert isinstance(model, FakeModel)
    while engine.has_work:
        engine.step()
        rows = [s.n for s in model.steps[-1] if s.request.observer]
        assert sum(rows) <= OBSERVED_CHUNK
        check_accounts(engine)
    seen = dict.fromkeys(watched, 0)
    for step in model.steps:
        for s in step:
            if s.request.observer:
                seen[s.request] += s.n
    assert list(seen.values()) == [200] * 3
    assert len(model.steps) == -(-600 // OBSERVED_CHUNK)
    assert quiet.output == expected([9] * 300, 2)
