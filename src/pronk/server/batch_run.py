"""One batch from where it stands to its end: check the input, run the lines, write the files.

Every step may be repeated: a line counts when its answer is in the store, and a process that dies
leaves the batch to the next one, which goes on with the lines that are missing.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pronk.server.auth import Caller
from pronk.server.batch_input import Item, check_input, read_input
from pronk.server.batch_output import answered, write_output
from pronk.server.disk import Files
from pronk.server.errors import DATABASE_GONE, api_error_of, openai_error
from pronk.server.storage.batches import LeaseLost, Line, StoredBatch, Tokens

Json = dict[str, Any]
Execute = Callable[[str, Json, Caller], Awaitable[tuple[int, Json]]]
"""(endpoint, body, caller) -> status and body of the answer."""

_OVERLOADED = (429, 503)
_SOME = 64
_LONGEST_WAIT = 30.0
_FILE_GONE = {
    "code": "input_file_missing", "message": "The bytes of the input file are gone.",
    "param": "input_file_id", "line": None,
}  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tools:
    """What all runs share. `slots`: as many lines are in the engine at a time. `caller`: by the
    owner of a batch, or ApiError where nobody may run lines for that owner any more. `wait`:
    seconds before the first retry of a line that was refused for overload; it doubles."""

    files: Files
    execute: Execute
    caller: Callable[[str], Caller]
    slots: asyncio.Semaphore
    max_line_bytes: int
    wait: float
    on_line: Callable[[str], None]
    """Hears of each line that is done, "completed" or "failed"."""


class Run:
    """Runs a batch that this process has claimed."""

    def __init__(self, tools: Tools, batch: StoredBatch) -> None:
        self.batch = batch
        self._tools = tools
        self._rows = tools.files.store.batches
        self._lines: set[asyncio.Task[None]] = set()
        self._waiting: asyncio.Future[Any] | None = None
        self._closed = False
        """No line is started any more."""
        self._paused = False
        self._error: Exception | None = None

    async def run(self) -> None:
        """Until the batch has ended, `pause` was called, or another process has taken it."""
        try:
            path = await asyncio.to_thread(self._path)
            if path is None:
                await self._end(None)
            elif await self._checked(path) and await self._ran(path):
                await self._end(path)
        except LeaseLost as lost:
            log.info("%s", lost)

    def interrupt(self) -> None:
        """Ends the batch with what is finished: it was cancelled or has expired."""
        self._close()
        self.drop_lines()

    def pause(self) -> None:
        """Leaves the batch as it is when the lines in flight are done (or dropped)."""
        self._paused = True
        self._close()

    def drop_lines(self) -> None:
        """Gives up the lines in flight."""
        for task in self._lines:
            task.cancel()

    def _close(self) -> None:
        self._closed = True
        if self._waiting is not None:
            self._waiting.cancel()

    def _path(self) -> Path | None:
        path = self._tools.files.folder / self.batch.input_file_id
        return path if path.is_file() else None

    async def _checked(self, path: Path) -> bool:
        """Checks the input unless that was done; False where it is wrong, and the batch failed."""
        if self.batch.status != "validating":
            return True
        checked = await asyncio.to_thread(
            check_input, path, self.batch.endpoint, self._tools.max_line_bytes
        )
        id = self.batch.id
        if checked.errors:
            await asyncio.to_thread(self._rows.end, id, "failed", None, None, checked.errors)
            return False
        self.batch = await asyncio.to_thread(self._rows.begin, id, checked.total, checked.model)
        return True

    async def _ran(self, path: Path) -> bool:
        """Runs what is not finished; whether the batch may be ended now."""
        while self.batch.status == "in_progress" and not self._closed:
            done = await asyncio.to_thread(self._rows.finished_lines, self.batch.id)
            if len(done) == self.batch.total:
                return True
            await self._run_lines(path, done)
            if self._error is not None:
                raise self._error
        return not self._paused

    async def _run_lines(self, path: Path, done: set[int]) -> None:
        items = read_input(path, self.batch.endpoint, self._tools.max_line_bytes)
        try:
            while not self._closed and (some := await asyncio.to_thread(_take, items)):
                for item in some:
                    if item.line not in done and await self._take_slot():
                        task = asyncio.create_task(self._line(item))
                        self._lines.add(task)
                        task.add_done_callback(self._line_done)
        finally:
            await asyncio.gather(*self._lines, return_exceptions=True)

    def _line_done(self, task: asyncio.Task[None]) -> None:
        self._lines.discard(task)
        self._tools.slots.release()

    async def _take_slot(self) -> bool:
        """Waits until a line may start; False where none may any more."""
        if self._closed:
            return False
        self._waiting = asyncio.ensure_future(self._tools.slots.acquire())
        try:
            await self._waiting
        except asyncio.CancelledError:
            if not self._closed:
                raise
            return False
        finally:
            self._waiting = None
        if self._closed:
            self._tools.slots.release()
        return not self._closed

    async def _line(self, item: Item) -> None:
        try:
            status, body = await self._answer(item)
            await self._store(item, status, body)
        except Exception as error:  # of the store: no line can be finished
            self._error = error
            self.interrupt()

    async def _answer(self, item: Item) -> tuple[int, Json]:
        """The answer to a line. Refused for overload it is tried again, later each time."""
        wait = self._tools.wait
        while True:
            try:
                who = self._tools.caller(self.batch.owner)
                status, body = await self._tools.execute(self.batch.endpoint, item.body, who)
            except Exception as error:
                told = api_error_of(error)
                if told.status == 500:
                    log.exception("line %d of %s failed", item.line, self.batch.id)
                status, body = told.status, openai_error(told)
            if status not in _OVERLOADED:
                return status, body
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)

    async def _store(self, item: Item, status: int, body: Json) -> None:
        """Stores an answer; once begun, whoever cancels the line waits for it."""
        ok = status == 200
        line = Line(item.line, ok, answered(item.custom_id, status, body))
        used = tokens_of(body) if ok else Tokens()

        async def write() -> None:
            await self._insist(partial(self._rows.finish_line, self.batch.id, line, used))
            self._tools.on_line("completed" if ok else "failed")

        writing = asyncio.ensure_future(write())
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            while not writing.done():
                with suppress(asyncio.CancelledError):  # more than once, it may be
                    await asyncio.wait({writing})
            if not writing.cancelled():
                writing.exception()  # the next start finds the line unfinished
            raise

    async def _insist(self, write: Callable[[], None]) -> None:
        """Tries again where the database is out of reach: an answer is dear."""
        wait = 0.1
        while True:
            try:
                return await asyncio.to_thread(write)
            except DATABASE_GONE as error:
                if self._closed:
                    raise
                log.warning("database out of reach (%s); trying again", type(error).__name__)
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    async def _end(self, path: Path | None) -> None:
        """Writes the files and ends the batch; `path` None: its input is gone."""
        batch = await asyncio.to_thread(self._rows.finalize, self.batch.id)
        if path is None:
            ending = "failed"
        elif batch.cancelling_at is not None:
            ending = "cancelled"
        else:
            ending = "completed" if batch.finished == batch.total else "expired"
        await asyncio.to_thread(self._write, batch, ending, path)
        log.info("batch %s: %s, %d of %d", batch.id, ending, batch.finished, batch.total)

    def _write(self, batch: StoredBatch, ending: str, path: Path | None) -> None:
        items: Iterator[Item] = iter(())
        if path is not None and batch.in_progress_at is not None:
            items = read_input(path, batch.endpoint, self._tools.max_line_bytes)
        output, failures = write_output(self._tools.files, batch, ending, items)
        errors = [_FILE_GONE] if path is None else None
        self._rows.end(batch.id, ending, output, failures, errors)


def _take(items: Iterator[Item]) -> list[Item]:
    return list(islice(items, _SOME))


def tokens_of(body: Json) -> Tokens:
    """What an answer says it has used; the APIs name it in two ways."""
    used = body.get("usage")
    if not isinstance(used, dict):
        return Tokens()

    def count(*names: str) -> int:
        return next((int(used[name]) for name in names if used.get(name)), 0)

    details = used.get("prompt_tokens_details") or used.get("input_tokens_details") or {}
    return Tokens(
        input=count("prompt_tokens", "input_tokens"),
        cached=int(details.get("cached_tokens") or 0),
        output=count("completion_tokens", "output_tokens"),
    )
