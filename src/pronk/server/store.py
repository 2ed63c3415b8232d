"""Everything that outlives the process, except the bytes of files: SQLite by default, PostgreSQL
by URL.

    store = Store(settings.data_dir, settings.database)
    ...
    store.close()

    store.files          FileRows          add get list delete purge
    store.batches        BatchRows         create get list cancel, and what runs them (batches.py)
    store.responses      ResponseRows      create get update delete list input_items chain abandoned
    store.conversations  ConversationRows  create get update delete list
                                           add_items list_items all_items get_item delete_item
    store.chats          ChatRows          add get list update delete
    store.usage          UsageRows         add list

Methods are plain functions that wait for the database: async code calls them in a thread,

    found = await asyncio.to_thread(store.responses.get, caller.id, id)

Each is one transaction, durable when it returns, and may be called from any thread. `owner` is the
caller's id; an object of somebody else is not there (None, False). Lists are pages
(storage/pages.py): `store.X.list(owner, Cursor(limit=20, order="desc", after=id))` gives
Page(data, has_more), and UserError where `after` is no object of that list. Ids are made by the
caller (schema.new_id); ids that come from clients may be passed on as they are.

Responses. `create(StoredResponse(...), running=True)` when work on it begins, `update(owner, id,
status=..., body=...)` when it ends; of `update(..., unless={"cancelled", "completed"})` and a
cancellation the first one counts. `items=` of both appends to the response's conversation in the
same transaction. `abandoned()`, once at the start and now and then, gives the responses that a dead
process left running; whoever calls it marks them failed. `chain(owner, id)` is a response with all
its predecessors.

Conversations. Items are JSON objects with an "id"; `add_items` adds all or none, in order.
"""

import time
from collections.abc import Callable
from pathlib import Path

from pronk.server.storage.batches import BatchRows
from pronk.server.storage.chats import ChatRows, StoredChat
from pronk.server.storage.conversations import ConversationRows, StoredConversation
from pronk.server.storage.database import LEASE_SECONDS, Database
from pronk.server.storage.files import FileRows, StoredFile
from pronk.server.storage.pages import Cursor, Page
from pronk.server.storage.responses import ResponseRows, StoredResponse
from pronk.server.storage.usage import UsageOfDay, UsageRows

__all__ = [
    "LEASE_SECONDS",
    "Cursor",
    "Page",
    "Store",
    "StoredChat",
    "StoredConversation",
    "StoredFile",
    "StoredResponse",
    "UsageOfDay",
]


class Store:
    """`url`: an SQLAlchemy URL, None for SQLite in `data_dir`. `clock`: Unix time in seconds.
    UserError where the database cannot be had, or another server has it."""

    def __init__(
        self, data_dir: Path, url: str | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.database = Database(data_dir, url, clock=clock)
        self.files = FileRows(self.database)
        self.batches = BatchRows(self.database)
        self.responses = ResponseRows(self.database)
        self.conversations = ConversationRows(self.database)
        self.chats = ChatRows(self.database)
        self.usage = UsageRows(self.database)

    def close(self) -> None:
        """Gives everything back."""
        self.database.close()
