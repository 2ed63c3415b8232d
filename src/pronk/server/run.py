"""Runs an application until somebody stops it."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from pronk.core.errors import PronkError, UserError
from pronk.server.connections import Http, Warnings, backlog, file_limit, raise_file_limit
from pronk.server.logs import log_config
from pronk.server.service import Service
from pronk.server.settings import ServerSettings

log = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 75
_LAST_WORDS_SECONDS = 5
"""For answers that are ended to say so, until their connections are cut."""


def run(
    settings: ServerSettings,
    make_app: Callable[..., FastAPI],
    tls: tuple[str | None, str | None],
    greet: Callable[[Service, str], None],
) -> None:
    """Serves until a signal: the first lets requests in flight end, for `drain_seconds`, the second
    ends them. `make_app` is `create_app` but for `on_ready` and `on_failure`; `tls`: the files of a
    certificate and of its key; `greet` is called once requests are taken, with the address. Raises
    UserError where the server cannot be started."""
    raise_file_limit()
    with _listen(settings.host, settings.port) as listener:
        cert, key = (path and os.path.expanduser(path) for path in tls)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        address = f"{'http' if cert is None else 'https'}://{shown}:{port}"
        failed: list[Exception] = []

        def fail(error: Exception) -> None:
            failed.append(error)
            server.should_exit = True

        def ready(service: Service) -> None:
            server.service = service
            asyncio.get_running_loop().set_exception_handler(Warnings.of_loop)
            greet(service, address)

        config = uvicorn.Config(
            make_app(on_ready=ready, on_failure=fail),
            http=Http,
            ws="none",
            backlog=backlog(file_limit()),
            log_config=log_config(settings.log_format),
            access_log=False,
            server_header=False,
            ssl_certfile=cert,
            ssl_keyfile=key,
            timeout_graceful_shutdown=round(settings.drain_seconds) + _LAST_WORDS_SECONDS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        server = _Server(config, settings.drain_seconds)
        server.run(sockets=[listener])
    if failed:
        raise failed[0]
    if not server.started:
        raise PronkError("the server could not be started")


class _Server(uvicorn.Server):
    """uvicorn's, which would cut the connections of answers that take too long: they end with an
    error in the words of their API instead."""

    def __init__(self, config: uvicorn.Config, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0
        self.service: Service | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops the server, the second ends the answers that it waits for, the
        third ends everything."""
        self._signals += 1
        if self._signals == 2 and self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_answers)
        else:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._drain_seconds, self._end_answers)
        if self.service is not None and (n := self.service.limits.in_flight):
            log.info(
                "stopping: %d requests in flight may end within %g s; a second Ctrl-C ends them",
                n, self._drain_seconds,
            )  # fmt: skip
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _end_answers(self) -> None:
        if self.service is not None:
            self.service.models.stop()


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"--host: {host} is no address of this machine: {error.strerror}") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog(file_limit()))
    except OSError as error:
        listener.close()
        raise UserError(
            f"--port: {port} of {host} cannot be used: {error.strerror}; 0 takes any that is free"
        ) from None
    return listener
