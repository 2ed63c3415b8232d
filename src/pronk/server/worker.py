"""The thread that steps one engine. Everybody else hands it requests and is woken when they have
moved on; what a request has become is read from the request itself, whose lists only grow."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

from pronk.core.errors import PronkError
from pronk.engine.engine import Engine, Event
from pronk.engine.request import Request

log = logging.getLogger(__name__)

_MOST_FAILURES = 3
"""Steps that raise one after another; then all requests end with what was raised."""

Wake = Callable[[], None]


class Worker:
    """Made in the event loop that its users run in; any thread may call it."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], Sequence[Event]]] = queue.SimpleQueue()
        self._wakes: dict[Request, Wake] = {}
        self._stopped: Exception | None = None
        self._closing = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], wake: Wake) -> None:
        """Queues requests. `wake` is called in the event loop whenever one of them has moved on;
        one that is refused has ended with its error by then."""

        def add() -> Sequence[Event]:
            return [event for r in requests if (event := self._add(r, wake))]

        self._inbox.put(add)

    def cancel(self, requests: Sequence[Request]) -> None:
        """Ends requests where they stand, as soon as the step that runs is done."""

        for request in requests:
            self._inbox.put(partial(self._abort, request))

    def stop(self, error: Exception) -> None:
        """Ends all requests with `error`, and those that come later."""

        def end() -> Sequence[Event]:
            self._stopped = error
            return self.engine.fail_all(error)

        self._inbox.put(end)

    def close(self) -> None:
        """Ends all requests and the thread; waits for the step that runs."""

        def end() -> Sequence[Event]:
            self._closing = True
            return ()

        self.stop(PronkError("the server is stopping"))
        self._inbox.put(end)
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            events: list[Event] = []
            try:
                events += self._handed(wait=not self.engine.has_work)
                if not self._closing and self.engine.has_work:
                    events += self._step()
            except Exception:  # without this thread all answers would hang
                log.exception("an engine failed between its steps")
                events += self._missed()
            self._tell(events)

    def _handed(self, wait: bool) -> list[Event]:
        """Does what was handed over since the last step; without other work, waits for it."""
        events: list[Event] = []
        while not self._closing:
            try:
                work = self._inbox.get(block=wait)
            except queue.Empty:
                break
            events += work()
            wait = False
        return events

    def _add(self, request: Request, wake: Wake) -> Event | None:
        self._wakes[request] = wake
        try:
            if self._stopped is not None:
                raise self._stopped
            self.engine.add(request)
        except Exception as error:
            request.end("error", error)
            return Event(request, (), "", "error")
        return None

    def _abort(self, request: Request) -> Sequence[Event]:
        return [Event(request, (), "", "abort")] if self.engine.abort(request) else []

    def _missed(self) -> list[Event]:
        """Of requests whose end was lost with the step, or whatever it was, that failed: others of
        the step may have ended before."""
        return [Event(r, (), "", r.finish_reason) for r in self._wakes if r.finished]

    def _step(self) -> Sequence[Event]:
        try:
            events = self.engine.step()
            self._failures = 0
            return events
        except Exception as error:
            self._failures += 1
            log.exception("a step failed")
            missed = self._missed()
            if self._failures < _MOST_FAILURES:
                return missed
            self._failures = 0
            failure = PronkError(f"the engine failed: {type(error).__name__}")
            return [*missed, *self.engine.fail_all(failure)]

    def _tell(self, events: Sequence[Event]) -> None:
        wakes = dict.fromkeys(self._wakes[e.request] for e in events if e.request in self._wakes)
        for event in events:
            if event.finish_reason is not None:
                self._wakes.pop(event.request, None)
        if not wakes:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(_call_all, tuple(wakes))


def _call_all(wakes: Sequence[Wake]) -> None:
    for wake in wakes:
        wake()
