"""Rows of conversations and their items (/v1/conversations)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pronk.core.errors import UserError
from pronk.server.errors import not_found
from pronk.server.storage.database import Database
from pronk.server.storage.pages import Cursor, Page, is_id, owned, select_page
from pronk.server.storage.tables import conversation_items as items_table
from pronk.server.storage.tables import conversations

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredConversation:
    id: str
    owner: str
    created_at: int
    metadata: dict[str, str]


class ConversationRows:
    """Every method is one transaction. Items are objects with an "id", unique in a conversation,
    and stay in the order in which they were added."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, conversation: StoredConversation, items: Sequence[Json] = ()) -> None:
        values = {name: getattr(conversation, name) for name in StoredConversation.__slots__}
        with self._db.write() as connection:
            connection.execute(conversations.insert().values(**values))
            if items:
                append_items(connection, conversation.owner, conversation.id, items, self._db.now())

    def get(self, owner: str, id: str) -> StoredConversation | None:
        with self._db.read() as connection:
            query = sa.select(conversations).where(owned(conversations, owner, id))
            row = connection.execute(query).one_or_none()
        return None if row is None else _conversation(row)

    def update(self, owner: str, id: str, metadata: dict[str, str]) -> bool:
        """Replaces the metadata; False where there is no such conversation."""
        change = conversations.update().where(owned(conversations, owner, id))
        with self._db.write() as connection:
            return connection.execute(change.values(metadata=metadata)).rowcount > 0

    def delete(self, owner: str, id: str) -> bool:
        """With its items; False where there is none."""
        with self._db.write() as connection:
            change = conversations.delete().where(owned(conversations, owner, id))
            return connection.execute(change).rowcount > 0

    def list(self, owner: str, cursor: Cursor) -> Page[StoredConversation]:
        mine = [conversations.c.owner == owner]
        query = sa.select(conversations).where(*mine)
        with self._db.read() as connection:
            return select_page(connection, query, conversations, cursor, mine, _conversation)

    def add_items(self, owner: str, id: str, items: Sequence[Json]) -> None:
        """Appends items, all or none: ApiError 404 where there is no such conversation, UserError
        where it has an item of that id."""
        with self._db.write() as connection:
            append_items(connection, owner, id, items, self._db.now())

    def list_items(self, owner: str, id: str, cursor: Cursor) -> Page[Json] | None:
        """None where there is no such conversation."""
        with self._db.read() as connection:
            if not _exists(connection, owner, id):
                return None
            here = [items_table.c.conversation_id == id]
            query = sa.select(items_table.c.body).where(*here)
            return select_page(connection, query, items_table, cursor, here, lambda row: row.body)

    def all_items(self, owner: str, id: str) -> Sequence[Json] | None:
        """All items, oldest first; None where there is no such conversation."""
        with self._db.read() as connection:
            if not _exists(connection, owner, id):
                return None
            query = sa.select(items_table.c.body).where(items_table.c.conversation_id == id)
            return connection.execute(query.order_by(items_table.c.seq)).scalars().all()

    def get_item(self, owner: str, id: str, item: str) -> Json | None:
        if not is_id(item):
            return None
        with self._db.read() as connection:
            query = (
                sa.select(items_table.c.body)
                .join(conversations, conversations.c.id == items_table.c.conversation_id)
                .where(owned(conversations, owner, id), items_table.c.id == item)
            )
            return connection.execute(query).scalar_one_or_none()

    def delete_item(self, owner: str, id: str, item: str) -> bool:
        """False where there is no such item."""
        if not is_id(item):
            return False
        with self._db.write() as connection:
            if not _exists(connection, owner, id):
                return False
            place = (items_table.c.conversation_id == id, items_table.c.id == item)
            return connection.execute(items_table.delete().where(*place)).rowcount > 0


def append_items(
    connection: sa.Connection, owner: str, id: str, items: Sequence[Json], now: int
) -> None:
    """Appends in somebody else's transaction; see `ConversationRows.add_items`."""
    if not _exists(connection, owner, id, lock=True):
        raise not_found("conversation", id)
    ids = [item["id"] for item in items]
    odd = next((item for item in ids if not is_id(item)), None)
    if odd is not None:
        raise UserError(f"items: the id {odd!r:.100} is not 1 to 80 letters, digits or any of _.:-")
    here = (items_table.c.conversation_id == id, items_table.c.id.in_(ids))
    taken = connection.execute(sa.select(items_table.c.id).where(*here)).scalars().first()
    if taken is None and len(set(ids)) < len(ids):
        taken = next(item for item in ids if ids.count(item) > 1)
    if taken is not None:
        raise UserError(f"items: the id {taken!r} is there twice")
    for item in items:  # one by one: `seq` must follow their order
        values = {"conversation_id": id, "id": item["id"], "created_at": now, "body": item}
        connection.execute(items_table.insert().values(**values))


def _exists(connection: sa.Connection, owner: str, id: str, *, lock: bool = False) -> bool:
    query = sa.select(conversations.c.id).where(owned(conversations, owner, id))
    return connection.execute(query.with_for_update() if lock else query).first() is not None


def _conversation(row: Any) -> StoredConversation:
    return StoredConversation(**{name: getattr(row, name) for name in StoredConversation.__slots__})
