"""What the routes work with, and one call of them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from pronk.core.errors import MemoryLimitError, UserError
from pronk.server.auth import Caller
from pronk.server.disk import Files
from pronk.server.errors import ApiError
from pronk.server.keys import Keys
from pronk.server.limits import Limits, Ticket, ticket_of
from pronk.server.logs import current_request
from pronk.server.metrics import Metrics
from pronk.server.models import Lease, Models
from pronk.server.settings import ServerSettings
from pronk.server.store import Store
from pronk.server.usage import Usage

if TYPE_CHECKING:
    from pronk.server.batches import Batches
    from pronk.server.response_background import Responses

log = logging.getLogger(__name__)

Result = TypeVar("Result")

BATCH_PRIORITY = 1
"""Of work that nobody waits for; live requests have 0."""


@dataclass(slots=True)
class Service:
    """Lies in `app.state.service`."""

    settings: ServerSettings
    models: Models
    store: Store
    metrics: Metrics
    usage: Usage
    keys: Keys | None
    limits: Limits
    files: Files
    batches: "Batches | None" = None
    responses: "Responses | None" = None
    ready: bool = False
    """Whether the first model is loaded."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class Call:
    """Somebody's request to the service: over HTTP, or a line of a batch."""

    service: Service
    caller: Caller
    priority: int = 0
    http: Request | None = None
    """Whose client may go away."""
    began: float = field(default_factory=time.monotonic)

    @staticmethod
    def of(request: Request, caller: Caller) -> "Call":
        return Call(request.app.state.service, caller, http=request)

    @property
    def ticket(self) -> Ticket | None:
        return None if self.http is None else ticket_of(self.http)

    async def model(self, name: str) -> Lease:
        """The model of that name, which the caller may use; to be released."""
        try:
            entry, adapter = self.service.models.find(name)
        except ApiError:
            self.caller.check_model(name)  # who may use some only hears of those
            raise
        self.caller.check_model(*filter(None, [adapter]), entry.name, *entry.aliases)
        try:
            lease = await self.service.models.acquire(name)
        except MemoryLimitError:
            raise
        except UserError as error:  # whose words are about files of this machine
            log.warning("a model cannot be loaded", exc_info=error)
            words = f"model: {entry.name} cannot be loaded; the server's log says why"
            raise ApiError(500, words, param="model", code="model_not_loadable") from None
        if info := current_request():
            info.model = lease.name
        return lease

    def who(
        self, lease: Lease, *, timeout: float | None = None, salt: str = "", priority: int = 0
    ) -> dict[str, Any]:
        """Arguments of the engine's `Request` that say whose it is. With keys, callers do not find
        each other's prompts in the cache, and so cannot tell by the time it takes, or by the
        `cached_tokens`, what those begin with; unless the settings say that they may."""
        service = self.service
        apart = service.keys is not None and not service.settings.share_prompts
        return {
            "adapter": lease.adapter,
            "salt": (f"{self.caller.id}\0{salt}" if apart else salt).encode(),
            "priority": max(self.priority, priority),
            "owner": self.caller.id,
            "deadline": self.deadline(timeout),
        }

    def deadline(self, seconds: float | None) -> float | None:
        """On the clock of the engine: what was asked for, at most what the settings allow. The time
        counts from the call's beginning: a model that is loaded first takes of it."""
        limits = [s for s in (seconds, self.service.settings.request_timeout) if s is not None]
        return self.began + min(limits) if limits else None

    def reserve(self, tokens: int) -> None:
        """Books what the call may take against the limits of its key."""
        if ticket := self.ticket:
            ticket.reserve(tokens)

    def book(
        self, model: str, *, prompt_tokens: int, completion_tokens: int, reason: str | None
    ) -> None:
        """Counts what the call has taken. Never waits."""
        if info := current_request():
            info.model, info.finish_reason = model, reason
            info.prompt_tokens = (info.prompt_tokens or 0) + prompt_tokens
            info.completion_tokens = (info.completion_tokens or 0) + completion_tokens
        if ticket := self.ticket:
            ticket.spend(prompt_tokens + completion_tokens)
        self.service.usage.add(
            self.caller.id, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
        )

    async def unless_gone(self, work: Awaitable[Result]) -> Result:
        """The result of `work`; a client that goes away before cancels it (ClientGone)."""
        task = asyncio.ensure_future(work)
        if self.http is None:
            return await task
        watch = asyncio.ensure_future(_disconnected(self.http))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientGone
        finally:
            for one in (task, watch):
                one.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Waits until a client has gone whose request's body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@contextmanager
def called(parameter: str, name: str) -> Iterator[None]:
    """Mistakes of a parameter are told under the name that it has in an API."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith(parameter):
            raise
        raise UserError(name + str(error).removeprefix(parameter)) from None


def refuse(condition: bool, param: str, why: str) -> None:
    """400 for what the types of a body cannot say."""
    if condition:
        raise ApiError(400, f"{param}: {why}", param=param)
