"""HTTP connections, with the bounds that uvicorn leaves to a proxy in front.

A client that connects and says nothing, sends its request a byte a minute, or never reads its
answer costs a file descriptor for as long as it likes, before anybody has asked it for a key. So
the head of a request, its body and the reading of the answer each have a time, and when nearly all
descriptors are taken a connection that is idle makes room for a new one.
"""

import asyncio
import errno
import logging
import sys
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

_WANTED_FILES = 65_536
_ENOUGH_FILES = 1 << 20
"""Where the system names no limit."""
_LONGEST_BACKLOG = 2048
_OTHER_FILES = 256
"""Descriptors for all that is no connection: models, the database, uploads."""
_TOLD_SECONDS = 60.0
_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def raise_file_limit() -> None:
    """Lets this process have as many files open as the system allows it to, 65,536 at most."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def file_limit() -> int:
    """How many files this process may have open."""
    if sys.platform == "win32":
        return _ENOUGH_FILES
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft


def backlog(files: int) -> int:
    """How many connections may wait to be accepted. asyncio accepts all of them before it looks at
    the first: there must be descriptors for them, too."""
    return min(_LONGEST_BACKLOG, files // 8)


def most_connections(files: int) -> int:
    """How many connections there may be."""
    return files - backlog(files) - min(_OTHER_FILES, files // 4)


class Warnings:
    """Of what happens thousands of times a second when it happens at all: one a minute."""

    _told_at: ClassVar[float] = float("-inf")

    @classmethod
    def too_many(cls, now: float, connections: int | None = None) -> None:
        if now - cls._told_at > _TOLD_SECONDS:
            cls._told_at = now
            known = "" if connections is None else f" ({connections})"
            log.warning("too many connections%s: some are closed or wait", known)

    @classmethod
    def of_loop(cls, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A handler of an event loop's exceptions. (asyncio itself logs a traceback for each
        connection that it has no descriptor for.)"""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _USED_UP:
            cls.too_many(loop.time())
        else:
            loop.default_exception_handler(context)


class Http(H11Protocol):
    """A connection. Used from the event loop only."""

    head_seconds: ClassVar[float] = 30.0
    """From the connection, or the first byte of a further request, to the end of the head."""
    body_seconds: ClassVar[float] = 60.0
    body_rate: ClassVar[float] = 1024.0
    """A body may take `body_seconds`, and a second more for so many bytes."""
    read_seconds: ClassVar[float] = 120.0
    """For which a client may leave an answer unread."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _in_body = False
    _began = 0.0
    _received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections(file_limit()):
            self._make_room()
        self._expect(body=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._received += len(data)
        state = self.conn.their_state
        if state is h11.IDLE:
            if self._timer is None and self.conn.trailing_data[0]:
                self._expect(body=False)
        elif state is not h11.SEND_BODY:
            self._expect_nothing()
        elif self._timer is None or not self._in_body:
            self._expect(body=True, received=len(data))

    # What is expected of the client.

    def _expect(self, *, body: bool, received: int = 0) -> None:
        self._expect_nothing()
        self._in_body, self._began, self._received = body, self.loop.time(), received
        self._timer = self.loop.call_at(self._due(), self._look)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> float:
        if not self._in_body:
            return self._began + self.head_seconds
        return self._began + self.body_seconds + self._received / self.body_rate

    def _look(self) -> None:
        """The time is over, unless more of a body has come, or we were the ones who did not read
        on."""
        now = self.loop.time()
        if self.flow.read_paused:
            self._began = now
        if self._due() > now:
            self._timer = self.loop.call_at(self._due(), self._look)
            return
        self._timer = None
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    # Too many.

    def _make_room(self) -> None:
        """Closes a connection without a request; this one if all have one."""
        others = (one for one in self.connections if isinstance(one, Http) and one is not self)
        idle = (one for one in others if one.conn.their_state is h11.IDLE)
        victim = next((one for one in idle if not one.transport.is_closing()), self)
        victim.transport.abort()
        Warnings.too_many(self.loop.time(), len(self.connections))
