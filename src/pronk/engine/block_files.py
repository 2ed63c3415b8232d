"""Blocks of keys and values as files, by key: bounded in bytes, shared by processes, never trusted.

One folder below the root for all blocks that may take each other's place (disk_blocks.py says which
those are), one file a block, named by its key:

    byte 0    magic, the folder's fingerprint, the key, the length and the checksum of what follows
    byte 64   the block

It is a cache and no more. A file that is not what its name says is deleted and counts for nothing,
one that is gone had to make room for others, and whatever keeps a file from being written ends the
writing: that costs the user a line to read. Nothing is synced to the disk: the checksums tell what
a crash has left incomplete. When the folders hold more than their bound, the files that were used
longest ago go, whoever wrote them; a file's time of change is the time of its last use.
"""

import contextlib
import errno
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final, cast

import numpy as np

from pronk.backends.protocol import U8
from pronk.checkpoints.cache import disk_error
from pronk.core.errors import CheckpointError, UserError
from pronk.core.files import open_regular_file

_MAGIC: Final = b"PRONKKV1"
_HEAD: Final = struct.Struct("<8s16s16sQQ8x")
_KEY_BYTES: Final = 16
_STEPS: Final = 16
"""The bound is kept by looking at all files each time that this fraction of it was written."""
_ABANDONED_S: Final = 3600.0
"""A file in the making that has not grown for so long has lost its process."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A file below the root."""

    used_ns: int
    nbytes: int
    path: Path


class BlockFiles:
    """The files of one folder, each of a block of `block_bytes`.

    `fingerprint` are 16 bytes that tell blocks of this folder from all others. All files in it and
    in the folders beside it have at most `limit` bytes together, and up to a sixteenth more for
    each further process that writes at the same moment. `checksum` is of 64 bits. `notice` is told
    in words, once, if nothing can be written any more. One thread may read while another one
    writes. UserError where not a single block may be kept."""

    def __init__(
        self,
        folder: Path,
        fingerprint: bytes,
        block_bytes: int,
        limit: int,
        checksum: Callable[[U8], int],
        notice: Callable[[str], None],
    ) -> None:
        self.file_bytes = _HEAD.size + block_bytes
        self.limit = limit
        self.writable = True
        self.nbytes = 0
        """Of all files below the root when they were last looked at, and of those written since."""
        self.n_written = self.n_damaged = 0
        if limit < self.file_bytes:
            raise UserError(
                f"kv_disk_bytes: {limit} is less than one block takes, {self.file_bytes} bytes"
            )
        self._root, self._folder = folder.parent, folder
        self._fingerprint = fingerprint
        self._checksum, self._notice = checksum, notice
        self._room = 0
        self._buffer = np.zeros(self.file_bytes + 1, np.uint8)  # a longer file shows
        self._keys: set[bytes] = set()  # single operations only: two threads use it
        try:
            self._make_folder()
            self._keys.update(key for entry in os.scandir(self._folder) if (key := _key(entry)))
        except OSError as error:
            self._stop_writing(error)

    def __contains__(self, key: bytes) -> bool:
        """Whether there was a file for a block; whether it is good shows when it is read."""
        return key in self._keys

    def read(self, key: bytes, used_ns: int) -> U8 | None:
        """A block, good until the next call, or None. Its file was then used at `used_ns`."""
        path = self._path(key)
        try:
            with open_regular_file(path) as file:
                n = cast(BufferedReader, file).readinto(self._buffer.data)
        except (CheckpointError, OSError):  # gone, or nothing that could be read another time
            self._keys.discard(key)
            return None
        block = self._buffer[_HEAD.size : self.file_bytes]
        head = self._buffer[: _HEAD.size].tobytes()
        if n != self.file_bytes or head != self._head(key, block):
            self.n_damaged += 1
            self._keys.discard(key)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.touch([key], used_ns)
        return block

    def touch(self, keys: Sequence[bytes], used_ns: int) -> None:
        """The blocks were used at `used_ns`, each a microsecond before the one in front of it."""
        for i, key in enumerate(keys):
            with contextlib.suppress(OSError):
                os.utime(self._path(key), ns=(used_ns - 1000 * i,) * 2)

    def write(self, key: bytes, block: U8, used_ns: int) -> None:
        """Keeps a block, if nothing has gone wrong before."""
        if not self.writable:
            return
        try:
            self._make_room()
            try:
                self._write(key, block, used_ns)
            except FileNotFoundError:  # the folder was deleted, all of which may be at any time
                self._make_folder()
                self._write(key, block, used_ns)
        except Exception as error:  # an OSError; whatever else it is, a cache may not fail anybody
            self._stop_writing(error)
        else:
            self._keys.add(key)
            self.nbytes += self.file_bytes
            self.n_written += 1

    def _write(self, key: bytes, block: U8, used_ns: int) -> None:
        number, name = tempfile.mkstemp(".partial", ".", self._folder)  # for this user only
        partial = Path(name)
        try:
            with open(number, "wb") as file:
                file.write(self._head(key, block))
                file.write(block.data)
            os.utime(partial, ns=(used_ns, used_ns))
            partial.replace(self._path(key))
        finally:
            partial.unlink(missing_ok=True)

    def _head(self, key: bytes, block: U8) -> bytes:
        return _HEAD.pack(_MAGIC, self._fingerprint, key, len(block), self._checksum(block))

    def _make_folder(self) -> None:
        self._root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self._root, self._folder):  # what prompts said can be told from a block
            folder.mkdir(mode=0o700, exist_ok=True)

    def _path(self, key: bytes) -> Path:
        return self._folder / key.hex()

    def _stop_writing(self, error: Exception) -> None:
        self.writable = False
        reason = str(error)
        if isinstance(error, OSError):
            reason = str(disk_error(error, self._folder, "KV blocks"))
        self._notice(f"no more KV blocks are kept on disk: {reason}")

    def tidy(self) -> int:
        """Looks at all files below the root, and deletes those used longest ago as far as the bound
        asks for it, with room for what is written until the next time. Returns that room."""
        step = max(self.limit // _STEPS, self.file_bytes)
        found = sorted(self._all_files(), key=lambda file: file.used_ns)
        self.nbytes = sum(file.nbytes for file in found)
        for file in found:
            if self.nbytes <= self.limit - step:
                break
            if _deleted(file.path):
                self.nbytes -= file.nbytes
                if file.path.parent == self._folder:
                    self._keys.discard(_key(file.path) or b"")
        return min(step, self.limit - self.nbytes)

    def _make_room(self) -> None:
        if self._room < self.file_bytes:
            self._room = self.tidy()
        if self._room < self.file_bytes:
            raise OSError(errno.EACCES, "old blocks cannot be deleted", str(self._root))
        self._room -= self.file_bytes

    def _all_files(self) -> Iterator[_Found]:
        """Blocks of all folders. What writers have left behind, and folders that nobody has used
        for long and that are empty, go on the way."""
        now = time.time()
        for folder in _entries(self._root):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in _entries(Path(folder.path)):
                with contextlib.suppress(OSError):  # somebody else has deleted it
                    stat = entry.stat(follow_symlinks=False)
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    if _key(entry):
                        yield _Found(stat.st_mtime_ns, stat.st_size, Path(entry.path))
                    elif entry.name.endswith(".partial") and now - stat.st_mtime > _ABANDONED_S:
                        os.unlink(entry.path)
            with contextlib.suppress(OSError):
                if now - folder.stat().st_mtime > _ABANDONED_S:
                    os.rmdir(folder.path)  # refused where there is anything in it


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def _key(path: "os.DirEntry[str] | Path") -> bytes | None:
    """The key that a file is named by; None for any other name."""
    with contextlib.suppress(ValueError):
        key = bytes.fromhex(path.name)
        return key if len(key) == _KEY_BYTES and key.hex() == path.name else None
    return None


def _deleted(path: Path) -> bool:
    """Whether a file is gone now."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
