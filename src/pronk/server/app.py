"""The application: routes, layers, errors, and what starts and stops with it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException

from pronk import __version__
from pronk.core.errors import PronkError
from pronk.server import (
    anthropic,
    auth,
    batches,
    chat,
    completions,
    conversations,
    embeddings,
    files,
    metrics,
    model_routes,
    ollama,
    ollama_embed,
    ollama_models,
    page,
    responses,
    stored_chats,
    tokenize,
    usage,
)
from pronk.server.batch_runner import Batches
from pronk.server.disk import Files
from pronk.server.document import describe
from pronk.server.errors import ApiError, api_error_of, error_body, validation_error
from pronk.server.execute import executor
from pronk.server.keys import Keys
from pronk.server.layers import add_layers
from pronk.server.logs import request_id
from pronk.server.models import Models
from pronk.server.response_background import Responses
from pronk.server.service import ClientGone, Service
from pronk.server.settings import ServerSettings
from pronk.server.store import Store
from pronk.server.tracing import start_tracing

log = logging.getLogger(__name__)

_ROUTERS = (
    chat, stored_chats, completions, responses, conversations, embeddings, tokenize, anthropic,
    ollama, ollama_embed, ollama_models, model_routes, files, batches, usage, metrics, page,
)  # fmt: skip
_IDLE_CHECK_SECONDS = 1.0
_THREADS = 64
"""Twice as many as there are connections to the database."""


def create_app(
    settings: ServerSettings,
    sources: list[str],
    *,
    options: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Path] | None = None,
    draft: str | None = None,
    on_ready: Callable[[Service], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """`sources`: the models, the first of which is loaded at the start; `options`: arguments of
    `LLM`; `adapters` (PEFT folders by name) and `draft` (a model that guesses) belong to the first
    model. Raises UserError for what cannot be served; nothing is loaded before the application
    starts. `on_failure` hears why it could not, and is to stop the server."""
    counts = metrics.Metrics()
    models = Models(
        sources, options or {}, counts, aliases=settings.aliases, adapters=adapters, draft=draft
    )
    keys = None if settings.api_key_file is None else Keys(settings.api_key_file)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            try:
                running = _running(app, settings, models, counts, keys)
                service = await stack.enter_async_context(running)
            except Exception as error:
                if on_failure is None:
                    raise
                on_failure(error)
            else:
                if on_ready:
                    on_ready(service)
            yield

    app = FastAPI(
        title="Pronk",
        version=__version__,
        summary="Llama models behind the APIs of OpenAI, Anthropic and Ollama.",
        lifespan=lifespan,
        openapi_url=None,  # served by page routes that ask for a caller
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=True,
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    app.state.limits = add_layers(
        app,
        settings,
        counts,
        tracing=start_tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None,
    )
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allow_origins), allow_methods=["*"],
            allow_headers=["*"],
        )  # fmt: skip
    for module in _ROUTERS:
        app.include_router(module.router)
    _handle_errors(app)
    auth.check_routes(app)
    describe(app, keys=settings.api_key_file is not None)
    return app


@contextlib.asynccontextmanager
async def _running(
    app: FastAPI,
    settings: ServerSettings,
    models: Models,
    counts: metrics.Metrics,
    keys: Keys | None,
) -> AsyncIterator[Service]:
    """Everything that works in the background, from the start to the end of the application. What
    was started is stopped in any case, the last first."""
    async with contextlib.AsyncExitStack() as stack:
        # By default they are a few per core. Those that wait for a database keep nobody waiting
        # who only has a prompt to be encoded.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "work"))
        store = await asyncio.to_thread(Store, settings.data_dir, settings.database)
        stack.push_async_callback(asyncio.to_thread, store.close)
        spent = usage.Usage(store)
        stack.push_async_callback(asyncio.to_thread, spent.flush)
        service = Service(
            settings=settings,
            models=models,
            store=store,
            metrics=counts,
            usage=spent,
            keys=keys,
            limits=app.state.limits,
            files=Files(store, settings.data_dir, max_bytes=settings.max_file_bytes),
            batches=None,
        )
        app.state.service = service
        stack.push_async_callback(models.close)  # which may write blocks for a while: usage first
        stack.push_async_callback(asyncio.to_thread, spent.flush)
        lease = await models.acquire(models.default.name)
        lease.release()
        for work in (spent.run(), _unload_idle(models, settings.idle_unload)):
            stack.push_async_callback(_cancelled, asyncio.create_task(work))
        service.batches = Batches(
            store,
            service.files,
            executor(service),
            concurrency=settings.batch_concurrency,
            keys=keys,
            max_line_bytes=settings.max_body_bytes,
            on_line=counts.batch_line,
        )
        await service.batches.start()
        stack.push_async_callback(service.batches.stop)
        service.responses = Responses(store)
        await service.responses.start()
        stack.push_async_callback(service.responses.stop)
        service.ready = True
        try:
            yield service
        finally:
            service.ready = False


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _unload_idle(models: Models, seconds: float | None) -> None:
    while True:
        await asyncio.sleep(_IDLE_CHECK_SECONDS)
        await models.unload_idle(seconds)


def _meant(app: FastAPI, path: str) -> str | None:
    """The route that a client with a base URL of too much or too little was looking for."""
    paths = {context.path for context in iter_route_contexts(app.routes)}
    return next((p for p in (f"/v1{path}", path.removeprefix("/v1")) if p in paths), None)


def _handle_errors(app: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> Response:
        body = error_body(request.url.path, error, request_id())
        return JSONResponse(body, status_code=error.status, headers=error.headers)

    @app.exception_handler(PronkError)
    async def pronk_error(request: Request, error: PronkError) -> Response:
        return answer(request, api_error_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, validation_error(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # of a body that is no text
            return answer(request, ApiError(400, "body: cannot be read as JSON", param="body"))
        words = {404: f"no such route: {request.method} {request.url.path}",
                 405: f"{request.method} is not a method of {request.url.path}"}  # fmt: skip
        message = words.get(error.status_code, str(error.detail))
        if error.status_code == 404 and (meant := _meant(app, request.url.path)):
            message += f"; did you mean {meant}? The client's base URL is to be set accordingly"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return answer(
            request, ApiError(error.status_code, message, code=code, headers=error.headers)
        )

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it
