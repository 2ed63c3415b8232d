"""What callers have used, in sums that are kept by day.

They are gathered in memory and written every second, by a thread: a request whose client has gone
is cancelled wherever it waits, so booking may not wait for a database.
"""

import asyncio
import logging
import threading
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request

from pronk.server.auth import Caller, caller
from pronk.server.errors import ApiError
from pronk.server.schema import Answer
from pronk.server.store import Store

log = logging.getLogger(__name__)

_EVERY_SECONDS = 1.0


@dataclass(slots=True)
class _Sum:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Usage:
    """Gathers usage and writes it to the store. Any thread may add."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._sums: dict[str, _Sum] = defaultdict(_Sum)

    def add(self, owner: str, *, prompt_tokens: int, completion_tokens: int) -> None:
        """One request of `owner`."""
        self._merge(owner, _Sum(1, prompt_tokens, completion_tokens))

    def flush(self) -> None:
        """Writes what was gathered. What cannot be written is kept for the next time."""
        with self._writing:
            with self._lock:
                sums, self._sums = self._sums, defaultdict(_Sum)
            while sums:
                owner, total = sums.popitem()
                try:
                    self._store.usage.add(
                        owner,
                        requests=total.requests,
                        prompt_tokens=total.prompt_tokens,
                        completion_tokens=total.completion_tokens,
                    )
                except Exception:
                    for kept, value in (*sums.items(), (owner, total)):
                        self._merge(kept, value)
                    raise

    async def run(self) -> None:
        """Writes every second until it is cancelled; whoever cancels it flushes once more."""
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            if not self._sums:
                continue
            try:
                await asyncio.to_thread(self.flush)
            except Exception as error:
                log.error("usage cannot be written, trying again", exc_info=error)

    def _merge(self, owner: str, more: _Sum) -> None:
        with self._lock:
            total = self._sums[owner]
            total.requests += more.requests
            total.prompt_tokens += more.prompt_tokens
            total.completion_tokens += more.completion_tokens


# The route.

router = APIRouter(tags=["usage"])


class DayOfUsage(Answer):
    object: Literal["usage.day"] = "usage.day"
    owner: str
    """The key's id."""
    name: str | None
    """The key's name; null where there is no such key any more."""
    day: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class UsageList(Answer):
    object: Literal["list"] = "list"
    data: list[DayOfUsage]


@router.get("/v1/usage", response_model=UsageList, summary="What a key has used, by day")
async def usage(
    request: Request,
    who: Annotated[Caller, Depends(caller("inference"))],
    start: Annotated[date | None, Query(description="First day, YYYY-MM-DD in UTC.")] = None,
    end: Annotated[date | None, Query(description="Last day, included.")] = None,
    everybody: Annotated[bool, Query(description="Of all keys; for admins.")] = False,
) -> UsageList:
    """The caller's own usage; with `everybody` that of all keys."""
    if everybody and not who.admin:
        raise ApiError(403, "everybody: only a key with the scope 'admin' sees others' usage",
                       param="everybody", code="missing_scope")  # fmt: skip
    service = request.app.state.service
    await asyncio.to_thread(service.usage.flush)
    rows = await asyncio.to_thread(
        service.store.usage.list,
        None if everybody else who.id,
        since=start and start.isoformat(),
        until=end and end.isoformat(),
    )
    names = {} if service.keys is None else {key.id: key.name for key in service.keys.all}
    return UsageList(
        data=[
            DayOfUsage(
                owner=row.owner,
                name=names.get(row.owner),
                day=row.day,
                requests=row.requests,
                prompt_tokens=row.prompt_tokens,
                completion_tokens=row.completion_tokens,
            )
            for row in rows
        ]
    )
