"""An OpenAI server that says what a test tells it to, with Pronk's page in front: what the page
does can be watched step by step, and its requests read."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from pronk.server import page
from pronk.server.errors import ApiError, error_body

USAGE = {"prompt_tokens": 31, "completion_tokens": 12, "total_tokens": 43,
         "prompt_tokens_details": {"cached_tokens": 16}}  # fmt: skip


@dataclass
class Answer:
    """What the next request gets. `pieces` are texts or deltas; an Event among them is waited for,
    so that a test can look at half an answer."""

    pieces: Sequence[str | dict[str, Any] | threading.Event] = ()
    finish: str | None = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    """The body's error, or the last event where the status is 200."""
    cut: bool = False
    """The connection ends in the middle of an event."""
    pause: float = 0.0
    """Seconds between the pieces: only for looking at, no test depends on it."""


def call(index: int, id: str | None = None, name: str | None = None, arguments: str = "") -> dict:
    """The delta of a tool call; the first piece of one has its id and name."""
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    named = {} if id is None else {"id": id, "type": "function"}
    return {"tool_calls": [{"index": index, **named, "function": function}]}


class FakeServer:
    """Answers requests with `answers`, in order, and keeps their bodies."""

    def __init__(self) -> None:
        self.url = ""
        self.models = ["smollm2-135m", "llama-3.1-8b"]
        self.key: str | None = None
        self.answers: deque[Answer] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.gone = threading.Event()
        """A client left in the middle of an answer."""
        self.app = FastAPI()
        self.app.include_router(page.router)
        self.app.get("/health")(self._health)
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._chat)
        self.app.exception_handler(ApiError)(self._refuse)
        self.app.middleware("http")(self._note)

    async def _note(self, request: Request, call_next: Any) -> Response:
        self.paths.append(request.url.path)
        return await call_next(request)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error_body(request.url.path, error), error.status, error.headers)

    async def _health(self) -> dict[str, str]:
        return {"status": "ok"}

    def _check(self, request: Request) -> None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise ApiError(401, "this server needs an API key")

    async def _models(self, request: Request) -> dict[str, Any]:
        self._check(request)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.models
        ]
        return {"object": "list", "data": data}

    async def _chat(self, request: Request) -> Response:
        self._check(request)
        body = await request.json()
        self.bodies.append(body)
        answer = self.answers.popleft()
        if answer.status != 200:
            return JSONResponse({"error": answer.error}, answer.status, answer.headers)
        return StreamingResponse(
            self._events(answer, body["model"]), media_type="text/event-stream"
        )

    async def _events(self, answer: Answer, model: str) -> AsyncIterator[str]:
        def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
            chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0,
                     "model": model, "choices": choices, "usage": usage}  # fmt: skip
            return f"data: {json.dumps(chunk)}\n\n"

        def choice(delta: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
            return [{"index": 0, "delta": delta, "finish_reason": finish}]

        try:
            yield event(choice({"role": "assistant", "content": ""}))
            for piece in answer.pieces:
                if isinstance(piece, threading.Event):
                    while not piece.is_set():
                        await asyncio.sleep(0.005)
                    continue
                yield event(choice({"content": piece} if isinstance(piece, str) else piece))
                await asyncio.sleep(answer.pause)
            if answer.cut:
                yield 'data: {"id": "chat'
                return
            if answer.error:
                yield f"data: {json.dumps({'error': answer.error})}\n\n"
                return
            yield event(choice({}, answer.finish))
            yield event([], USAGE)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise


@contextmanager
def running() -> Iterator[FakeServer]:
    """The server on a free port of loopback, in a thread."""
    fake = FakeServer()
    config = uvicorn.Config(fake.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off",
                            ws="none", timeout_graceful_shutdown=1)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        fake.url = f"http://127.0.0.1:{port}"
        yield fake
    finally:
        server.should_exit = True
        thread.join()
