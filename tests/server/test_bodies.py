"""Bodies of many requests at a time."""

import asyncio
import json
from typing import Any

import pytest
from service_app import scope_of

from pronk.server.bodies import BodyLimitLayer
from pronk.server.metrics import Metrics

LIMIT = 100
FULL = 16


class Reader:
    """An application that reads a body and answers when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.read = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
        self.read += 1
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Requests:
    def __init__(self) -> None:
        self.app, self.metrics = Reader(), Metrics()
        larger = {"/v1/files": 100 * LIMIT}
        self.layer = BodyLimitLayer(self.app, limit=LIMIT, metrics=self.metrics, larger=larger)

    def send(self, size: int, path: str = "/v1/chat/completions") -> "asyncio.Task[list[Any]]":
        return asyncio.ensure_future(self._one(size, path))

    async def _one(self, size: int, path: str) -> list[Any]:
        half = [b"x" * (size // 2), b"x" * (size - size // 2)]
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": half.pop(0), "more_body": bool(half)}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.layer(scope_of(path), receive, send)
        return sent

    async def until_read(self, n: int) -> None:
        while self.app.read < n:
            await asyncio.sleep(0)


def test_bodies_together_have_a_limit() -> None:
    async def run() -> None:
        requests = Requests()
        held = [requests.send(LIMIT) for _ in range(FULL)]
        await requests.until_read(FULL)
        start, body = await requests.send(10)
        assert start["status"] == 503
        assert (b"retry-after", b"1") in start["headers"]
        assert json.loads(body["body"])["error"]["code"] == "overloaded"
        counted = requests.metrics.registry.get_sample_value
        assert counted("pronk_requests_refused_total", {"reason": "bodies"}) == 1
        requests.app.go.set()
        assert [(await task)[0]["status"] for task in held] == [200] * FULL
        assert (await requests.send(LIMIT))[0]["status"] == 200

    asyncio.run(run())


def test_a_refused_or_dropped_request_holds_nothing() -> None:
    async def run() -> None:
        requests = Requests()
        for _ in range(3 * FULL):
            assert (await requests.send(LIMIT + 1))[0]["status"] == 413
        for _ in range(3 * FULL):
            task, before = requests.send(LIMIT), requests.app.read
            await requests.until_read(before + 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        requests.app.go.set()
        assert (await requests.send(LIMIT))[0]["status"] == 200

    asyncio.run(run())


def test_what_goes_to_the_disk_does_not_count() -> None:
    async def run() -> None:
        requests = Requests()
        files = [requests.send(50 * LIMIT, "/v1/files") for _ in range(FULL)]
        await requests.until_read(FULL)
        requests.app.go.set()
        assert (await requests.send(LIMIT))[0]["status"] == 200
        assert [(await task)[0]["status"] for task in files] == [200] * FULL

    asyncio.run(run())
