"""Responses that are made in the background, and what follows stored ones."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import Any

from pronk.core.errors import PronkError
from pronk.server.errors import ApiError, not_found
from pronk.server.response_events import TERMINAL, replay, sse
from pronk.server.response_run import Job, create, drive, fail, save
from pronk.server.service import refuse
from pronk.server.store import LEASE_SECONDS, Store, StoredResponse
from pronk.server.streams import DONE

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})
_LEFT = "the server that worked on this response was stopped"


class Run:
    """A response that is made in the background, and whoever follows it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ended = asyncio.Event()
        self.stopping = False
        """The server stops: it is no cancellation of the client's."""
        self._changed = asyncio.Event()

    def tell(self) -> None:
        """Wakes the followers."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def cancel(self) -> None:
        """Ends it where it is, as soon as the engine's step is done."""
        generation = self.job.generation
        generation.lease.worker.cancel(generation.requests)

    async def follow(self, after: int) -> AsyncGenerator[str, None]:
        """Its events behind number `after`, those to come as they come."""
        told = after + 1
        while True:
            changed, ended = self._changed, self.ended.is_set()
            for data in self.job.draft.events[told:]:
                if data["type"] in _ENDS and not ended:
                    break  # not before it is stored
                yield sse(data)
                told += 1
            if ended:
                break
            await changed.wait()
        yield DONE


class Responses:
    """The background's work. Used in the event loop only."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ends what dead processes left, now and from time to time."""
        await asyncio.to_thread(self._fail_abandoned)
        self._watch = asyncio.create_task(self._watch_abandoned())

    async def stop(self) -> None:
        """Ends what still runs, as failed, and stores it."""
        for run in self._runs.values():
            run.stopping = True
            run.cancel()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Does something whose requester does not wait for it."""
        task = asyncio.create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def running(self, id: str) -> Run | None:
        return self._runs.get(id)

    async def run(self, job: Job) -> Run:
        """Makes a response in the background; ApiError 503 where too much is made there."""
        most = job.call.service.settings.max_queue
        if len(self._runs) >= most:
            job.generation.close()
            raise ApiError(
                503, f"background: {most} responses are made in the background, no more may wait",
                code="overloaded", headers={"Retry-After": "1"},
            )  # fmt: skip
        run = self._runs[job.id] = Run(job)
        try:
            await create(job)
        except BaseException:
            del self._runs[job.id]
            job.generation.close()
            raise
        ticket = job.call.ticket
        end: Callable[[], None] = ticket.share().close if ticket else lambda: None
        self.later(self._attend(run, end))
        return run

    async def _attend(self, run: Run, end: Callable[[], None]) -> None:
        try:
            await self._make(run)
        finally:
            run.job.generation.close()
            del self._runs[run.job.id]
            run.ended.set()
            run.tell()
            end()

    async def _make(self, run: Run) -> None:
        job, shown = run.job, "queued"
        try:
            async for _ in drive(job):
                run.tell()
                if shown != job.draft.body["status"]:
                    shown = job.draft.body["status"]
                    await self._show(job)
            if run.stopping and job.draft.body["status"] == "cancelled":
                raise PronkError(_LEFT)
        except Exception as error:
            fail(job, error)
        await save(job)

    async def _show(self, job: Job) -> None:
        """Stores that a response has left the queue."""
        body = dict(job.draft.body)
        if body["status"] not in TERMINAL:
            update = partial(self._store.responses.update, unless=TERMINAL, running=True)
            owner = job.call.caller.id
            await asyncio.to_thread(update, owner, job.id, status=body["status"], body=body)

    # What is stored.

    async def cancel(self, owner: str, id: str) -> StoredResponse:
        """Ends a response of the background; one that has ended stays as it is. ApiError 404 where
        there is none, 400 where a client waits for it."""
        found = await self.get(owner, id)
        refuse(not found.body["background"], "id", f"{id} does not run in the background")
        if run := self._runs.get(id):
            run.cancel()
            await run.ended.wait()
        elif found.status not in TERMINAL:  # another process makes it
            ended = {**found.body, "status": "cancelled"}
            update = partial(self._store.responses.update, unless=TERMINAL)
            await asyncio.to_thread(update, owner, id, status="cancelled", body=ended)
        return await self.get(owner, id)

    async def delete(self, owner: str, id: str) -> None:
        """With what still runs of it."""
        await self.get(owner, id)
        if run := self._runs.get(id):
            run.cancel()
            await run.ended.wait()
        if not await asyncio.to_thread(self._store.responses.delete, owner, id):
            raise not_found("response", id)

    async def get(self, owner: str, id: str) -> StoredResponse:
        found = await asyncio.to_thread(self._store.responses.get, owner, id)
        if found is None:
            raise not_found("response", id)
        return found

    async def follow(self, found: StoredResponse, after: int) -> AsyncGenerator[str, None]:
        """The events of a stored response behind number `after`. Those of one that is not made in
        the background of this process come when it has ended."""
        if run := self._runs.get(found.id):
            async for text in run.follow(after):
                yield text
            return
        while found.status not in TERMINAL:
            await asyncio.sleep(_POLL_SECONDS)
            found = await self.get(found.owner, found.id)
        state = found.state or {"cuts": [], "ran": False}
        for data in replay(found.body, state["cuts"], state["ran"])[after + 1 :]:
            yield sse(data)
        yield DONE

    # What dead processes left.

    async def _watch_abandoned(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS)
            try:
                await asyncio.to_thread(self._fail_abandoned)
            except Exception:  # the database may come back
                log.exception("abandoned responses wait: the database cannot be used")

    def _fail_abandoned(self) -> None:
        error = {"code": "server_error", "message": _LEFT}
        for row in self._store.responses.abandoned():
            body = {**row.body, "status": "failed", "error": error}
            self._store.responses.update(
                row.owner, row.id, status="failed", body=body, unless=TERMINAL
            )


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("a response could not be ended")
