"""How large the body of a request may be."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pronk.server.errors import ApiError
from pronk.server.logs import send_error

if TYPE_CHECKING:
    from pronk.server.metrics import Metrics


class BodyLimitLayer:
    """ASGI middleware: 413 for a body of more than `limit` bytes, or more than its path's in
    `larger`. It counts what arrives, so a body that does not say its length is no way around."""

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.larger.get(scope["path"].rstrip("/"), self.limit)
        body = _Body(receive, send, limit)
        declared = _content_length(scope)
        if declared is None or declared <= limit:
            try:
                await self.app(scope, body.receive, body.send)
            except Exception:
                if not body.refused:
                    raise  # not of the body's size
        if (declared is not None and declared > limit) or body.refused:
            self._metrics.refused("body")
            words = f"body: more than {limit} bytes, the limit of this route"
            error = ApiError(413, words, code="body_too_large")
            await send_error(error, scope["path"], send)


class _TooLarge(Exception):
    """Ends whoever reads the body."""


@dataclass(slots=True)
class _Body:
    """A body that is counted while it is read, and the answer to it."""

    _receive: Receive
    _send: Send
    limit: int
    n: int = 0
    answered: bool = False

    @property
    def refused(self) -> bool:
        """Too large, and nothing was answered before that became known."""
        return self.n > self.limit and not self.answered

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.n += len(message.get("body", b""))
            if self.n > self.limit:
                raise _TooLarge
        return message

    async def send(self, message: Message) -> None:
        if self.refused:
            return  # what the application makes of the broken body; a 413 comes in its place
        self.answered = True
        await self._send(message)


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None
