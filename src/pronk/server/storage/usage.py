"""What each key has used, by day."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from pronk.server.storage.database import Database
from pronk.server.storage.tables import usage


@dataclass(frozen=True, slots=True)
class UsageOfDay:
    """`day`: YYYY-MM-DD in UTC."""

    owner: str
    day: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageRows:
    def __init__(self, database: Database) -> None:
        self._db = database

    def add(
        self, owner: str, *, requests: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0
    ) -> None:
        """Adds to what `owner` has used today."""
        day = datetime.fromtimestamp(self._db.clock(), UTC).date().isoformat()
        more = {
            "requests": requests,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }
        insert = self._db.insert(usage).values(owner=owner, day=day, **more)
        with self._db.write() as connection:
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=["owner", "day"],
                    set_={name: usage.c[name] + n for name, n in more.items()},
                )
            )

    def list(
        self, owner: str | None = None, *, since: str | None = None, until: str | None = None
    ) -> Sequence[UsageOfDay]:
        """By day and owner, of one owner or of all; `since` and `until` are days, both included."""
        query = sa.select(usage).order_by(usage.c.day, usage.c.owner)
        if owner is not None:
            query = query.where(usage.c.owner == owner)
        if since is not None:
            query = query.where(usage.c.day >= since)
        if until is not None:
            query = query.where(usage.c.day <= until)
        with self._db.read() as connection:
            rows = connection.execute(query).all()
        return [UsageOfDay(*(getattr(row, name) for name in UsageOfDay.__slots__)) for row in rows]
