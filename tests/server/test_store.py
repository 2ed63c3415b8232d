"""The stored state, on SQLite and on a real PostgreSQL."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_samples import Clock, batch, chat, file, response

from pronk.core.errors import UserError
from pronk.server.errors import ApiError
from pronk.server.storage import tables
from pronk.server.storage.batches import LeaseLost, Line, Tokens
from pronk.server.storage.pages import slice_page
from pronk.server.store import (
    LEASE_SECONDS,
    Cursor,
    Store,
    StoredConversation,
    UsageOfDay,
)

NASTY = "a\0b\ud800'\"%_\\ é 🦙"
ODD_IDS = ["", "a\0b", "\ud800", "x" * 5000, "'; drop table files; --", "é"]


def test_what_was_stored_is_there_after_a_restart(open_store: Callable[[], Store]) -> None:
    first = open_store()
    stored = response(
        "resp_1", body={"text": NASTY}, input=[{"id": "i", "text": NASTY}], model=NASTY
    )
    first.responses.create(stored)
    first.close()
    assert open_store().responses.get("me", "resp_1") == stored


def test_database_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    store = Store(folder)
    store.usage.add("k", requests=1)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {"pronk.db", "pronk.db-wal"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    store.close()


def test_two_servers_on_one_sqlite_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UserError, match="used by another server"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://a:secret@h/x", "sqlite://", "postgresql+asyncpg://a:secret@h/x"]
)
def test_other_databases_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="database: ") as caught:
        Store(tmp_path, url)
    assert "secret" not in str(caught.value)


def test_database_that_is_not_there_is_named(tmp_path: Path, postgres: str) -> None:
    with pytest.raises(UserError, match=r"database: .*does not exist") as caught:
        Store(tmp_path, postgres + "x")
    assert postgres.split(":")[2].split("@")[0] not in str(caught.value)


def test_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "pronk.db").mkdir()
    (tmp_path / "pronk.db" / "pronk.db").mkdir()
    with pytest.raises(UserError, match=r"database: .*pronk\.db"):
        Store(tmp_path)


def test_version_of_the_tables(open_store: Callable[[], Store]) -> None:
    store = open_store()
    done: list[int] = []
    steps = {n: lambda connection, n=n: done.append(n) for n in (1, 2, 3)}
    with store.database.write() as connection:
        tables.migrate(connection, 3, steps)
        tables.migrate(connection, 3, steps)
    assert done == [1, 2]
    store.close()
    with pytest.raises(UserError, match="version 3, made by a newer Pronk"):
        open_store()


def test_failed_step_changes_nothing(open_store: Callable[[], Store]) -> None:
    store = open_store()

    def fails(connection: sa.Connection) -> None:
        connection.execute(sa.text("CREATE TABLE more (x INTEGER)"))
        raise RuntimeError("step")

    with pytest.raises(RuntimeError, match="step"), store.database.write() as connection:
        tables.migrate(connection, 2, {1: fails})
    with store.database.read() as connection:
        assert not sa.inspect(connection).has_table("more")
        assert connection.execute(sa.select(tables.schema_version)).scalar_one() == 1


def test_two_postgres_servers_start_at_once(tmp_path: Path, postgres: str) -> None:
    stores: list[Store] = []
    threads = [
        threading.Thread(target=lambda: stores.append(Store(tmp_path, postgres))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4
    for store in stores:
        store.close()


def test_objects_of_others_are_not_there(store: Store) -> None:
    store.files.add(file("file-1"))
    store.batches.create(batch("batch_1"))
    store.responses.create(response("resp_1"))
    store.conversations.create(StoredConversation("conv_1", "me", 1, {}), [{"id": "i"}])
    store.chats.add(chat("chatcmpl-1"))
    everything = [
        (store.files, "file-1"), (store.batches, "batch_1"), (store.responses, "resp_1"),
        (store.conversations, "conv_1"), (store.chats, "chatcmpl-1"),
    ]  # fmt: skip
    for rows, id in everything:
        assert rows.get("you", id) is None
        assert rows.list("you", Cursor()).data == []
        assert [found.id for found in rows.list("me", Cursor()).data] == [id]
        with pytest.raises(UserError, match="after: no object"):
            rows.list("you", Cursor(after=id))
        for odd in ODD_IDS:
            assert rows.get("me", odd) is None
            with pytest.raises(UserError, match="before: no object"):
                rows.list("me", Cursor(before=odd))
    assert store.batches.cancel("you", "batch_1") is None
    assert not store.responses.update("you", "resp_1", status="failed", body={})
    assert store.responses.chain("you", "resp_1") is None
    assert store.conversations.list_items("you", "conv_1", Cursor()) is None
    assert store.conversations.all_items("you", "conv_1") is None
    assert store.conversations.get_item("you", "conv_1", "i") is None
    assert not store.conversations.delete_item("you", "conv_1", "i")
    assert not store.conversations.update("you", "conv_1", {"a": "b"})
    with pytest.raises(ApiError, match="no conversation"):
        store.conversations.add_items("you", "conv_1", [{"id": "j"}])
    assert store.chats.update("you", "chatcmpl-1", {}) is None
    for deletes in (store.files, store.responses, store.conversations, store.chats):
        for _, id in everything:
            assert not deletes.delete("you", id)
    assert all(rows.get("me", id) is not None for rows, id in everything)


@given(
    limit=st.integers(1, 8),
    order=st.sampled_from(["asc", "desc"]),
    after=st.none() | st.integers(0, 6),
    before=st.none() | st.integers(0, 6),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_pages_are_those_of_a_list(
    store: Store, limit: int, order: str, after: int | None, before: int | None
) -> None:
    ids = [f"chatcmpl-{i}" for i in range(7)]
    if store.chats.get("me", ids[0]) is None:
        for id in ids:
            store.chats.add(chat(id))
            store.chats.add(chat(f"{id}x", owner="you"))
    cursor = Cursor(
        limit, order, None if after is None else ids[after], None if before is None else ids[before]
    )  # type: ignore[arg-type]
    page = store.chats.list("me", cursor)
    ordered = ids if order == "asc" else ids[::-1]
    start = 0 if after is None else ordered.index(ids[after]) + 1
    stop = 7 if before is None else ordered.index(ids[before])
    window = ordered[start:stop]
    backwards = after is None and before is not None
    expected = window[-limit:] if backwards else window[:limit]
    assert [found.id for found in page.data] == expected
    assert page.has_more == (len(window) > limit)
    same = slice_page([{"id": id} for id in ids], cursor)
    assert [found["id"] for found in same.data] == expected
    assert same.has_more == page.has_more


def test_files_expire(store: Store, clock: Clock) -> None:
    store.files.add(file("file-1", expires_at=int(clock()) + 10))
    store.files.add(file("file-2", filename=NASTY))
    assert store.files.get("me", "file-2").filename == NASTY  # type: ignore[union-attr]
    assert len(store.files.list("me", Cursor()).data) == 2
    assert store.files.purge() == []
    clock.time += 10
    assert store.files.get("me", "file-1") is None
    assert [f.id for f in store.files.list("me", Cursor()).data] == ["file-2"]
    assert not store.files.delete("me", "file-1")
    assert store.files.purge() == ["file-1"]
    assert store.files.unknown(["file-1", "file-2"]) == {"file-1"}


def test_files_by_purpose(store: Store) -> None:
    store.files.add(file("file-1"))
    store.files.add(file("file-2", purpose="vision"))
    assert [f.id for f in store.files.list("me", Cursor(), purpose="vision").data] == ["file-2"]


def test_file_stays_while_a_batch_reads_it(store: Store, clock: Clock) -> None:
    store.files.add(file("file-1", expires_at=int(clock()) + 10))
    store.batches.create(batch("batch_1"))
    with pytest.raises(ApiError, match="is the input of batch_1") as caught:
        store.files.delete("me", "file-1")
    assert caught.value.status == 409
    clock.time += 10
    assert store.files.purge() == []
    store.batches.claim(1)
    store.batches.end("batch_1", "failed", None, None)
    assert store.files.purge() == ["file-1"]


def test_batch_needs_a_file_for_batches(store: Store, clock: Clock) -> None:
    store.files.add(file("file-1", owner="you"))
    store.files.add(file("file-2", purpose="vision"))
    store.files.add(file("file-3", expires_at=int(clock())))
    for id in ("file-1", "file-2", "file-3", *ODD_IDS):
        with pytest.raises(UserError, match="input_file_id: "):
            store.batches.create(batch("batch_1", id))


def test_responses_chain(store: Store) -> None:
    for n in range(4):
        before = f"resp_{n - 1}" if n else None
        store.responses.create(response(f"resp_{n}", previous_response_id=before))
    chain = store.responses.chain("me", "resp_2")
    assert chain is not None
    assert [found.id for found in chain] == ["resp_0", "resp_1", "resp_2"]
    assert store.responses.delete("me", "resp_1")
    assert not store.responses.delete("me", "resp_1")
    assert store.responses.chain("me", "resp_2") is None
    assert store.responses.get("me", "resp_2") is not None


def test_of_an_end_and_a_cancellation_the_first_counts(store: Store) -> None:
    store.responses.create(response("resp_1", status="in_progress"), running=True)
    ends = {"completed", "cancelled"}
    for status, counts in (("cancelled", True), ("completed", False)):
        done = store.responses.update(
            "me", "resp_1", status=status, body={"s": status}, state={"n": 1}, unless=ends
        )
        assert done is counts
    found = store.responses.get("me", "resp_1")
    assert found is not None
    assert (found.status, found.body, found.state) == ("cancelled", {"s": "cancelled"}, {"n": 1})


def test_input_items_by_pages(store: Store) -> None:
    store.responses.create(response("resp_1", input=[{"id": f"i{n}"} for n in range(5)]))
    page = store.responses.input_items("me", "resp_1", Cursor(2, "desc", after="i3"))
    assert page is not None
    assert [item["id"] for item in page.data] == ["i2", "i1"]
    assert page.has_more
    assert store.responses.input_items("me", "resp_2", Cursor()) is None
    with pytest.raises(UserError, match="after: "):
        store.responses.input_items("me", "resp_1", Cursor(after="x"))


def test_responses_of_a_dead_process_are_handed_over_once(
    open_store: Callable[[], Store], clock: Clock
) -> None:
    first = open_store()
    first.responses.create(response("resp_1", status="in_progress"), running=True)
    first.responses.create(response("resp_2"))
    assert first.responses.abandoned() == []
    if first.database.exclusive:
        first.close()
    second = open_store()
    if not first.database.exclusive:
        assert second.responses.abandoned() == []
        clock.time += LEASE_SECONDS + 1
        second.database.beat()
    assert [found.id for found in second.responses.abandoned()] == ["resp_1"]
    assert second.responses.abandoned() == []


def test_response_and_its_items_are_stored_together(store: Store) -> None:
    store.conversations.create(StoredConversation("conv_1", "me", 1, {}), [{"id": "a"}])
    stored = response("resp_1", conversation_id="conv_1")
    with pytest.raises(UserError, match="items: the id 'a' is there twice"):
        store.responses.create(stored, items=[{"id": "b"}, {"id": "a"}])
    assert store.responses.get("me", "resp_1") is None
    assert store.conversations.all_items("me", "conv_1") == [{"id": "a"}]
    store.responses.create(stored, items=[{"id": "b"}])
    assert store.responses.update(
        "me", "resp_1", status="completed", body={}, items=[{"id": "c", "text": NASTY}]
    )
    assert store.conversations.all_items("me", "conv_1") == [
        {"id": "a"}, {"id": "b"}, {"id": "c", "text": NASTY},
    ]  # fmt: skip
    store.conversations.delete("me", "conv_1")
    with pytest.raises(ApiError, match="no conversation"):
        store.responses.create(response("resp_2", conversation_id="conv_1"), items=[{"id": "d"}])
    assert store.responses.get("me", "resp_2") is None


def test_conversations(store: Store) -> None:
    store.conversations.create(StoredConversation("conv_1", "me", 1, {"k": NASTY}))
    store.conversations.create(StoredConversation("conv_2", "me", 1, {}), [{"id": "a"}])
    assert store.conversations.get("me", "conv_1").metadata == {"k": NASTY}  # type: ignore[union-attr]
    assert store.conversations.update("me", "conv_1", {"x": "y"})
    assert store.conversations.get("me", "conv_1").metadata == {"x": "y"}  # type: ignore[union-attr]
    store.conversations.add_items("me", "conv_1", [{"id": f"i{n}"} for n in range(30)])
    page = store.conversations.list_items("me", "conv_1", Cursor(3, "asc", after="i8"))
    assert page is not None
    assert [item["id"] for item in page.data] == ["i9", "i10", "i11"]
    with pytest.raises(UserError, match="after: "):  # of another conversation
        store.conversations.list_items("me", "conv_1", Cursor(after="a"))
    for odd in ODD_IDS:
        assert store.conversations.get_item("me", "conv_1", odd) is None
        assert not store.conversations.delete_item("me", "conv_1", odd)
        with pytest.raises(UserError, match="items: "):
            store.conversations.add_items("me", "conv_1", [{"id": "new"}, {"id": odd}])
    assert store.conversations.get_item("me", "conv_1", "new") is None
    with pytest.raises(UserError, match="twice"):
        store.conversations.add_items("me", "conv_1", [{"id": "j"}, {"id": "j"}])
    assert store.conversations.delete_item("me", "conv_1", "i3")
    assert not store.conversations.delete_item("me", "conv_1", "i3")
    assert store.conversations.get_item("me", "conv_1", "i4") == {"id": "i4"}
    assert store.conversations.delete("me", "conv_1")
    assert store.conversations.list_items("me", "conv_1", Cursor()) is None
    with store.database.read() as connection:
        left = connection.execute(sa.select(tables.conversation_items.c.id)).scalars().all()
    assert left == ["a"]


def test_items_added_by_many_threads_stay_together(store: Store) -> None:
    store.conversations.create(StoredConversation("conv_1", "me", 1, {}))

    def add(who: int) -> None:
        for turn in range(5):
            items = [{"id": f"{who}-{turn}-{n}"} for n in range(4)]
            store.conversations.add_items("me", "conv_1", items)

    threads = [threading.Thread(target=add, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    items = store.conversations.all_items("me", "conv_1")
    assert items is not None
    ids = [item["id"] for item in items]
    assert len(ids) == len(set(ids)) == 6 * 5 * 4
    for i in range(0, len(ids), 4):
        group = ids[i].rsplit("-", 1)[0]
        assert ids[i : i + 4] == [f"{group}-{n}" for n in range(4)]


def test_chats_by_model_and_metadata(store: Store) -> None:
    both = {"a": "1", NASTY: NASTY}
    store.chats.add(chat("c1", metadata=both, model=NASTY))
    store.chats.add(chat("c2", metadata={"a": "1"}, messages=[{"role": "user", "content": NASTY}]))
    store.chats.add(chat("c3", metadata={NASTY: "1"}))

    def ids(**wanted: object) -> list[str]:
        page = store.chats.list("me", Cursor(order="asc"), **wanted)  # type: ignore[arg-type]
        return [found.id for found in page.data]

    assert ids() == ["c1", "c2", "c3"]
    assert ids(model=NASTY) == ["c1"]
    assert ids(metadata={"a": "1"}) == ["c1", "c2"]
    assert ids(metadata=both) == ["c1"]
    assert ids(metadata={"a": "2"}) == []
    assert ids(metadata={"a": "1"}, model="m") == ["c2"]
    changed = store.chats.update("me", "c2", {"a": "2"})
    assert changed is not None
    assert changed.metadata == {"a": "2"}
    assert changed.messages == [{"role": "user", "content": NASTY}]
    assert ids(metadata={"a": "2"}) == ["c2"]
    assert ids(metadata={"a": "1"}) == ["c1"]
    assert store.chats.delete("me", "c1")
    assert not store.chats.delete("me", "c1")
    assert ids(metadata={"a": "1"}) == []


def test_usage_adds_up(store: Store, clock: Clock) -> None:
    def use() -> None:
        for _ in range(20):
            store.usage.add("k", requests=1, prompt_tokens=10, completion_tokens=3)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = UsageOfDay("k", "2027-01-15", 80, 800, 240)
    assert store.usage.list() == [first]
    clock.time += 86_400
    store.usage.add("j", requests=1)
    second = UsageOfDay("j", "2027-01-16", 1, 0, 0)
    assert store.usage.list() == [first, second]
    assert store.usage.list("k") == [first]
    assert store.usage.list(since="2027-01-16") == [second]
    assert store.usage.list(until="2027-01-15") == [first]


def test_batch_has_one_runner(open_store: Callable[[], Store], clock: Clock) -> None:
    first = open_store()
    first.files.add(file("file-1"))
    for n in range(3):
        first.batches.create(batch(f"batch_{n}"))
    assert [found.id for found in first.batches.claim(2)] == ["batch_0", "batch_1"]
    assert first.batches.running() == {"batch_0": "validating", "batch_1": "validating"}
    assert [found.id for found in first.batches.claim(2)] == ["batch_2"]
    first.batches.begin("batch_0", 2, "m")
    first.batches.finish_line("batch_0", Line(1, True, {"id": "x"}), Tokens(3, 1, 2))
    if first.database.exclusive:
        first.close()  # as good as dead: nobody else may use it
    second = open_store()
    if not first.database.exclusive:
        assert second.batches.claim(9) == []
        with pytest.raises(LeaseLost):
            second.batches.finish_line("batch_0", Line(2, True, {}), Tokens())
        assert second.batches.finished_lines("batch_0") == {1}
        clock.time += LEASE_SECONDS + 1
        second.database.beat()
    taken = second.batches.claim(9)
    assert [found.id for found in taken] == ["batch_0", "batch_1", "batch_2"]
    assert taken[0].status == "in_progress"
    assert (taken[0].completed, taken[0].input_tokens, taken[0].cached_tokens) == (1, 3, 1)
    if not first.database.exclusive:  # it wakes up again, and has nothing to say any more
        first.database.beat()
        assert first.batches.running() == {}
        for late in (
            lambda: first.batches.finish_line("batch_0", Line(2, True, {}), Tokens()),
            lambda: first.batches.finalize("batch_0"),
            lambda: first.batches.end("batch_1", "failed", None, None),
            lambda: first.batches.begin("batch_2", 1, None),
            lambda: first.batches.end("batch_2", "completed", None, None),
        ):
            with pytest.raises(LeaseLost):
                late()
    second.batches.release("batch_1")
    assert [found.id for found in second.batches.claim(9)] == ["batch_1"]
    second.batches.release()
    assert second.batches.running() == {}


def test_process_that_slept_does_not_take_its_own_work(store: Store, clock: Clock) -> None:
    store.files.add(file("file-1"))
    store.batches.create(batch("batch_1"))
    assert len(store.batches.claim(1)) == 1
    store.responses.create(response("resp_1", status="in_progress"), running=True)
    clock.time += 20 * LEASE_SECONDS
    assert store.batches.claim(1) == []
    assert store.responses.abandoned() == []
    assert store.batches.running() == {"batch_1": "validating"}


def test_line_counts_once_and_not_after_the_end(store: Store) -> None:
    store.files.add(file("file-1"))
    store.batches.create(batch("batch_1"))
    store.batches.claim(1)
    store.batches.begin("batch_1", 3, "m")
    for _ in range(3):
        store.batches.finish_line("batch_1", Line(1, False, {"n": 1}), Tokens(1, 0, 1))
    store.batches.finish_line("batch_1", Line(3, True, {"n": 3}), Tokens())
    assert store.batches.finished_lines("batch_1") == {1, 3}
    assert [line.line for line in store.batches.lines("batch_1", after=1, most=5)] == [3]
    found = store.batches.finalize("batch_1")
    assert (found.status, found.completed, found.failed, found.input_tokens) == (
        "finalizing", 1, 1, 1,
    )  # fmt: skip
    assert store.batches.finalize("batch_1") == found
    with pytest.raises(LeaseLost):
        store.batches.finish_line("batch_1", Line(2, True, {}), Tokens())
    assert store.batches.finished_lines("batch_1") == {1, 3}
    with pytest.raises(ApiError, match="is finalizing"):
        store.batches.cancel("me", "batch_1")
    assert found.output_file_id is not None
    store.batches.end("batch_1", "completed", file(found.output_file_id), None)
    ended = store.batches.get("me", "batch_1")
    assert ended is not None
    assert (ended.status, ended.output_file_id, ended.error_file_id) == (
        "completed", found.output_file_id, None,
    )  # fmt: skip
    assert store.files.get("me", found.output_file_id) is not None
    assert store.batches.finished_lines("batch_1") == set()
    with pytest.raises(LeaseLost):
        store.batches.end("batch_1", "completed", None, None)
    assert store.batches.claim(9) == []


def test_many_processes_claim_each_batch_once(tmp_path: Path, postgres: str) -> None:
    stores = [Store(tmp_path, postgres) for _ in range(4)]
    stores[0].files.add(file("file-1"))
    for n in range(40):
        stores[0].batches.create(batch(f"batch_{n}"))
    taken: list[str] = []

    def claim(store: Store) -> None:
        for _ in range(40):
            taken.extend(found.id for found in store.batches.claim(3))

    threads = [threading.Thread(target=claim, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f"batch_{n}" for n in range(40))
    for store in stores:
        store.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from pronk.server.store import Store, StoredResponse
store = Store(Path(sys.argv[1]), sys.argv[2] or None)
n = 0
while True:
    store.responses.create(StoredResponse(f"resp_{n}", "me", 1, "m", "completed", {"n": n}))
    print(n, flush=True)
    n += 1
"""


def test_what_was_reported_stored_survives_a_kill(
    tmp_path: Path, database_url: str | None, open_store: Callable[[], Store]
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), database_url or ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        reported = -1
        for line in child.stdout:
            reported = int(line)
            if reported == 25:
                os.kill(child.pid, 9)
    assert reported >= 25
    store = open_store()
    for n in range(reported + 1):
        found = store.responses.get("me", f"resp_{n}")
        assert found is not None
        assert found.body == {"n": n}
