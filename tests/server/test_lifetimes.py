"""What becomes of an answer whose client goes away, and of answers when the server stops."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import Live, live_server
from sdk import HI, client

from engine.tiny_models import write_gguf
from pronk.core.errors import CheckpointError
from pronk.server.app import create_app
from pronk.server.response_background import Responses
from pronk.server.settings import ServerSettings
from pronk.server.store import Store

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that answers one request at a time."""
    folder = tmp_path_factory.mktemp("small")
    model = write_gguf(folder / "tiny.gguf", **{"llama.context_length": 32768})
    with live_server([model], folder / "data", options={"max_batch": 1}) as server:
        yield server


def endless(**more: Any) -> dict[str, Any]:
    """An answer that takes long."""
    return {"model": "tiny", "messages": HI, "ignore_eos": True, "seed": 1, **more}


class Vanishing:
    """A client that says goodbye by closing its socket."""

    def __init__(self, server: Live, path: str, body: dict[str, Any]) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + content)

    def go(self) -> None:
        self.socket.close()


def engine_of(server: Live) -> Any:
    loaded = server.service.models.default.loaded
    assert loaded
    return loaded.llm.engine


def queued(server: Live) -> int:
    scheduler = engine_of(server).scheduler
    return len(scheduler.running) + len(scheduler.waiting)


def check_nothing_is_left(server: Live) -> None:
    stats = engine_of(server).stats
    server.until(lambda: queued(server) == 0 and stats().blocks_used == 0)
    server.until(lambda: server.service.limits.in_flight == 0)
    server.until(lambda: server.service.models.default.users == 0)
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        [line] = [x for x in text.splitlines() if x.startswith(name + "{")]
        assert line.endswith(" 0.0"), line


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_client_that_goes_ends_its_answer(small: Live, path: str, stream: bool) -> None:
    body = endless(stream=stream)
    if path != CHAT:
        del body["messages"]
        body |= {"prompt": ["a", "b"], "max_tokens": 20000}
    one = Vanishing(small, path, body)
    small.until(lambda: queued(small) == (1 if path == CHAT else 2))
    if stream:
        assert one.socket.recv(100).startswith(b"HTTP/1.1 200")
    one.go()
    check_nothing_is_left(small)


@pytest.mark.parametrize("stream", [True, False])
def test_also_while_it_waits(small: Live, stream: bool) -> None:
    first = Vanishing(small, CHAT, endless())
    small.until(lambda: small.busy == 1)
    others = [Vanishing(small, CHAT, endless(stream=stream, n=2)) for _ in range(3)]
    small.until(lambda: queued(small) == 7)
    for other in others:
        other.go()
    small.until(lambda: queued(small) == 1)
    assert small.busy == 1, "the one that runs goes on"
    first.go()
    check_nothing_is_left(small)
    with client(small) as sdk:
        assert sdk.chat.completions.create(model="tiny", messages=HI, max_tokens=2).choices


def test_many_that_come_and_go(small: Live) -> None:
    async def one(http: httpx.AsyncClient, i: int) -> None:
        body = endless(stream=i % 2 == 0, max_tokens=20000)
        try:
            async with http.stream("POST", CHAT, json=body, timeout=0.02 * (i % 7) + 0.01) as reply:
                async for _ in reply.aiter_lines():
                    if i % 3 == 0:
                        return
        except httpx.TimeoutException:
            pass

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=small.url) as http:
            await asyncio.gather(*(one(http, i) for i in range(40)))

    asyncio.run(all_of_them())
    check_nothing_is_left(small)


def test_the_server_stops_when_answers_are_done(tmp_path: Path) -> None:
    """A stop lets what runs come to its end; then there is nothing left."""
    model = write_gguf(tmp_path / "tiny.gguf")
    answers: list[Any] = []
    body = {"model": "tiny", "messages": HI, "max_tokens": 60, "ignore_eos": True}

    def ask(url: str) -> None:
        answers.append(httpx.post(url + CHAT, json=body, timeout=60).json())

    with live_server([model], tmp_path / "data") as server:
        threads = [threading.Thread(target=ask, args=(server.url,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        server.until(lambda: server.service.limits.in_flight == 3 or len(answers) == 3)
    for thread in threads:
        thread.join()
    assert [a["usage"]["completion_tokens"] for a in answers] == [60, 60, 60]
    assert server.service.models.default.loaded is None
    assert not server.service.ready


def test_a_stop_ends_what_takes_too_long(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", **{"llama.context_length": 1 << 18})
    with live_server([model], tmp_path / "data", options={"max_batch": 1}) as server:
        stream = Vanishing(server, CHAT, endless(stream=True))
        server.until(lambda: server.busy == 1)
    assert server.service.models.default.loaded is None
    stream.go()


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    app = create_app(ServerSettings(data_dir=tmp_path / "data"), [str(model)])
    model.write_bytes(model.read_bytes()[:5000])

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(CheckpointError):
        asyncio.run(start())
    Store(tmp_path / "data").close()  # which another server would hold


def test_what_cannot_be_stopped_does_not_keep_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise OSError("the database is gone")

    monkeypatch.setattr(Responses, "stop", broken)
    app = create_app(
        ServerSettings(data_dir=tmp_path / "data"), [str(write_gguf(tmp_path / "tiny.gguf"))]
    )

    async def start() -> None:
        async with app.router.lifespan_context(app):
            watch = app.state.service.responses._watch
        watch.cancel()

    with pytest.raises(OSError, match="the database is gone"):
        asyncio.run(start())
    assert app.state.service.models.default.loaded is None
    Store(tmp_path / "data").close()
