"""The thread that steps an engine, on the fake model: who waits is woken, whatever fails."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from engine.test_rules import make_engine, make_request
from pronk.core.errors import PronkError
from pronk.engine.engine import Engine
from pronk.engine.request import Request
from pronk.server.worker import Worker

PATIENCE = 30


async def ended(request: Request, changed: asyncio.Event) -> None:
    """Waits as a generation does: what nobody tells it, it does not see."""
    while True:
        await asyncio.wait_for(changed.wait(), PATIENCE)
        changed.clear()
        if request.finished:
            return


def with_worker(engine: Engine, use: Callable[[Worker], Awaitable[None]]) -> None:
    async def main() -> None:
        worker = Worker(engine, "test")
        try:
            await use(worker)
        finally:
            await asyncio.to_thread(worker.close)

    asyncio.run(main())


def failing_once(function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The function, which raises once, after its work."""
    failures = [RuntimeError("broken")]

    def fails(*args: Any) -> Any:
        result = function(*args)
        if when(*args) and failures:
            raise failures.pop()
        return result

    return fails


def test_who_ends_in_a_step_that_fails_is_told() -> None:
    engine = make_engine(32)
    short, long = make_request([1, 2, 3], 1), make_request([4, 5, 6], 5)
    engine.scheduler.commit = failing_once(  # type: ignore[method-assign]
        engine.scheduler.commit, lambda done, *_: done.request is long
    )

    async def use(worker: Worker) -> None:
        changed = {request: asyncio.Event() for request in (short, long)}
        with engine._lock:  # both in one step
            for request in (short, long):
                worker.submit([request], changed[request].set)
        for request in (short, long):
            await ended(request, changed[request])

    with_worker(engine, use)
    assert (short.finish_reason, short.n_output) == ("length", 1)
    assert (long.finish_reason, long.n_output) == ("length", 5)


def test_a_deadline_that_passes_in_a_step_that_fails_is_told() -> None:
    engine = make_engine(32)
    late, other = make_request([1, 2, 3], 5, deadline=0.0), make_request([4, 5, 6], 5)
    engine._model.run = failing_once(engine._model.run, lambda _: True)  # type: ignore[method-assign]

    async def use(worker: Worker) -> None:
        changed = {request: asyncio.Event() for request in (late, other)}
        with engine._lock:
            for request in (late, other):
                worker.submit([request], changed[request].set)
        for request in (late, other):
            await ended(request, changed[request])

    with_worker(engine, use)
    assert isinstance(late.error, TimeoutError)
    assert other.n_output == 5


def test_steps_that_keep_failing_end_all_and_the_next_request_is_answered() -> None:
    engine = make_engine(32)
    run = engine._model.run

    async def use(worker: Worker) -> None:
        def broken(slices: Any) -> Any:
            raise OSError("no memory")

        changed = asyncio.Event()
        engine._model.run = broken  # type: ignore[method-assign]
        lost = [make_request([i], 5) for i in range(3)]
        worker.submit(lost, changed.set)
        for request in lost:
            await ended(request, changed) if not request.finished else None
            with pytest.raises(Exception, match="the engine failed: OSError"):
                request.raise_error()
        engine._model.run = run  # type: ignore[method-assign]
        request, changed = make_request([7], 5), asyncio.Event()
        worker.submit([request], changed.set)
        await ended(request, changed)
        assert request.n_output == 5

    with_worker(engine, use)


def test_the_thread_outlives_whatever_fails_between_steps() -> None:
    engine = make_engine(32)
    engine.abort = failing_once(engine.abort, lambda _: True)  # type: ignore[method-assign]

    async def use(worker: Worker) -> None:
        first, second, third = (make_request([i], 1000) for i in range(3))
        changed = asyncio.Event()
        worker.submit([first, second, third], changed.set)
        worker.cancel([first, second, third])
        while not (first.finished and second.finished and third.finished):
            await asyncio.wait_for(changed.wait(), PATIENCE)
            changed.clear()
        assert {r.finish_reason for r in (first, second, third)} <= {"abort", "length"}
        request, changed = make_request([7], 5), asyncio.Event()
        worker.submit([request], changed.set)
        await ended(request, changed)

    with_worker(engine, use)


def test_a_refused_request_is_told_its_error() -> None:
    engine = make_engine(4)

    async def use(worker: Worker) -> None:
        request, changed = make_request([1] * 1000), asyncio.Event()
        worker.submit([request], changed.set)
        await ended(request, changed)
        with pytest.raises(Exception, match="1000 tokens do not fit"):
            request.raise_error()

    with_worker(engine, use)


def test_a_stop_ends_what_runs() -> None:
    engine = make_engine(64)

    async def main() -> None:
        worker, changed = Worker(engine, "test"), asyncio.Event()
        requests = [make_request([i], 1500) for i in range(12)]
        worker.submit(requests, changed.set)
        await asyncio.wait_for(changed.wait(), PATIENCE)
        await asyncio.to_thread(worker.close)
        for request in requests:
            assert request.finished
            with pytest.raises(Exception, match="the server is stopping"):
                request.raise_error()

    asyncio.run(main())


def test_who_comes_after_a_stop_is_told_the_same() -> None:
    engine = make_engine(64)

    async def use(worker: Worker) -> None:
        worker.stop(PronkError("we close at six"))
        request, changed = make_request([1], 5), asyncio.Event()
        worker.submit([request], changed.set)
        await ended(request, changed)
        with pytest.raises(PronkError, match="we close at six"):
            request.raise_error()

    with_worker(engine, use)
