"""Whose turn it is: priorities, fairness between owners, deadlines, prompts that begin alike."""

import random
import time

import pytest
from test_rules import FakeModel, Guesser, check_accounts, expected, make_engine, make_request

from pronk.backends.protocol import BLOCK
from pronk.core.errors import DeadlineError
from pronk.engine.engine import Engine
from pronk.engine.request import Request, State


def slices_of(engine: Engine) -> list[tuple[Request, int]]:
    model = engine._model
    assert isinstance(model, FakeModel)
    return [(s.request, s.n) for s in model.steps[-1]]


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        check_accounts(engine)


def test_a_smaller_priority_takes_a_place_in_the_batch() -> None:
    engine = make_engine(20, max_batch=2)
    batch = [make_request([i] * 40, 30, priority=1) for i in range(3)]
    for request in batch:
        engine.add(request)
    engine.step()
    live = make_request([9] * 10, 5)
    engine.add(live)
    engine.step()
    assert [request for request, _ in slices_of(engine)] == [live, batch[0]]
    assert batch[1].state is State.WAITING
    assert (batch[0].preemptions, batch[1].preemptions) == (0, 1)
    finish(engine)
    assert live.output == expected([9] * 10, 5)
    assert [r.output for r in batch] == [expected([i] * 40, 30) for i in range(3)]


def test_a_smaller_priority_takes_blocks() -> None:
    engine = make_engine(4)
    large = make_request([1] * 100, 20, priority=1)
    engine.add(large)
    engine.step()
    live = make_request([2] * 60, 5)
    engine.add(live)
    engine.step()
    assert [request for request, _ in slices_of(engine)] == [live]
    finish(engine)
    assert large.output == expected([1] * 100, 20)
    assert large.preemptions == 1


def test_a_smaller_priority_reads_its_prompt_first() -> None:
    engine = make_engine(40, token_budget=32)
    slow = make_request([1] * 300, 2, priority=1)
    engine.add(slow)
    engine.step()
    live = make_request([2] * 50, 2)
    engine.add(live)
    engine.step()
    assert slices_of(engine) == [(live, 32)]
    engine.step()
    assert slices_of(engine) == [(live, 18), (slow, 14)]
    finish(engine)


def test_owners_take_turns() -> None:
    """One owner's hundred requests do not keep another's one waiting."""
    engine = make_engine(100, max_batch=1)
    many = [make_request([i], 3, owner="many") for i in range(10)]
    for request in many:
        engine.add(request)
    engine.step()
    few = [make_request([i, 1], 3, owner="few") for i in range(2)]
    for request in few:
        engine.add(request)
    ended: list[Request] = []
    while engine.has_work:
        ended += [event.request for event in engine.step() if event.finish_reason]
    assert set(ended[:4]) == {many[0], few[0], few[1], many[1]}
    assert ended.index(few[0]) == 1
    own = [request for request in ended if request.owner == "many"]
    assert own == many, "first come, first served for one owner"


def test_a_new_owner_starts_even_with_the_others() -> None:
    engine = make_engine(100, max_batch=1)
    old = [make_request([i], 3, owner="old") for i in range(6)]
    for request in old:
        engine.add(request)
    for _ in range(9):
        engine.step()
    new = [make_request([i], 3, owner="new") for i in range(6)]
    for request in new:
        engine.add(request)
    ended: list[str] = []
    while engine.has_work:
        ended += [event.request.owner for event in engine.step() if event.finish_reason]
    assert ended[:6].count("old") == 3, "it would not get six turns in a row"


@pytest.mark.parametrize("running", [True, False])
def test_a_deadline_ends_a_request_wherever_it_stands(running: bool) -> None:
    engine = make_engine(20, max_batch=1)
    other = make_request([1] * 40, 30)
    late = make_request([2] * 40, 30)
    for request in (late, other) if running else (other, late):
        engine.add(request)
    engine.step()
    late.deadline = time.monotonic() - 1
    events = engine.step()
    assert [e.finish_reason for e in events if e.request is late] == ["error"]
    assert isinstance(late.error, DeadlineError)
    assert isinstance(late.error, TimeoutError)
    finish(engine)
    assert other.output == expected([1] * 40, 30)


def test_prompts_that_begin_alike_are_computed_once() -> None:
    engine = make_engine(60, max_batch=8, token_budget=64)
    requests = [make_request([5] * 200 + [i], 4) for i in range(6)]
    other = make_request([6] * 10, 4)
    for request in [*requests, other]:
        engine.add(request)
    finish(engine)
    model = engine._model
    assert isinstance(model, FakeModel)
    computed = sum(s.n for step in model.steps for s in step)
    alone = 201 + 5 * (201 - 6 * BLOCK) + 10
    assert computed == alone + 7 * 3
    assert [r.cached for r in requests] == [0] + [6 * BLOCK] * 5
    for i, request in enumerate(requests):
        assert request.output == expected([5] * 200 + [i], 4)


def test_who_waited_for_a_beginning_goes_on_when_its_maker_is_gone() -> None:
    engine = make_engine(60, token_budget=32)
    first, second = make_request([5] * 200, 4), make_request([5] * 200 + [1], 4)
    engine.add(first)
    engine.add(second)
    for _ in range(3):
        engine.step()
    assert second.state is State.WAITING
    engine.abort(first)
    finish(engine)
    assert second.cached == 3 * BLOCK
    assert second.output == expected([5] * 200 + [1], 4)


def test_nobody_waits_for_a_beginning_of_a_larger_priority() -> None:
    """Which may get no room at all while others keep coming."""
    engine = make_engine(200, token_budget=64)
    batch = make_request([5] * 1000, 4, priority=1)
    engine.add(batch)
    engine.step()
    live = [make_request([5] * 1000 + [i], 4) for i in range(2)]
    others = [make_request([6 + i] * 300, 1) for i in range(6)]
    for request in (*live, *others):
        engine.add(request)
    engine.step()
    assert [request for request, _ in slices_of(engine)] == [live[0]]
    finish(engine)
    assert live[1].cached == 1000 // BLOCK * BLOCK, "its own beginnings it does wait for"
    for request in (batch, *live, *others):
        n = 1 if request in others else 4
        assert request.output == expected(request.ids[: request.n_prompt].tolist(), n)


def test_other_salts_share_nothing() -> None:
    engine = make_engine(60)
    for salt in (b"", b"a", b"b"):
        request = make_request([5] * 100, 1, salt=salt)
        engine.run([request])
        assert request.cached == 0
    again = make_request([5] * 100, 1, salt=b"a")
    engine.run([again])
    assert again.cached == 3 * BLOCK


def test_ten_thousand_random_schedules_lose_no_block_and_change_no_answer() -> None:
    """Adds, aborts, deadlines, priorities, owners and drafts in any order, on a cache where
    requests push each other out."""
    for seed in range(10_000):
        rng = random.Random(seed)
        speculator = Guesser() if rng.random() < 0.3 else None
        engine = make_engine(
            rng.randint(3, 6), context=96, max_batch=rng.randint(1, 4),
            token_budget=rng.choice([3, 20, 64]), speculator=speculator,
        )  # fmt: skip
        requests: list[tuple[Request, list[int], int]] = []
        while engine.has_work or len(requests) < 4:
            if len(requests) < 4 and rng.random() < 0.5:
                prompt = [1] * rng.choice([0, 32, 40]) + [rng.randrange(3)] * rng.randint(1, 30)
                n = rng.randint(1, 10)
                request = make_request(
                    prompt, n, priority=rng.randint(0, 1), owner=rng.choice("ab"),
                    deadline=time.monotonic() if rng.random() < 0.05 else None,
                )  # fmt: skip
                engine.add(request)
                requests.append((request, prompt, n))
            elif requests and rng.random() < 0.05:
                engine.abort(rng.choice(requests)[0])
            engine.step()
        check_accounts(engine)
        pool = engine.scheduler.pool
        assert pool.n_free + pool.n_cached == pool.n_blocks, seed
        for request, prompt, n in requests:
            assert request.output == expected(prompt, request.n_output), seed
            assert request.n_output == n or request.finish_reason in ("abort", "error"), seed


def test_stats_count_what_happened() -> None:
    engine = make_engine(10)
    first, second = make_request([5] * 100, 7), make_request([5] * 100, 3)
    engine.run([first])
    engine.add(second)
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks) == (1, 0, 10)
    assert (stats.blocks_used, stats.blocks_cached) == (4, 0)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (200, 96, 8)
