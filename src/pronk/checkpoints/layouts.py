"""Packed weights on disk: the next start of a model maps them instead of packing its files again.

One file a model, `<cache>/layouts/<name>-<hash of the path>.layout`:

    byte 0      magic, place, length and CRC-32 of the index
    byte 4096   packed tensors one after another, each from a multiple of 4096 on
    the end     the index, JSON: what the bytes were made from; of each weight its columns, and of
                each tensor in it the number of its layout, rows, place and checksum

It is a cache and no more. A file that is absent, damaged, incomplete or made from something else
than the model's files as they are now counts for nothing and is written anew; one that cannot be
written costs the user a line to read. Nothing is synced to the disk: the checksums tell what a
crash has left incomplete.
"""

import contextlib
import json
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from operator import index
from pathlib import Path
from typing import IO, Any, Final, Protocol, Self, TypeAlias

from pronk.backends.protocol import U8
from pronk.checkpoints import cache
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.mapped import MappedFile
from pronk.checkpoints.names import READER_VERSION
from pronk.core.errors import CheckpointError, UserError
from pronk.core.progress import Progress

_MAGIC: Final = b"PRONKLAY"
_HEAD: Final = struct.Struct("<8sQQI")
_PAGE: Final = 4096
_RUN: Final = 8 << 20
_MAX_INDEX: Final = 64 << 20
_ABANDONED_S: Final = 3600.0
"""A file in the making that has not grown for so long has lost its process."""

Part: TypeAlias = tuple[int, int, U8]
"""Layout, rows and packed bytes of one tensor of a weight."""


class PackingOps(Protocol):
    """What a backend offers whose weights can be kept on disk."""

    LAYOUT_VERSION: int

    def packed_parts(self, weight: Any) -> list[Part]:
        """The packed bytes of a weight, as views."""
        ...

    def from_packed(self, cols: int, parts: Sequence[Part]) -> Any:
        """The same weight; its bytes stay where they are. ValueError where they cannot be one."""
        ...

    def checksum(self, data: U8) -> int: ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Of a packed tensor in the file."""

    layout: int
    rows: int
    start: int
    nbytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A weight in the file."""

    cols: int
    places: tuple[_Place, ...]


class LayoutCache:
    """The packed weights of a checkpoint that is being loaded: `get` gives those that its file
    has, `add` takes those that had to be packed, `save` writes all of them."""

    def __init__(self, checkpoint: Checkpoint, ops: Any) -> None:
        """UserError where nothing can be kept."""
        if not hasattr(ops, "LAYOUT_VERSION"):
            raise UserError(f"the {ops.name} backend packs no weights")
        if not checkpoint.files():
            raise UserError(f"{checkpoint.path} is not on disk")
        self._checkpoint = checkpoint
        self._ops: PackingOps = ops
        self._source = _source_of(checkpoint, ops.LAYOUT_VERSION)
        self._path = cache.layout_path(checkpoint.path)
        self._file = _open(self._path, self._source)
        self._weights: dict[str, Any] = {}
        self._missed = False

    def get(self, tensors: Sequence[str]) -> Any | None:
        """The weight stacked from these tensors; None if the file does not have it whole. Reads all
        its bytes, for their checksum, at the speed of memory: the first token needs them anyway."""
        if self._file is None:
            return None
        key = _key(tensors)
        entry = self._file.entries.get(key)
        shapes = [self._checkpoint.shape(name) for name in tensors]
        if entry is None or [(place.rows, entry.cols) for place in entry.places] != shapes:
            return None
        parts = []
        for place in entry.places:
            data = self._file.bytes(place)
            if data is None or self._ops.checksum(data) != place.checksum:
                return None
            parts.append((place.layout, place.rows, data))
        try:
            weight = self._ops.from_packed(entry.cols, parts)
        except (ValueError, TypeError):  # numbers that no weight has
            return None
        self._weights[key] = weight
        return weight

    def add(self, tensors: Sequence[str], weight: Any) -> None:
        """A weight that `get` did not have."""
        self._weights[_key(tensors)] = weight
        self._missed = True

    def save(self, progress: Progress) -> None:
        """Writes the file if `add` was called. Of several processes that do so at once the last
        one's file stays. Where it cannot be done, `progress` is told why."""
        if not self._missed:
            return
        try:
            self._require_unchanged()
            self._write(progress)
        except UserError as error:
            reason = str(error)
        except OSError as error:
            reason = str(cache.disk_error(error, self._path.parent, "packed weights"))
        else:
            return
        progress(0, 0, f"layout cache not written: {reason}")

    def _require_unchanged(self) -> None:
        for file in self._source["files"]:
            if not _unchanged(*file):
                raise UserError(f"{file[0]} has changed since it was opened")

    def _write(self, progress: Progress) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _clean(self._path.parent)
        parts = {key: self._ops.packed_parts(weight) for key, weight in self._weights.items()}
        total = sum(_padded(data.nbytes) for each in parts.values() for _, _, data in each)
        cache.require_free(self._path.parent, total + _RUN, "keeping packed weights")
        with _Writer(self._path, total, progress) as out:
            entries = {}
            for key, each in parts.items():
                cols = self._checkpoint.shape(key.split()[0])[1]
                places = (out.add(part, self._ops.checksum(part[2])) for part in each)
                entries[key] = _Entry(cols, tuple(places))
            out.finish(self._source, entries)


def _key(tensors: Iterable[str]) -> str:
    return " ".join(tensors)


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % _PAGE


def _source_of(checkpoint: Checkpoint, version: int) -> dict[str, Any]:
    """What packed bytes depend on, as JSON values."""
    return {
        "version": version,
        "reader": READER_VERSION,
        "config": repr(checkpoint.config),  # the number of heads tells the order of rows
        "files": [list(file) for file in checkpoint.files()],
    }


_DAMAGED = (CheckpointError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a file may raise that is none, or is damaged outside its weights."""


class _File:
    """A file with packed weights, mapped. The constructor raises one of _DAMAGED."""

    def __init__(self, path: Path) -> None:
        self._map = MappedFile(path)
        head = self._map.bytes(0, _HEAD.size)
        if len(head) < _HEAD.size:
            raise ValueError("too short")
        magic, start, length, crc = _HEAD.unpack(head)
        text = self._map.bytes(start, min(length, _MAX_INDEX))
        if magic != _MAGIC or len(text) != length or zlib.crc32(text) != crc:
            raise ValueError("not whole")
        content = json.loads(text)
        self.source: dict[str, Any] = content["source"]
        self.entries: Mapping[str, _Entry] = {
            key: _Entry(cols, tuple(_Place(*map(index, place)) for place in places))
            for key, (cols, places) in content["weights"].items()
        }

    def bytes(self, place: _Place) -> U8 | None:
        """The bytes of a tensor, not yet compared with their checksum; None outside the file."""
        if not 0 <= place.start <= place.start + place.nbytes <= self._map.size:
            return None
        return self._map.view(place.start, place.nbytes)

    def ask_for_huge_pages(self) -> None:
        """Where the file system keeps a file in pieces as large, which Linux's newer ones do."""
        with contextlib.suppress(OSError, AttributeError):
            self._map.buffer.madvise(mmap.MADV_HUGEPAGE)


def _open(path: Path, source: Mapping[str, Any]) -> _File | None:
    """The file at `path` if it was made from `source`."""
    try:
        file = _File(path)
    except _DAMAGED:
        return None
    if file.source != source:
        return None
    file.ask_for_huge_pages()
    return file


class _Writer:
    """Writes a file beside its place and renames it in the end.

    It writes runs of 8 MiB that begin at multiples of 8 MiB: file systems that can then hold them
    in huge pages, which is how they will be mapped."""

    def __init__(self, path: Path, total: int, progress: Progress) -> None:
        self._path, self._total, self._progress = path, total, progress
        self._at = 0
        self._run = memoryview(bytearray(_RUN))

    def __enter__(self) -> Self:
        number, name = tempfile.mkstemp(".partial", ".", self._path.parent)
        self._partial = Path(name)
        self._file: IO[bytes] = open(number, "wb", buffering=0)
        self._append(bytes(_PAGE))
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, part: Part, checksum: int) -> _Place:
        layout, rows, data = part
        place = _Place(layout, rows, self._at, data.nbytes, checksum)
        self._append(data.data)
        self._append(bytes(-data.nbytes % _PAGE))
        return place

    def finish(self, source: Mapping[str, Any], entries: Mapping[str, _Entry]) -> None:
        weights = {key: astuple(entry) for key, entry in entries.items()}
        text = json.dumps({"source": source, "weights": weights}).encode()
        head = _HEAD.pack(_MAGIC, self._at, len(text), zlib.crc32(text))
        self._append(text)
        self._flush()
        self._file.seek(0)
        self._write(memoryview(head))
        self._file.close()
        self._partial.replace(self._path)
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        self._progress(min(done, self._total), self._total, "writing packed weights")

    def _append(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            used = self._at % _RUN
            fits = min(len(rest), _RUN - used)
            self._run[used : used + fits] = rest[:fits]
            self._at += fits
            rest = rest[fits:]
            if self._at % _RUN == 0:
                self._write(self._run)
                self._tell(self._at)

    def _flush(self) -> None:
        self._write(self._run[: self._at % _RUN])

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]


def _clean(folder: Path) -> None:
    """Deletes what nobody will read any more: files whose process has died while it wrote them,
    and packed weights of models that are gone or have changed."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
    for path in folder.glob("*.layout"):
        if not _is_current(path):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_current(path: Path) -> bool:
    """Whether the files that packed weights were made from are still there, unchanged."""
    try:
        return all(_unchanged(*file) for file in _File(path).source["files"])
    except _DAMAGED:
        return False


def _unchanged(path: str, size: int, mtime_ns: int) -> bool:
    try:
        stat = os.stat(path)
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (size, mtime_ns)
