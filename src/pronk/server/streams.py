"""Server-sent events."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from pronk.server.errors import api_error_of, openai_error
from pronk.server.generation import Generation

log = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> str:
    """One event of a stream."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n"


def failure(error: Exception) -> str:
    """The event that ends a stream which cannot go on, in OpenAI's shape."""
    log.warning("a stream failed", exc_info=error)
    return event(openai_error(api_error_of(error)))


class EventStream(StreamingResponse):
    """The events of a generation, which is closed however the stream ends: also when the client
    goes away, and when it had gone before the first event. (None: of one that goes on without the
    client.) What fails midway is told by `on_error`, in the words of the API."""

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation | None,
        events: AsyncGenerator[str, None],
        on_error: Callable[[Exception], str] = failure,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        no_delay = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_until_end(events, on_error), headers={**no_delay, **(headers or {})})
        self._generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Watches for the client to go by itself: Starlette leaves that to `send` with some
        servers, and a request that waits in the queue sends nothing."""
        sent = asyncio.ensure_future(self.stream_response(send))
        gone = asyncio.ensure_future(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({sent, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sent.done():
                with contextlib.suppress(OSError):  # the client has gone
                    sent.result()
        finally:
            for task in (sent, gone):
                task.cancel()
            await asyncio.gather(sent, gone, return_exceptions=True)
            if self._generation is not None:
                self._generation.close()


async def _until_end(
    events: AsyncGenerator[str, None], on_error: Callable[[Exception], str]
) -> AsyncIterator[str]:
    async with aclosing(events):
        try:
            async for text in events:
                yield text
        except Exception as error:
            yield on_error(error)
