"""No field of OpenAI's client is silently lost: each is honoured, or refused by name with 400."""

import importlib.metadata
from typing import Any

import httpx
import pytest

from conformance import openapi_coverage as coverage
from server.live import Live

DOCUMENT = coverage.Document()
SERVED = [one for one in coverage.ENDPOINTS if DOCUMENT.serves(one)]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, Any] = {
    "chat.completions.create": CHAT,
    "chat.completions.update": {"metadata": {}},
    "completions.create": {"model": "tiny", "prompt": "a"},
    "embeddings.create": {"model": "tiny", "input": "a"},
    "batches.create": {
        "input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h",
    },
    "responses.create": {"model": "tiny", "input": "a"},
    "responses.input_tokens.count": {"model": "tiny", "input": "a"},
    "conversations.create": {},
    "conversations.update": {"metadata": {}},
    "conversations.items.create": {"items": [{"role": "user", "content": "a"}]},
}  # fmt: skip
"""What is good by itself."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from engine.tiny_models import write_gguf
    from server.live import live_server

    folder = tmp_path_factory.mktemp("coverage")
    model = write_gguf(folder / "tiny.gguf", **{"llama.context_length": 2048})
    with live_server([model], folder / "data") as server:
        yield server


@pytest.mark.parametrize("endpoint", SERVED, ids=lambda one: one.name)
def test_nothing_is_silently_missing(tiny: Live, endpoint: coverage.Endpoint) -> None:
    found = coverage.compare(DOCUMENT, endpoint)
    relied_on = [name for name in found.missing if found.read[name]]
    assert relied_on == []
    for name in [*(n for n, state in found.sent.items() if state != "supported"), "no_such_field"]:
        check_refused(tiny, endpoint, name)


def check_refused(tiny: Live, endpoint: coverage.Endpoint, name: str) -> None:
    url = tiny.url + endpoint.path.replace("{id}", "x_1").replace("{model}", "tiny")
    if endpoint.name in BODIES:
        body = {**BODIES[endpoint.name], name: {"x": 1}}
        reply = httpx.request(endpoint.method, url, json=body, timeout=60)
    elif endpoint.name == "files.create":
        files = {"file": ("a", b"x")}
        data = {"purpose": "batch", name: "1"}
        reply = httpx.post(url, files=files, data=data, timeout=60)
    elif endpoint.method == "get" and endpoint.params is not None:
        reply = httpx.get(url, params={name: "1"}, timeout=60)
    else:
        return
    assert reply.status_code == 400, (name, reply.text)
    error = reply.json()["error"]
    assert error["param"] == name
    assert name in error["message"]


def test_the_page_is_up_to_date() -> None:
    """Of the client that it was written for; run the script after a change."""
    page = coverage.PAGE.read_text()
    version = importlib.metadata.version("openai")
    if f"Python client {version}," not in page:
        pytest.skip(f"the page was written for another client than {version}")
    assert page == coverage.page()
