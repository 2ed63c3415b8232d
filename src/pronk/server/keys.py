"""API keys: the file that holds them, and the check of one.

A key is `pk-` and 256 random bits. The file, JSON with mode 0600, holds a hash of each and what it
may do; the key itself is shown once, when it is made. `pronk key` writes the file, the server reads
it again whenever it changes.

The hash is BLAKE2b keyed with random bytes of the file. A slow hash is for secrets that people
think up: it makes guessing dear. Nobody guesses 256 random bits, and a check that takes a
millisecond would be a way to keep the server busy.

Knows nothing of the web; `pronk key` needs no web packages.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pronk.core.errors import CheckpointError, UserError
from pronk.core.files import parse_json, read_regular_file

SCOPES = frozenset({"inference", "files", "metrics", "admin"})
"""inference: everything that generates, tokenizes or lists models; files: files, batches and other
stored objects; metrics: /metrics; admin: loads and unloads, and sees everybody's usage."""
DEFAULT_SCOPES = frozenset({"inference", "files"})

_VERSION = 1
_FILE_LIMIT = 64 << 20
_NAME_LENGTH = 64
_SALT_BYTES = 32
_LOCK_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """What the file says of a key. None stands for no limit."""

    id: str
    name: str
    hash: str
    """Hexadecimal digits of the key's hash with the salt of its file."""
    scopes: frozenset[str]
    created_at: int
    """Unix time in seconds, as all times here."""
    expires_at: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    models: frozenset[str] | None = None
    """Names of the models that it may use."""

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True, slots=True)
class KeyFile:
    """The contents of a key file."""

    salt: bytes = field(default_factory=lambda: secrets.token_bytes(_SALT_BYTES))
    keys: tuple[Key, ...] = ()

    def find(self, secret: str) -> Key | None:
        """The entry of a key, expired or not. Looks at all of them, whichever it is, so that the
        time it takes tells nothing."""
        digest = _hash(self.salt, secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.hash, digest):
                found = key
        return found

    def added(self, secret: str, key: Key) -> "KeyFile":
        """With one more entry, whose hash is that of `secret`; UserError if its name is taken."""
        if any(other.name == key.name for other in self.keys):
            raise UserError(f"--name: there is a key {key.name!r} already; names are given once")
        return replace(self, keys=(*self.keys, replace(key, hash=_hash(self.salt, secret))))

    def removed(self, name: str) -> "KeyFile":
        """Without the key of a name; UserError where there is none."""
        kept = tuple(key for key in self.keys if key.name != name)
        if len(kept) == len(self.keys):
            known = ", ".join(sorted(key.name for key in self.keys)) or "none"
            raise UserError(f"NAME: no key {name!r}; there are: {known}")
        return replace(self, keys=kept)


def _hash(salt: bytes, secret: str) -> str:
    # a header may hold any bytes, which come here as characters; half a character is no reason to
    # fail
    data = secret.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, key=salt, digest_size=32).hexdigest()


def new_key(
    *,
    name: str,
    scopes: frozenset[str] = DEFAULT_SCOPES,
    now: int,
    expires_at: int | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    max_concurrency: int | None = None,
    models: frozenset[str] | None = None,
) -> tuple[str, Key]:
    """A new key and its entry, which has no hash yet (`KeyFile.added` gives it)."""
    if not _is_name(name):
        raise UserError(
            f"--name: {name!r} is not 1 to {_NAME_LENGTH} letters, digits, spaces or any of ._@+-"
        )
    key = Key(
        id=f"key_{secrets.token_hex(8)}",
        name=name,
        hash="",
        scopes=scopes,
        created_at=now,
        expires_at=expires_at,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrency=max_concurrency,
        models=models,
    )
    return f"pk-{secrets.token_urlsafe(32)}", key


def _is_name(name: str) -> bool:
    """Names stand in logs and labels: nothing that would look like something else there."""
    plain = all(char.isalnum() or char in " ._@+-" for char in name)
    return 1 <= len(name) <= _NAME_LENGTH and plain and name == name.strip()


# The file.


def read_keys(path: Path) -> KeyFile:
    """Reads and checks a key file; UserError says what is wrong with it and how one is made."""
    try:
        data = read_regular_file(path, _FILE_LIMIT)
        if os.name == "posix" and (mode := path.stat().st_mode) & 0o022:
            raise UserError(
                f"{path}: anybody may write it (mode {mode & 0o777:o}); `chmod 600 {path}`"
            )
    except (CheckpointError, OSError) as error:
        raise UserError(f"{error}; `pronk key add {path} --name NAME` makes a key file") from None
    return _parse(data, path)


def _parse(data: bytes, path: Path) -> KeyFile:
    """A key file from its bytes."""
    made = f"key files are JSON, made with `pronk key add {path} --name NAME`"
    try:
        fields = parse_json(data, path)
    except CheckpointError as error:
        raise UserError(f"{error}; {made}") from None
    if fields.get("version") != _VERSION:
        raise UserError(f"{path}: version {fields.get('version')!r} is not {_VERSION}; {made}")
    try:
        salt = bytes.fromhex(fields["salt"])
        if len(salt) != _SALT_BYTES:
            raise ValueError(f"salt: {len(salt)} bytes, not {_SALT_BYTES}")
        if unknown := fields.keys() - {"version", "salt", "keys"}:
            raise ValueError(f"{min(unknown)!r} is not known")
        keys = tuple(_parse_key(entry, i) for i, entry in enumerate(fields["keys"]))
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} is missing; {made}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; {made}") from None
    for names in ([key.name for key in keys], [key.id for key in keys]):
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path}: {twice!r} is there twice; {made}")
    return KeyFile(salt, keys)


def _parse_key(entry: Any, index: int) -> Key:
    """ValueError or KeyError says what is wrong."""
    where = f"keys[{index}]"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {entry!r:.40} is not an object")
    if unknown := entry.keys() - set(Key.__slots__):
        raise ValueError(f"{where}: {min(unknown)!r} is not known")
    whole = (
        "expires_at",
        "requests_per_minute",
        "tokens_per_minute",
        "max_concurrency",
    )
    models = entry.get("models")
    name = _checked(entry["name"], str, f"{where}.name")
    if not _is_name(name):
        raise ValueError(f"{where}.name: {name!r:.80} is no name")
    return Key(
        id=_checked(entry["id"], str, f"{where}.id"),
        name=name,
        hash=_checked_hash(entry["hash"], f"{where}.hash"),
        scopes=_checked_scopes(entry["scopes"], f"{where}.scopes"),
        created_at=_checked(entry["created_at"], int, f"{where}.created_at"),
        models=None if models is None else frozenset(_texts(models, f"{where}.models")),
        **{name: _limit(entry.get(name), f"{where}.{name}") for name in whole},
    )


T = TypeVar("T")


def _checked(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {value!r:.40} is not of type {kind.__name__}")
    return value


def _checked_hash(value: Any, where: str) -> str:
    text = _checked(value, str, where)
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError(f"{where}: not 64 hexadecimal digits")
    return text


def _checked_scopes(value: Any, where: str) -> frozenset[str]:
    scopes = frozenset(_texts(value, where))
    if unknown := scopes - SCOPES:
        raise ValueError(f"{where}: {min(unknown)!r:.40} is not one of {', '.join(sorted(SCOPES))}")
    return scopes


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where}: {value!r:.40} is not a list of texts")
    return value


def _limit(value: Any, where: str) -> int | None:
    if value is None:
        return None
    number = _checked(value, int, where)
    if number < 1:
        raise ValueError(f"{where}: {number} is not at least 1")
    return number


def change_keys(path: Path, change: Callable[[KeyFile], KeyFile], *, create: bool = False) -> None:
    """Reads, changes and writes a key file while nobody else does. The file is either what it was
    or the changed one, whatever happens on the way. With `create` it need not exist."""
    with _locked(path):
        missing = create and not os.path.lexists(path)
        _write(path, change(KeyFile() if missing else read_keys(path)))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        if not path.parent.is_dir():  # a slip of the pen would make a key that no server reads
            raise UserError(f"{path}: there is no folder {path.parent}; make it first")
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS, mode=0o600):
            yield
    except Timeout:
        raise UserError(f"{path}: another process is changing it; try again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _write(path: Path, file: KeyFile) -> None:
    path = path.resolve()  # a link stays a link
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(
        {
            "version": _VERSION,
            "salt": file.salt.hex(),
            "keys": [_fields(key) for key in file.keys],
        },
        indent=1,
    )
    with suppress(FileNotFoundError):
        partial.unlink()
    try:
        # 0600 from its first byte on, not only after a chmod
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as out:
            out.write(text + "\n")
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fields(key: Key) -> dict[str, Any]:
    """An entry as JSON; what is not limited is left out."""
    values = {name: getattr(key, name) for name in Key.__slots__}
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in values.items()
        if value is not None
    }


# The server's view.


class Keys:
    """The keys of a running server. A changed file counts from the next check on; one that cannot
    be read leaves the keys as they were, and an error in the log."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._stamp = _stamp(path)  # before reading: a change in between is seen next time
        self._file = read_keys(path)

    @property
    def all(self) -> Sequence[Key]:
        self._refresh()
        return self._file.keys

    def find(self, secret: str) -> Key | None:
        """The entry of a key that is valid now."""
        self._refresh()
        key = self._file.find(secret)
        return None if key is None or key.expired(self._clock()) else key

    def _refresh(self) -> None:
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._file = read_keys(self.path)
        except UserError as error:
            log.error("key file not read again, the old keys stay: %s", error)
        else:
            log.info("key file read again: %d keys", len(self._file.keys))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
