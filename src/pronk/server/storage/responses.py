"""Rows of stored responses (/v1/responses)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pronk.server.storage.conversations import append_items
from pronk.server.storage.database import Database
from pronk.server.storage.pages import Cursor, Page, owned, select_page, slice_page
from pronk.server.storage.tables import responses

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response. `body` is the object that clients get, `input` the items that it answers, each
    with an "id"; `state` is the server's own."""

    id: str
    owner: str
    created_at: int
    model: str
    status: str
    body: Json
    input: Sequence[Json] = ()
    previous_response_id: str | None = None
    conversation_id: str | None = None
    state: Json | None = None


class ResponseRows:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(
        self,
        response: StoredResponse,
        *,
        running: bool = False,
        items: Sequence[Json] = (),
    ) -> None:
        """Stores a response. `running`: this process works on it still (see `abandoned`). `items`
        are appended to its conversation; ApiError 404 where that is gone."""
        values = {name: getattr(response, name) for name in StoredResponse.__slots__}
        values |= {"input": list(response.input), "runner": self._runner(running)}
        with self._db.write() as connection:
            self._append(connection, response, items)
            connection.execute(responses.insert().values(**values))

    def get(self, owner: str, id: str) -> StoredResponse | None:
        with self._db.read() as connection:
            return _get(connection, owner, id)

    def update(
        self,
        owner: str,
        id: str,
        *,
        status: str,
        body: Json,
        state: Json | None = None,
        running: bool = False,
        items: Sequence[Json] = (),
        unless: Collection[str] = (),
    ) -> bool:
        """Replaces what changes of a response; `state` None leaves it. `items` are appended to its
        conversation. False where it is gone or, then nothing changes, has a status of `unless`
        (so that of an end and a cancellation the first one counts)."""
        values: Json = {"status": status, "body": body, "runner": self._runner(running)}
        if state is not None:
            values["state"] = state
        with self._db.write() as connection:
            found = _get(connection, owner, id, lock=True)
            if found is None or found.status in unless:
                return False
            self._append(connection, found, items)
            connection.execute(responses.update().where(responses.c.id == id).values(**values))
            return True

    def delete(self, owner: str, id: str) -> bool:
        """False where there is none."""
        with self._db.write() as connection:
            done = connection.execute(responses.delete().where(owned(responses, owner, id)))
            return done.rowcount > 0

    def list(self, owner: str, cursor: Cursor) -> Page[StoredResponse]:
        mine = [responses.c.owner == owner]
        query = sa.select(responses).where(*mine)
        with self._db.read() as connection:
            return select_page(connection, query, responses, cursor, mine, _response)

    def input_items(self, owner: str, id: str, cursor: Cursor) -> Page[Json] | None:
        """A page of what a response answers; None where there is no such response."""
        found = self.get(owner, id)
        return None if found is None else slice_page(found.input, cursor)

    def chain(self, owner: str, id: str) -> Sequence[StoredResponse] | None:
        """A response and all that came before it by `previous_response_id`, oldest first; None
        where one of them is gone."""
        chain: list[StoredResponse] = []
        following: str | None = id
        with self._db.read() as connection:
            while following is not None:
                found = _get(connection, owner, following)
                if found is None:
                    return None
                chain.append(found)
                following = found.previous_response_id
        return chain[::-1]

    def abandoned(self) -> Sequence[StoredResponse]:
        """Responses, of all owners, that a process worked on which lives no more. They are this
        process's now; it must end them."""
        lost = self._db.is_dead(responses.c.runner)
        with self._db.write() as connection:
            query = sa.select(responses).where(lost).with_for_update(skip_locked=True)
            rows = connection.execute(query.order_by(responses.c.seq)).all()
            for row in rows:
                mine = {"runner": self._db.instance}
                connection.execute(
                    responses.update().where(responses.c.seq == row.seq).values(**mine)
                )
            return [_response(row) for row in rows]

    def _runner(self, running: bool) -> str | None:
        return self._db.instance if running else None

    def _append(
        self, connection: sa.Connection, response: StoredResponse, items: Sequence[Json]
    ) -> None:
        if items:
            assert response.conversation_id is not None, "items without a conversation"
            append_items(
                connection, response.owner, response.conversation_id, items, self._db.now()
            )


def _get(
    connection: sa.Connection, owner: str, id: str, *, lock: bool = False
) -> StoredResponse | None:
    query = sa.select(responses).where(owned(responses, owner, id))
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return None if row is None else _response(row)


def _response(row: Any) -> StoredResponse:
    return StoredResponse(**{name: getattr(row, name) for name in StoredResponse.__slots__})
