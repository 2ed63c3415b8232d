"""The connection to the database: SQLite unless told otherwise, PostgreSQL by URL.

Reads and writes are transactions, `with database.read() as connection`. SQLite has one writer at a
time: a write begins as one (BEGIN IMMEDIATE), so what it has read cannot change before it ends. On
PostgreSQL the methods lock the rows that they decide by.

One SQLite database belongs to one server process, which holds a lock on it; further processes share
a PostgreSQL, and tell each other by `instances` that they live.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.dialects import postgresql, sqlite

from pronk.core.errors import UserError
from pronk.server.schema import new_id
from pronk.server.storage.tables import instances, migrate

FILE_NAME = "pronk.db"
LEASE_SECONDS = 60.0
"""An instance that was not heard of for so long is dead, and others take over what it ran."""
_BUSY_MS = 30_000
_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}
"""Parameters of libpq: a server that vanished is noticed within half a minute, not half an hour."""
_MIGRATION_LOCK = 0x70726F6E6B  # "pronk"


class Database:
    """`url`: an SQLAlchemy URL, None for SQLite in `data_dir`. `clock`: Unix time in seconds."""

    def __init__(
        self, data_dir: Path, url: str | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.clock = clock
        self.instance = new_id("inst_")
        try:
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"--data-dir: {data_dir} is no folder: {error.strerror}") from None
        parsed = _parse(url) if url else sa.URL.create("sqlite", database=_make(data_dir))
        self.exclusive = parsed.get_backend_name() == "sqlite"
        """No other process uses this database."""
        self._lock = (
            FileLock(f"{parsed.database}.lock", mode=0o600, thread_local=False)
            if self.exclusive
            else None
        )
        if self._lock is not None:
            _hold(self._lock, parsed.database)
        self._writing = threading.Lock() if self.exclusive else None
        self.engine = _connect(parsed)
        try:
            with self.write() as connection:
                self._migrate(connection)
        except BaseException as error:
            self.close()
            if isinstance(error, sa.exc.DatabaseError):
                where = parsed.render_as_string(hide_password=True)
                raise UserError(f"database: {where}: {str(error.orig).strip()}") from None
            raise

    def _migrate(self, connection: sa.Connection) -> None:
        if not self.exclusive:  # two processes start at once
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        migrate(connection)
        if self.exclusive:
            connection.execute(instances.delete())
        self._beat(connection)

    def close(self) -> None:
        """Gives everything back. What still runs in other threads fails."""
        self.engine.dispose()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the database."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that changes something; it is durable once the block has been left."""
        with self._writing or nullcontext(), self.engine.connect() as connection:
            connection.execution_options(pronk_write=True)
            with connection.begin():
                yield connection

    def now(self) -> int:
        """Unix time in seconds."""
        return int(self.clock())

    def insert(self, table: sa.Table) -> "sqlite.Insert | postgresql.Insert":
        """An insert that can say what to do where the key is taken (`on_conflict_...`)."""
        return sqlite.insert(table) if self.exclusive else postgresql.insert(table)

    # Which processes live.

    def beat(self) -> None:
        """Says that this process lives. At least every LEASE_SECONDS / 3."""
        with self.write() as connection:
            self._beat(connection)

    def _beat(self, connection: sa.Connection) -> None:
        new = {"seen_at": self.clock()}
        insert = self.insert(instances).values(id=self.instance, **new)
        connection.execute(insert.on_conflict_do_update(index_elements=["id"], set_=new))
        stale = instances.c.seen_at < self.clock() - 10 * LEASE_SECONDS
        connection.execute(instances.delete().where(stale))

    def leave(self) -> None:
        """Says that this process runs nothing any more."""
        with self.write() as connection:
            connection.execute(instances.delete().where(instances.c.id == self.instance))

    def living(self) -> sa.Select[tuple[str]]:
        """Query of the ids of living processes."""
        alive = instances.c.seen_at > self.clock() - LEASE_SECONDS
        return sa.select(instances.c.id).where(alive)

    def is_dead(self, runner: sa.Column[str]) -> sa.ColumnElement[bool]:
        """The condition that a runner is a process that is dead. This one is not, even where it
        slept for long and could not say so."""
        return sa.and_(runner != self.instance, runner.not_in(self.living()))


def _parse(url: str) -> sa.URL:
    kinds = "sqlite:///FILE and postgresql://USER:PASSWORD@HOST/NAME work"
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise UserError(f"database: not a URL; {kinds}") from None  # may hold a password
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
        assert parsed.database is not None
        return parsed.set(database=_make(Path(parsed.database)))
    if parsed.drivername != "postgresql+psycopg":
        raise UserError(f"database: {parsed.render_as_string()!r} is not supported; {kinds}")
    return parsed


def _make(path: Path) -> str:
    """Creates a database file that nobody else can read, and the files beside it with it."""
    if path.is_dir():
        path = path / FILE_NAME
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise UserError(f"database: {path}: {error.strerror}") from None
    return str(path)


def _hold(lock: FileLock, path: str | None) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"database: {path} is used by another server; give this one a data folder of its own,"
            " or both a PostgreSQL"
        ) from None


def _connect(url: sa.URL) -> sa.Engine:
    # prompts are parameters, and errors get into logs
    options: dict[str, Any] = {"pool_size": 8, "max_overflow": 24, "hide_parameters": True}
    if url.get_backend_name() != "sqlite":
        ours = {name: value for name, value in _PATIENCE.items() if name not in url.query}
        options |= {"pool_pre_ping": True, "connect_args": ours}
    try:
        engine = sa.create_engine(
            url, json_serializer=partial(json.dumps, allow_nan=False), **options
        )
    except ModuleNotFoundError:
        raise UserError(
            "database: PostgreSQL needs the package psycopg; `pip install 'pronk[postgres]'`"
        ) from None
    if url.get_backend_name() == "sqlite":
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, not at the first write
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",  # what a client was told is stored survives a power cut
        f"busy_timeout={_BUSY_MS}",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("pronk_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
