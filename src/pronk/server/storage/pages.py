"""Lists by pages, as OpenAI's API has them: `limit` objects behind (or before) one known by id."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import sqlalchemy as sa

from pronk.core.errors import UserError

T = TypeVar("T")
Order = Literal["asc", "desc"]
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,80}")


@dataclass(frozen=True, slots=True)
class Cursor:
    """Which page is wanted. `after` and `before` are ids of objects of the same list: the page
    holds what follows the one and what precedes the other, in `order`."""

    limit: int = 20
    order: Order = "desc"
    after: str | None = None
    before: str | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page, and whether more lies behind it (before it, where only `before` was given)."""

    data: Sequence[T]
    has_more: bool


def select_page(
    connection: sa.Connection,
    query: sa.Select[Any],
    table: sa.Table,
    cursor: Cursor,
    scope: Sequence[sa.ColumnElement[bool]],
    make: Callable[[Any], T],
) -> Page[T]:
    """A page of `query`, by `table.c.seq`. `scope` says which rows a cursor may stand at: one that
    lies outside of it is unknown to the caller."""
    backwards = cursor.after is None and cursor.before is not None
    ascending = (cursor.order == "asc") != backwards
    for name, id in (("after", cursor.after), ("before", cursor.before)):
        if id is None:
            continue
        seq = _seq_of(connection, table, id, scope, name)
        behind = (name == "after") == (cursor.order == "asc")
        query = query.where(table.c.seq > seq if behind else table.c.seq < seq)
    order = table.c.seq.asc() if ascending else table.c.seq.desc()
    rows = connection.execute(query.order_by(order).limit(cursor.limit + 1)).all()
    data = [make(row) for row in rows[: cursor.limit]]
    return Page(data[::-1] if backwards else data, len(rows) > cursor.limit)


def _seq_of(
    connection: sa.Connection,
    table: sa.Table,
    id: str,
    scope: Sequence[sa.ColumnElement[bool]],
    name: str,
) -> int:
    seq = None
    if is_id(id):
        found = sa.select(table.c.seq).where(table.c.id == id, *scope)
        seq = connection.execute(found).scalar_one_or_none()
    if seq is None:
        raise UserError(f"{name}: no object {id!r:.100} in this list")
    return int(seq)


def slice_page(items: Sequence[dict[str, Any]], cursor: Cursor) -> Page[dict[str, Any]]:
    """A page of objects with an "id" that are all at hand, oldest first."""
    ordered = list(items) if cursor.order == "asc" else list(items)[::-1]
    places = {item["id"]: i for i, item in enumerate(ordered)}
    bounds = {"after": -1, "before": len(ordered)}
    for name, id in (("after", cursor.after), ("before", cursor.before)):
        if id is not None:
            if id not in places:
                raise UserError(f"{name}: no object {id!r:.100} in this list")
            bounds[name] = places[id]
    window = ordered[bounds["after"] + 1 : bounds["before"]]
    backwards = cursor.after is None and cursor.before is not None
    data = window[-cursor.limit :] if backwards else window[: cursor.limit]
    return Page(data, len(window) > len(data))


def is_id(text: str) -> bool:
    """Whether a text that a client sent could be an id. Databases refuse some texts as such."""
    return _ID.fullmatch(text) is not None


def owned(table: sa.Table, owner: str, id: str) -> sa.ColumnElement[bool]:
    """The condition that a row is the object `id` of `owner`."""
    if not is_id(id):
        return sa.false()
    return sa.and_(table.c.id == id, table.c.owner == owner)
