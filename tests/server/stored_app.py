"""An application of some routers around a store, with two keys: those of `ME` and `YOU`."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from pronk.core.errors import PronkError
from pronk.server.auth import check_routes
from pronk.server.errors import api_error_of, openai_error, validation_error
from pronk.server.keys import Key
from pronk.server.store import Store

ME = {"Authorization": "Bearer pk-me"}
YOU = {"Authorization": "Bearer pk-you"}
_KEYS = {
    f"pk-{name}": Key(name, name, "", frozenset({"files", "inference"}), 1)
    for name in ("me", "you")
}

KEYS: Any = SimpleNamespace(find=_KEYS.get, all=list(_KEYS.values()))


def make_app(store: Store, routers: Sequence[APIRouter], **service: Any) -> FastAPI:
    """`service`: further attributes of the service, such as files and batches; batches run as long
    as the application does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batches = service.get("batches")
        if batches is not None:
            await batches.start()
        yield
        if batches is not None:
            await batches.stop()

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    for router in routers:
        app.include_router(router)
    app.state.service = SimpleNamespace(
        store=store,
        keys=KEYS,
        metrics=SimpleNamespace(auth_failed=lambda code: None),
        settings=SimpleNamespace(control_token=None),
        **service,
    )

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            error = validation_error(error.errors())
        found = api_error_of(error)
        return JSONResponse(openai_error(found), found.status, found.headers)

    for kind in (RequestValidationError, PronkError):
        app.add_exception_handler(kind, answer)
    check_routes(app)
    return app
