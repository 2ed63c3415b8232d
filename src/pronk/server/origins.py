"""Keeps the web pages of others away from a server without keys.

A browser runs pages of everybody on a machine that reaches this server, and a server without keys
trusts whoever reaches it. What a page could do:

- send a form, a file or JSON here, without reading the answer. A browser says which page sends
  (`Origin`, `Sec-Fetch-Site`); what changes anything is refused unless it comes from a page of this
  server or of an origin that was allowed.
- let a name of its own point to 127.0.0.1 once it is loaded, and be a page of this server for the
  browser (DNS rebinding). It cannot choose what the browser writes into `Host`, though: only
  addresses, names that nobody can register, and names that were allowed are answered.

With keys neither gets a page anywhere: it does not know one.
"""

import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pronk.core.errors import UserError
from pronk.server.errors import ApiError
from pronk.server.logs import send_error
from pronk.server.metrics import Metrics

_HARMLESS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing here; without CORS a foreign page does not see their answers."""
_PROBES = frozenset({"/health", "/ready"})
"""Told to everybody: whoever balances load may ask by any name."""
_PRIVATE = (".localhost", ".local", ".internal", ".lan", ".home.arpa")
"""Ends of names that nobody can register."""
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


def check_origin(origin: str) -> str:
    """An origin as browsers write it; UserError where it is none."""
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise UserError(
            f"--allow-origin: {origin!r:.100} is no origin; http://localhost:3000 is one, without a"
            " path, or * for all"
        )
    return origin


def check_host_name(name: str) -> str:
    """A name as it may stand in `Host`, without a port; UserError where it is none."""
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        raise UserError(
            f"--allow-host: {name!r:.100} is no name of a host, such as llm.example.com"
        )
    return name.casefold()


class OriginLayer:
    """ASGI middleware: 403 for what pages of others could have sent. `hosts`: names that count as
    this server's; `origins`: of pages that may call it, "*" for all."""

    def __init__(
        self, app: ASGIApp, *, hosts: Iterable[str], origins: Iterable[str], metrics: Metrics
    ) -> None:
        self.app = app
        self._hosts = frozenset(hosts) | {socket.gethostname().casefold()}
        self._origins = frozenset(origins)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _PROBES:
            error = self._refusal(scope["method"], Headers(scope=scope))
            if error is not None:
                self._metrics.auth_failed(error.code or "")
                await send_error(error, scope["path"], send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not self._is_ours(_name_of(host)):
            return ApiError(
                403,
                f"Host: {host!r:.100} is not known as this server, which has no keys and therefore"
                " answers only to addresses and local names; start it with --allow-host NAME, or"
                " with --api-key-file",
                code="host_not_allowed",
            )
        if method not in _HARMLESS and not self._is_welcome(headers, host):
            return ApiError(
                403,
                f"Origin: pages of {headers.get('origin', 'elsewhere')!r:.100} may not use this"
                " server, which has no keys; start it with --allow-origin ORIGIN",
                code="origin_not_allowed",
            )
        return None

    def _is_ours(self, name: str) -> bool:
        if "." not in name or name.endswith(_PRIVATE) or name in self._hosts:
            return True  # also where there is no name: browsers always send one
        return name.rpartition(".")[2].isdecimal()  # an address: no name ends in a number

    def _is_welcome(self, headers: Headers, host: str) -> bool:
        """Whether a request comes from no page, or from one that may send it."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if site in ("same-origin", "none"):
            return True
        if origin is None:
            return site is None
        if "*" in self._origins or origin in self._origins:
            return True
        scheme, _, where = origin.partition("://")
        if scheme in ("http", "https"):
            return where.casefold() == host.casefold()
        return origin != "null"  # of an extension or an app, which somebody has installed


def _name_of(host: str) -> str:
    """Without the port: `[::1]:8000` is `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".").casefold()
