"""Databases that are locked, full, broken or gone."""

import logging
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from pronk.core.errors import UserError
from pronk.server.errors import api_error_of
from pronk.server.logs import _Lines
from pronk.server.storage import database
from pronk.server.storage.database import FILE_NAME, Database
from pronk.server.store import Store, StoredConversation

SECRET = "what somebody asked"


def write(store: Store) -> None:
    store.conversations.create(StoredConversation("conv_1", "", 1, {"a": SECRET}), [])


def test_a_locked_database_is_no_fault_of_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_MS", 10)
    store = Store(tmp_path)
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sa.exc.OperationalError) as caught:
            write(store)
        other.execute("ROLLBACK")
        write(store)
    finally:
        other.close()
        store.close()
    told = api_error_of(caught.value)
    assert (told.status, told.code, told.headers) == (
        503, "database_unavailable", {"Retry-After": "5"},
    )  # fmt: skip


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "x.db")
    try:
        connection.execute("PRAGMA max_page_count = 2")
        connection.execute("CREATE TABLE t (a)")
        with pytest.raises(sqlite3.OperationalError) as caught:
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    finally:
        connection.close()
    error = sa.exc.OperationalError("INSERT", None, caught.value)
    assert api_error_of(error).status == 507


def test_a_broken_database_is_named_at_the_start(tmp_path: Path) -> None:
    Store(tmp_path).close()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:100] + b"\xa5" * 8000)
    with pytest.raises(UserError, match=r"^database: sqlite:.*pronk\.db: .*malformed"):
        Store(tmp_path)
    path.write_text("no database at all" * 100)
    with pytest.raises(UserError, match=r"^database: sqlite:.*pronk\.db: .*not a database"):
        Store(tmp_path)


def test_a_data_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match=r"^--data-dir: .*file"):
            Store(path)


def test_errors_do_not_quote_what_was_to_be_stored(tmp_path: Path) -> None:
    """Whoever logs one with its text would log a prompt."""
    store = Store(tmp_path)
    write(store)
    try:
        with pytest.raises(sa.exc.IntegrityError) as caught:
            write(store)
    finally:
        store.close()
    assert SECRET not in str(caught.value)
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed", (), None)
    record.exc_info = (type(caught.value), caught.value, None)
    assert SECRET not in _Lines().format(record)


@pytest.mark.parametrize("options", ["", "?connect_timeout=3&tcp_user_timeout=7000"])
def test_a_server_that_vanishes_is_noticed(tmp_path: Path, postgres: str, options: str) -> None:
    """By the system's network; what the URL says counts."""
    base = Database(tmp_path, postgres + options)
    try:
        with base.read() as connection:
            raw = connection.connection.driver_connection
            assert raw is not None
            used = raw.info.get_parameters()
    finally:
        base.close()
    assert used["keepalives_idle"] == "15"
    assert used["connect_timeout"] == ("3" if options else "10")
    assert used["tcp_user_timeout"] == ("7000" if options else "30000")
