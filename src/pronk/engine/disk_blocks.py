"""Blocks of the KV cache that outlive the process: what was computed for a prompt is found again
after a restart.

A block goes to the disk when a later request has found it in memory, which shows that it is worth
it, and when the engine is closed, the most recently used ones first. It comes back when a request
begins with its tokens and memory does not have it. Blocks are copied by the thread that steps,
which owns the arrays at that moment; files are read by it, too, and written by a thread of their
own (block_files.py). Numbers never depend on any of this: blocks are the bytes that computing them
again would give, and lie in a folder that is named by all that these depend on.
"""

import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from pronk import __version__
from pronk.backends.protocol import BLOCK, U8, KvDtype, Ops
from pronk.checkpoints import cache
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.names import READER_VERSION
from pronk.core.errors import UserError
from pronk.engine.block_files import BlockFiles
from pronk.model.rope import rope_table

KV_VERSION: Final = 1
"""Of the bytes of a block and of what is computed for them. Raise it when one of these changes in a
way that nothing else in `fingerprint` shows."""
_QUEUED_BYTES: Final = 64 << 20
_QUEUED_MOST: Final = 256
"""Blocks that wait to be written take at most so much memory, and are at most so many."""
_PATIENCE_S: Final = 30.0
"""Without a single block being written, until `keep` gives up."""
_ROPE_POSITIONS: Final = 1024


class BlockMemory(Protocol):
    """The arrays of a KV cache, by block (runner.py)."""

    @property
    def block_bytes(self) -> int: ...

    def read_block(self, block: int) -> U8:
        """A copy of a block."""
        ...

    def write_block(self, block: int, data: U8) -> None: ...


@dataclass(frozen=True, slots=True)
class DiskStats:
    """What has become of blocks since the start."""

    nbytes: int
    """Of all blocks on disk, those of other models, too."""
    hits: int
    """Requests for which blocks were loaded."""
    loaded: int
    saved: int
    dropped: int
    """Blocks that were not saved when they could have been, because the disk was too slow."""
    damaged: int
    writable: bool


class DiskBlocks:
    """The scheduler's `Stored`, between a KV cache and the files of its folder.

    One thread at a time calls it, the one that steps; `stats` may be read by any. After a fork it
    is of no more use to the child, where its thread is not."""

    def __init__(self, memory: BlockMemory, files: BlockFiles) -> None:
        self._memory, self._files = memory, files
        self._most = max(4, min(_QUEUED_MOST, _QUEUED_BYTES // files.file_bytes))
        self._room = threading.BoundedSemaphore(self._most)
        self._queued: set[bytes] = set()
        self._writer = ThreadPoolExecutor(1, "pronk-kv")
        self._pid = os.getpid()
        self._closed = False
        self._hits = self._loaded = self._dropped = 0
        self._writer.submit(files.tidy)  # the bound may have become smaller

    @property
    def stats(self) -> DiskStats:
        files = self._files
        return DiskStats(
            files.nbytes, self._hits, self._loaded, files.n_written, self._dropped,
            files.n_damaged, files.writable,
        )  # fmt: skip

    @property
    def _open(self) -> bool:
        return not self._closed and self._pid == os.getpid()

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of the first `keys` have files."""
        if not self._open:
            return 0
        return sum(1 for _ in itertools.takewhile(self._files.__contains__, keys))

    def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Reads files into blocks, up to the first that is not good; how many were."""
        now, n = time.time_ns(), 0
        for i, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            data = self._files.read(key, now - 1000 * i)
            if data is None:
                break
            self._memory.write_block(block, data)
            n = i + 1
        self._loaded += n
        self._hits += n > 0
        return n

    def found(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """A request begins with these blocks of the memory: they are saved if they are not yet.
        Drops those that the disk is too slow for, the end of the text first; another request will
        find them."""
        if not self._open or not keys:
            return
        now = time.time_ns()
        for i, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            if self._is_saved(key):
                continue
            if not self._files.writable or not self._room.acquire(blocking=False):
                self._dropped += sum(not self._is_saved(key) for key in keys[i:])
                break
            self._save(key, block, now - 1000 * i)
        if self._room.acquire(blocking=False):
            self._submit(partial(self._files.touch, keys, now))

    def keep(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        """Saves blocks with their keys, the most valuable one first, as many as the bound holds."""
        if not self._open:
            return
        now = time.time_ns()
        for i, (key, block) in enumerate(blocks[: self._files.limit // self._files.file_bytes]):
            if not self._files.writable or not self._room.acquire(timeout=_PATIENCE_S):
                break
            if self._is_saved(key):
                self._submit(partial(self._files.touch, [key], now - 1000 * i))
            else:
                self._save(key, block, now - 1000 * i)

    def settle(self) -> None:
        """Waits until everything is written."""
        if self._open:
            self._writer.submit(int).result()

    def close(self) -> None:
        """Writes what is on its way; then nothing is found or kept any more."""
        if self._open:
            self._writer.shutdown()
        self._closed = True

    def _is_saved(self, key: bytes) -> bool:
        return key in self._files or key in self._queued

    def _save(self, key: bytes, block: int, used_ns: int) -> None:
        """With the room for it taken."""
        self._queued.add(key)
        try:
            data = self._memory.read_block(block)
            self._submit(partial(self._files.write, key, data, used_ns), key)
        except BaseException:
            self._done(key)
            raise

    def _submit(self, work: Callable[[], None], key: bytes | None = None) -> None:
        try:
            future = self._writer.submit(work)
        except RuntimeError:  # the interpreter is about to end
            self._closed = True
            self._done(key)
        else:
            future.add_done_callback(lambda _: self._done(key))

    def _done(self, key: bytes | None) -> None:
        if key is not None:
            self._queued.discard(key)
        self._room.release()


def fingerprint(checkpoint: Checkpoint, ops: Ops, kv_dtype: KvDtype, block_bytes: int) -> bytes:
    """16 bytes that tell what the content of a block with a certain key depends on: the weights,
    the code that computes, on which processor, and how its results are stored. The number of
    positions is not among it: an angle depends on its own position only."""
    config = checkpoint.config
    angles = rope_table(config, min(config.context, _ROPE_POSITIONS))  # NumPy's cosines differ, too
    source = {
        "version": [__version__, KV_VERSION, READER_VERSION],
        "numerics": ops.numerics(),
        "angles": hashlib.blake2b(angles.tobytes(), digest_size=16).hexdigest(),
        "blocks": [BLOCK, kv_dtype, block_bytes, sys.byteorder],
        "config": repr(config),
        "files": checkpoint.files(),
    }
    return hashlib.blake2b(json.dumps(source).encode(), digest_size=16).digest()


def open_disk_blocks(
    checkpoint: Checkpoint,
    ops: Ops,
    kv_dtype: KvDtype,
    memory: BlockMemory,
    limit: int,
    notice: Callable[[str], None],
) -> DiskBlocks | None:
    """Blocks of a model below `<cache>/kv`, at most `limit` bytes with those of all others. None,
    and `notice` is told why, where nothing can be kept. UserError for a limit below one block."""
    try:
        if not checkpoint.files():
            raise UserError(f"{checkpoint.path} is not on disk")
        mark = fingerprint(checkpoint, ops, kv_dtype, memory.block_bytes)
        folder = cache.kv_folder(checkpoint.path, mark.hex()[:16])
    except UserError as error:
        notice(f"no KV blocks are kept on disk: {error}")
        return None
    files = BlockFiles(folder, mark, memory.block_bytes, limit, ops.checksum, notice)
    return DiskBlocks(memory, files)
