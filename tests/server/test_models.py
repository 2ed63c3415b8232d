"""Loading and unloading: whoever waits, is cancelled, fails or comes at the same time."""

import asyncio
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.tiny_models import CONFIG, write_gguf
from peft_folders import lora_tensors, write_adapter
from pronk.core.errors import MemoryLimitError, UserError
from pronk.engine.llm import LLM
from pronk.server import models as models_module
from pronk.server.auth import ANONYMOUS
from pronk.server.errors import ApiError
from pronk.server.metrics import Metrics
from pronk.server.models import Models
from pronk.server.service import Call, Service

PATIENCE = 30


class Loader:
    """Stands before the loading of models: counts, waits to be let through, fails."""

    def __init__(self) -> None:
        self._make = models_module._make
        self._lock = threading.Lock()
        self.begun = self.now = self.most = 0
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []

    def __call__(self, *args: Any) -> LLM:
        with self._lock:
            self.begun += 1
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            assert self.gate.wait(PATIENCE)
            if self.errors:
                raise self.errors.pop(0)
            return self._make(*args)
        finally:
            with self._lock:
                self.now -= 1


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader()
    monkeypatch.setattr(models_module, "_make", loader)
    return loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        write_gguf(folder / f"{name}.gguf", seed=seed)
        tensors = lora_tensors(CONFIG, seed=seed)
        write_adapter(folder / f"lora-{name}", tensors)
    return folder


def using(folder: Path, use: Callable[[Models], Awaitable[None]]) -> None:
    async def main() -> None:
        models = Models([str(folder / "a.gguf"), str(folder / "b.gguf")], {}, Metrics())
        try:
            await use(models)
        finally:
            await models.close()
        assert not any(entry.loaded or entry.users for entry in models)

    asyncio.run(main())


async def until(truth: Callable[[], bool]) -> None:
    for _ in range(PATIENCE * 100):
        if truth():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("that did not happen")


def test_all_who_wait_for_a_model_share_its_loading(folder: Path, loader: Loader) -> None:
    async def use(models: Models) -> None:
        leases = await asyncio.gather(*(models.acquire("a") for _ in range(10)))
        assert loader.begun == 1
        assert len({id(lease.llm) for lease in leases}) == 1
        assert models.default.users == 10
        for lease in leases:
            lease.release()
            lease.release()  # again, which counts once

    using(folder, use)


def test_who_is_cancelled_leaves_the_loading_to_the_others(folder: Path, loader: Loader) -> None:
    """The thread that loads cannot be stopped: a second one beside it would take the memory that it
    is about to fill for free."""

    async def use(models: Models) -> None:
        loader.gate.clear()
        first = asyncio.create_task(models.acquire("a"))
        await until(lambda: loader.begun == 1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        others = [asyncio.create_task(models.acquire(name)) for name in ("a", "b")]
        await asyncio.sleep(0.05)
        loader.gate.set()
        for lease in await asyncio.gather(*others):
            lease.release()
        assert (loader.begun, loader.most) == (2, 1)

    using(folder, use)


def test_a_failure_is_everybody_s_and_the_next_one_tries_again(
    folder: Path, loader: Loader
) -> None:
    async def use(models: Models) -> None:
        loader.errors.append(UserError("damaged"))
        found = await asyncio.gather(
            *(models.acquire("a") for _ in range(10)), return_exceptions=True
        )
        assert [str(error) for error in found] == ["damaged"] * 10
        assert loader.begun == 1
        (await models.acquire("a")).release()

    using(folder, use)


def test_the_end_waits_for_a_loading_that_nobody_wants(folder: Path, loader: Loader) -> None:
    async def use(models: Models) -> None:
        loader.gate.clear()
        task = asyncio.create_task(models.acquire("a"))
        await until(lambda: loader.begun == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        threading.Timer(0.05, loader.gate.set).start()

    using(folder, use)
    assert loader.now == 0


def test_the_model_unused_for_longest_makes_room(folder: Path, loader: Loader) -> None:
    async def use(models: Models) -> None:
        lease = await models.acquire("a")
        loader.errors.append(MemoryLimitError("too large"))
        with pytest.raises(ApiError) as refused:
            await models.acquire("b")
        assert refused.value.status == 503
        assert refused.value.headers["Retry-After"]
        lease.release()
        loader.errors.append(MemoryLimitError("too large"))
        (await models.acquire("b")).release()
        assert [entry.loaded is not None for entry in models] == [False, True]

    using(folder, use)


def test_a_model_that_is_wanted_while_it_goes_comes_back(folder: Path) -> None:
    async def use(models: Models) -> None:
        (await models.acquire("a")).release()
        going = asyncio.create_task(models.unload("a"))
        await asyncio.sleep(0)
        lease = await models.acquire("a")
        assert await going is True
        with pytest.raises(ApiError) as refused:
            await models.unload("a")
        assert refused.value.status == 409
        lease.release()
        await models.unload_idle(0)
        assert models.default.loaded is None
        assert await models.unload("a") is False

    using(folder, use)


def test_an_unloading_goes_on_when_who_asked_is_cancelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be kept of a model is written."""
    closed: list[bool] = []
    close = LLM.close

    def slow(llm: LLM) -> None:
        time.sleep(0.05)
        close(llm)
        closed.append(True)

    monkeypatch.setattr(LLM, "close", slow)

    async def use(models: Models) -> None:
        (await models.acquire("a")).release()
        task = asyncio.create_task(models.unload_idle(0))
        await until(lambda: models.default.loaded is None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    using(folder, use)
    assert closed == [True]


def test_two_adapters_of_one_name_at_once(folder: Path) -> None:
    async def use(models: Models) -> None:
        found = await asyncio.gather(
            *(models.load_adapter("x", folder / f"lora-{name}", name) for name in "ab"),
            return_exceptions=True,
        )
        assert sum(isinstance(one, ApiError) for one in found) == 1
        lease = await models.acquire("x")
        assert lease.adapter == lease.name == "x"
        lease.release()
        gone = await asyncio.gather(
            models.unload_adapter("x"), models.unload_adapter("x"), return_exceptions=True
        )
        assert not [error for error in gone if error and not isinstance(error, ApiError)]
        for name in "ab":
            await models.load_adapter("x", folder / f"lora-{name}", name)
            await models.unload_adapter("x")

    using(folder, use)


def test_an_adapter_in_use_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(models: Models) -> None:
        await models.load_adapter("x", folder / "lora-a")
        lease = await models.acquire("x")
        engine, gate = lease.llm.engine, threading.Event()
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: gate.wait(PATIENCE) and step())
        request = lease.llm.prompter.completion("hello", {"max_tokens": 400}, adapter="x")
        lease.worker.submit([request], lambda: None)
        await until(lambda: engine.has_work)
        with pytest.raises(ApiError, match="in use by 1") as refused:
            await models.unload_adapter("x")
        assert refused.value.status == 409
        lease.worker.cancel([request])
        gate.set()
        await until(lambda: request.finished)
        await models.unload_adapter("x")
        lease.release()

    using(folder, use)


def test_an_adapter_that_goes_while_its_model_is_loaded(folder: Path, loader: Loader) -> None:
    async def use(models: Models) -> None:
        await models.load_adapter("x", folder / "lora-a", "a")
        await models.unload("a")
        loader.gate.clear()
        loading = asyncio.create_task(models.acquire("a"))
        await until(lambda: loader.begun == 2)
        dropping = asyncio.create_task(models.unload_adapter("x"))
        await asyncio.sleep(0.05)
        loader.gate.set()
        lease = await loading
        await dropping
        assert lease.llm.adapters == ()
        lease.release()
        await models.load_adapter("x", folder / "lora-b", "a")

    using(folder, use)


def test_what_a_model_has_to_say_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_gguf(tmp_path / "a.gguf")
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    async def main() -> None:
        models = Models([str(model)], {"kv_disk_bytes": 1 << 20}, Metrics())
        with caplog.at_level("WARNING", "pronk"):
            (await models.acquire("a")).release()
        await models.close()

    asyncio.run(main())
    assert "KV blocks are kept on disk" in caplog.text


def test_time_that_a_model_takes_to_load_counts(tmp_path: Path) -> None:
    from pronk.server.settings import ServerSettings

    service: Any = Service.__new__(Service)
    service.settings = ServerSettings(data_dir=tmp_path, request_timeout=50)
    call = Call(service, ANONYMOUS, began=1000.0)
    assert call.deadline(None) == 1050
    assert call.deadline(20) == 1020
    assert call.deadline(80) == 1050


def test_a_model_is_loaded_again_without_an_adapter_whose_folder_is_gone(
    folder: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "lora"
    write_adapter(lora, lora_tensors(CONFIG, seed=0))

    async def use(models: Models) -> None:
        await models.load_adapter("mine", lora)
        await models.unload("a")
        shutil.rmtree(lora)
        lease = await models.acquire("a")
        assert list(lease.llm.adapters) == []
        lease.release()

    using(folder, use)
