"""Models of a server: names, loading on demand, memory that is short, adapters."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import Live, live_server
from sdk import HI, choices_of, client

from engine.tiny_models import CONFIG, write_gguf
from peft_folders import lora_tensors, write_adapter
from pronk import LLM

CHAT = "/v1/chat/completions"
CONTROL = {"Authorization": "Bearer ctl"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models and an adapter of the first."""
    folder = tmp_path_factory.mktemp("models")
    names = ("first", "second", "third")
    found = {name: write_gguf(folder / f"{name}.gguf", seed=i) for i, name in enumerate(names)}
    return found | {"lora": write_adapter(folder / "lora", lora_tensors(CONFIG, size=2.0))}


@pytest.fixture
def server(files: dict[str, Path], tmp_path: Path) -> Iterator[Live]:
    sources = [files[name] for name in ("first", "second", "third")]
    aliases = {"Team/Favourite": "second"}
    with live_server(sources, tmp_path / "data", control_token="ctl", aliases=aliases) as one:
        yield one


@pytest.fixture
def sdk(server: Live) -> Iterator[openai.OpenAI]:
    with client(server) as one:
        yield one


def say(sdk: openai.OpenAI, model: str) -> str:
    answer = sdk.chat.completions.create(model=model, messages=HI, temperature=0, max_tokens=12)
    return choices_of(answer)[0].text


def own(path: Path, **adapter: Any) -> str:
    with LLM(path, adapters=adapter) as llm:
        name = next(iter(adapter), None)
        return llm.chat(HI, temperature=0, max_tokens=12, adapter=name).text


def loaded(server: Live) -> list[str]:
    return [entry.name for entry in server.service.models if entry.loaded]


def control(server: Live, what: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{what}", json=body, headers=CONTROL, timeout=60)


def post(server: Live, model: str) -> httpx.Response:
    body = {"model": model, "messages": HI, "max_tokens": 2}
    return httpx.post(server.url + CHAT, json=body, timeout=60)


def test_names(server: Live, sdk: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in sdk.models.list()}
    assert list(models) == ["first", "second", "third"]
    assert models["first"]["loaded"]
    assert models["first"]["max_model_len"] == CONFIG.context
    assert not models["second"]["loaded"]
    for name in ("second", "SECOND", "second.gguf", "second:latest", "team/favourite"):
        assert sdk.models.retrieve(name).id == "second"
    for name in ("fourth", "firs", "/first", "a/b"):
        with pytest.raises(openai.NotFoundError) as missing:
            sdk.models.retrieve(name)
        assert missing.value.code == "model_not_found"


def test_loading_on_demand(server: Live, sdk: openai.OpenAI, files: dict[str, Path]) -> None:
    assert loaded(server) == ["first"]
    expected = own(files["second"])
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: say(sdk, "team/favourite"), range(8))) == {expected}
    assert loaded(server) == ["first", "second"]
    assert say(sdk, "first") == own(files["first"]) != expected
    answer = sdk.chat.completions.create(model="TEAM/favourite", messages=HI, max_tokens=1)
    assert answer.model == "second"


def test_control(server: Live, sdk: openai.OpenAI) -> None:
    assert httpx.post(f"{server.url}/v1/load_model", json={"model": "third"}).status_code == 401
    assert control(server, "load_model", model="third").json() == {"id": "third", "loaded": True}
    assert loaded(server) == ["first", "third"]
    reply = control(server, "unload_model", model="third")
    assert reply.json() == {"id": "third", "loaded": False}
    assert control(server, "unload_model", model="third").status_code == 200
    assert control(server, "load_model", model="fourth").status_code == 404
    assert loaded(server) == ["first"]
    with sdk.chat.completions.create(
        model="first", messages=HI, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
        if server.service.models.default.users:
            busy = control(server, "unload_model", model="first")
            assert busy.status_code in (200, 409)  # 200: it was at its end just then
    server.until(lambda: server.service.models.default.users == 0)
    assert control(server, "unload_model", model="first").status_code == 200
    assert loaded(server) == []
    assert say(sdk, "first")


class Memory:
    """Room for so many models."""

    def __init__(self, server: Live, room: int) -> None:
        self.server, self.room = server, room

    def __call__(self) -> int:
        return 0 if len(loaded(self.server)) >= self.room else 1 << 34


def test_the_model_that_rested_longest_goes(
    server: Live, sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(server, room=2)
    monkeypatch.setattr("pronk.engine.llm.free_memory", memory)
    say(sdk, "second")
    say(sdk, "first")
    assert say(sdk, "third")
    assert loaded(server) == ["first", "third"]
    assert say(sdk, "second")
    assert loaded(server) == ["second", "third"]
    memory.room = 0
    assert control(server, "unload_model", model="second").status_code == 200
    reply = post(server, "second")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_capacity")
    assert loaded(server) == []
    memory.room = 1
    assert say(sdk, "first")


def test_models_in_use_stay(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pronk.engine.llm.free_memory", Memory(server, room=1))
    entry = server.service.models.default
    entry.users += 1  # an answer that takes long
    replies = [post(server, "second") for _ in range(2)]
    for reply in replies:
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) > 0
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", "model_capacity")
        assert "in use" in error["message"]
    assert post(server, "first").status_code == 200
    entry.users -= 1
    assert post(server, "second").status_code == 200
    assert loaded(server) == ["second"]


def test_a_model_whose_file_is_gone(files: dict[str, Path], tmp_path: Path) -> None:
    gone = write_gguf(tmp_path / "gone.gguf")
    with live_server([files["first"], gone], tmp_path / "data") as server:
        gone.unlink()
        reply = post(server, "gone")
        assert reply.status_code == 500
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_loadable", "model")
        assert str(tmp_path) not in error["message"]
        assert post(server, "first").status_code == 200


def test_adapters(server: Live, sdk: openai.OpenAI, files: dict[str, Path]) -> None:
    path, lora = str(files["lora"]), {"lora_name": "style"}
    made = control(server, "load_lora_adapter", **lora, lora_path=path).json()
    assert (made["id"], made["root"]) == ("style", "first")
    assert sdk.models.retrieve("style").id == "style"
    assert [model.id for model in sdk.models.list()][:2] == ["first", "style"]
    plain, styled = own(files["first"]), own(files["first"], style=files["lora"])
    assert plain != styled
    with ThreadPoolExecutor(6) as pool:
        names = ["first", "style"] * 3
        assert list(pool.map(lambda name: say(sdk, name), names)) == [plain, styled] * 3
    assert sdk.chat.completions.create(model="style", messages=HI, max_tokens=1).model == "style"
    for name in ("style", "first", " ", "second.gguf"):
        again = control(server, "load_lora_adapter", lora_name=name, lora_path=path)
        assert again.status_code == 400, name
    bad = control(server, "load_lora_adapter", lora_name="x", lora_path=str(files["first"].parent))
    assert bad.status_code == 400
    assert control(server, "unload_model", model="first").status_code == 200
    assert say(sdk, "style") == styled, "loaded again with its model"
    assert control(server, "unload_lora_adapter", **lora).status_code == 200
    assert post(server, "style").status_code == 404
    assert control(server, "unload_lora_adapter", **lora).status_code == 404
    assert say(sdk, "first") == plain


def test_adapters_from_the_start(files: dict[str, Path], tmp_path: Path) -> None:
    import uvicorn

    from pronk.server.app import create_app
    from pronk.server.settings import ServerSettings

    ready = threading.Event()
    app = create_app(
        ServerSettings(data_dir=tmp_path),
        [str(files["first"])],
        adapters={"style": files["lora"]},
        on_ready=lambda service: ready.set(),
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        while not server.started:
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        body = {"model": "style", "messages": HI, "temperature": 0, "max_tokens": 12}
        reply = httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=body, timeout=60).json()
        styled = own(files["first"], style=files["lora"])
        assert reply["choices"][0]["message"]["content"] == styled
    finally:
        server.should_exit = True
        thread.join()
