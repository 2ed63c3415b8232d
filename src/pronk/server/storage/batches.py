"""Rows of batches and of their finished lines (server/batches.py runs them).

A batch is run by one process at a time, its `runner`. Every change that a runner makes asks in the
same transaction whether it still is; LeaseLost where another took over, and then nothing changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pronk.core.errors import PronkError, UserError
from pronk.server.errors import ApiError
from pronk.server.schema import new_id
from pronk.server.storage.database import Database
from pronk.server.storage.files import FINAL, StoredFile, insert_file
from pronk.server.storage.pages import Cursor, Page, owned, select_page
from pronk.server.storage.tables import batch_lines, batches, files

Json = dict[str, Any]


class LeaseLost(PronkError):
    """Another process runs the batch, or it has ended."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What answers have used."""

    input: int = 0
    cached: int = 0
    """Of `input`."""
    output: int = 0


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch; times are Unix seconds."""

    id: str
    owner: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    expires_at: int
    status: str = "validating"
    metadata: dict[str, str] | None = None
    output_expires_after: int | None = None
    errors: Sequence[Json] | None = None
    model: str | None = None
    output_file_id: str | None = None
    """Reserved from the moment on when the batch is finalized; the file is there at its end."""
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def finished(self) -> int:
        """Lines that have an answer."""
        return self.completed + self.failed


@dataclass(frozen=True, slots=True)
class Line:
    """A finished line: its number in the input file from 1 on, whether the answer was 200, and the
    object that the output file or the error file holds of it."""

    line: int
    ok: bool
    output: Json


class BatchRows:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # What clients do.

    def create(self, batch: StoredBatch) -> None:
        """UserError where its input is no file for batches."""
        id = batch.input_file_id
        fresh = sa.or_(files.c.expires_at.is_(None), files.c.expires_at > self._db.now())
        with self._db.write() as connection:
            query = sa.select(files.c.purpose).where(owned(files, batch.owner, id), fresh)
            purpose = connection.execute(query.with_for_update()).scalar_one_or_none()
            if purpose is None:
                raise UserError(f"input_file_id: no file {id!r:.100}")
            if purpose != "batch":
                raise UserError(
                    f"input_file_id: {id} has the purpose {purpose!r}; upload it with 'batch'"
                )
            values = {name: getattr(batch, name) for name in StoredBatch.__slots__}
            connection.execute(batches.insert().values(**values))

    def get(self, owner: str, id: str) -> StoredBatch | None:
        with self._db.read() as connection:
            row = connection.execute(_one(owner, id)).one_or_none()
        return None if row is None else _batch(row)

    def list(self, owner: str, cursor: Cursor) -> Page[StoredBatch]:
        mine = [batches.c.owner == owner]
        query = sa.select(batches).where(*mine)
        with self._db.read() as connection:
            return select_page(connection, query, batches, cursor, mine, _batch)

    def cancel(self, owner: str, id: str) -> StoredBatch | None:
        """Asks for an end; 409 where it has ended in another way, None where there is no such
        batch."""
        with self._db.write() as connection:
            row = connection.execute(_one(owner, id).with_for_update()).one_or_none()
            if row is None:
                return None
            if row.status in ("validating", "in_progress"):
                change = {"status": "cancelling", "cancelling_at": self._db.now()}
                connection.execute(batches.update().where(batches.c.id == id).values(**change))
                row = connection.execute(_one(owner, id)).one()
            elif row.status not in ("cancelling", "cancelled"):
                raise ApiError(
                    409, f"batch {id} is {row.status}; only one that still runs can be cancelled"
                )
            return _batch(row)

    # What the runner does.

    def claim(self, most: int) -> Sequence[StoredBatch]:
        """Takes up to `most` batches, oldest first, that nobody runs who lives."""
        free = sa.or_(batches.c.runner.is_(None), self._db.is_dead(batches.c.runner))
        query = sa.select(batches).where(batches.c.status.not_in(FINAL), free)
        query = query.order_by(batches.c.seq).limit(most).with_for_update(skip_locked=True)
        with self._db.write() as connection:
            rows = connection.execute(query).all()
            # Asked again: its runner may have begun to live after the query above began.
            living = set(connection.execute(self._db.living()).scalars())
            mine = [row for row in rows if row.runner is None or row.runner not in living]
            connection.execute(
                batches.update()
                .where(batches.c.id.in_([row.id for row in mine]))
                .values(runner=self._db.instance)
            )
            return [_batch(row) for row in mine]

    def running(self) -> Mapping[str, str]:
        """The state of every batch that this process runs, by id."""
        query = sa.select(batches.c.id, batches.c.status).where(self._mine())
        with self._db.read() as connection:
            return {row.id: row.status for row in connection.execute(query)}

    def release(self, id: str | None = None) -> None:
        """Leaves a batch, or all that this process runs, to whoever wants them."""
        mine = self._mine() if id is None else sa.and_(self._mine(), batches.c.id == id)
        with self._db.write() as connection:
            connection.execute(batches.update().where(mine).values(runner=None))

    def begin(self, id: str, total: int, model: str | None) -> StoredBatch:
        """The input is right: lines may run. One that is being cancelled stays so."""
        with self._db.write() as connection:
            batch = self._lock(connection, id)
            change: Json = {"total": total, "model": model}
            if batch.status == "validating":
                change |= {"status": "in_progress", "in_progress_at": self._db.now()}
            return self._change(connection, id, change)

    def finish_line(self, id: str, line: Line, used: Tokens) -> None:
        """Stores the answer of a line. A second one for the same line changes nothing."""
        insert = self._db.insert(batch_lines).values(
            batch_id=id, line=line.line, ok=line.ok, output=line.output
        )
        counter = batches.c.completed if line.ok else batches.c.failed
        more = {
            counter: counter + 1,
            batches.c.input_tokens: batches.c.input_tokens + used.input,
            batches.c.cached_tokens: batches.c.cached_tokens + used.cached,
            batches.c.output_tokens: batches.c.output_tokens + used.output,
        }
        added = insert.on_conflict_do_nothing().returning(batch_lines.c.line)
        open_still = sa.and_(batches.c.id == id, self._mine(), batches.c.finalizing_at.is_(None))
        with self._db.write() as connection:
            if connection.execute(added).one_or_none() is None:
                return
            if connection.execute(batches.update().where(open_still).values(more)).rowcount == 0:
                raise LeaseLost(f"batch {id}: line {line.line} came too late")

    def finished_lines(self, id: str) -> set[int]:
        """Numbers of the lines that have an answer."""
        query = sa.select(batch_lines.c.line).where(batch_lines.c.batch_id == id)
        with self._db.read() as connection:
            return set(connection.execute(query).scalars())

    def lines(self, id: str, *, after: int, most: int) -> Sequence[Line]:
        """Finished lines behind the line `after`, in order."""
        query = sa.select(batch_lines).where(
            batch_lines.c.batch_id == id, batch_lines.c.line > after
        )
        with self._db.read() as connection:
            rows = connection.execute(query.order_by(batch_lines.c.line).limit(most)).all()
        return [Line(row.line, row.ok, row.output) for row in rows]

    def finalize(self, id: str) -> StoredBatch:
        """No further line counts. Reserves the ids of the output files, once."""
        with self._db.write() as connection:
            batch = self._lock(connection, id)
            if batch.finalizing_at is not None:
                return batch
            change: Json = {"finalizing_at": self._db.now()}
            if batch.status != "cancelling":
                change["status"] = "finalizing"
            change["output_file_id"] = new_id("file-")
            change["error_file_id"] = new_id("file-")
            return self._change(connection, id, change)

    def end(
        self,
        id: str,
        status: str,
        output: StoredFile | None,
        failures: StoredFile | None,
        errors: Sequence[Json] | None = None,
    ) -> None:
        """Ends a finalized batch. Its files, whose bytes are there, become known with it. `errors`:
        why it failed."""
        change: Json = {"status": status, f"{status}_at": self._db.now(), "runner": None}
        change["output_file_id"] = None if output is None else output.id
        change["error_file_id"] = None if failures is None else failures.id
        change["errors"] = None if errors is None else list(errors)
        with self._db.write() as connection:
            self._lock(connection, id)
            for file in filter(None, (output, failures)):
                insert_file(connection, file)
            connection.execute(batch_lines.delete().where(batch_lines.c.batch_id == id))
            self._change(connection, id, change)

    def _mine(self) -> sa.ColumnElement[bool]:
        return sa.and_(batches.c.runner == self._db.instance, batches.c.status.not_in(FINAL))

    def _lock(self, connection: sa.Connection, id: str) -> StoredBatch:
        query = sa.select(batches).where(batches.c.id == id, self._mine()).with_for_update()
        row = connection.execute(query).one_or_none()
        if row is None:
            raise LeaseLost(f"batch {id}: another server runs it")
        return _batch(row)

    def _change(self, connection: sa.Connection, id: str, values: Json) -> StoredBatch:
        connection.execute(batches.update().where(batches.c.id == id).values(**values))
        return _batch(connection.execute(sa.select(batches).where(batches.c.id == id)).one())


def _one(owner: str, id: str) -> sa.Select[Any]:
    return sa.select(batches).where(owned(batches, owner, id))


def _batch(row: Any) -> StoredBatch:
    return StoredBatch(**{name: getattr(row, name) for name in StoredBatch.__slots__})
