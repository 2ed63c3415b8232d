"""The bytes of files on disk, and the rule that ties them to their rows in the store.

The bytes are written to a partial file in `data_dir/files`, synced and renamed to their id before
the row is made, and unlinked after the row is gone. So a row has its bytes, whenever the process
dies; bytes without a row are removed by `tidy` at the next start. Server processes that share a
PostgreSQL share this folder, too.
"""

import errno
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pronk.core.errors import PronkError
from pronk.server.errors import ApiError, not_found
from pronk.server.schema import new_id
from pronk.server.storage.files import StoredFile
from pronk.server.store import Store

_PARTIAL = "partial-"
_ABANDONED_SECONDS = 3600.0
"""Where other processes may be writing: a file without a row that is older is nobody's."""
_SOME = 500

log = logging.getLogger(__name__)


class Partial:
    """A file that is being written; gone unless it is kept."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{_PARTIAL}{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._file = os.fdopen(os.open(self._path, flags, 0o600), "wb")
        self.size = 0

    def write(self, data: bytes | bytearray) -> None:
        with _full_disk_told():
            self._file.write(data)
        self.size += len(data)

    def keep(self, id: str) -> None:
        """The bytes are on disk under their id when this returns."""
        with _full_disk_told():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._path.replace(self._path.with_name(id))
        _sync_folder(self._path.parent)

    def close(self) -> None:
        """Drops what was not kept."""
        with suppress(OSError):  # a full disk, told already
            self._file.close()
        self._path.unlink(missing_ok=True)


class Files:
    """`max_bytes`: of one file. Methods wait for disk and database: async code calls them in
    threads."""

    def __init__(self, store: Store, data_dir: Path, *, max_bytes: int) -> None:
        self.store = store
        self.max_bytes = max_bytes
        self.folder = data_dir / "files"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def partial(self) -> Partial:
        """A new file to write to; its caller closes it."""
        return Partial(self.folder)

    def add(self, partial: Partial, file: StoredFile) -> None:
        """Makes what was written a file."""
        partial.keep(file.id)
        try:
            self.store.files.add(file)
        except BaseException:
            (self.folder / file.id).unlink(missing_ok=True)
            raise

    def new(
        self, owner: str, partial: Partial, *, filename: str, purpose: str, lifetime: int | None
    ) -> StoredFile:
        """Adds a file that was made just now; `lifetime` in seconds, None for ever."""
        now = self.store.database.now()
        expires = None if lifetime is None else now + lifetime
        file = StoredFile(new_id("file-"), owner, now, expires, purpose, partial.size, filename)
        self.add(partial, file)
        return file

    def get(self, owner: str, id: str) -> StoredFile:
        """ApiError 404 where there is none."""
        file = self.store.files.get(owner, id)
        if file is None:
            raise not_found("file", id)
        return file

    def path(self, file: StoredFile) -> Path:
        """Where the bytes of a file are."""
        path = self.folder / file.id
        if not path.is_file():
            raise PronkError(f"file {file.id}: its bytes are missing in {self.folder.name}/")
        return path

    def delete(self, owner: str, id: str) -> None:
        """ApiError 404 where there is none, 409 where a batch reads it."""
        if not self.store.files.delete(owner, id):
            raise not_found("file", id)
        (self.folder / id).unlink(missing_ok=True)

    def purge(self) -> None:
        """Removes expired files."""
        for id in self.store.files.purge():
            (self.folder / id).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes what a process that died left behind."""
        now = time.time()
        ids: list[str] = []
        for entry in list(os.scandir(self.folder)):
            with suppress(FileNotFoundError):  # another process was faster
                old = now - entry.stat().st_mtime > _ABANDONED_SECONDS
                if self.store.database.exclusive or old:
                    ids.append(entry.name)
        for i in range(0, len(ids), _SOME):
            for id in self.store.files.unknown(ids[i : i + _SOME]):
                log.info("removing %s, which no file has", id)
                (self.folder / id).unlink(missing_ok=True)


@contextmanager
def _full_disk_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ApiError(507, "no space is left for files on the server's disk") from None


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
