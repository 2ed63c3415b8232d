"""What all of Ollama's routes have in common: bodies that are JSON whatever they say they are, and
answers of one JSON object a line."""

import json
import logging
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from pronk.server.errors import api_error_of
from pronk.server.streams import EventStream

log = logging.getLogger(__name__)

_BROWSER = ("origin", "sec-fetch-site")
"""Headers of which a browser sends one at least with such requests."""


class AnyTypeRoute(APIRoute):
    """Reads a body as JSON. Ollama's users call it with `curl -d`, which says that it sends a form.
    Not so for a browser: the page of somebody else may send forms, but JSON only where it was
    allowed to (CORS)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def as_json(request: Request) -> Response:
            if any(name in request.headers for name in _BROWSER):
                return await handle(request)
            headers = [item for item in request.scope["headers"] if item[0] != b"content-type"]
            headers.append((b"content-type", b"application/json"))
            return await handle(Request({**request.scope, "headers": headers}, request.receive))

        return as_json


class LineStream(EventStream):
    """A stream of JSON lines."""

    media_type = "application/x-ndjson"


def line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def failure(error: Exception) -> str:
    """The line that ends a stream which cannot go on."""
    log.warning("a stream failed", exc_info=error)
    return line({"error": api_error_of(error).message})


def timestamp(at: float | None = None) -> str:
    """A Unix time, or now, as Ollama writes it."""
    when = datetime.now(UTC) if at is None else datetime.fromtimestamp(at, UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
