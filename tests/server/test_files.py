"""/v1/files, and what happens to the bytes."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from store_samples import ON_SQLITE, Clock, batch
from stored_app import ME, YOU, make_app

from pronk.server import files as files_module
from pronk.server.disk import Files, Partial
from pronk.server.errors import ApiError
from pronk.server.store import Store
from pronk.server.upload import Form, boundary_of

LIMIT = 3_000_000


@pytest.fixture
def files(store: Store, tmp_path: Path) -> Files:
    return Files(store, tmp_path, max_bytes=LIMIT)


@pytest.fixture
def client(store: Store, files: Files) -> Iterator[TestClient]:
    with TestClient(make_app(store, [files_module.router], files=files), headers=ME) as client:
        yield client


def on_disk(files: Files) -> set[str]:
    return {path.name for path in files.folder.iterdir()}


def upload(client: TestClient, data: bytes = b"abc", **fields: Any) -> Any:
    fields = {"purpose": "user_data"} | fields
    name = fields.pop("name", "a.txt")
    return client.post("/v1/files", files={"file": (name, data)}, data=fields)


def message(response: Any, status: int) -> tuple[str | None, str]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error["param"], error["message"]


def test_official_client(client: TestClient, clock: Clock) -> None:
    sdk = openai.OpenAI(base_url="http://testserver/v1", api_key="pk-me", http_client=client)
    data = os.urandom(2_500_000) + b"\r\n--\r\n"
    made = sdk.files.create(file=("données 1.bin", data), purpose="assistants")
    assert made.id.startswith("file-")
    assert made.model_dump() == {
        "id": made.id, "object": "file", "bytes": len(data), "created_at": int(clock()),
        "expires_at": None, "filename": "données 1.bin", "purpose": "assistants",
        "status": "processed", "status_details": None,
    }  # fmt: skip
    assert sdk.files.retrieve(made.id) == made
    assert sdk.files.content(made.id).read() == data
    later = sdk.files.create(
        file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert later.expires_at == int(clock()) + 3600
    assert [found.id for found in sdk.files.list()] == [later.id, made.id]
    assert [found.id for found in sdk.files.list(limit=1, order="asc")] == [made.id, later.id]
    assert [found.id for found in sdk.files.list(purpose="batch")] == [later.id]
    deleted = sdk.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    with pytest.raises(openai.NotFoundError):
        sdk.files.content(made.id)


def test_content_is_no_page_of_ours(client: TestClient) -> None:
    id = upload(client, b"<script>", name="x.html").json()["id"]
    found = client.get(f"/v1/files/{id}/content")
    assert found.content == b"<script>"
    assert found.headers["content-type"] == "application/octet-stream"
    assert found.headers["content-disposition"].startswith("attachment")
    assert found.headers["x-content-type-options"] == "nosniff"
    part = client.get(f"/v1/files/{id}/content", headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"scr")


def test_owners_see_their_own_files_only(client: TestClient) -> None:
    id = upload(client).json()["id"]
    for path in (f"/v1/files/{id}", f"/v1/files/{id}/content"):
        assert "no file" in message(client.get(path, headers=YOU), 404)[1]
    message(client.delete(f"/v1/files/{id}", headers=YOU), 404)
    assert client.get("/v1/files", headers=YOU).json()["data"] == []
    message(client.get("/v1/files", headers={"Authorization": "Bearer pk-x"}), 401)
    assert client.get(f"/v1/files/{id}").status_code == 200


def test_input_of_batches_expires_by_itself(client: TestClient, files: Files, clock: Clock) -> None:
    made = upload(client, purpose="batch").json()
    assert made["expires_at"] == made["created_at"] + 30 * 86_400
    clock.time += 30 * 86_400
    message(client.get(f"/v1/files/{made['id']}"), 404)
    assert made["id"] in on_disk(files)
    files.purge()
    assert on_disk(files) == set()


@ON_SQLITE
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fun"}, "purpose"),
        ({"purpose": "batch_output"}, "purpose"),
        ({"purpose": ["batch", "batch"]}, "purpose"),
        ({"purpose": "x" * 2000}, "purpose"),
        ({"purpose": b"\xff"}, "purpose"),
        ({"colour": "red"}, "colour"),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        ({"expires_after[seconds]": "7200"}, "expires_after[anchor]"),
        *(
            (
                {"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds},
                "expires_after[seconds]",
            )
            for seconds in ("3599", "2592001", "-1", "1e4", "", "²", "9" * 999)
        ),
        ({"name": "x" * 256}, "file"),
    ],
)
def test_bad_fields(client: TestClient, files: Files, fields: Any, param: str) -> None:
    assert message(upload(client, **fields), 400)[0] == param
    assert on_disk(files) == set()


def test_bad_forms(client: TestClient, files: Files) -> None:
    def post(body: bytes, kind: str | None = "multipart/form-data; boundary=B") -> Any:
        headers = {} if kind is None else {"Content-Type": kind}
        return client.post("/v1/files", content=body, headers=headers)

    part = b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\nx\r\n'
    file_part, purpose = part % (b"file", b'; filename="f"'), part % (b"purpose", b"")
    message(post(b"{}", "application/json"), 415)
    message(post(b"{}", None), 415)
    message(post(b"", "multipart/form-data"), 400)
    message(post(b"", f"multipart/form-data; boundary={'x' * 300}"), 400)
    assert message(post(b""), 400)[1] == "body: the form ends in the middle"
    assert "no form" in message(post(b"nonsense"), 400)[1]
    assert "in the middle" in message(post(file_part), 400)[1]
    assert message(post(file_part + b"--B--"), 400)[0] == "purpose"
    assert message(post(purpose.replace(b"x", b"batch") + b"--B--"), 400)[0] == "file"
    assert message(post(part % (b"file", b"") + b"--B--"), 400)[0] == "file"
    assert "twice" in message(post(file_part + file_part + b"--B--"), 400)[1]
    assert message(post(b"--B\r\n\r\nx\r\n--B--"), 400)[1].startswith(": this server")
    for name in (b"", b"..\\", b"\xff", b"a/", b"a\tb", b"a\0b"):
        odd = part % (b"file", b'; filename="%s"' % name)
        assert message(post(odd + b"--B--"), 400)[0] == "file"
    assert on_disk(files) == set()
    path = part % (b"file", b'; filename="../../etc/passwd"')
    made = post(purpose.replace(b"\r\nx\r\n", b"\r\nvision\r\n") + path + b"--B--").json()
    assert made["filename"] == "passwd"
    assert on_disk(files) == {made["id"]}


@pytest.mark.parametrize("declared", [True, False])
def test_too_large(client: TestClient, files: Files, declared: bool) -> None:
    size = LIMIT + 1 if not declared else LIMIT + 200_000
    request = client.build_request(
        "POST", "/v1/files", files={"file": ("a", bytes(size))}, data={"purpose": "vision"}
    )
    body = request.read()
    headers = {"Content-Type": request.headers["content-type"]}
    sent = body if declared else (body[i : i + 50_000] for i in range(0, len(body), 50_000))
    answer = client.post("/v1/files", content=sent, headers=headers)
    assert str(LIMIT) in message(answer, 413)[1]
    assert on_disk(files) == set()
    assert upload(client, bytes(LIMIT)).status_code == 200


def test_upload_is_not_held_in_memory(store: Store, files: Files) -> None:
    """What waits to be written never exceeds a flush and the piece that came last."""
    seen: list[int] = []
    original = Partial.write

    def write(partial: Partial, data: bytes | bytearray) -> None:
        seen.append(len(data))
        original(partial, data)

    head = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    )

    async def pieces() -> AsyncIterator[bytes]:
        yield head
        for start in range(0, LIMIT, 65_536):
            yield bytes(min(65_536, LIMIT - start))
        yield b"\r\n--B--\r\n"

    async def send() -> httpx.Response:
        app = make_app(store, [files_module.router], files=files)
        transport = httpx.ASGITransport(app)
        headers = ME | {"Content-Type": "multipart/form-data; boundary=B"}
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/v1/files", content=pieces(), headers=headers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "write", write)
        assert asyncio.run(send()).json()["bytes"] == LIMIT
    assert sum(seen) == LIMIT
    assert len(seen) > 2
    assert max(seen) <= (1 << 20) + 65_536


def test_client_that_goes_away_leaves_nothing(store: Store, files: Files) -> None:
    app = make_app(store, [files_module.router], files=files)
    pieces = [
        {"type": "http.request", "more_body": True, "body": b"--B\r\nContent-Disposition: "
         b'form-data; name="file"; filename="f"\r\n\r\n' + bytes(2_000_000)},
        {"type": "http.disconnect"},
    ]  # fmt: skip
    seen: list[set[str]] = []
    scope = {
        "type": "http", "method": "POST", "path": "/v1/files", "raw_path": b"/v1/files",
        "query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http",
        "headers": [(b"authorization", b"Bearer pk-me"),
                    (b"content-type", b"multipart/form-data; boundary=B")],
    }  # fmt: skip

    async def receive() -> Any:
        seen.append(on_disk(files))
        return pieces.pop(0)

    async def send(message: Any) -> None:
        pass

    with pytest.raises(ClientDisconnect):
        asyncio.run(app(scope, receive, send))
    assert len(seen[-1]) == 1
    assert on_disk(files) == set()


def test_full_disk_is_told(client: TestClient, files: Files, monkeypatch: Any) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "no space" in message(upload(client), 507)[1]
    assert on_disk(files) == set()


def test_no_row_no_bytes(client: TestClient, files: Files, monkeypatch: Any) -> None:
    def fails(file: object) -> None:
        raise ApiError(503, "no database")

    monkeypatch.setattr(files.store.files, "add", fails)
    message(upload(client), 503)
    assert on_disk(files) == set()


@ON_SQLITE
@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"), ("limit=10001", "limit"), ("limit=x", "limit"),
        ("order=up", "order"), ("after=file-x", "after"), ("after=%00", "after"),
        ("colour=red", "colour"),
    ],
)  # fmt: skip
def test_bad_queries(client: TestClient, query: str, param: str) -> None:
    assert message(client.get(f"/v1/files?{query}"), 400)[0] == param


def test_pages(client: TestClient) -> None:
    ids = [upload(client).json()["id"] for _ in range(5)]
    page = client.get("/v1/files?limit=2").json()
    assert page["object"] == "list"
    assert [f["id"] for f in page["data"]] == [ids[4], ids[3]]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[4], ids[3], True)
    page = client.get(f"/v1/files?limit=9&order=asc&after={ids[2]}").json()
    assert [f["id"] for f in page["data"]] == ids[3:]
    assert page["has_more"] is False
    page = client.get("/v1/files?purpose=vision").json()
    assert (page["data"], page["first_id"], page["last_id"]) == ([], None, None)


def test_what_a_dead_process_left_is_removed(
    store: Store, files: Files, client: TestClient, tmp_path: Path
) -> None:
    kept = upload(client).json()["id"]
    for name in ("partial-1", "file-orphan", "partial-old", "file-old"):
        (files.folder / name).write_bytes(b"x")
        if name.endswith("old"):
            long_ago = time.time() - 7200
            os.utime(files.folder / name, (long_ago, long_ago))
    files.tidy()
    young = set() if store.database.exclusive else {"partial-1", "file-orphan"}
    assert on_disk(files) == {kept} | young


KILLED = """
import os, sys
from pathlib import Path
from pronk.server.disk import Files
from pronk.server.store import Store
store = Store(Path(sys.argv[1]))
files = Files(store, Path(sys.argv[1]), max_bytes=9999)
where = sys.argv[2]
def die(*_, **__):
    os._exit(9)
def one(name):
    partial = files.partial()
    partial.write(name.encode())
    return files.new("me", partial, filename=name, purpose="vision", lifetime=None)
kept = one("kept")
print(kept.id, flush=True)
if where == "before the rename":
    Path.replace = die
elif where == "before the row":
    store.files.add = die
elif where == "before the bytes are gone":
    doomed = one("doomed")
    Path.unlink = die
    files.delete("me", doomed.id)
one("lost")
"""


@pytest.mark.parametrize(
    "where", ["before the rename", "before the row", "before the bytes are gone"]
)
def test_crash_leaves_no_orphan(tmp_path: Path, where: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), where]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert child.returncode == 9
    store = Store(tmp_path)
    files = Files(store, tmp_path, max_bytes=9)
    assert len(on_disk(files)) == 2
    files.tidy()
    assert on_disk(files) == {child.stdout.strip()}
    assert files.path(files.get("me", child.stdout.strip())).read_bytes() == b"kept"
    store.close()


def test_lost_bytes_are_an_error_of_ours(client: TestClient, files: Files) -> None:
    id = upload(client).json()["id"]
    (files.folder / id).unlink()
    answer = client.get(f"/v1/files/{id}/content")
    assert "bytes are missing" in message(answer, 500)[1]


def test_file_of_a_batch_is_kept(store: Store, client: TestClient, files: Files) -> None:
    id = upload(client, purpose="batch").json()["id"]
    store.batches.create(batch("batch_1", id))
    assert "batch_1" in message(client.delete(f"/v1/files/{id}"), 409)[1]
    assert on_disk(files) == {id}


@given(st.binary(max_size=300), st.lists(st.integers(1, 60), max_size=8))
@settings(max_examples=200, deadline=None)
def test_form_is_the_same_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    body = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n'
        b"Content-Type: text/plain\r\n\r\n" + data + b"\r\n--B--\r\n"
    )
    if b"\r\n--B" in b"\r\n" + data + b"\r\n":
        return
    got = bytearray()
    form = Form(b"B", "file", frozenset({"purpose"}), got.extend)
    start = 0
    for cut in cuts:
        form.feed(body[start : start + cut])
        start += cut
    form.feed(body[start:])
    assert form.finish() == {"purpose": "batch"}
    assert form.filename == "f"
    assert bytes(got) == data


def test_boundaries() -> None:
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
