"""A read-only memory-mapped file, and words for what is wrong with one. No format knowledge."""

import mmap
import os
from functools import partial
from pathlib import Path

import numpy as np

from pronk.backends.protocol import U8
from pronk.core.errors import CheckpointError
from pronk.core.files import open_regular_file, read_json

__all__ = ["MappedFile", "quoted", "read_json"]


def quoted(text: str) -> str:
    """A name out of a file, made safe for a one-line message."""
    return ascii(text if len(text) <= 100 else text[:100] + "...")


class MappedFile:
    """The bytes of a file. Callers check every range against `size` before they take it."""

    def __init__(self, path: Path) -> None:
        """CheckpointError when the file cannot be opened, is empty or no regular file."""
        self.path = path
        with open_regular_file(path) as file:
            try:
                # Length 0 means the whole file, and is refused for an empty one.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise CheckpointError(f"{path}: the file is empty") from None
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
            self.mtime_ns = os.fstat(file.fileno()).st_mtime_ns
        self.size = len(self._map)
        self._bytes: U8 = np.frombuffer(self._map, np.uint8)

    def bytes(self, start: int, length: int) -> bytes:
        """A copy of a few bytes; like a slice, shorter where the file ends."""
        return self._map[start : start + length]

    @property
    def buffer(self) -> mmap.mmap:
        """The mapping itself, for parsers."""
        return self._map

    def view(self, start: int, length: int) -> U8:
        """`[length]` bytes that stay in the file until they are touched."""
        assert min(start, length, self.size - start - length) >= 0, (start, length, self.size)
        return self._bytes[start : start + length]

    def release(self, start: int, length: int) -> None:
        """Gives the pages of a range back to the system; they are read again when touched."""
        if hasattr(mmap, "MADV_DONTNEED") and length:
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, start + length - first)

    def releaser(self, start: int, length: int) -> "partial[None]":
        return partial(self.release, start, length)

    def close(self) -> None:
        """Lets go of the mapping. It stays as long as somebody holds a view of it."""
        self.size = 0
        self._bytes = np.empty(0, np.uint8)
        try:
            self._map.close()
        except BufferError:
            return
