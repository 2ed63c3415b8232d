"""The whole server on a free port of loopback, in a thread of the tests' process."""

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from pronk.server.app import create_app
from pronk.server.connections import Http
from pronk.server.service import Service
from pronk.server.settings import ServerSettings

PATIENCE = 30
"""Seconds until a test gives up; nothing is measured with them."""


@dataclass(frozen=True, slots=True)
class Live:
    """A server that runs."""

    url: str
    service: Service

    def until(self, truth: Any) -> None:
        """Waits until `truth()` holds."""
        for _ in range(PATIENCE * 100):
            if truth():
                return
            threading.Event().wait(0.01)
        raise AssertionError("that did not happen")

    @property
    def busy(self) -> int:
        """Requests that are in the engines."""
        loaded = [entry.loaded for entry in self.service.models if entry.loaded]
        return sum(len(one.llm.engine.scheduler.running) for one in loaded)

    def aborted(self) -> float:
        """Answers of the first model that were ended because nobody waited for them any more."""
        labels = {"model_name": self.service.models.default.name, "finished_reason": "abort"}
        value = self.service.metrics.registry.get_sample_value("vllm:request_success_total", labels)
        return value or 0.0

    def leave(self, path: str, body: Any) -> None:
        """Asks and goes away as soon as the answer is being computed, without a word of it."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=PATIENCE)
        try:
            kind = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), kind)
            self.until(lambda: self.busy > 0)
        finally:
            connection.close()


@contextmanager
def live_server(
    sources: Sequence[str | Path], data_dir: Path, *, options: Any = None, **settings: Any
) -> Iterator[Live]:
    """`sources`: its models; `options`: of `LLM`; `settings`: of `ServerSettings`."""
    services: list[Service] = []
    app = create_app(
        ServerSettings(data_dir=data_dir, **settings),
        [str(source) for source in sources],
        options=options or {},
        on_ready=services.append,
    )
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, access_log=False, http=Http, ws="none",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", services[0])
    finally:
        server.should_exit = True
        thread.join()
