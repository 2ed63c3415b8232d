"""What is logged of a request, what is not, and what its client gets back."""

import asyncio
import json
import logging
import logging.config
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from service_app import add_key, bearer, exchange, make_app, scope_of
from starlette.types import Message

from pronk.server.logs import current_request, log_config, request_id

CHAT = "/v1/chat/completions"
Open = Callable[..., TestClient]


@pytest.fixture
def open_app(tmp_path: Path) -> Iterator[Open]:
    apps: list[FastAPI] = []

    def open_one(**settings: Any) -> TestClient:
        apps.append(make_app(tmp_path / f"data{len(apps)}", **settings))
        return TestClient(apps[-1], raise_server_exceptions=False)

    yield open_one
    for app in apps:
        app.state.service.store.close()


class Lines:
    """What a logging configuration writes."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self) -> list[str]:
        return self._capsys.readouterr().err.splitlines()

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text()]


@pytest.fixture
def configured(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Lines]]:
    def configure(format: Any, **more: Any) -> Lines:
        logging.config.dictConfig(log_config(format, **more))
        return Lines(capsys)

    yield configure
    for name in ("pronk", "uvicorn", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def test_a_request_is_one_object(
    open_app: Open, configured: Callable[..., Lines], tmp_path: Path
) -> None:
    secret = add_key(tmp_path / "keys", "alice")
    client = open_app(keys=tmp_path / "keys")
    lines = configured("json")
    answer = client.post(CHAT, headers=bearer(secret), params={"used": 7})
    [line] = lines.objects()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line.pop("ms") >= 0
    assert line == {
        "level": "info", "event": "request", "logger": "pronk.server.logs",
        "request_id": answer.headers["x-request-id"], "method": "POST", "path": CHAT,
        "status": 200, "key": "alice", "model": "tiny", "prompt_tokens": 7,
        "completion_tokens": 0, "finish_reason": "stop",
    }  # fmt: skip


def test_a_request_is_one_line_of_text(open_app: Open, configured: Callable[..., Lines]) -> None:
    client = open_app()
    lines = configured("text")
    client.post(CHAT, headers={"x-request-id": "my-id"})
    [line] = lines.text()
    assert re.fullmatch(
        r"\S+Z INFO    request request_id=my-id method=POST path=/v1/chat/completions status=200"
        r" ms=\S+ key=anonymous model=tiny prompt_tokens=0 completion_tokens=0 finish_reason=stop",
        line,
    )


@pytest.mark.parametrize("sane", ["a", "req_12", "0b0e-4.x:/+=@~_", "x" * 128])
def test_ids_of_clients_are_kept(sane: str, open_app: Open) -> None:
    answer = open_app().post(CHAT, headers={"X-Request-ID": sane})
    assert answer.headers["x-request-id"] == answer.headers["request-id"] == sane


@pytest.mark.parametrize("wild", ["", "x" * 129, "a b", "a\tb", "é", '"', "{}", "a,b"])
def test_ids_that_could_be_something_else_are_not(wild: str, open_app: Open) -> None:
    client = open_app()
    given = client.post(CHAT, headers={"x-request-id": wild.encode()}).headers["x-request-id"]
    assert re.fullmatch(r"req_[0-9a-f]{24}", given)
    again = client.post(CHAT).headers["x-request-id"]
    assert again != given


def test_neither_prompts_nor_keys_are_logged(
    open_app: Open, configured: Callable[..., Lines], tmp_path: Path
) -> None:
    secret = add_key(tmp_path / "keys", "alice")
    client = open_app(keys=tmp_path / "keys")
    for format in ("json", "text"):
        lines = configured(format, level="DEBUG")
        for headers in (bearer(secret), bearer("pk-wrong"), {"x-api-key": secret}):
            for path in (CHAT, "/v1/echo", "/v1/fail", "/v1/fail_late", "/v1/nowhere"):
                client.post(
                    path, headers=headers, params={"key": "my secret"}, json={"p": "my secret"}
                )
        written = "\n".join(lines.text())
        assert "alice" in written
        assert "ValueError" in written
        for hidden in (secret, "pk-wrong", "secret"):
            assert hidden not in written


def test_what_fails_is_an_answer_with_an_id_and_a_place_in_the_log(
    open_app: Open, configured: Callable[..., Lines]
) -> None:
    client = open_app()
    lines = configured("json")
    answer = client.post("/v1/fail")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == (
        "internal error (ValueError); the server's log says more"
    )
    error, request = lines.objects()
    assert (error["level"], error["event"]) == ("error", "request failed")
    assert error["error"] == "ValueError"
    assert re.match(r"\S+service_app\.py:\d+ fail < ", error["where"])
    assert error["request_id"] == request["request_id"] == answer.headers["x-request-id"]
    assert request["status"] == 500


def test_an_answer_that_breaks_off_just_ends(
    open_app: Open, configured: Callable[..., Lines]
) -> None:
    client = open_app()
    lines = configured("json")
    sent = asyncio.run(_watch(client.app, "/v1/fail_late"))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1]["more_body"]  # so the server closes the connection, and the client sees it
    assert [line["event"] for line in lines.objects()] == ["request failed", "request"]


async def _watch(app: Any, path: str) -> list[Message]:
    """What is sent to a client that stays."""
    sent: list[Message] = []
    body = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if not body:
            await asyncio.Event().wait()
        return body.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope_of(path), receive, send)
    return sent


def test_a_client_that_goes_away_is_seen(open_app: Open, configured: Callable[..., Lines]) -> None:
    client = open_app()
    app: Any = client.app
    lines = configured("json")
    scope = scope_of("/v1/echo", {"content-type": "application/json"})
    sent = asyncio.run(exchange(app, scope, [], then={"type": "http.disconnect"}))
    [line] = lines.objects()
    assert line["status"] == 499
    assert not sent or sent[0]["status"] >= 400
    registry = app.state.service.metrics.registry
    gone = registry.get_sample_value(
        "pronk_requests_aborted_by_client_total", {"route": "/v1/echo"}
    )
    assert gone == 1
    assert registry.get_sample_value("pronk_http_requests_in_flight") == 0


def test_machines_that_ask_all_day_are_quiet(
    open_app: Open, configured: Callable[..., Lines]
) -> None:
    client = open_app()
    lines = configured("json")
    client.get("/health")
    client.get("/metrics")
    assert lines.objects() == []
    client.post("/health")
    assert [line["status"] for line in lines.objects()] == [405]
    lines = configured("json", level="DEBUG")
    client.get("/health")
    assert [line["path"] for line in lines.objects() if line["event"] == "request"] == ["/health"]


def test_uvicorns_lines_come_the_same_way(configured: Callable[..., Lines]) -> None:
    lines = configured("json")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request %d", 5)
    logging.getLogger("uvicorn.access").info("127.0.0.1 - GET /?key=secret")
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    warned, failed = lines.objects()
    assert (warned["event"], warned["logger"]) == ("Invalid HTTP request 5", "uvicorn.error")
    assert (failed["error"], failed["reason"]) == ("OSError", "No space left on device")


def test_a_line_stays_a_line(configured: Callable[..., Lines]) -> None:
    lines = configured("text")
    logging.getLogger("pronk.x").warning("a\nb", extra={"fields": {"path": "/c\n d", "e": ""}})
    [line] = lines.text()
    assert line.endswith('WARNING a\\nb path="/c\\n d" e=""')


def test_outside_of_requests_there_is_none() -> None:
    assert current_request() is None
    assert request_id() is None


def test_two_requests_at_once_keep_their_ids(open_app: Open) -> None:
    client = open_app()
    app: Any = client.app

    async def both() -> list[list[Message]]:
        scopes = [scope_of(CHAT, {"x-request-id": f"r{i}"}) for i in range(20)]
        return await asyncio.gather(*(exchange(app, scope, [b""]) for scope in scopes))

    for i, sent in enumerate(asyncio.run(both())):
        assert (b"x-request-id", b"r%d" % i) in sent[0]["headers"]
    assert current_request() is None


def test_logs_go_to_the_stderr_of_now() -> None:
    assert log_config("text")["handlers"]["stderr"]["stream"] is sys.stderr
