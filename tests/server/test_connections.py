"""Clients that connect and dawdle, of the server's HTTP connections."""

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from live import PATIENCE

from pronk.server import connections
from pronk.server.connections import Http, Warnings, backlog, most_connections

BIG = 64 << 20


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes it was sent; /big with many."""
    n, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        n, more = n + len(message["body"]), message["more_body"]
    body = bytes(BIG) if scope["path"] == "/big" else b"%d bytes" % n
    start = {"type": "http.response.start", "status": 200, "headers": []}
    start["headers"] = [(b"content-length", b"%d" % len(body))]
    await send(start)
    for i in range(0, len(body), 1 << 20):
        more = i + (1 << 20) < len(body)
        await send({"type": "http.response.body", "body": body[i : i + (1 << 20)],
                    "more_body": more})  # fmt: skip


@pytest.fixture
def server() -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, http=Http, ws="none", lifespan="off", log_config=None,
        access_log=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
    assert not thread.is_alive()


def until(truth: Any) -> None:
    for _ in range(PATIENCE * 100):
        if truth():
            return
        threading.Event().wait(0.01)
    raise AssertionError("that did not happen")


@contextmanager
def connected(server: uvicorn.Server) -> Iterator[socket.socket]:
    address = server.servers[0].sockets[0].getsockname()
    with socket.create_connection(address, timeout=PATIENCE) as client:
        yield client


def closed(client: socket.socket) -> bool:
    """Whether the server hangs up instead of answering."""
    try:
        return client.recv(1000) == b""
    except ConnectionResetError:
        return True


def ask(client: socket.socket, head: str, body: bytes = b"") -> bytes:
    client.sendall(f"{head}\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return answer(client)


def answer(client: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"bytes"):
        piece = client.recv(1000)
        assert piece, "the server hung up"
        answer += piece
    return answer


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-More:"])
def test_a_head_that_never_ends(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(Http, "head_seconds", 0.05)
    with connected(server) as client:
        client.sendall(said)
        assert closed(client)
    until(lambda: not server.server_state.connections)


def test_a_further_head_that_never_ends(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(server) as client:
        assert ask(client, "POST / HTTP/1.1", b"abc").endswith(b"3 bytes")
        monkeypatch.setattr(Http, "head_seconds", 0.05)
        client.sendall(b"GET / HTTP/1.1\r\nHo")
        assert closed(client)


def test_a_body_that_never_comes(server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http, "body_seconds", 0.05)
    with connected(server) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
        assert closed(client)
    until(lambda: not server.server_state.tasks)


def test_a_body_that_comes_too_slowly(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then is no way to stay."""
    monkeypatch.setattr(Http, "body_seconds", 0.05)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n"
    with connected(server) as client:
        client.sendall(head)
        try:
            for _ in range(5000):
                client.sendall(b"x")
                threading.Event().wait(0.005)
        except OSError:
            return
    raise AssertionError("the server reads on")


def test_large_bodies_have_more_time(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has come counts: no limit of the time as such."""
    monkeypatch.setattr(Http, "body_seconds", 0.05)
    monkeypatch.setattr(Http, "body_rate", 1.0)
    with connected(server) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n" + bytes(1000))
        threading.Event().wait(0.3)
        client.sendall(bytes(1000))
        assert answer(client).endswith(b"2000 bytes")


def test_an_answer_that_nobody_reads(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Http, "read_seconds", 0.05)
    with connected(server) as client:
        client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: server.server_state.tasks)
        until(lambda: not server.server_state.tasks)
    until(lambda: not server.server_state.connections)


def test_usual_clients_notice_nothing(server: uvicorn.Server) -> None:
    with connected(server) as client:
        for n in (0, 1, 100_000):
            assert ask(client, "POST / HTTP/1.1", bytes(n)).endswith(b"%d bytes" % n)


def test_idle_connections_make_room(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "file_limit", lambda: 16)
    idle = [socket.create_connection(server.servers[0].sockets[0].getsockname()) for _ in range(40)]
    try:
        with connected(server) as client:
            assert ask(client, "POST / HTTP/1.1", b"ab").endswith(b"2 bytes")
            until(lambda: len(server.server_state.connections) <= most_connections(16))
    finally:
        for one in idle:
            one.close()


def test_descriptors_are_left_for_everything_else() -> None:
    for files in (16, 256, 1024, 65_536, 1 << 20):
        assert 1 <= backlog(files) <= 2048
        assert files // 2 <= most_connections(files) < files - backlog(files)


def test_a_flood_is_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio tells of a connection that it cannot accept, over and over."""
    monkeypatch.setattr(Warnings, "_told_at", float("-inf"))
    others: list[Any] = []

    class Loop:
        def time(self) -> float:
            return 5.0

        def default_exception_handler(self, context: Any) -> None:
            others.append(context)

    loop: Any = Loop()
    for _ in range(100):
        Warnings.of_loop(loop, {"exception": OSError(errno.EMFILE, "Too many open files")})
    assert [record.getMessage() for record in caplog.records] == [
        "too many connections: some are closed or wait"
    ]
    Warnings.of_loop(loop, {"exception": OSError(errno.EPIPE, "Broken pipe")})
    assert len(others) == 1
