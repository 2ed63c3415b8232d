"""Rows of stored chat completions (`store: true`)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pronk.server.storage.database import Database
from pronk.server.storage.pages import Cursor, Page, owned, select_page
from pronk.server.storage.tables import chat_completions as chats
from pronk.server.storage.tables import chat_metadata

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredChat:
    """`body` is the chat.completion as the client got it, `messages` what it answers, as they came
    in the request."""

    id: str
    owner: str
    created_at: int
    model: str
    metadata: dict[str, str]
    body: Json
    messages: Sequence[Json]


class ChatRows:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def add(self, chat: StoredChat) -> None:
        values = {name: getattr(chat, name) for name in StoredChat.__slots__}
        values |= {"messages": list(chat.messages), "model_digest": _digest(chat.model)}
        with self._db.write() as connection:
            connection.execute(chats.insert().values(**values))
            _index(connection, chat.id, chat.metadata)

    def get(self, owner: str, id: str) -> StoredChat | None:
        with self._db.read() as connection:
            row = connection.execute(_one(owner, id)).one_or_none()
        return None if row is None else _chat(row)

    def list(
        self,
        owner: str,
        cursor: Cursor,
        *,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[StoredChat]:
        """Chats of a model, with all of the given metadata."""
        mine = [chats.c.owner == owner]
        query = sa.select(chats).where(*mine)
        if model is not None:
            query = query.where(chats.c.model_digest == _digest(model))
        for pair in (metadata or {}).items():
            has = sa.select(chat_metadata.c.chat_id).where(
                chat_metadata.c.chat_id == chats.c.id, chat_metadata.c.digest == _digest(pair)
            )
            query = query.where(has.exists())
        with self._db.read() as connection:
            return select_page(connection, query, chats, cursor, mine, _chat)

    def update(self, owner: str, id: str, metadata: dict[str, str]) -> StoredChat | None:
        """Replaces the metadata; None where there is no such chat."""
        with self._db.write() as connection:
            if connection.execute(_one(owner, id).with_for_update()).one_or_none() is None:
                return None
            connection.execute(chats.update().where(chats.c.id == id).values(metadata=metadata))
            connection.execute(chat_metadata.delete().where(chat_metadata.c.chat_id == id))
            _index(connection, id, metadata)
            return _chat(connection.execute(_one(owner, id)).one())

    def delete(self, owner: str, id: str) -> bool:
        """False where there is none."""
        with self._db.write() as connection:
            return connection.execute(chats.delete().where(owned(chats, owner, id))).rowcount > 0


def _one(owner: str, id: str) -> sa.Select[Any]:
    return sa.select(chats).where(owned(chats, owner, id))


def _index(connection: sa.Connection, id: str, metadata: Mapping[str, str]) -> None:
    rows = [{"chat_id": id, "digest": _digest(pair)} for pair in metadata.items()]
    if rows:
        connection.execute(chat_metadata.insert(), rows)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _chat(row: Any) -> StoredChat:
    return StoredChat(**{name: getattr(row, name) for name in StoredChat.__slots__})
