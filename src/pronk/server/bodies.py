"""How large the body of a request may be, and all bodies together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pronk.server.errors import ApiError
from pronk.server.logs import send_error

if TYPE_CHECKING:
    from pronk.server.metrics import Metrics

_TOGETHER = 16
"""Bodies of the largest size that may lie in memory at a time."""


class BodyLimitLayer:
    """ASGI middleware: 413 for a body of more than `limit` bytes, or more than its path's in
    `larger`. It counts what arrives, so a body that does not say its length is no way around.

    A body is read before it is known what it asks for, and so before any limit of requests counts:
    503 where those that are held exceed sixteen of the largest. (Those of `larger` go to the disk.)
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        metrics: "Metrics",
        larger: dict[str, int] | None = None,
    ) -> None:
        self.app = app
        self.limit = limit
        self.larger = larger or {}
        self._metrics = metrics
        self._room = _Room(_TOGETHER * limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        larger = self.larger.get(scope["path"].rstrip("/"))
        body = _Body(receive, send, larger or self.limit, None if larger else self._room)
        declared = _content_length(scope)
        if declared is not None and declared > body.limit:
            body.refuse_size()
        else:
            try:
                await self.app(scope, body.receive, body.send)
            except Exception:
                if not body.refused:
                    raise  # not of the body's size
            finally:
                self._room.used -= body.held
        if body.refused and body.error is not None:
            self._metrics.refused("body" if body.error.status == 413 else "bodies")
            await send_error(body.error, scope["path"], send)


class _Refused(Exception):
    """Ends whoever reads the body."""


@dataclass(slots=True)
class _Room:
    """Bytes of bodies that are held, of all requests."""

    most: int
    used: int = 0


@dataclass(slots=True)
class _Body:
    """A body that is counted while it is read, and the answer to it. `room`: None where it is not
    held in memory."""

    _receive: Receive
    _send: Send
    limit: int
    room: _Room | None
    n: int = 0
    held: int = 0
    answered: bool = False
    error: ApiError | None = None

    @property
    def refused(self) -> bool:
        """Too large, and nothing was answered before that became known."""
        return self.error is not None and not self.answered

    def refuse_size(self) -> None:
        words = f"body: more than {self.limit} bytes, the limit of this route"
        self.error = ApiError(413, words, code="body_too_large")

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            if self.error is not None:
                raise _Refused
        return message

    def _count(self, size: int) -> None:
        self.n += size
        if self.n > self.limit:
            self.refuse_size()
        elif self.room and self.room.used + size > self.room.most:
            words = "the server is busy: it holds too many large requests; try again in a moment"
            self.error = ApiError(503, words, code="overloaded", headers={"Retry-After": "1"})
        elif self.room:
            self.room.used += size
            self.held += size

    async def send(self, message: Message) -> None:
        if self.refused:
            return  # what the application makes of the broken body; the error comes in its place
        self.answered = True
        await self._send(message)


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None
