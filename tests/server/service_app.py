"""A small application with the server's own doors and layers, and routes that do little."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Scope

from pronk.server import metrics as metrics_module
from pronk.server import usage as usage_module
from pronk.server.auth import AuthLayer, Caller, caller
from pronk.server.bodies import BodyLimitLayer
from pronk.server.errors import ApiError, error_body
from pronk.server.keys import Keys, change_keys, new_key
from pronk.server.limits import Limits, LimitsLayer
from pronk.server.logs import RequestLayer, request_id
from pronk.server.metrics import Metrics
from pronk.server.service import Call
from pronk.server.settings import ServerSettings
from pronk.server.store import Store
from pronk.server.tracing import TracingLayer
from pronk.server.usage import Usage

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(
    request: Request,
    who: Annotated[Caller, Depends(caller("inference"))],
    reserve: int = 0,
    used: int = 0,
) -> dict[str, str]:
    call = Call.of(request, who)
    if reserve:
        call.reserve(reserve)
    call.book("tiny", prompt_tokens=used, completion_tokens=0, reason="stop")
    return {"name": who.name, "id": who.id}


@router.post("/v1/responses/{id}/cancel")
async def cancel(
    id: str, who: Annotated[Caller, Depends(caller("inference", limited=False))]
) -> str:
    return id


@router.post("/v1/stream")
async def stream(who: Annotated[Caller, Depends(caller("inference"))]) -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        for i in range(3):
            yield b"data: %d\n\n" % i

    return StreamingResponse(pieces(), media_type="text/event-stream")


@router.post("/v1/fail")
async def fail(who: Annotated[Caller, Depends(caller("inference"))]) -> None:
    raise ValueError("the prompt was: my secret")


@router.post("/v1/fail_late")
async def fail_late(who: Annotated[Caller, Depends(caller("inference"))]) -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise ValueError("the prompt was: my secret")

    return StreamingResponse(pieces())


@router.post("/v1/echo")
async def echo(
    body: dict[str, Any], who: Annotated[Caller, Depends(caller("inference"))]
) -> dict[str, int]:
    return {"keys": len(body)}


@router.post("/v1/messages")
async def messages(
    body: dict[str, Any], who: Annotated[Caller, Depends(caller("inference"))]
) -> str:
    return who.name


@router.post("/v1/files")
async def files(request: Request, who: Annotated[Caller, Depends(caller("files"))]) -> int:
    return len(await request.body())


@router.get("/v1/models")
async def models(who: Annotated[Caller, Depends(caller("inference"))], model: str = "a") -> str:
    who.check_model(model, f"alias-of-{model}")
    return model


@router.post("/v1/load")
async def load(who: Annotated[Caller, Depends(caller("admin"))]) -> str:
    return who.name


@router.get("/health")
async def health() -> str:
    return "ok"


@dataclass
class Service:
    """What routes find at `app.state.service`."""

    settings: ServerSettings
    metrics: Metrics
    store: Store
    usage: Usage
    keys: Keys | None = None
    now: list[float] = field(default_factory=lambda: [1000.0])
    """The clock of the limits."""
    limits: Limits = field(init=False)


def make_app(
    folder: Path,
    *,
    keys: Path | None = None,
    max_queue: int = 100,
    max_body_bytes: int = 1000,
    control_token: str | None = None,
    tracing: Any = None,
) -> FastAPI:
    """Docs and schema off: the routes are those above, /metrics and /v1/usage."""
    settings = ServerSettings(
        data_dir=folder, max_queue=max_queue, max_body_bytes=max_body_bytes,
        control_token=control_token,
    )  # fmt: skip
    metrics, store = Metrics(), Store(folder, None)
    service = Service(settings, metrics, store, Usage(store), Keys(keys) if keys else None)
    service.limits = Limits(max_queue=max_queue, metrics=metrics, clock=lambda: service.now[0])
    app = FastAPI(openapi_url=None)
    app.state.service = service
    for one in (router, metrics_module.router, usage_module.router):
        app.include_router(one)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        body = error_body(request.url.path, error, request_id())
        return JSONResponse(body, error.status, headers=error.headers)

    app.add_middleware(
        BodyLimitLayer, limit=max_body_bytes, larger={"/v1/files": 10 * max_body_bytes},
        metrics=metrics,
    )  # fmt: skip
    app.add_middleware(LimitsLayer, limits=service.limits)
    app.add_middleware(AuthLayer)
    if tracing is not None:
        app.add_middleware(TracingLayer, provider=tracing)
    app.add_middleware(RequestLayer, metrics=metrics)
    return app


def add_key(file: Path, name: str, **more: Any) -> str:
    """A new key in a file."""
    secret, key = new_key(name=name, now=0, **more)
    change_keys(file, lambda keys: keys.added(secret, key), create=True)
    return secret


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def scope_of(path: str, headers: dict[str, str] | None = None, method: str = "POST") -> Scope:
    """An ASGI scope, for tests that play the server themselves."""
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "scheme": "http", "headers": raw, "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip


async def exchange(
    app: ASGIApp, scope: Scope, chunks: list[bytes], *, then: Message | None = None
) -> list[Message]:
    """What an application answers to a body in `chunks`, followed by `then`."""
    messages: list[Message] = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)}
        for i, chunk in enumerate(chunks)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else then or {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent
