"""Who calls, and what they may do.

Where keys are set, `AuthLayer` asks everybody for one before anything is read. Every route declares
`Depends(caller(SCOPE))`, too; the few that need none are named in `OPEN_PATHS`, and a server with
any other does not start (`check_routes`). So a route that somebody forgot to protect is a failed
start, not an open door.

Without a key file everybody is the same anonymous caller, who may do all but control the server.
Control routes (scope admin) want the control token or a key with that scope, always.
"""

import hmac
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from pronk.core.errors import PronkError
from pronk.server.errors import ApiError
from pronk.server.keys import SCOPES, Key
from pronk.server.limits import enter
from pronk.server.logs import current_request, send_error

OPEN_PATHS = frozenset({"/health", "/ready", "/"})
"""Routes that nobody needs a key for: is it alive, does it take requests, and the page, which holds
no secrets and asks its user for the key."""
OPEN_PREFIXES = ("/static/",)
"""The same for the page's files."""

CONTROL_NAME = "control"


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who was let in."""

    id: str
    """Owner of what the caller stores; "" where no keys are configured."""
    name: str
    scopes: frozenset[str]
    models: frozenset[str] | None = None
    """Names of the models that the caller may use; None: all."""
    key: Key | None = None
    """The entry of the key, where one was given: its limits."""

    @property
    def admin(self) -> bool:
        return "admin" in self.scopes

    def may_use(self, *names: str) -> bool:
        """Whether the caller may use a model that goes by these names."""
        return self.models is None or not self.models.isdisjoint(names)

    def check_model(self, *names: str) -> None:
        """Refuses a model, which goes by these names, that the key is not for: 403."""
        if not self.may_use(*names):
            allowed = ", ".join(sorted(self.models or ())) or "none"
            raise ApiError(
                403,
                f"model: the key {self.name!r} is not for {names[0]!r}; its models: {allowed}",
                param="model",
                code="model_not_allowed",
            )


ANONYMOUS = Caller("", "anonymous", SCOPES - {"admin"})


class _Wanted:
    """The dependency: the caller of a request, or 401 (who?), 403 (not you), 429 (not now)."""

    def __init__(self, scope: str, limited: bool) -> None:
        assert scope in SCOPES, scope
        self.scope = scope
        self.limited = limited

    async def __call__(self, connection: HTTPConnection) -> Caller:
        try:
            found = authenticate(connection, self.scope)
        except ApiError as error:
            connection.app.state.service.metrics.auth_failed(error.code)
            raise
        if info := current_request():
            info.key = found.name
        work = connection.scope.get("method") == "POST"
        enter(connection, found, limited=self.limited and work)
        return found


def caller(
    scope: str, *, limited: bool | None = None
) -> Callable[[HTTPConnection], Coroutine[Any, Any, Caller]]:
    """The dependency that a route declares: a Caller who has `scope`.

    POST requests of scope inference count against the limits of their key and of the server;
    `limited` says otherwise, False for those that must come through when the server is full
    (a cancellation)."""
    return _Wanted(scope, scope == "inference" if limited is None else limited)


class AuthLayer:
    """ASGI middleware: where keys are set, whoever has none gets 401 before anything else: no body
    is read, and no route, not even one that does not exist, answers. What the key may do is the
    routes' business."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]):
            connection = HTTPConnection(scope)
            service = connection.app.state.service
            try:
                _identify(connection)
            except ApiError as error:
                service.metrics.auth_failed(error.code)
                await send_error(error, scope["path"], send)
                return
        await self.app(scope, receive, send)


def authenticate(connection: HTTPConnection, scope: str) -> Caller:
    """The caller of a request; ApiError 401 or 403 where it is nobody who has `scope`."""
    found = _identify(connection)
    if scope in found.scopes:
        return found
    if found is ANONYMOUS:
        raise _unknown(
            "this route controls the server; it needs the control token printed at its start, as"
            " `Authorization: Bearer TOKEN`",
            "control_token_required",
        )
    has = ", ".join(sorted(found.scopes)) or "none"
    raise ApiError(
        403,
        f"the key {found.name!r} lacks the scope {scope!r}; it has: {has}",
        code="missing_scope",
    )


def _identify(connection: HTTPConnection) -> Caller:
    """Whose request it is, whatever it asks for; ApiError 401 where that is unknown."""
    service = connection.app.state.service
    secret = _secret(connection)
    if _is_control_token(secret, service.settings.control_token):
        # without keys there is one owner, whoever asks
        return Caller("" if service.keys is None else CONTROL_NAME, CONTROL_NAME, SCOPES)
    if service.keys is None:
        return ANONYMOUS
    if secret is None:
        raise _unknown(
            "an API key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
            "missing_api_key",
        )
    key = service.keys.find(secret)
    if key is None:
        raise _unknown("the API key is unknown, removed or expired", "invalid_api_key")
    return Caller(key.id, key.name, key.scopes, key.models, key)


def _unknown(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": 'Bearer realm="pronk"'})


def _secret(connection: HTTPConnection) -> str | None:
    """The key as OpenAI's clients send it, or as Anthropic's do. Never from the query, which ends
    up in logs and histories."""
    headers = connection.headers
    if authorization := headers.get("authorization"):
        kind, _, secret = authorization.partition(" ")
        if kind.lower() == "bearer" and (secret := secret.strip()):
            return secret
    return headers.get("x-api-key", "").strip() or None


def _is_control_token(secret: str | None, token: str | None) -> bool:
    if secret is None or not token:
        return False
    return hmac.compare_digest(secret.encode("utf-8", "surrogatepass"), token.encode())


# Deny by default.


def undeclared_routes(app: FastAPI) -> list[str]:
    """Paths of routes that ask for no caller and are not meant to be open."""
    routes = iter_route_contexts(app.routes)
    return [
        route.path or repr(route.route)
        for route in routes
        if not _is_open(route.path) and not _declares(getattr(route, "dependant", None))
    ]


def check_routes(app: FastAPI) -> None:
    """Refuses an application with a route that anybody could use by accident."""
    if paths := undeclared_routes(app):
        raise PronkError(f"routes without a caller: {', '.join(paths)}; declare caller(SCOPE)")


def _is_open(path: str | None) -> bool:
    return path is not None and (path in OPEN_PATHS or f"{path}/".startswith(OPEN_PREFIXES))


def _declares(dependant: Dependant | None) -> bool:
    if dependant is None:
        return False
    if isinstance(dependant.call, _Wanted):
        return True
    return any(map(_declares, dependant.dependencies))
