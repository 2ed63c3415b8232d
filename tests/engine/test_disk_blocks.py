"""Blocks on disk: what is found there is what would be computed, and nothing that is wrong with a
file, a folder or a disk is anybody's problem."""

import errno
import os
import random
import shutil
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from engine import test_rules
from engine.test_rules import (
    VOCAB,
    EngineMachine,
    FakeModel,
    Interrupter,
    check_accounts,
    expected,
    make_engine,
    make_request,
    prompts,
)
from engine.tiny_models import CONFIG, random_checkpoint, write_gguf
from pronk.backends import reference
from pronk.backends.protocol import BLOCK, KV_DTYPES, U8, KvDtype
from pronk.backends.select import select_backend
from pronk.checkpoints import cache
from pronk.checkpoints.open import open_checkpoint
from pronk.core.errors import UserError
from pronk.engine import block_files, disk_blocks
from pronk.engine.block_files import BlockFiles
from pronk.engine.disk_blocks import DiskBlocks, fingerprint, open_disk_blocks
from pronk.engine.engine import Engine
from pronk.engine.llm import LLM
from pronk.engine.request import Request, SamplingParams

FILE = 64 + 8 * BLOCK
"""Bytes of a file of the fake model."""
ONE, OTHER = bytes(range(16)), bytes(range(16, 32))
"""Fingerprints."""


class FakeMemory:
    """The blocks of a fake model."""

    block_bytes = 8 * BLOCK

    def __init__(self, model: FakeModel) -> None:
        self._kv = model.kv

    def read_block(self, block: int) -> U8:
        return np.array(self._kv[block * BLOCK : (block + 1) * BLOCK], np.uint64).view(np.uint8)

    def write_block(self, block: int, data: U8) -> None:
        self._kv[block * BLOCK : (block + 1) * BLOCK] = array("Q", data.tobytes()).tolist()


class FakeAdapters:
    """Adapters that change nothing, with digests of their own."""

    def __init__(self, **digests: bytes) -> None:
        self._digests = digests

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._digests)

    def digest(self, name: str) -> bytes:
        return self._digests[name]


class Disk:
    """Starts engines on one folder, one after another or side by side."""

    def __init__(self, root: Path, limit: int = 1 << 20) -> None:
        self.root, self.limit = root, limit
        self.told: list[str] = []
        self._open: list[Engine] = []

    def files(self, fingerprint: bytes = ONE, limit: int | None = None) -> BlockFiles:
        limit = self.limit if limit is None else limit
        folder = self.root / fingerprint.hex()
        return BlockFiles(
            folder, fingerprint, FakeMemory.block_bytes, limit, reference.checksum, self.told.append
        )

    def start(self, n_blocks: int = 40, fingerprint: bytes = ONE, **options: Any) -> Engine:
        model = FakeModel(n_blocks)
        stored = DiskBlocks(FakeMemory(model), self.files(fingerprint))
        values = {"context": n_blocks * BLOCK, **options}
        engine = Engine(model, vocab_size=VOCAB, n_blocks=n_blocks, stored=stored, **values)
        self._open.append(engine)
        return engine

    def paths(self) -> list[Path]:
        return sorted(path for path in self.root.glob("*/*"))

    def close(self) -> None:
        for engine in self._open:
            store_of(engine).close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "kv")
    yield disk
    disk.close()


def store_of(engine: Engine) -> DiskBlocks:
    assert isinstance(engine.scheduler.stored, DiskBlocks)
    return engine.scheduler.stored


def ask(engine: Engine, prompt: Sequence[int], max_tokens: int = 8, **options: Any) -> Request:
    """Runs one request, whose answer must be right."""
    request = Request(prompt, SamplingParams(max_tokens=max_tokens), **options)
    engine.run([request])
    assert request.output == expected(list(prompt), max_tokens)
    check_accounts(engine)
    return request


def text(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=n)


def n_computed(engine: Engine) -> int:
    assert isinstance(engine._model, FakeModel)
    return sum(s.rows for step in engine._model.steps for s in step)


def test_a_second_start_computes_only_the_rest(disk: Disk) -> None:
    prompt = text(10 * BLOCK + 5)
    first = disk.start()
    assert ask(first, prompt).cached == 0
    assert disk.paths() == [], "nobody has asked for it again"
    first.close()
    assert len(disk.paths()) == 10
    second = disk.start()
    assert ask(second, prompt, 3).cached == 10 * BLOCK
    assert n_computed(second) == 5 + 2
    stats = store_of(second).stats
    assert (stats.hits, stats.loaded, stats.saved, stats.damaged) == (1, 10, 0, 0)
    assert ask(second, prompt).cached == 10 * BLOCK
    assert store_of(second).stats.loaded == 10, "the second time they were in memory"
    second.close()
    assert store_of(second).stats.nbytes == 10 * FILE == sum(p.stat().st_size for p in disk.paths())
    assert disk.told == []


def test_one_token_is_left_to_compute(disk: Disk) -> None:
    prompt = text(4 * BLOCK)
    first = disk.start()
    ask(first, prompt, 1)
    first.close()
    assert len(disk.paths()) == 4
    second = disk.start()
    assert ask(second, prompt, 1).cached == 3 * BLOCK
    assert n_computed(second) == BLOCK


def test_what_is_found_again_is_saved_at_once(disk: Disk) -> None:
    first = disk.start()
    system = text(5 * BLOCK)
    ask(first, [*system, 1, *text(60, seed=1)])
    store_of(first).settle()
    assert disk.paths() == []
    ask(first, [*system, 2, *text(60, seed=2)])
    store_of(first).settle()
    assert len(disk.paths()) == 5
    assert store_of(first).stats.saved == 5
    second = disk.start()  # as after a crash: nobody has closed the first one
    assert ask(second, [*system, 3]).cached == 5 * BLOCK


def test_a_preempted_request_proves_nothing(disk: Disk) -> None:
    engine = disk.start(n_blocks=6, max_batch=2)
    requests = [make_request(text(70, seed), 60) for seed in range(2)]
    engine.run(requests)
    assert sum(request.preemptions for request in requests) > 0
    store_of(engine).settle()
    assert disk.paths() == []


def test_longer_answers_go_on_where_the_disk_ends(disk: Disk) -> None:
    """Memory has the first blocks, the disk those behind them."""
    prompt = text(9 * BLOCK + 1)
    first = disk.start()
    ask(first, prompt)
    first.close()
    second = disk.start()
    for path in disk.paths():
        os.utime(path, (0, 0))
    assert ask(second, prompt[: 3 * BLOCK + 1], 1).cached == 3 * BLOCK
    assert store_of(second).stats.loaded == 3
    assert ask(second, prompt).cached == 9 * BLOCK
    assert store_of(second).stats.loaded == 9
    assert all(path.stat().st_mtime > 0 for path in disk.paths()), "all of them were used"


def test_files_are_for_their_user_only(disk: Disk) -> None:
    engine = disk.start()
    ask(engine, text(3 * BLOCK))
    engine.close()
    for path in (disk.root, *disk.root.glob("*"), *disk.paths()):
        assert path.stat().st_mode & 0o077 == 0
    assert len(disk.paths()) == 3


def test_salts_adapters_and_other_models_do_not_meet(disk: Disk) -> None:
    prompt = text(3 * BLOCK + 1)
    first = disk.start(adapters=FakeAdapters(x=b"1", y=b"2"))
    ask(first, prompt)
    ask(first, prompt, salt=b"a")
    ask(first, prompt, adapter="x")
    first.close()
    second = disk.start(adapters=FakeAdapters(x=b"3", z=b"1"))
    assert ask(second, prompt, adapter="x").cached == 0, "the name stands for other numbers now"
    assert ask(second, prompt, adapter="z").cached == 3 * BLOCK
    assert ask(second, prompt, salt=b"b").cached == 0
    assert ask(second, prompt, salt=b"a", adapter="z").cached == 0
    assert ask(second, prompt, salt=b"a").cached == 3 * BLOCK
    assert ask(second, prompt).cached == 3 * BLOCK
    assert ask(disk.start(fingerprint=OTHER), prompt).cached == 0


def test_no_salt_continues_the_keys_of_another_request() -> None:
    engine = make_engine(20)
    prompt = text(3 * BLOCK)
    first = make_request(prompt)
    engine.run([first])
    second = Request(prompt[BLOCK:], SamplingParams(max_tokens=1), salt=first.keys[0])
    engine.run([second])
    assert second.cached == 0
    assert not {*first.keys} & {*second.keys}


def flip(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _of_its_neighbour(path: Path) -> None:
    other = next(p for p in sorted(path.parent.iterdir()) if p != path and p.is_file())
    shutil.copy(other, path)


def _of_another_folder(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + OTHER + data[24:])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: FILE // 2]),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(FILE)),
    "magic": flip(0),
    "key": flip(30),
    "length": flip(40),
    "checksum": flip(50),
    "content": flip(64),
    "end": flip(FILE - 1),
    "neighbour": _of_its_neighbour,
    "another folder": _of_another_folder,
    "fifo": _fifo,
    "folder": _folder,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_damaged_is_computed_anew(disk: Disk, damage: Callable[[Path], None]) -> None:
    prompt = text(6 * BLOCK + 1)
    first = disk.start()
    request = ask(first, prompt)
    first.close()
    second = disk.start()
    path = disk.root / ONE.hex() / request.keys[2].hex()
    damage(path)
    assert ask(second, prompt).cached == 2 * BLOCK
    assert not path.is_file(), "it is not tried a second time"
    assert len(disk.paths()) - path.exists() == 5
    assert ask(second, prompt).cached == 6 * BLOCK
    second.close()
    if not path.exists():
        return
    assert ask(disk.start(), prompt).cached == (2 if path.is_dir() else 6) * BLOCK


def test_a_file_of_another_folder_is_no_file_of_this_one(disk: Disk) -> None:
    key, data = block_of(7)
    theirs, mine = (disk.root / name.hex() / key.hex() for name in (OTHER, ONE))
    disk.files(OTHER).write(key, data, 10**9)
    mine.parent.mkdir()
    shutil.copy(theirs, mine)
    files = disk.files()
    assert key in files
    assert files.read(key, 10**9) is None
    assert (mine.exists(), theirs.exists(), files.n_damaged) == (False, True, 1)


def test_names_that_are_no_keys_are_left_alone(disk: Disk) -> None:
    first = disk.start()
    ask(first, text(2 * BLOCK))
    first.close()
    foreign = [disk.root / ONE.hex() / name for name in ("readme", "00" * 15, "AB" * 16, ".x")]
    for path in foreign:
        path.write_bytes(b"mine")
    (disk.root / "a file").write_bytes(b"mine")
    second = disk.start()
    assert ask(second, text(2 * BLOCK + 1)).cached == 2 * BLOCK
    assert store_of(second).stats.nbytes in (0, 2 * FILE)
    second.close()
    assert all(path.read_bytes() == b"mine" for path in foreign)


def test_files_of_dead_writers_go(disk: Disk) -> None:
    files = disk.files()
    folder = disk.root / ONE.hex()
    old, new = folder / ".old.partial", folder / ".new.partial"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    abandoned = disk.root / OTHER.hex()
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    files.tidy()
    assert [path.exists() for path in (old, new, abandoned)] == [False, True, False]


def block_of(i: int) -> tuple[bytes, U8]:
    key = i.to_bytes(16, "big")
    return key, np.full(FakeMemory.block_bytes, i % 251, np.uint8)


@pytest.mark.parametrize("n_fit", [1, 2, 7, 40])
def test_the_bound_is_kept_and_the_longest_unused_go(disk: Disk, n_fit: int) -> None:
    limit = n_fit * FILE + FILE // 2
    files = disk.files(OTHER, limit)
    files.write(*block_of(500), used_ns=0)
    files = disk.files(ONE, limit)
    for i in range(100):
        files.write(*block_of(i), used_ns=(i + 1) * 10**9)
        sizes = [path.stat().st_size for path in disk.paths()]
        assert sum(sizes) == files.nbytes <= limit
        assert set(sizes) == {FILE}
    left = [int(path.name, 16) for path in disk.paths()]
    assert left == list(range(100 - len(left), 100))
    assert len(left) >= n_fit - max(1, n_fit // 16)
    for i in range(100):
        key, data = block_of(i)
        assert (key in files) == (i in left)
        found = files.read(key, 10**12)
        assert (found is not None) == (i in left)
        assert found is None or np.array_equal(found, data)
    assert files.n_damaged == 0
    assert disk.told == []


def test_use_keeps_a_file(disk: Disk) -> None:
    files = disk.files(limit=4 * FILE)
    for i in range(4):
        files.write(*block_of(i), used_ns=(i + 1) * 10**9)
    assert files.read(block_of(0)[0], used_ns=10**12) is not None
    files.touch([block_of(1)[0]], used_ns=10**12)
    for i in (4, 5):
        files.write(*block_of(i), used_ns=10**12 + i)
    assert [int(path.name, 16) for path in disk.paths()] == [0, 1, 4, 5]


def test_a_smaller_bound_holds_from_the_next_start(disk: Disk) -> None:
    first = disk.start()
    ask(first, text(20 * BLOCK))
    first.close()
    disk.limit = 5 * FILE
    second = disk.start()
    store_of(second).settle()
    assert 1 <= len(disk.paths()) <= 5
    assert ask(second, text(20 * BLOCK)).cached == len(disk.paths()) * BLOCK, "of the beginning"


def test_closing_keeps_the_most_recent_as_far_as_there_is_room(disk: Disk) -> None:
    disk.limit = 8 * FILE
    first = disk.start()
    for seed in range(4):
        ask(first, text(5 * BLOCK, seed), 1)
    first.close()
    assert len(disk.paths()) <= 8
    second = disk.start()
    assert ask(second, text(5 * BLOCK + 1, seed=3), 1).cached == 5 * BLOCK
    assert ask(second, text(5 * BLOCK + 1, seed=2), 1).cached in (2 * BLOCK, 3 * BLOCK)
    assert ask(second, text(5 * BLOCK + 1, seed=0), 1).cached == 0


def test_a_slow_disk_loses_blocks_and_time_of_nobody(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_blocks, "_QUEUED_MOST", 4)
    engine = disk.start()
    store, written = store_of(engine), threading.Event()
    store._writer.submit(written.wait)
    for _ in range(2):
        ask(engine, text(9 * BLOCK))
    assert (store.stats.saved, store.stats.dropped) == (0, 4)
    written.set()
    store.settle()
    assert store.stats.saved == 4
    ask(engine, text(9 * BLOCK))
    store.settle()
    assert store.stats.saved == 8


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    disk = Disk(tmp_path / "file" / "kv")
    engine = disk.start()
    for _ in range(2):
        ask(engine, text(5 * BLOCK))
    engine.close()
    (told,) = disk.told
    assert told.startswith("no more KV blocks are kept on disk: cannot write")
    assert not store_of(engine).stats.writable


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_is_told_once(
    disk: Disk, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept before can still be found."""
    before = disk.start()
    ask(before, text(3 * BLOCK))
    before.close()
    engine = disk.start()

    def fail(self: BlockFiles, key: bytes, block: U8) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(BlockFiles, "_head", fail)
    for _ in range(3):
        ask(engine, text(5 * BLOCK, seed=1))
        store_of(engine).settle()
    monkeypatch.undo()
    assert len(disk.told) == 1
    assert ("disk full" if number == errno.ENOSPC else os.strerror(number)) in disk.told[0]
    assert ask(engine, text(3 * BLOCK + 1)).cached == 3 * BLOCK
    engine.close()
    assert len(disk.paths()) == 3, "no partial file is left"


def test_a_folder_deleted_meanwhile_is_made_again(disk: Disk) -> None:
    engine = disk.start()
    ask(engine, text(3 * BLOCK))
    shutil.rmtree(disk.root)
    engine.close()
    assert disk.told == []
    assert len(disk.paths()) == 3


def test_old_files_that_cannot_be_deleted_end_the_writing(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_files, "_deleted", lambda path: False)
    files = disk.files(limit=3 * FILE)
    for i in range(5):
        files.write(*block_of(i), used_ns=i)
    assert len(disk.paths()) == 3
    assert not files.writable
    assert ["old blocks" in told or "Permission denied" in told for told in disk.told] == [True]


def test_processes_share_a_folder(disk: Disk) -> None:
    """Two at once write, read and evict; nobody meets a bad file, and the bound holds within the
    sixteenth that each may be ahead."""
    disk.limit = 32 * FILE
    used_ns = 10**18

    def work(seed: int) -> int:
        rng, files, most = random.Random(seed), disk.files(), 0
        for turn in range(300):
            key, data = block_of(rng.randrange(60))
            if rng.random() < 0.5:
                files.write(key, data, used_ns + turn)
            else:
                found = files.read(key, used_ns + turn)
                assert found is None or np.array_equal(found, data)
            sizes = [FILE for path in disk.paths() if not path.name.startswith(".")]
            most = max(most, sum(sizes))
        assert files.n_damaged == 0
        assert files.writable
        return most

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(work, range(2))) <= disk.limit + 2 * FILE
    assert disk.told == []


def test_closing_while_somebody_still_reads(disk: Disk) -> None:
    """Full blocks of requests that run are kept, too, and these go on to their end."""
    engine = disk.start()
    request = make_request(text(3 * BLOCK + 5), max_tokens=40)
    engine.add(request)
    for _ in range(3):
        engine.step()
    engine.close()
    assert len(disk.paths()) == 3
    while engine.has_work:
        engine.step()
    assert request.output == expected(text(3 * BLOCK + 5), 40)
    assert ask(disk.start(), text(4 * BLOCK)[: 3 * BLOCK + 1]).cached == 3 * BLOCK


def test_two_engines_on_one_folder(disk: Disk) -> None:
    one, other = disk.start(), disk.start()
    ask(one, text(5 * BLOCK))
    one.close()
    assert ask(other, text(5 * BLOCK)).cached == 0, "it looked into the folder when it started"
    other.close()
    assert len(disk.paths()) == 5
    assert ask(disk.start(), text(5 * BLOCK + 1)).cached == 5 * BLOCK


def test_after_a_fork_and_after_the_end_nothing_is_asked(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = text(3 * BLOCK + 1)
    first = disk.start()
    ask(first, prompt)
    first.close()
    first.close()
    n_before = len(disk.paths())
    ask(first, [1, *prompt])
    ask(first, [1, *prompt])
    assert len(disk.paths()) == n_before
    second = disk.start()
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    assert ask(second, prompt).cached == 0
    assert ask(second, prompt).cached == 3 * BLOCK
    second.close()
    assert store_of(second).stats.loaded == 0


def test_a_cache_that_cannot_take_a_block_costs_one_step(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = text(5 * BLOCK + 1)
    first = disk.start()
    ask(first, prompt)
    first.close()
    engine = disk.start()
    request = make_request(prompt)
    engine.add(request)
    with monkeypatch.context() as patch:
        patch.setattr(FakeMemory, "write_block", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    check_accounts(engine)
    engine.run([])
    while engine.has_work:
        engine.step()
    assert request.output == expected(prompt, 8)
    assert request.cached == 5 * BLOCK


LOADING = {"_load", "load", "count", "found", "_save", "_submit", "read", "publish", "take"}


@pytest.mark.parametrize("gap", range(1, 60))
def test_interruptions_while_blocks_are_loaded(
    disk: Disk, gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {disk_blocks.__file__, block_files.__file__, *test_rules.BOOK_KEEPING}
    monkeypatch.setattr(test_rules, "BOOK_KEEPING", sources)
    first = disk.start()
    ask(first, text(4 * BLOCK))
    first.close()
    engine = disk.start(n_blocks=12)
    requests = [make_request([*text(4 * BLOCK), i, *text(20, i)]) for i in range(3)]
    for request in requests:
        engine.add(request)
    interrupter = Interrupter([gap], LOADING)
    while engine.has_work:
        interrupter.interrupts(engine.step)
        check_accounts(engine)
    for request in requests:
        assert request.output == expected(request.ids[: request.n_prompt].tolist(), 8)
    store_of(engine).settle()
    engine.close()
    assert ask(disk.start(), text(4 * BLOCK + 1)).cached == 4 * BLOCK


class Immediate:
    """A thread for those who want to know when its work is done."""

    def submit(self, work: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(work())
        return future

    def shutdown(self) -> None: ...


class DiskMachine(EngineMachine):
    """Random work with restarts on one folder, whose files are now and then damaged, on a disk with
    hardly more room than the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.disk = Disk(self.folder / "kv", limit=9 * FILE)
        self.engine = self.begin()

    def begin(self) -> Engine:
        engine = self.disk.start(n_blocks=6, max_batch=4, token_budget=50)
        store = store_of(engine)
        store._writer.shutdown()
        store._writer = Immediate()  # type: ignore[assignment]
        return engine

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        for request, _ in self.all:
            self.engine.abort(request)
        if clean:
            self.engine.close()
        store_of(self.engine).close()
        self.engine = self.begin()

    @rule(which=st.integers(0, 99), damage=st.sampled_from(sorted(DAMAGE.keys() - {"folder"})))
    def damage(self, which: int, damage: str) -> None:
        whole = [p for p in self.disk.paths() if p.is_file() and p.stat().st_size == FILE]
        if len(whole) > 1:
            DAMAGE[damage](whole[which % len(whole)])

    def teardown(self) -> None:
        super().teardown()
        self.disk.close()
        sizes = [path.stat().st_size for path in self.disk.paths() if path.is_file()]
        assert sum(sizes) <= self.disk.limit + len(sizes)  # some were made longer by one
        assert self.disk.told == []
        shutil.rmtree(self.folder)


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.tuples(prompts, st.integers(1, 50)), min_size=1, max_size=6),
        min_size=2, max_size=4,
    ),
    limit=st.sampled_from([1, 3, 100]),
    n_blocks=st.sampled_from([6, 9, 100]),
)  # fmt: skip
def test_answers_do_not_depend_on_the_disk(
    batches: list[list[tuple[list[int], int]]], limit: int, n_blocks: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder) / "kv", limit * FILE)
        for batch in batches:
            engine = disk.start(n_blocks)
            requests = [make_request(prompt, n) for prompt, n in batch]
            engine.run(requests)
            for request, (prompt, n) in zip(requests, batch, strict=True):
                assert request.output == expected(prompt, n)
            check_accounts(engine)
            engine.close()
        assert sum(path.stat().st_size for path in disk.paths()) <= disk.limit
        disk.close()


# ---- real models ---------------------------------------------------------------------------------


@pytest.fixture
def kv_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where blocks go: nobody else's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pronk" / "kv"


def backend_or_skip(name: str) -> Any:
    try:
        return select_backend(name)
    except UserError as error:
        pytest.skip(str(error))


PROMPT = [i * 37 % 250 for i in range(200)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_restarted_model_says_the_same(
    tmp_path: Path, kv_root: Path, backend: str, kv_dtype: KvDtype
) -> None:
    """The same tokens and, to the last bit, the same log probabilities."""
    backend_or_skip(backend)
    path = write_gguf(tmp_path / "model.gguf")
    options: dict[str, Any] = {"backend": backend, "kv_dtype": kv_dtype, "ctx": 256}
    wanted = {"max_tokens": 20, "logprobs": 5, "ignore_eos": True}
    with LLM(path, **options) as llm:
        plain = llm.generate(PROMPT, **wanted)
        assert llm.disk_stats is None
    found = []
    for _ in range(2):
        with LLM(path, kv_disk_bytes=1 << 24, **options) as llm:
            found.append(llm.generate(PROMPT, **wanted))
            stats = llm.disk_stats
    assert [c.token_ids for c in found] == [plain.token_ids] * 2
    assert [c.logprobs for c in found] == [plain.logprobs] * 2
    assert stats is not None
    assert (stats.loaded, stats.hits, stats.damaged) == (6, 1, 0)
    (folder,) = kv_root.iterdir()
    assert folder.name.startswith("model.gguf-")
    assert len(list(folder.iterdir())) == 6


def test_what_numbers_depend_on_tells_models_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "one.gguf")
    with open_checkpoint(path) as one, open_checkpoint(path) as again:
        first = fingerprint(one, reference, "f16", 1024)
        assert first == fingerprint(again, reference, "f16", 1024)
        others = [
            fingerprint(one, reference, "f32", 1024),
            fingerprint(one, reference, "f16", 2048),
        ]
        for config in (
            replace(CONFIG, rope_theta=20_000.0),
            replace(CONFIG, norm_eps=1e-6),
            replace(CONFIG, rope_divisors=(2.0, 1.0, 1.0, 1.0)),
        ):
            one.config = config
            others.append(fingerprint(one, reference, "f16", 1024))
        for module, name, value in (
            (reference, "numerics", lambda: "other"),
            (disk_blocks, "KV_VERSION", 2),
            (disk_blocks, "__version__", "9"),
            (disk_blocks, "READER_VERSION", 9),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, value)
                others.append(fingerprint(again, reference, "f16", 1024))
        cpu = backend_or_skip("cpu")
        others.append(fingerprint(again, cpu, "f16", 1024))
        assert cpu.isa() in cpu.numerics()
    write_gguf(tmp_path / "one.gguf", seed=1)
    with open_checkpoint(path) as changed:
        others.append(fingerprint(changed, reference, "f16", 1024))
    assert len({first, *others}) == 1 + len(others)


def test_another_dtype_or_changed_weights_find_nothing(tmp_path: Path, kv_root: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")

    def loaded(**options: Any) -> int:
        with LLM(path, backend="reference", kv_disk_bytes=1 << 24, **options) as llm:
            llm.generate(PROMPT, max_tokens=1)
            assert llm.disk_stats is not None
            return llm.disk_stats.loaded

    assert [loaded(), loaded(), loaded(kv_dtype="int8"), loaded(ctx=300)] == [0, 6, 0, 6]
    write_gguf(path, seed=1)
    assert [loaded(), loaded()] == [0, 6]


def test_models_that_are_not_on_disk_keep_nothing(kv_root: Path) -> None:
    told: list[str] = []
    memory = FakeMemory(FakeModel(2))
    assert (
        open_disk_blocks(random_checkpoint(), reference, "f16", memory, 1 << 20, told.append)
        is None
    )
    assert told == ["no KV blocks are kept on disk: random is not on disk"]
    assert not kv_root.exists()


def test_options_that_do_not_go_together(tmp_path: Path, kv_root: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    for value, what in (
        (-1, "-1 is not a whole number from 0"),
        (True, "True is not a whole number"),
        (1.5, "1.5 is not a whole number"),
        (100, r"100 is less than one block takes, \d+ bytes"),
    ):
        with pytest.raises(UserError, match=f"kv_disk_bytes: {what}"):
            LLM(path, backend="reference", kv_disk_bytes=value)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="kv_disk_bytes: 5 is of no use without prefix_cache"):
        LLM(path, backend="reference", kv_disk_bytes=5, prefix_cache=False)
    assert not kv_root.exists() or not list(kv_root.glob("*/*"))


def test_folders_of_a_model(tmp_path: Path, kv_root: Path) -> None:
    model = tmp_path / "strange [x]*.gguf"
    folders = [cache.kv_folder(model, mark) for mark in ("aa", "bb")]
    for folder in (*folders, cache.kv_folder(tmp_path / "other.gguf", "aa")):
        folder.mkdir(parents=True)
    assert cache.kv_folders(model) == folders


def test_a_prefix_of_smollm2_outlives_the_process(smollm2_path: Path, kv_root: Path) -> None:
    backend_or_skip("cpu")
    line = "A fox, a crow and a piece of cheese met on a branch and did not agree. "

    def answer(n_disk_bytes: int) -> tuple[list[int], Any, int, Any]:
        with LLM(smollm2_path, backend="cpu", ctx=2048, kv_disk_bytes=n_disk_bytes) as llm:
            prompt = llm.tokenizer.encode(line * 80)[:1000]
            request = Request(prompt, SamplingParams(max_tokens=12, logprobs=3))
            llm.engine.run([request])
            return request.output, request.logprobs, request.cached or 0, llm.disk_stats

    plain = answer(0)
    cold, warm = answer(1 << 28), answer(1 << 28)
    assert plain[:3] == cold[:3]
    assert warm[:2] == plain[:2]
    assert warm[2] == 1000 // BLOCK * BLOCK == 992
    assert warm[3].loaded == 31
