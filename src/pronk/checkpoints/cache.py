"""Models on disk: where they lie, which are complete, and their removal.

Every fetched model has a folder `<cache>/models/<name>` with a `manifest.json`, written last, that
names its files with their sizes and times. A start compares those and hashes nothing. Weights of
the Hugging Face hub stay in the hub's own cache, shared with other programs; the manifest only
points there. Fetching is in `pull.py` and `hub.py`.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pronk.checkpoints.catalog import ModelRef
from pronk.core.errors import CheckpointError, UserError
from pronk.core.files import read_json
from pronk.core.progress import Progress

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """Pronk's folder in the user's cache; `XDG_CACHE_HOME` is followed everywhere."""
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(base) / "pronk"
    try:
        home = Path.home()
    except RuntimeError:
        raise UserError("this user has no home folder; set XDG_CACHE_HOME for models") from None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "pronk"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "pronk"
    return home / ".cache" / "pronk"


@dataclass(frozen=True, slots=True)
class CachedFile:
    path: str
    """Absolute, or relative to the folder of the manifest."""
    nbytes: int
    mtime_ns: int
    fetched: bool
    """By `pull`; False of what another program had left in the hub's cache."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A model that lies complete on disk."""

    name: str
    path: Path
    """The GGUF file or the folder to open."""
    source: str
    """A requirement of the package index, or a repository of the hub."""
    licence: str
    """Its short form; "" where unknown."""
    files: tuple[CachedFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def model_folder(ref: ModelRef) -> Path:
    return cache_root() / "models" / ref.name.replace("/", "--").replace(":", "--")


def layouts_folder() -> Path:
    """Where packed weights are kept (layouts.py); all of it may be deleted at any time."""
    return cache_root() / "layouts"


def layout_path(model: Path) -> Path:
    """The file for the packed weights of the model at a path."""
    return layouts_folder() / f"{_stem(model)}.layout"


def kv_root() -> Path:
    """Where keys and values of prompts are kept (engine/disk_blocks.py); all of it may be deleted
    at any time."""
    return cache_root() / "kv"


def kv_folder(model: Path, fingerprint: str) -> Path:
    """The folder for those of the model at a path that fit what `fingerprint` stands for."""
    return kv_root() / f"{_stem(model)}-{fingerprint}"


def kv_folders(model: Path) -> list[Path]:
    """All folders of the model at a path."""
    return sorted(kv_root().glob(f"{glob.escape(_stem(model))}-*"))


def _stem(model: Path) -> str:
    model = model.resolve()
    digest = hashlib.sha256(os.fsencode(model)).hexdigest()[:16]
    return f"{model.name[:40]}-{digest}"


def installed(ref: ModelRef) -> Installed | None:
    """The model as its manifest has it, or None where it is absent, incomplete or changed."""
    return _if_complete(model_folder(ref))


def recorded(ref: ModelRef) -> Installed | None:
    """The model as its manifest has it, whatever has become of its files."""
    return _read_manifest(model_folder(ref))


def installed_models() -> list[Installed]:
    """All models that have a manifest and are still complete, by name."""
    try:
        manifests = sorted((cache_root() / "models").glob(f"*/{MANIFEST}"))
    except OSError:  # a cache that cannot be read holds no models
        return []
    return [model for manifest in manifests if (model := _if_complete(manifest.parent))]


def describe(
    ref: ModelRef, path: Path, source: str, licence: str, files: Mapping[Path, bool]
) -> Installed:
    """A model whose files are complete and verified; of each is told whether `pull` fetched it."""
    folder = model_folder(ref)
    entries = tuple(
        CachedFile(_inside(folder, file), stat.st_size, stat.st_mtime_ns, fetched)
        for file, fetched in files.items()
        for stat in (file.stat(),)
    )
    return Installed(ref.name, path, source, licence, entries)


def record(ref: ModelRef, model: Installed) -> None:
    """Writes the manifest of a model."""
    folder = model_folder(ref)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(model) | {"path": _inside(folder, model.path)}, indent=1)
    write_atomically(folder / MANIFEST, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """The file at `path` is either what it was or `data`, whatever happens on the way."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _inside(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _read_manifest(folder: Path) -> Installed | None:
    try:
        fields = read_json(folder / MANIFEST)
        files = tuple(CachedFile(**file) for file in fields.pop("files"))
        return Installed(**fields | {"path": folder / fields["path"], "files": files})
    except (CheckpointError, KeyError, TypeError):
        return None  # no manifest, or one that another program wrote: the same as no model


def _if_complete(folder: Path) -> Installed | None:
    model = _read_manifest(folder)
    try:
        complete = model and all(_unchanged(folder / file.path, file) for file in model.files)
    except (OSError, ValueError, TypeError):  # a file is gone, or the manifest is strange
        return None
    return model if complete else None


def _unchanged(path: Path, file: CachedFile) -> bool:
    stat = path.stat()
    return stat.st_size == file.nbytes and stat.st_mtime_ns == file.mtime_ns


def remove_folder(folder: Path) -> int:
    """Deletes a folder; returns the bytes that its files held."""
    freed = folder_bytes(folder)
    # The manifest first: an interrupted removal then leaves no model, instead of half of one.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
    return freed


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`, links not followed; 0 where there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # a temporary file that was just renamed
                continue
    return total


def require_free(folder: Path, nbytes: int, what: str) -> None:
    """Raises UserError when the disk that holds `folder` has less than `nbytes` free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise UserError(
            f"disk full: {what} needs {nbytes / 1e6:,.0f} MB free in {existing},"
            f" there are {free / 1e6:,.0f} MB; free some space or point XDG_CACHE_HOME (HF_HOME for"
            " Hugging Face models) to another disk"
        )


def disk_error(error: OSError, folder: Path, what: str) -> UserError:
    """The line for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"disk full: no space left in {folder} for {what}; nothing was kept")
    where = error.filename or folder
    return UserError(f"cannot write {where} for {what}: {error.strerror or error}")


@contextmanager
def watched(folder: Path, total: int, what: str, progress: Progress) -> Iterator[None]:
    """Tells progress by the growth of `folder` while somebody else's code downloads into it."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            progress(min(folder_bytes(folder), total), total, what)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    progress(total, total, what)
