"""Who is let in where; and that no route is open by accident."""

import asyncio
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from service_app import Service, add_key, bearer, make_app, scope_of
from starlette.routing import Mount, Route
from starlette.types import Message

from engine.tiny_models import write_gguf
from pronk.core.errors import PronkError
from pronk.server.app import create_app
from pronk.server.auth import Caller, caller, check_routes, undeclared_routes
from pronk.server.errors import ApiError
from pronk.server.keys import Keys
from pronk.server.metrics import Metrics
from pronk.server.settings import ServerSettings
from pronk.server.store import Store

Open = Callable[..., TestClient]


@pytest.fixture
def open_app(tmp_path: Path) -> Iterator[Open]:
    apps: list[FastAPI] = []

    def open_one(**settings: Any) -> TestClient:
        apps.append(make_app(tmp_path / f"data{len(apps)}", **settings))
        return TestClient(apps[-1])

    yield open_one
    for app in apps:
        app.state.service.store.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


CHAT = "/v1/chat/completions"


def failures(client: TestClient) -> dict[str, float]:
    """What the metrics say of requests turned away."""
    app: Any = client.app
    family = next(
        metric for metric in app.state.service.metrics.registry.collect()
        if metric.name == "pronk_auth_failures"
    )  # fmt: skip
    return {sample.labels["reason"]: sample.value for sample in family.samples}


def test_without_keys_everybody_is_anonymous(open_app: Open) -> None:
    client = open_app()
    assert client.post(CHAT).json() == {"name": "anonymous", "id": ""}
    assert client.post(CHAT, headers=bearer("sk-whatever")).json()["name"] == "anonymous"
    assert client.get("/metrics").status_code == 200
    assert client.post("/v1/files", content=b"abc").json() == 3


@pytest.mark.parametrize("token", [None, "", "the-token"])
def test_without_keys_nobody_controls_the_server_but_by_its_token(
    open_app: Open, token: str | None
) -> None:
    client = open_app(control_token=token)
    for headers in ({}, bearer("wrong"), bearer(""), {"x-api-key": "wrong"}):
        refused = client.post("/v1/load", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "control_token_required"
    if token:
        assert client.post("/v1/load", headers=bearer(token)).json() == "control"
        assert client.post(CHAT, headers=bearer(token)).json() == {"name": "control", "id": ""}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": "Bearer "}, "missing_api_key"),
        ({"Authorization": "Basic YTpi"}, "missing_api_key"),
        ({"Authorization": "Bearer pk-wrong"}, "invalid_api_key"),
        ({"Authorization": "Bearer \xff\xe9".encode("latin-1")}, "invalid_api_key"),
        ({"x-api-key": "pk-wrong"}, "invalid_api_key"),
    ],
)
def test_with_keys_a_valid_one_is_needed(
    headers: dict[str, Any], code: str, open_app: Open, file: Path
) -> None:
    add_key(file, "alice")
    client = open_app(keys=file)
    refused = client.post(CHAT, headers=headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == 'Bearer realm="pronk"'
    assert refused.json()["error"]["type"] == "authentication_error"
    assert refused.json()["error"]["code"] == code
    assert failures(client) == {code: 1}


def test_a_key_comes_as_openai_or_anthropic_send_it_and_never_in_the_query(
    open_app: Open, file: Path
) -> None:
    secret = add_key(file, "alice")
    client = open_app(keys=file)
    for headers in (bearer(secret), {"authorization": f"bearer  {secret} "}, {"x-api-key": secret}):
        assert client.post(CHAT, headers=headers).json()["name"] == "alice"
    for name in ("api_key", "key", "token", "x-api-key", "authorization"):
        assert client.post(CHAT, params={name: secret}).status_code == 401


def test_owners_are_the_ids_of_keys(open_app: Open, file: Path) -> None:
    secrets = [add_key(file, name) for name in ("a", "b")]
    client = open_app(keys=file)
    ids = [client.post(CHAT, headers=bearer(secret)).json()["id"] for secret in secrets]
    assert ids[0] != ids[1]
    assert all(id.startswith("key_") for id in ids)


def test_expired_and_removed_keys_open_nothing(open_app: Open, file: Path) -> None:
    old = add_key(file, "old", expires_at=1)
    client = open_app(keys=file)
    refused = client.post(CHAT, headers=bearer(old))
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_scopes(open_app: Open, file: Path) -> None:
    routes = {"inference": ("POST", CHAT), "files": ("POST", "/v1/files"),
              "metrics": ("GET", "/metrics"), "admin": ("POST", "/v1/load")}  # fmt: skip
    for scope in routes:
        add_key(file, f"not-{scope}", scopes=frozenset(routes) - {scope})
        secret = add_key(file, scope, scopes=frozenset({scope}))
        client = open_app(keys=file)
        for wanted, (method, path) in routes.items():
            answer = client.request(method, path, headers=bearer(secret))
            if wanted == scope:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 403
            error = answer.json()["error"]
            assert error["code"] == "missing_scope"
            assert error["message"] == (
                f"the key {scope!r} lacks the scope {wanted!r}; it has: {scope}"
            )


def test_the_control_token_works_beside_keys(open_app: Open, file: Path) -> None:
    inference = add_key(file, "alice")
    client = open_app(keys=file, control_token="the-token")
    assert client.post("/v1/load", headers=bearer("the-token")).json() == "control"
    assert client.post("/v1/load", headers=bearer(inference)).status_code == 403
    assert client.post(CHAT, headers=bearer("the-token")).json()["id"] == "control"


def test_keys_are_for_models(open_app: Open, file: Path) -> None:
    secret = add_key(file, "alice", models=frozenset({"a", "alias-of-b"}))
    client = open_app(keys=file)
    for model in ("a", "b"):
        assert client.get("/v1/models", params={"model": model}, headers=bearer(secret)).is_success
    refused = client.get("/v1/models", params={"model": "c"}, headers=bearer(secret))
    assert refused.status_code == 403
    assert refused.json()["error"] == {
        "message": "model: the key 'alice' is not for 'c'; its models: a, alias-of-b",
        "type": "permission_error", "param": "model", "code": "model_not_allowed",
    }  # fmt: skip


def test_errors_have_the_shape_of_their_api(open_app: Open, file: Path) -> None:
    add_key(file, "alice")
    refused = open_app(keys=file).post("/v1/messages", json={})
    assert refused.status_code == 401
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "authentication_error"
    assert refused.json()["request_id"] == refused.headers["request-id"]


def test_without_a_key_nothing_is_read_and_no_route_answers(open_app: Open, file: Path) -> None:
    secret = add_key(file, "alice")
    client = open_app(keys=file)
    app: Any = client.app

    async def receive() -> Message:
        raise AssertionError("the body was read")

    for path in ("/v1/echo", "/v1/files", "/v1/nowhere", "/openapi.json", "/health/x"):
        sent: list[Message] = []

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        asyncio.run(app(scope_of(path, {"content-length": "5"}), receive, send))
        assert sent[0]["status"] == 401
        assert client.post(path, content=b"{").status_code == 401
        assert client.put(path).status_code == 401
    assert client.post("/v1/nowhere", headers=bearer(secret)).status_code == 404
    assert client.get("/health").json() == "ok"
    assert failures(client) == {"missing_api_key": 15}


def test_a_caller_cannot_be_changed() -> None:
    who = Caller("", "a", frozenset())
    with pytest.raises(dataclasses.FrozenInstanceError):
        who.name = "b"  # type: ignore[misc]
    with pytest.raises(ApiError, match="not for 'm'; its models: none"):
        dataclasses.replace(who, models=frozenset()).check_model("m")


# Deny by default.


def test_every_route_of_the_small_application_asks_for_a_caller(open_app: Open) -> None:
    app: Any = open_app().app
    assert undeclared_routes(app) == []
    check_routes(app)


def test_a_route_without_a_caller_is_found_wherever_it_is() -> None:
    inner, outer, guarded = APIRouter(), APIRouter(prefix="/outer"), APIRouter()

    async def plain(request: Request) -> None: ...

    async def indirect(who: Annotated[Caller, Depends(caller("files"))]) -> Caller:
        return who

    inner.add_api_route("/inner", plain)
    outer.include_router(inner, prefix="/deep")
    outer.add_api_route("/declared", plain, dependencies=[Depends(caller("admin"))])
    outer.add_api_route("/indirect", plain, dependencies=[Depends(indirect)])
    guarded.add_api_route("/by-its-router", plain)
    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(outer)
    app.include_router(guarded, dependencies=[Depends(caller("inference"))])
    app.add_api_route("/health", plain)
    app.add_api_route("/static/{name}", plain)
    app.router.routes.append(Route("/raw", plain))
    app.router.routes.append(Mount("/mounted", routes=[Route("/x", plain)]))
    app.add_api_websocket_route("/socket", plain)
    assert undeclared_routes(app) == [
        "/openapi.json", "/outer/deep/inner", "/raw", "/mounted", "/socket",
    ]  # fmt: skip
    with pytest.raises(PronkError, match=r"routes without a caller: /openapi\.json, /outer/deep"):
        check_routes(app)


def test_documents_are_open_only_as_declared_routes() -> None:
    app = FastAPI()
    assert undeclared_routes(app) == ["/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"]


# The real application.


def calls_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Each method and path that the application answers, parameters filled in with `x`."""
    for route in iter_route_contexts(app.routes):
        for method in sorted(route.methods or ()):
            yield method, re.sub(r"{[^}]*}", "x", route.path or "")


@pytest.fixture
def real_app(tmp_path: Path, file: Path) -> Iterator[FastAPI]:
    """The server's application, not started: its doors are shut before anything is needed."""
    model = write_gguf(tmp_path / "tiny.gguf")
    app = create_app(ServerSettings(data_dir=tmp_path / "data"), [str(model)])
    keys = None if not file.exists() else Keys(file)
    app.state.service = Service(
        ServerSettings(data_dir=tmp_path, control_token="the-token"), Metrics(),
        Store(tmp_path / "store", None), usage=None, keys=keys,  # type: ignore[arg-type]
    )  # fmt: skip
    yield app
    app.state.service.store.close()


OPEN = {"/", "/static/x", "/health", "/ready"}


def test_no_route_answers_without_a_key(real_app: FastAPI, file: Path) -> None:
    add_key(file, "alice")
    real_app.state.service.keys = Keys(file)
    client = TestClient(real_app)
    calls = [(method, path) for method, path in calls_of(real_app) if path not in OPEN]
    assert len(calls) > 15
    for method, path in calls:
        for headers in ({}, bearer("pk-wrong"), {"x-api-key": "the-token-x"}):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"]
            assert "the-token" not in answer.text


def test_control_routes_are_never_open(real_app: FastAPI, file: Path) -> None:
    """Neither without keys nor to a key that may do all else."""
    client = TestClient(real_app)
    control = [
        (method, path)
        for method, path in calls_of(real_app)
        if re.search("load|adapter|admin|shutdown", path)
    ]
    assert len(control) >= 4
    body = {"model": "tiny", "lora_name": "x", "lora_path": "x"}
    for method, path in control:
        refused = client.request(method, path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            401, "control_token_required",
        ), path  # fmt: skip
    everything_else = frozenset({"inference", "files", "metrics"})
    secret = add_key(file, "alice", scopes=everything_else)
    real_app.state.service.keys = Keys(file)
    for method, path in control:
        refused = client.request(method, path, json=body, headers=bearer(secret))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
