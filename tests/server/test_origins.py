"""Web pages of others and a server without keys."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from live import live_server
from service_app import add_key, bearer
from starlette.responses import PlainTextResponse

from engine.tiny_models import write_gguf
from pronk.core.errors import UserError
from pronk.server.metrics import Metrics
from pronk.server.origins import OriginLayer, check_host_name, check_origin

HERE = "127.0.0.1:8000"
FOREIGN = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


def client(**options: Any) -> TestClient:
    metrics = Metrics()
    layer = OriginLayer(
        PlainTextResponse("ok"), **{"hosts": (), "origins": (), "metrics": metrics, **options}
    )
    return TestClient(layer)


@pytest.mark.parametrize(
    "host",
    [
        HERE, "127.0.0.1", "localhost:8000", "localhost", "[::1]:8000", "[::ffff:1.2.3.4]",
        "192.168.1.5:80", "pronk", "pronk:8000", "box.local", "host.docker.internal:8000",
        "a.b.localhost", "llm.example.com:8000", "LLM.example.com.", "127.1",
    ],
)  # fmt: skip
def test_names_of_this_server(host: str) -> None:
    answer = client(hosts=["llm.example.com"]).post("/v1/x", headers={"Host": host})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "127.0.0.1.nip.io:8000",
        "localhost.evil.example", "llm.example.com.evil.example", "evil.example.", "notlocal.com",
        "1.2.3.4@evil.example",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_names_that_somebody_else_may_have(host: str, method: str) -> None:
    """By such a name the page of somebody else may be, for the browser, a page of this server."""
    server = client(hosts=["llm.example.com"])
    answer = server.request(method, "/v1/x", headers={"Host": host, "Sec-Fetch-Site": "none"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"
    assert "--allow-host" in answer.json()["error"]["message"]


def test_probes_may_use_any_name() -> None:
    for path in ("/health", "/ready"):
        assert client().get(path, headers={"Host": "evil.example"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        FOREIGN,
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "http://127.0.0.1:8000.evil.example"},
        {"Origin": "http://127.0.0.1:3000", "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://friend.example.evil.example"},
    ],
)
def test_pages_of_others(headers: dict[str, str]) -> None:
    server = client(origins=["https://friend.example"])
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        answer = server.request(method, "/v1/files", headers={"Host": HERE, **headers})
        assert answer.status_code == 403, method
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers
    assert server.get("/v1/files", headers={"Host": HERE, **headers}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": f"http://{HERE}", "Sec-Fetch-Site": "same-origin"},
        {"Origin": f"http://{HERE}"},
        {"Origin": "https://chat.example.com", "Sec-Fetch-Site": "same-origin"},  # proxy, new Host
        {"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "chrome-extension://abcdefgh", "Sec-Fetch-Site": "none"},
        {"Origin": "app://obsidian.md"},
    ],
)
def test_whoever_is_welcome(headers: dict[str, str]) -> None:
    server = client(origins=["https://friend.example"])
    assert server.post("/v1/x", headers={"Host": HERE, **headers}).status_code == 200
    everybody = client(origins=["*"])
    assert everybody.post("/v1/x", headers={"Host": HERE, **headers, **FOREIGN}).is_success


def test_errors_are_of_the_api_that_was_called() -> None:
    answer = client().post("/api/chat", headers={"Host": "evil.example"})
    assert answer.json()["error"].startswith("Host: ")
    answer = client().post("/v1/messages", headers={"Host": HERE, **FOREIGN})
    assert answer.json()["error"]["type"] == "permission_error"


def test_a_server_without_keys(server_url: str) -> None:
    """A form with a file is what any page may send without asking first."""
    form: Any = {"files": {"file": ("x.txt", b"planted")}, "data": {"purpose": "user_data"}}
    before = httpx.get(f"{server_url}/v1/files").json()["data"]
    answer = httpx.post(f"{server_url}/v1/files", headers=FOREIGN, **form)
    assert answer.status_code == 403
    assert httpx.get(f"{server_url}/v1/files").json()["data"] == before
    rebound = httpx.get(f"{server_url}/v1/files", headers={"Host": "evil.example"})
    assert rebound.status_code == 403
    own = httpx.get(f"{server_url}/v1/models", headers={"Host": "localhost:1"})
    assert own.status_code == 200


def test_a_server_for_pages_of_one_origin(tiny_model: Path, tmp_path: Path) -> None:
    friend = {"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-y"}
    with live_server([tiny_model], tmp_path, allow_origins=(friend["Origin"],)) as live:
        path = f"{live.url}/tokenize"
        answer = httpx.post(path, json={"model": "tiny", "content": "a"}, headers=friend)
        assert answer.headers["access-control-allow-origin"] == friend["Origin"]
        assert answer.status_code == 200
        preflight = httpx.options(path, headers={**friend, **asked})
        assert preflight.headers["access-control-allow-headers"] == "x-y"
        foreign = httpx.options(path, headers={**FOREIGN, **asked})
        assert foreign.status_code == 400
        assert "access-control-allow-origin" not in foreign.headers
        assert httpx.post(path, json={}, headers=FOREIGN).status_code == 403


def test_a_server_with_keys_answers_to_every_name(tiny_model: Path, tmp_path: Path) -> None:
    """A page cannot send a key that it does not know."""
    file = tmp_path / "keys.json"
    secret = add_key(file, "alice")
    with live_server([tiny_model], tmp_path / "data", api_key_file=file) as live:
        headers = {"Host": "llm.example.com"}
        assert httpx.get(f"{live.url}/version", headers=headers).status_code == 401
        known = httpx.get(f"{live.url}/version", headers={**headers, **bearer(secret)})
        assert known.status_code == 200


@pytest.mark.parametrize("origin", ["evil", "http://", "http://a/", "http://a/b", "a b", ""])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(UserError, match=r"^--allow-origin: .* is no origin"):
        check_origin(origin)


@pytest.mark.parametrize("name", ["http://a", "a:80", "a/b", "", "*", "a..b"])
def test_what_is_no_name_of_a_host(name: str) -> None:
    with pytest.raises(UserError, match=r"^--allow-host: .* is no name"):
        check_host_name(name)


def test_origins_and_names_as_they_are_given() -> None:
    for origin in ("*", "http://localhost:3000", "https://a.example", "app://obsidian.md"):
        assert check_origin(origin) == origin
    assert check_host_name("LLM.Example.com") == "llm.example.com"
