"""/v1/batches, and that every line of a batch is answered once whatever happens."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from store_samples import ON_SQLITE, Clock
from stored_app import KEYS, ME, YOU, make_app

from pronk.server import batches as batches_module
from pronk.server import files as files_module
from pronk.server.auth import ANONYMOUS, Caller
from pronk.server.batch_input import MOST_ERRORS, check_input, read_input
from pronk.server.batch_run import tokens_of
from pronk.server.batch_runner import Batches, caller_of
from pronk.server.disk import Files
from pronk.server.errors import ApiError
from pronk.server.keys import Key
from pronk.server.storage.batches import StoredBatch, Tokens
from pronk.server.storage.files import FINAL
from pronk.server.store import LEASE_SECONDS, Store

CHAT = "/v1/chat/completions"
USED = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
Json = dict[str, Any]
Answer = Callable[[str, Json, Caller], Awaitable[tuple[int, Json]]]


def line(n: object, **more: object) -> Json:
    return {"custom_id": f"c{n}", "method": "POST", "url": CHAT, "body": {"n": n}} | more


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


async def echo(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
    return 200, {"echo": body, "endpoint": endpoint, "caller": caller.id, "usage": USED}


def files_of(store: Store, folder: Path) -> Files:
    return Files(store, folder, max_bytes=1 << 26)


def runner(store: Store, files: Files, execute: Answer, **more: Any) -> Batches:
    options: Json = {"concurrency": 4, "keys": None, "poll": 0.01, "overload_wait": 0.001}
    return Batches(store, files, execute, **(options | more))


@asynccontextmanager
async def running(*batches: Batches) -> AsyncIterator[None]:
    for one in batches:
        await one.start()
    try:
        yield
    finally:
        for one in batches:
            await one.stop()


def submit(files: Files, data: bytes, id: str = "batch_1", **more: Any) -> str:
    """Makes a batch of nobody's in particular; returns its id."""
    partial = files.partial()
    partial.write(data)
    file = files.new("", partial, filename="in.jsonl", purpose="batch", lifetime=None)
    partial.close()
    now = files.store.database.now()
    values: Json = {"endpoint": CHAT, "completion_window": "24h", "created_at": now,
                    "expires_at": now + 86_400}  # fmt: skip
    files.store.batches.create(StoredBatch(id, "", input_file_id=file.id, **(values | more)))
    return id


async def until(store: Store, id: str, test: Callable[[StoredBatch], object]) -> StoredBatch:
    """The batch once `test` is true of it."""
    for _ in range(6000):
        batch = await asyncio.to_thread(store.batches.get, "", id)
        assert batch is not None
        if test(batch):
            return batch
        await asyncio.sleep(0.01)
    raise AssertionError(f"after a minute: {batch}")


def ended(batch: StoredBatch) -> bool:
    return batch.status in FINAL


def read(files: Files, id: str | None, owner: str = "") -> list[Json]:
    assert id is not None
    path = files.path(files.get(owner, id))
    return [json.loads(text) for text in path.read_bytes().splitlines()]


def run_to_end(store: Store, files: Files, execute: Answer, id: str, **more: Any) -> StoredBatch:
    async def run() -> StoredBatch:
        async with running(runner(store, files, execute, **more)):
            return await until(store, id, ended)

    return asyncio.run(run())


@pytest.fixture
def files(store: Store, tmp_path: Path) -> Files:
    return files_of(store, tmp_path)


# Over HTTP.


@pytest.fixture
def client(store: Store, files: Files) -> Iterator[TestClient]:
    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        if body.get("bad"):
            return 400, {"error": {"message": "bad", "type": "x", "param": None, "code": None}}
        return await echo(endpoint, body, caller)

    batches = runner(store, files, execute, keys=KEYS)
    app = make_app(
        store, [files_module.router, batches_module.router], files=files, batches=batches
    )
    with TestClient(app, headers=ME) as client:
        yield client


def sdk_of(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="pk-me", http_client=client)


def wait_for(sdk: openai.OpenAI, id: str) -> Any:
    for _ in range(6000):
        batch = sdk.batches.retrieve(id)
        if batch.status in FINAL:
            return batch
        time.sleep(0.01)
    raise AssertionError(f"after a minute: {batch}")


def test_lines_are_counted(store: Store, files: Files) -> None:
    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        return (200, {}) if body["n"] % 3 else (400, {"error": {}})

    counted: Counter[str] = Counter()
    id = submit(files, jsonl([line(n) for n in range(9)]))
    run_to_end(store, files, execute, id, on_line=lambda status: counted.update([status]))
    assert counted == {"completed": 6, "failed": 3}


def test_official_client(client: TestClient, clock: Clock) -> None:
    sdk = sdk_of(client)
    lines = [line(n, body={"model": "m", "n": n, "bad": n == 2}) for n in range(5)]
    source = sdk.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    made = sdk.batches.create(
        input_file_id=source.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"a": "b"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.status == "validating"
    assert made.expires_at == made.created_at + 86_400
    done = wait_for(sdk, made.id)
    now = int(clock())
    assert done.model_dump() == {
        "id": made.id, "object": "batch", "endpoint": CHAT, "model": "m", "errors": None,
        "input_file_id": source.id, "completion_window": "24h", "status": "completed",
        "output_file_id": done.output_file_id, "error_file_id": done.error_file_id,
        "created_at": now, "in_progress_at": now, "expires_at": now + 86_400,
        "finalizing_at": now, "completed_at": now, "failed_at": None, "expired_at": None,
        "cancelling_at": None, "cancelled_at": None, "metadata": {"a": "b"},
        "request_counts": {"total": 5, "completed": 4, "failed": 1},
        "usage": {
            "input_tokens": 28, "input_tokens_details": {"cached_tokens": 16},
            "output_tokens": 8, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 36,
        },
    }  # fmt: skip
    good = [json.loads(text) for text in sdk.files.content(done.output_file_id).text.splitlines()]
    assert [one["custom_id"] for one in good] == ["c0", "c1", "c3", "c4"]
    assert good[2]["id"].startswith("batch_req_")
    assert good[2]["error"] is None
    assert good[2]["response"] == {
        "status_code": 200,
        "request_id": good[2]["response"]["request_id"],
        "body": {"echo": lines[3]["body"], "endpoint": CHAT, "caller": "me", "usage": USED},
    }
    (bad,) = (json.loads(text) for text in sdk.files.content(done.error_file_id).text.splitlines())
    assert (bad["custom_id"], bad["response"]["status_code"], bad["error"]) == ("c2", 400, None)
    output = sdk.files.retrieve(done.output_file_id)
    assert (output.purpose, output.expires_at) == ("batch_output", now + 3600)
    assert output.filename == f"{made.id}_output.jsonl"
    assert [one.id for one in sdk.batches.list()] == [made.id]
    sdk.files.delete(source.id)  # nobody reads it any more
    with pytest.raises(openai.ConflictError):
        sdk.batches.cancel(made.id)


def test_wrong_input_fails_with_its_lines(client: TestClient) -> None:
    sdk = sdk_of(client)
    source = sdk.files.create(file=jsonl([line(1), line(1), line(2, url="/v1/x")]), purpose="batch")
    made = sdk.batches.create(input_file_id=source.id, endpoint=CHAT, completion_window="24h")
    failed = wait_for(sdk, made.id)
    assert failed.status == "failed"
    assert failed.failed_at is not None
    assert (failed.in_progress_at, failed.finalizing_at, failed.output_file_id) == (None,) * 3
    assert [(one.line, one.code, one.param) for one in failed.errors.data] == [
        (2, "duplicate_custom_id", "custom_id"), (3, "invalid_url", "url"),
    ]  # fmt: skip


def test_owners_see_their_own_batches_only(client: TestClient) -> None:
    sdk = sdk_of(client)
    source = sdk.files.create(file=jsonl([line(1)]), purpose="batch")
    body = {"input_file_id": source.id, "endpoint": CHAT, "completion_window": "24h"}
    refused = client.post("/v1/batches", json=body, headers=YOU)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input_file_id"
    id = client.post("/v1/batches", json=body).json()["id"]
    assert client.get(f"/v1/batches/{id}", headers=YOU).status_code == 404
    assert client.post(f"/v1/batches/{id}/cancel", headers=YOU).status_code == 404
    assert client.get("/v1/batches", headers=YOU).json()["data"] == []
    assert client.get("/v1/batches/a%00b").status_code == 404
    wait_for(sdk, id)


@ON_SQLITE
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": "file-x\0"}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
        ({"metadata": {"\ud800": "a"}}, "metadata"),
        ({"metadata": {f"{n}": "" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}},
         "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}},
         "output_expires_after.anchor"),
        ({"priority": 1}, "priority"),
    ],
)  # fmt: skip
def test_bad_requests(client: TestClient, change: Json, param: str) -> None:
    body = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}
    answer = client.post(  # httpx itself would not send half of a surrogate pair
        "/v1/batches",
        content=json.dumps(body | change),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@ON_SQLITE
@pytest.mark.parametrize("query", ["limit=0", "limit=101", "order=asc", "after=x", "before=x"])
def test_bad_queries(client: TestClient, query: str) -> None:
    answer = client.get(f"/v1/batches?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0]


# The input.


def errors_of(tmp_path: Path, data: bytes, most: int = 10_000) -> list[tuple[int | None, str]]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    checked = check_input(path, CHAT, most)
    assert all(error.keys() == {"code", "message", "param", "line"} for error in checked.errors)
    return [(error["line"], error["code"]) for error in checked.errors]


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"[1]", "invalid_json_line"),
        (b"\xff", "invalid_json_line"),
        (b"", "invalid_json_line"),
        (b"  \t", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (jsonl([line(9)]).strip() + b" x", "invalid_json_line"),
        (jsonl([line(9)]).strip().replace(b'{"n": 9}', b'{"n": NaN}'), "invalid_json_line"),
        (json.dumps({"custom_id": "c"}).encode(), "missing_required_parameter"),
        (jsonl([line(9, more=1)]).strip(), "unknown_parameter"),
        (jsonl([line(9, custom_id="c0")]).strip(), "duplicate_custom_id"),
        (jsonl([line(9, custom_id="")]).strip(), "invalid_value"),
        (jsonl([line(9, custom_id=9)]).strip(), "invalid_value"),
        (jsonl([line(9, custom_id="x" * 513)]).strip(), "invalid_value"),
        (jsonl([line(9, method="GET")]).strip(), "invalid_method"),
        (jsonl([line(9, url="/v1/completions")]).strip(), "invalid_url"),
        (jsonl([line(9, body=[])]).strip(), "invalid_value"),
        (jsonl([line(9, body={"stream": True})]).strip(), "invalid_value"),
        (jsonl([line(9, body={"x": "y" * 200_000})]).strip(), "line_too_long"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, bad: bytes, code: str) -> None:
    most = 150_000
    assert errors_of(tmp_path, jsonl([line(0)]) + bad + b"\n" + jsonl([line(1)]), most) == [
        (2, code)
    ]
    if bad.strip():
        assert errors_of(tmp_path, jsonl([line(0)]) + bad, most) == [(2, code)]


def test_length_of_a_line(tmp_path: Path) -> None:
    text = jsonl([line(0)]).strip()
    for end in (b"", b"\n"):
        assert errors_of(tmp_path, text + end, len(text) + len(end)) == []
        assert errors_of(tmp_path, text + end, len(text) - 1) == [(1, "line_too_long")]


def test_number_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors_of(tmp_path, b"") == errors_of(tmp_path, b"\n \n") == [(None, "empty_file")]
    monkeypatch.setattr("pronk.server.batch_input.MOST_LINES", 3)
    lines = [line(n) for n in range(5)]
    assert errors_of(tmp_path, jsonl(lines[:3]) + b"\n\n") == []
    assert errors_of(tmp_path, jsonl(lines)) == [(4, "too_many_lines")]
    assert len(errors_of(tmp_path, b"x\n" * 1000)) == MOST_ERRORS


def test_model_of_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    for models, expected in (("mm", "m"), ("mn", None)):
        path.write_bytes(jsonl([line(n, body={"model": m}) for n, m in enumerate(models)]))
        checked = check_input(path, CHAT, 1000)
        assert (checked.total, checked.model, checked.errors) == (2, expected, [])
    assert [(item.line, item.custom_id) for item in read_input(path, CHAT, 1000)] == [
        (1, "c0"), (2, "c1"),
    ]  # fmt: skip


# Running.


def test_texts_that_databases_refuse(store: Store, files: Files) -> None:
    nasty = "a\0b\ud800é\u2028"
    id = submit(files, jsonl([line(nasty, body={"x": nasty, "model": nasty})]))
    batch = run_to_end(store, files, echo, id)
    (got,) = read(files, batch.output_file_id)
    assert (got["custom_id"], got["response"]["body"]["echo"]["x"]) == (f"c{nasty}", nasty)
    assert batch.model is None  # it could not be told


def test_lines_run_side_by_side_up_to_the_limit(store: Store, files: Files) -> None:
    ids = [submit(files, jsonl([line(n) for n in range(12)]), f"batch_{b}") for b in range(2)]
    now = most = 0

    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return 200, {}

    async def run() -> None:
        async with running(runner(store, files, execute, concurrency=5)):
            for id in ids:
                done = await until(store, id, ended)
                assert (done.status, done.completed) == ("completed", 12)

    asyncio.run(run())
    assert most == 5


def test_order_of_the_input_is_kept(store: Store, files: Files) -> None:
    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        await asyncio.sleep(0.02 if body["n"] % 3 == 0 else 0)
        return (200 if body["n"] % 2 else 400), {"n": body["n"]}

    id = submit(files, jsonl([line(n) for n in range(450)]))
    batch = run_to_end(store, files, execute, id, concurrency=50)
    assert (batch.completed, batch.failed) == (225, 225)
    for file, parity in ((batch.output_file_id, 1), (batch.error_file_id, 0)):
        got = [one["response"]["body"]["n"] for one in read(files, file)]
        assert got == list(range(parity, 450, 2))


def test_overloaded_lines_are_tried_again(store: Store, files: Files) -> None:
    tries: Counter[int] = Counter()

    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        tries[body["n"]] += 1
        if tries[body["n"]] <= 2:
            return 429, {}
        if tries[body["n"]] == 3:
            raise ApiError(503, "busy")
        return 200, {}

    batch = run_to_end(store, files, execute, submit(files, jsonl([line(n) for n in range(9)])))
    assert (batch.status, batch.completed, batch.failed) == ("completed", 9, 0)
    assert set(tries.values()) == {4}


def test_line_that_raises_fails_alone(store: Store, files: Files) -> None:
    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        if body["n"] == 1:
            raise ApiError(404, "model: no such model", param="model")
        if body["n"] == 2:
            raise RuntimeError("secret")
        return 200, {}

    batch = run_to_end(store, files, execute, submit(files, jsonl([line(n) for n in range(4)])))
    assert (batch.completed, batch.failed) == (2, 2)
    first, second = (one["response"] for one in read(files, batch.error_file_id))
    assert (first["status_code"], first["body"]["error"]["param"]) == (404, "model")
    assert second["status_code"] == 500
    assert "secret" not in json.dumps(second)


def test_cancelled_batch_keeps_what_is_finished(store: Store, files: Files) -> None:
    stuck: list[int] = []

    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        if body["n"] >= 6:
            try:
                await asyncio.Event().wait()
            finally:
                stuck.append(body["n"])
        return 200, {}

    id = submit(files, jsonl([line(n) for n in range(20)]))

    async def run() -> StoredBatch:
        async with running(runner(store, files, execute)):
            await until(store, id, lambda batch: batch.completed == 6)
            asked = store.batches.cancel("", id)
            assert asked is not None
            assert asked.status == "cancelling"
            return await until(store, id, ended)

    batch = asyncio.run(run())
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("cancelled", 20, 6, 0)
    assert batch.cancelled_at is not None
    assert len(stuck) <= 4  # no line was started afterwards
    assert [one["custom_id"] for one in read(files, batch.output_file_id)] == [
        f"c{n}" for n in range(6)
    ]
    rest = read(files, batch.error_file_id)
    assert [one["custom_id"] for one in rest] == [f"c{n}" for n in range(6, 20)]
    assert all(one["response"] is None for one in rest)
    assert {one["error"]["code"] for one in rest} == {"batch_cancelled"}
    assert store.batches.cancel("", id) == batch


def test_cancelled_before_anybody_ran_it(store: Store, files: Files) -> None:
    id = submit(files, b"nonsense\n")
    store.batches.cancel("", id)
    batch = run_to_end(store, files, echo, id)
    assert (batch.status, batch.errors) == ("cancelled", None)
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


def test_expired_batch_keeps_what_is_finished(store: Store, files: Files, clock: Clock) -> None:
    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        if body["n"] == 3:
            await asyncio.Event().wait()
        return (200 if body["n"] else 400), {}

    id = submit(files, jsonl([line(n) for n in range(4)]))

    async def run() -> StoredBatch:
        async with running(runner(store, files, execute)):
            await until(store, id, lambda batch: batch.finished == 3)
            clock.time += 86_399
            await asyncio.sleep(0.1)
            assert (await until(store, id, lambda batch: True)).status == "in_progress"
            clock.time += 1
            return await until(store, id, ended)

    batch = asyncio.run(run())
    assert (batch.status, batch.completed, batch.failed) == ("expired", 2, 1)
    assert batch.expired_at == int(clock())
    assert [one["custom_id"] for one in read(files, batch.output_file_id)] == ["c1", "c2"]
    first, last = read(files, batch.error_file_id)
    assert (first["custom_id"], first["response"]["status_code"]) == ("c0", 400)
    assert (last["custom_id"], last["error"]["code"]) == ("c3", "batch_expired")


def test_expired_while_no_server_ran(store: Store, files: Files, clock: Clock) -> None:
    id = submit(files, jsonl([line(n) for n in range(3)]))
    clock.time += 86_400
    executed: list[object] = []

    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        executed.append(body)
        return 200, {}

    batch = run_to_end(store, files, execute, id)
    assert (batch.status, executed) == ("expired", [])
    assert len(read(files, batch.error_file_id)) == 3


def test_stop_leaves_lines_to_the_next_start(store: Store, files: Files) -> None:
    id = submit(files, jsonl([line(n) for n in range(30)]))
    executed: Counter[int] = Counter()
    gate = asyncio.Event()

    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        if body["n"] >= 10:
            await gate.wait()
        executed[body["n"]] += 1
        return 200, {}

    async def run() -> None:
        first = runner(store, files, execute)
        await first.start()
        await until(store, id, lambda batch: batch.completed == 10)
        asyncio.get_running_loop().call_later(0.05, gate.set)
        await first.stop(grace=30)  # those in flight have the time to finish
        paused = await until(store, id, lambda batch: True)
        assert (paused.status, paused.completed) == ("in_progress", 14)
        gate.clear()
        second = runner(store, files, execute)
        await second.start()
        await asyncio.sleep(0.1)
        await second.stop()  # those in flight are dropped
        assert (await until(store, id, lambda batch: True)).completed == 14
        gate.set()
        async with running(runner(store, files, execute)):
            done = await until(store, id, ended)
        assert (done.status, done.completed) == ("completed", 30)

    asyncio.run(run())
    assert set(executed.values()) == {1}


def test_database_that_goes_away_for_a_while(
    store: Store, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = submit(files, jsonl([line(n) for n in range(8)]))
    executed: Counter[int] = Counter()
    failures = iter(range(5))
    real = store.batches.finish_line

    def fails(*args: Any) -> None:
        if next(failures, None) is not None:
            raise sa.exc.OperationalError("x", {}, Exception("gone"))
        real(*args)

    monkeypatch.setattr(store.batches, "finish_line", fails)

    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        executed[body["n"]] += 1
        return 200, {}

    batch = run_to_end(store, files, execute, id)
    assert batch.completed == 8
    assert set(executed.values()) == {1}


def test_run_that_fails_is_begun_again(
    store: Store, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pronk.server.batch_runner._RETRY_SECONDS", 0.01)
    id = submit(files, jsonl([line(n) for n in range(8)]))
    failures = iter(range(3))
    real = store.batches.end

    def fails(*args: Any) -> None:
        if next(failures, None) is not None:
            raise RuntimeError("bug")
        real(*args)

    monkeypatch.setattr(store.batches, "end", fails)
    batch = run_to_end(store, files, echo, id)
    assert (batch.status, batch.completed) == ("completed", 8)
    assert len(read(files, batch.output_file_id)) == 8
    inputs = {batch.input_file_id}
    assert {p.name for p in files.folder.iterdir()} == {batch.output_file_id} | inputs


def test_input_whose_bytes_are_gone(store: Store, files: Files) -> None:
    id = submit(files, jsonl([line(1)]))
    for path in files.folder.iterdir():
        path.unlink()
    batch = run_to_end(store, files, echo, id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [error["code"] for error in batch.errors] == ["input_file_missing"]


def test_lines_run_as_the_key_is_now() -> None:
    def keys(**more: Any) -> Any:
        values: Json = {"id": "k", "name": "n", "hash": "", "scopes": frozenset({"inference"}),
                        "created_at": 1}  # fmt: skip
        return SimpleNamespace(all=[Key(**(values | more))])

    assert caller_of(None, "", 5.0) is ANONYMOUS
    found = caller_of(keys(models=frozenset({"m"})), "k", 5.0)
    assert (found.id, found.models) == ("k", {"m"})
    assert caller_of(keys(), "control", 5.0).admin
    for refused, owner, status in (
        (None, "k", 401), (keys(), "", 401), (keys(), "j", 401), (keys(expires_at=5), "k", 401),
        (keys(scopes=frozenset({"files"})), "k", 403),
    ):  # fmt: skip
        with pytest.raises(ApiError) as caught:
            caller_of(refused, owner, 5.0)
        assert caught.value.status == status


def test_usage_of_all_apis() -> None:
    assert tokens_of({"usage": USED}) == Tokens(7, 4, 2)
    responses = {
        "input_tokens": 5, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip
    assert tokens_of({"usage": responses}) == Tokens(5, 1, 3)
    assert tokens_of({"usage": {"prompt_tokens": 4, "total_tokens": 4}}) == Tokens(4, 0, 0)
    assert tokens_of({"usage": None}) == tokens_of({}) == Tokens()


# Several processes, and dead ones.


def test_two_servers_share_the_batches(tmp_path: Path, postgres: str) -> None:
    stores = [Store(tmp_path, postgres) for _ in range(2)]
    both = [files_of(store, tmp_path) for store in stores]
    ids = [submit(both[0], jsonl([line(n) for n in range(25)]), f"batch_{b}") for b in range(12)]
    by: Counter[int] = Counter()

    def execute_of(server: int) -> Answer:
        async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
            await asyncio.sleep(0.001)
            by[server] += 1
            return 200, {"by": server}

        return execute

    async def run() -> None:
        servers = [runner(stores[i], both[i], execute_of(i)) for i in range(2)]
        async with running(*servers):
            for id in ids:
                batch = await until(stores[0], id, ended)
                assert (batch.status, batch.completed) == ("completed", 25)
                got = read(both[1], batch.output_file_id)
                assert [one["custom_id"] for one in got] == [f"c{n}" for n in range(25)]
                assert len({one["response"]["body"]["by"] for one in got}) == 1

    asyncio.run(run())
    assert sum(by.values()) == 12 * 25
    assert set(by) == {0, 1}
    for store in stores:
        store.close()


KILLED = """
import asyncio, os, sys
from pathlib import Path
from pronk.server.batch_runner import Batches
from pronk.server.disk import Files
from pronk.server.store import Store
folder = Path(sys.argv[1])
store = Store(folder, sys.argv[2] or None)
files = Files(store, folder, max_bytes=1 << 26)
log = os.open(folder / "executed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

async def execute(endpoint, body, caller):
    await asyncio.sleep(0.02)
    os.write(log, b"%d\\n" % body["n"])
    return 200, {"n": body["n"], "pid": os.getpid()}

async def main():
    batches = Batches(store, files, execute, concurrency=8, keys=None, poll=0.01)
    await batches.start()
    print("started", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_killed_batch_of_200_finishes_every_line_once(
    tmp_path: Path, database_url: str | None
) -> None:
    store = Store(tmp_path, database_url)
    id = submit(files_of(store, tmp_path), jsonl([line(n) for n in range(200)]))
    store.close()
    log = tmp_path / "executed"
    command = [sys.executable, "-c", KILLED, str(tmp_path), database_url or ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"started\n"
        while not log.exists() or log.read_bytes().count(b"\n") < 60:
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    late = 0.0 if database_url is None else LEASE_SECONDS + 1  # until its lease has run out
    store = Store(tmp_path, database_url, clock=lambda: time.time() + late)
    files = files_of(store, tmp_path)
    found = store.batches.get("", id)
    assert found is not None
    assert 0 < found.completed < 200
    before = store.batches.finished_lines(id)
    assert len(before) == found.completed
    again: list[int] = []

    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        again.append(body["n"])
        return 200, {"n": body["n"]}

    batch = run_to_end(store, files, execute, id)
    assert (batch.status, batch.total, batch.completed) == ("completed", 200, 200)
    got = read(files, batch.output_file_id)
    assert [one["custom_id"] for one in got] == [f"c{n}" for n in range(200)]
    assert sorted(again) == sorted(set(range(200)) - {number - 1 for number in before})
    executed = Counter(int(n) for n in log.read_bytes().split())
    assert max(executed.values()) == 1
    assert before <= {n + 1 for n in executed}
    store.close()


DIES_AT = """
import asyncio, os, sys
from pathlib import Path
from pronk.server.batch_runner import Batches
from pronk.server.disk import Files, Partial
from pronk.server.store import Store
folder, where = Path(sys.argv[1]), sys.argv[2]
store = Store(folder)
files = Files(store, folder, max_bytes=1 << 26)

async def execute(endpoint, body, caller):
    return 200 if body["n"] else 400, {"n": body["n"]}

def die(*_):
    os._exit(9)

rows = store.batches
if where == "while the files are written":
    kept = []
    real = Partial.keep
    def keep(partial, id):
        if kept:
            die()
        kept.append(id)
        real(partial, id)
    Partial.keep = keep
else:
    setattr(rows, where, die)

async def main():
    await Batches(store, files, execute, concurrency=2, keys=None, poll=0.01).start()
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["begin", "finalize", "while the files are written", "end"])
def test_death_between_any_two_steps(tmp_path: Path, where: str) -> None:
    store = Store(tmp_path)
    id = submit(files_of(store, tmp_path), jsonl([line(n) for n in range(5)]))
    store.close()
    died = subprocess.run(
        [sys.executable, "-c", DIES_AT, str(tmp_path), where], check=False, timeout=60
    )
    assert died.returncode == 9
    store = Store(tmp_path)
    files = files_of(store, tmp_path)

    async def execute(endpoint: str, body: Json, caller: Caller) -> tuple[int, Json]:
        assert where == "begin", "finished already"
        return 200 if body["n"] else 400, {"n": body["n"]}

    batch = run_to_end(store, files, execute, id)
    assert (batch.status, batch.completed, batch.failed) == ("completed", 4, 1)
    assert len(read(files, batch.output_file_id)) == 4
    assert len(read(files, batch.error_file_id)) == 1
    names = {batch.input_file_id, batch.output_file_id, batch.error_file_id}
    assert {path.name for path in files.folder.iterdir()} == names
    store.close()
