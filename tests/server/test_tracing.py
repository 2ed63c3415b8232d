"""Spans of requests: their attributes, their parents, and that they cost nothing when off."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from service_app import add_key, bearer, exchange, make_app, scope_of

from pronk.core.errors import UserError
from pronk.server import tracing

sdk = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter",
    reason="no opentelemetry-sdk: `pip install 'pronk[otel]'`",
)

CHAT = "/v1/chat/completions"


class Traced:
    """An application, and the spans that its requests leave."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.exporter = sdk.InMemorySpanExporter()
        self.provider = tracing.provider_for(self.exporter)
        self.app: FastAPI = make_app(folder, tracing=self.provider, **settings)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def spans(self) -> list[Any]:
        found = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return found


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Callable[..., Traced]]:
    made: list[Traced] = []

    def trace(**settings: Any) -> Traced:
        made.append(Traced(tmp_path / f"data{len(made)}", **settings))
        return made[-1]

    yield trace
    for one in made:
        one.app.state.service.store.close()
        one.provider.shutdown()


def test_a_span_for_each_request(traced: Callable[..., Traced], tmp_path: Path) -> None:
    secret = add_key(tmp_path / "keys", "alice")
    it = traced(keys=tmp_path / "keys")
    answer = it.client.post(CHAT, headers=bearer(secret), params={"used": 7})
    [span] = it.spans()
    assert span.name == "chat tiny"
    assert span.kind.name == "SERVER"
    assert span.parent is None
    assert span.resource.attributes["service.name"] == "pronk"
    assert dict(span.attributes) == {
        "http.request.method": "POST", "http.route": CHAT, "url.path": CHAT,
        "http.response.status_code": 200, "pronk.request_id": answer.headers["x-request-id"],
        "pronk.key": "alice", "gen_ai.operation.name": "chat", "gen_ai.provider.name": "pronk",
        "gen_ai.request.model": "tiny", "gen_ai.response.model": "tiny",
        "gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 0,
        "gen_ai.response.finish_reasons": ("stop",),
    }  # fmt: skip


def test_a_span_lies_below_its_callers(traced: Callable[..., Traced]) -> None:
    it = traced()
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    for header in (f"00-{trace_id}-{span_id}-01", "00-nonsense-01"):
        it.client.post(CHAT, headers={"traceparent": header})
    below, alone = it.spans()
    assert below.context.trace_id == int(trace_id, 16)
    assert below.parent.span_id == int(span_id, 16)
    assert alone.parent is None


def test_failures_are_marked_and_quote_nothing(traced: Callable[..., Traced]) -> None:
    it = traced()
    for path, status, marked in (
        ("/v1/fail", 500, True), ("/v1/fail_late", 200, False), ("/v1/load", 401, False),
        ("/v1/nowhere?key=secret", 404, False),
    ):  # fmt: skip
        it.client.post(path)
        [span] = it.spans()
        assert span.attributes["http.response.status_code"] == status
        assert span.status.is_ok is not marked
        assert "secret" not in span.to_json()
        assert span.events == ()
        if "fail" in path:
            assert span.attributes["error.type"] == "ValueError"
    assert it.client.post("/v1/nowhere").status_code == 404
    assert it.spans()[0].name == "POST unmatched"


def test_what_machines_ask_all_day_is_not_traced(traced: Callable[..., Traced]) -> None:
    it = traced()
    it.client.get("/health")
    it.client.get("/metrics")
    assert it.spans() == []


def test_a_client_that_goes_away_leaves_a_span(traced: Callable[..., Traced]) -> None:
    it = traced()
    scope = scope_of("/v1/echo", {"content-type": "application/json"})
    asyncio.run(exchange(it.app, scope, []))
    [span] = it.spans()
    assert span.attributes["http.route"] == "/v1/echo"


def test_the_last_spans_are_sent_when_the_application_ends(tmp_path: Path) -> None:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = sdk.InMemorySpanExporter()
    provider = tracing.provider_for(sdk.InMemorySpanExporter())
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000))
    app = make_app(tmp_path, tracing=provider)
    with TestClient(app) as client:
        client.post(CHAT)
        assert exporter.get_finished_spans() == ()
    assert [span.name for span in exporter.get_finished_spans()] == ["chat tiny"]
    app.state.service.store.close()


def test_spans_arrive_at_a_collector() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="no OTLP exporter")
    arrived: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            arrived.append((self.path, body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            provider = tracing.start_tracing(f"http://127.0.0.1:{server.server_port}/v1/traces")
            with provider.get_tracer("test").start_as_current_span("a span of ours"):
                pass
            provider.shutdown()  # sends what is left
        finally:
            server.shutdown()
            thread.join()
    assert [path for path, _ in arrived] == ["/v1/traces"]
    assert b"pronk" in arrived[0][1]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"--otlp-endpoint: traces need the package .*pronk\[otel"):
        tracing.start_tracing("http://127.0.0.1:1")


def test_nothing_of_it_is_loaded_when_off() -> None:
    """FastAPI itself loads the interfaces, but neither what makes spans nor what sends them."""
    code = (
        "import sys; from pathlib import Path;"
        "from fastapi import FastAPI; from pronk.server.layers import add_layers;"
        "from pronk.server.metrics import Metrics; from pronk.server.settings import *;"
        "add_layers(FastAPI(), ServerSettings(data_dir=Path('x')), Metrics());"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk',"
        " 'opentelemetry.exporter'))])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout == "[]\n"
