"""Runs batches beside the live requests: which of them, and who of several processes.

A loop of the server's event loop, once a second: say that this process lives, take batches that
nobody runs, see to those that were cancelled or have expired, remove expired files.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from pronk.server.auth import ANONYMOUS, CONTROL_NAME, Caller
from pronk.server.batch_run import Execute, Run, Tools
from pronk.server.disk import Files
from pronk.server.errors import ApiError
from pronk.server.keys import SCOPES, Keys
from pronk.server.storage.batches import StoredBatch
from pronk.server.store import LEASE_SECONDS, Store

_MOST_RUNS = 8
"""Batches that one process runs at a time: a long one does not keep short ones waiting."""
_BEAT_SECONDS = LEASE_SECONDS / 4
_PURGE_SECONDS = 60.0
_RETRY_SECONDS = 5.0

log = logging.getLogger(__name__)


class Batches:
    """`concurrency`: lines that are in the engine at a time, of all batches together. `keys`: those
    of the server, None where it needs none. `poll`: seconds between looks at the database.
    `on_line` hears of each line that is done, "completed" or "failed"."""

    def __init__(
        self,
        store: Store,
        files: Files,
        execute: Execute,
        *,
        concurrency: int,
        keys: Keys | None,
        max_line_bytes: int = 64 << 20,
        poll: float = 1.0,
        overload_wait: float = 0.5,
        on_line: Callable[[str], None] = lambda status: None,
    ) -> None:
        self.store = store
        self._files = files
        self._poll = poll
        self._tools = Tools(
            files=files,
            execute=execute,
            caller=lambda owner: caller_of(keys, owner, store.database.now()),
            slots=asyncio.Semaphore(concurrency),
            max_line_bytes=max_line_bytes,
            wait=overload_wait,
            on_line=on_line,
        )
        self._runs: dict[str, tuple[Run, asyncio.Task[None]]] = {}
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Cleans up behind a process that died, and goes on with its batches."""
        await asyncio.to_thread(self._files.tidy)
        self._loop = asyncio.create_task(self._look_after())

    async def stop(self, grace: float = 0.0) -> None:
        """Starts no further line, waits `grace` seconds for those in flight and drops the rest. The
        batches go on where the next server starts, or another one runs."""
        self._stopping.set()
        self._wake.set()
        if self._loop is not None:
            await self._loop
        tasks = {task for _, task in self._runs.values()}
        for run, _ in self._runs.values():
            run.pause()
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
        for run, _ in self._runs.values():
            run.drop_lines()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._leave)

    def wake(self) -> None:
        """Looks at the database now: there is something new."""
        self._wake.set()

    def _leave(self) -> None:
        self.store.batches.release()
        self.store.database.leave()

    async def _look_after(self) -> None:
        clock = asyncio.get_running_loop().time
        beat = purge = clock()
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if clock() >= beat:
                    await asyncio.to_thread(self.store.database.beat)
                    beat = clock() + _BEAT_SECONDS
                if clock() >= purge:
                    await asyncio.to_thread(self._files.purge)
                    purge = clock() + _PURGE_SECONDS
                await self._look()
            except Exception:  # the database may come back
                log.exception("batches wait: the database cannot be used")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._poll)

    async def _look(self) -> None:
        """One look at all batches."""
        states = await asyncio.to_thread(self.store.batches.running)
        now = self.store.database.now()
        for id, (run, _) in list(self._runs.items()):
            if id not in states:  # ended, or taken over by another process
                run.pause()
                run.drop_lines()
            elif states[id] == "cancelling" or now >= run.batch.expires_at:
                run.interrupt()
        for id in states.keys() - self._runs.keys():  # a run failed, and could not say so
            await asyncio.to_thread(self.store.batches.release, id)
        room = _MOST_RUNS - len(self._runs)
        if room > 0 and not self._stopping.is_set():
            for batch in await asyncio.to_thread(self.store.batches.claim, room):
                self._start(batch)

    def _start(self, batch: StoredBatch) -> None:
        run = Run(self._tools, batch)
        if self.store.database.now() >= batch.expires_at:
            run.interrupt()
        self._runs[batch.id] = run, asyncio.create_task(self._attend(run))

    async def _attend(self, run: Run) -> None:
        try:
            await run.run()
        except Exception:
            log.exception("batch %s failed to run; trying again", run.batch.id)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _RETRY_SECONDS)
        finally:
            del self._runs[run.batch.id]
            self._wake.set()


def caller_of(keys: Keys | None, owner: str, now: float) -> Caller:
    """Who the lines of an owner's batches run as: its key as it is now. ApiError 401 where there is
    none any more, 403 where it may not generate."""
    if keys is None and owner == ANONYMOUS.id:
        return ANONYMOUS
    if keys is not None and owner == CONTROL_NAME:
        return Caller(CONTROL_NAME, CONTROL_NAME, SCOPES)
    for key in keys.all if keys is not None else ():
        if key.id == owner and not key.expired(now):
            return check_generates(Caller(key.id, key.name, key.scopes, key.models, key))
    raise ApiError(401, "the key that made this batch is gone", code="invalid_api_key")


def check_generates(who: Caller) -> Caller:
    """Batches generate: 403 for a caller who may not."""
    if "inference" not in who.scopes:
        raise ApiError(
            403, f"the key {who.name!r} lacks the scope 'inference', which batches need",
            code="missing_scope",
        )  # fmt: skip
    return who
