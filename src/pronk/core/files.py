"""Reading small files of a model folder whole. Whoever made the folder may be hostile: a file may
be a device, a FIFO or a link to one, or far larger than anybody needs. Not for weights."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from pronk.core.errors import CheckpointError

JSON_LIMIT = 64 << 20
"""Bytes. The largest JSON file of a model, its tokenizer.json, has 17 MB."""


@contextmanager
def open_regular_file(path: Path) -> Iterator[IO[bytes]]:
    """A file open for reading; CheckpointError when it cannot be opened or is no regular file."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb", opener=_open_without_waiting))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError:  # a NUL or a lone surrogate
            raise CheckpointError(f"{str(path)!a}: no possible file name") from None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        yield file


def _open_without_waiting(path: str, flags: int) -> int:
    """A FIFO would keep a plain open waiting until somebody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_regular_file(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes, or CheckpointError."""
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, at most {limit} are allowed")
        try:
            # No more than it said: a file of /proc has size 0 and no end.
            return file.read(size)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes, or CheckpointError."""
    return parse_json(read_regular_file(path, limit), path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `text`. A name given twice is refused, and one that is no Unicode (half of
    a surrogate pair). CheckpointError names `path`."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: cannot be read: not UTF-8") from None
    except RecursionError:
        raise CheckpointError(f"{path}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, is a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0][:100]!a} is given twice")
    if not is_unicode("".join(result)):
        name = next(name for name in result if not is_unicode(name))
        raise ValueError(f"the name {name[:100]!a} has a lone surrogate")
    return result


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON's `\\ud800` gives half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
