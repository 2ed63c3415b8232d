"""Rows of files. Their bytes are on disk (server/files.py)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pronk.server.errors import ApiError
from pronk.server.storage.database import Database
from pronk.server.storage.pages import Cursor, Page, owned, select_page
from pronk.server.storage.tables import batches, files

FINAL = ("completed", "failed", "cancelled", "expired")
"""States of a batch that never change again."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file; times are Unix seconds."""

    id: str
    owner: str
    created_at: int
    expires_at: int | None
    purpose: str
    bytes: int
    filename: str


class FileRows:
    """Expired files are not there any more, whether `purge` has been at them or not."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def add(self, file: StoredFile) -> None:
        with self._db.write() as connection:
            connection.execute(files.insert().values(**_values(file)))

    def get(self, owner: str, id: str) -> StoredFile | None:
        with self._db.read() as connection:
            query = sa.select(files).where(owned(files, owner, id), self._fresh())
            row = connection.execute(query).one_or_none()
        return None if row is None else _file(row)

    def list(self, owner: str, cursor: Cursor, *, purpose: str | None = None) -> Page[StoredFile]:
        mine = [files.c.owner == owner, self._fresh()]
        query = sa.select(files).where(*mine)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._db.read() as connection:
            return select_page(connection, query, files, cursor, mine, _file)

    def delete(self, owner: str, id: str) -> bool:
        """False where there is no such file; 409 where a batch still reads it."""
        with self._db.write() as connection:
            query = sa.select(files.c.id).where(owned(files, owner, id), self._fresh())
            if connection.execute(query.with_for_update()).one_or_none() is None:
                return False
            if (batch := connection.execute(_reader(id)).scalar()) is not None:
                raise ApiError(
                    409,
                    f"file {id} is the input of {batch}, which has not ended; cancel that first",
                    param="id",
                    code="file_in_use",
                )
            connection.execute(files.delete().where(files.c.id == id))
            return True

    def purge(self) -> Sequence[str]:
        """Forgets expired files that no batch reads any more; returns their ids."""
        old = sa.and_(files.c.expires_at <= self._db.now(), ~_reader(files.c.id).exists())
        with self._db.write() as connection:
            query = sa.select(files.c.id).where(old).with_for_update(skip_locked=True)
            ids = connection.execute(query).scalars().all()
            connection.execute(files.delete().where(files.c.id.in_(ids)))
            return ids

    def unknown(self, ids: Collection[str]) -> set[str]:
        """Those of `ids` that are no file's. At most some hundred at a time."""
        with self._db.read() as connection:
            query = sa.select(files.c.id).where(files.c.id.in_(ids))
            return set(ids) - set(connection.execute(query).scalars())

    def _fresh(self) -> sa.ColumnElement[bool]:
        return sa.or_(files.c.expires_at.is_(None), files.c.expires_at > self._db.now())


def insert_file(connection: sa.Connection, file: StoredFile) -> None:
    """Adds a file in somebody else's transaction."""
    connection.execute(files.insert().values(**_values(file)))


def _reader(id: object) -> sa.Select[tuple[str]]:
    """Batches that still need a file."""
    return sa.select(batches.c.id).where(
        batches.c.input_file_id == id, batches.c.status.not_in(FINAL)
    )


def _values(file: StoredFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in StoredFile.__slots__}


def _file(row: Any) -> StoredFile:
    return StoredFile(**{name: getattr(row, name) for name in StoredFile.__slots__})
