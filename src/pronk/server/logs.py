"""Logs, and the outermost layer of the application.

One line an event, as JSON objects or as text for people, on stderr; uvicorn's own lines come the
same way. Every request has an id: the client's `x-request-id` if that is sane, or a new one. It
stands in the answer's headers, in every line that is logged meanwhile, and in errors.

Neither prompts nor keys are ever logged. So a path is logged without its query, and an exception
with its type and where it was raised: its text may quote what it failed on.
"""

import json
import logging
import re
import secrets
import sys
import time
import traceback
from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pronk.server.errors import ApiError, api_error_of, error_body

if TYPE_CHECKING:
    from pronk.server.metrics import Metrics

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@~-]{1,128}")
_ID_HEADERS = ("x-request-id", "request-id")
"""OpenAI's clients look at the first, Anthropic's at the second."""
_GONE = 499
"""The status in logs and metrics, nginx's, of a request whose client did not wait for one."""
_QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Asked for every few seconds by machines; logged at level debug unless something is wrong."""
_MOST_FRAMES = 12
"""Of an exception; those below are the web framework's."""


@dataclass(slots=True)
class RequestInfo:
    """What is known of a request, for logs, metrics and traces. Filled in on the way."""

    id: str
    method: str
    path: str
    key: str | None = None
    """The name of the caller's key, not the key."""
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    trace_id: str | None = None


_current: ContextVar[RequestInfo | None] = ContextVar("pronk_request", default=None)


def current_request() -> RequestInfo | None:
    """The request that is being answered, None outside of any."""
    return _current.get()


def request_id() -> str | None:
    """The id of the request that is being answered."""
    info = _current.get()
    return info.id if info else None


class RequestLayer:
    """ASGI middleware around everything else: request ids, the log line and the metrics of each
    request, and an answer where the application failed."""

    def __init__(self, app: ASGIApp, *, metrics: "Metrics") -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        info = RequestInfo(_id_of(scope), scope["method"], scope["path"])
        token = _current.set(info)
        exchange = _Exchange(info.id, receive, send)
        started = time.perf_counter()
        self.metrics.http_started()
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.gone = True
        except Exception as error:
            await _answer(error, info, exchange)
        finally:
            self._book(scope, info, exchange, time.perf_counter() - started)
            _current.reset(token)

    def _book(self, scope: Scope, info: RequestInfo, exchange: "_Exchange", seconds: float) -> None:
        gone = exchange.gone or not (exchange.complete or exchange.failed)
        status = _GONE if gone else exchange.status
        route = route_of(scope)
        self.metrics.http(info.method, route, status, seconds)
        if gone:
            self.metrics.vanished(route)
        quiet = info.path in _QUIET and status < 400
        fields = {
            "method": info.method,
            "path": info.path,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "key": info.key,
            "model": info.model,
            "prompt_tokens": info.prompt_tokens,
            "completion_tokens": info.completion_tokens,
            "finish_reason": info.finish_reason,
            "trace_id": info.trace_id,
        }
        level = logging.DEBUG if quiet else logging.INFO
        log.log(level, "request", extra={"fields": fields})


class _Exchange:
    """The two ends of a request, watched."""

    def __init__(self, id: str, receive: Receive, send: Send) -> None:
        self._id = id
        self._receive, self._send = receive, send
        self.status = 0
        """0 until the answer has begun."""
        self.complete = False
        self.gone = False
        """The client went away before the answer's end."""
        self.failed = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.complete:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            for name in _ID_HEADERS:
                add_header(message, name, self._id)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True


async def _answer(error: Exception, info: RequestInfo, exchange: _Exchange) -> None:
    """The one place where an exception that nobody expected becomes an answer. One that has begun
    just ends: the server closes the connection, and the client sees that its end is missing."""
    log.error("request failed", exc_info=error)
    exchange.failed = True
    if exchange.status:
        exchange.status = 500
        return
    await send_error(api_error_of(error), info.path, exchange.send)


async def send_error(error: ApiError, path: str, send: Send) -> None:
    """Answers with an error from a layer, where no route does it."""
    body = json.dumps(error_body(path, error, request_id()), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _id_of(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if _SANE_ID.fullmatch(text) else _new_id()
    return _new_id()


def _new_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def add_header(start: MutableMapping[str, Any], name: str, value: str) -> None:
    """Adds a header to the message that begins an answer, if it has none of that name."""
    headers = list(start.get("headers", ()))
    if all(known.lower() != name.encode() for known, _ in headers):
        headers.append((name.encode(), value.encode("latin-1")))
    start["headers"] = headers


def route_of(scope: Scope) -> str:
    """The route that a request went to, with the names of its parameters; "unmatched" if none."""
    effective = scope.get("fastapi", {}).get("effective_route_context")
    path = getattr(effective, "path", None) or getattr(scope.get("route"), "path", None)
    return path or "unmatched"


# The lines.


class _Lines(logging.Formatter):
    """A record as one line: `event`, the request's id, then the record's own fields."""

    def __init__(self, format: Literal["text", "json"] = "text") -> None:
        super().__init__()
        self._json = format == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"request_id": request_id(), **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1]:
            fields |= _error_fields(record.exc_info[1])
        fields = {name: value for name, value in fields.items() if value is not None}
        event = record.getMessage()
        if self._json:
            return json.dumps(
                {
                    "time": _utc(record.created),
                    "level": record.levelname.lower(),
                    "event": event,
                    "logger": record.name,
                    **fields,
                },
                ensure_ascii=False,
                default=str,
            )
        words = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        line = f"{_utc(record.created)} {record.levelname:<7} {event} {words}".rstrip()
        return line.replace("\n", "\\n").replace("\r", "\\r")


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


def _plain(value: object) -> str:
    text = str(value)
    return text if text and re.fullmatch(r"[!-~]+", text) else json.dumps(text)


def _error_fields(error: BaseException) -> dict[str, str]:
    """Where an exception comes from, without its text; that of the system says no secrets."""
    frames = list(reversed(traceback.extract_tb(error.__traceback__)))[:_MOST_FRAMES]
    shown = {
        "error": type(error).__name__,
        "where": " < ".join(f"{f.filename}:{f.lineno} {f.name}" for f in frames),
    }
    if isinstance(error, OSError) and error.strerror:
        shown["reason"] = error.strerror
    return shown


def log_config(format: Literal["text", "json"], *, level: str = "INFO") -> dict[str, Any]:
    """What `logging.config.dictConfig`, and uvicorn as its `log_config`, are to be given."""
    quiet = {"handlers": [], "level": "CRITICAL", "propagate": False}
    ours = {"handlers": ["stderr"], "level": level, "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": _Lines, "format": format}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "lines",
                "stream": sys.stderr,
            }
        },
        # uvicorn's lines of requests know neither the id nor the key; ours take their place
        "loggers": {
            "pronk": ours,
            "uvicorn": {**ours, "level": "WARNING"},
            "uvicorn.access": quiet,
        },
    }
