"""How much anybody may ask for: requests and tokens a minute and requests at once of a key,
requests in flight of all, size of a JSON schema. (Bytes of a body: bodies.py.)

The rates are token buckets: a key may use its minute's worth at once, and gets it back evenly over
a minute. A request that is refused takes nothing. Tokens are booked when they are known to be
wanted (prompt and `max_tokens`) and set right when the answer has ended.

Used from the event loop only: none of it waits, so nothing needs a lock.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pronk.core.errors import UserError
from pronk.server.errors import ApiError
from pronk.server.keys import Key
from pronk.server.logs import add_header

if TYPE_CHECKING:
    from pronk.server.auth import Caller
    from pronk.server.metrics import Metrics

SCHEMA_DEPTH = 64
"""Levels of objects and lists in a JSON schema."""

_MINUTE = 60.0
_ROUNDING = 1e-6
_BUSY_SECONDS = 1
"""Retry-After where nobody can know when there will be room."""


class Bucket:
    """Holds up to `per_minute`, and gains as much a minute. A debt is paid back first."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        gained = (now - self._at) * self.per_minute / _MINUTE
        self._level, self._at = min(self.per_minute, self._level + gained), now
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until it holds `amount`."""
        seconds = (amount - self.level(now)) * _MINUTE / self.per_minute
        return seconds if seconds > _ROUNDING else 0.0

    def take(self, amount: float, now: float) -> None:
        """Takes out `amount`, even where that makes a debt; puts back a negative one."""
        self._level = min(self.per_minute, self.level(now) - amount)

    def change(self, per_minute: int, now: float) -> None:
        """The limit became another one: as much as before is gone from it."""
        if per_minute != self.per_minute:
            gone = self.per_minute - self.level(now)
            self.per_minute = per_minute
            self._level = per_minute - gone


@dataclass(slots=True)
class _Account:
    """What a key has used lately."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    in_flight: int = 0


class Limits:
    """`max_queue`: requests in flight, of all callers together."""

    def __init__(
        self,
        *,
        max_queue: int,
        metrics: "Metrics",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_queue = max_queue
        self.in_flight = 0
        self._metrics = metrics
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def admit(self, caller: "Caller") -> "Ticket":
        """Lets a request in: 503 where the server is full, 429 where the key is at a limit."""
        if self.in_flight >= self.max_queue:
            raise self._refused(
                "queue",
                503,
                f"the server is busy: {self.in_flight} requests are in flight, and no more may"
                " wait; try again in a moment",
                _BUSY_SECONDS,
            )
        key = caller.key
        account = self._account(key) if key else None
        if key and account:
            self._check(key, account)
            if account.requests:
                account.requests.take(1, self._clock())
            account.in_flight += 1
        self.in_flight += 1
        return Ticket(self, key, account)

    def _check(self, key: Key, account: _Account) -> None:
        most = key.max_concurrency
        if most is not None and account.in_flight >= most:
            raise self._refused(
                "concurrency",
                429,
                f"the key {key.name!r} has {account.in_flight} requests in flight, its limit is"
                f" {most}; wait until one has ended",
                _BUSY_SECONDS,
            )
        if account.requests and (wait := account.requests.wait(1, self._clock())):
            raise self._refused(
                "requests",
                429,
                f"the key {key.name!r} has used its {key.requests_per_minute} requests a minute;"
                f" the next one may come in {_duration(wait)}",
                wait,
            )
        if account.tokens and (wait := account.tokens.wait(1, self._clock())):
            raise self._tokens_spent(key, wait)

    def reserve(self, key: Key, account: _Account, tokens: int) -> None:
        """Books tokens of a request that is in flight; 429 where they are too many now, 400 where
        they always will be."""
        if account.tokens is None:
            return
        if tokens > account.tokens.per_minute:
            self._metrics.refused("tokens")
            raise ApiError(
                400,
                f"the request may take {tokens} tokens (its prompt and max_tokens), the key"
                f" {key.name!r} has {account.tokens.per_minute} a minute; ask for fewer",
                param="max_tokens",
                code="rate_limit_exceeded",
            )
        if wait := account.tokens.wait(tokens, self._clock()):
            raise self._tokens_spent(key, wait, f" for the {tokens} of this request")
        account.tokens.take(tokens, self._clock())

    def give_back(self, account: _Account, tokens: int) -> None:
        """Booked tokens that were not used; where more were used, a negative number."""
        if account.tokens:
            account.tokens.take(-tokens, self._clock())

    def leave(self, account: _Account | None) -> None:
        self.in_flight -= 1
        if account:
            account.in_flight -= 1

    def headers(self, key: Key) -> dict[str, str]:
        """OpenAI's headers of what a key may still use."""
        account, now = self._account(key), self._clock()
        buckets = {"requests": account.requests, "tokens": account.tokens}
        headers = {}
        for unit, bucket in buckets.items():
            if bucket:
                left = max(0, math.floor(bucket.level(now) + _ROUNDING))
                headers[f"x-ratelimit-limit-{unit}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{unit}"] = str(left)
                full = bucket.wait(bucket.per_minute, now)
                headers[f"x-ratelimit-reset-{unit}"] = _duration(full)
        return headers

    def _account(self, key: Key) -> _Account:
        """The account of a key, with the limits that it has now."""
        account = self._accounts.setdefault(key.id, _Account())
        now = self._clock()
        account.requests = _bucket(account.requests, key.requests_per_minute, now)
        account.tokens = _bucket(account.tokens, key.tokens_per_minute, now)
        return account

    def _tokens_spent(self, key: Key, wait: float, words: str = "") -> ApiError:
        return self._refused(
            "tokens",
            429,
            f"the key {key.name!r} has used its {key.tokens_per_minute} tokens a minute; there are"
            f" enough{words} in {_duration(wait)}",
            wait,
        )

    def _refused(self, reason: str, status: int, message: str, wait: float) -> ApiError:
        self._metrics.refused(reason)
        code = "overloaded" if status == 503 else "rate_limit_exceeded"
        return ApiError(
            status, message, code=code, headers={"Retry-After": str(max(1, math.ceil(wait)))}
        )


def _bucket(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.change(per_minute, now)
    return bucket


def _duration(seconds: float) -> str:
    """As OpenAI's headers have it: 17ms, 1.5s, 6m0s."""
    millis = math.ceil((seconds - _ROUNDING) * 1000)
    if millis < 1000:
        return f"{max(0, millis)}ms"
    minutes, rest = divmod(millis, 60_000)
    whole = f"{rest / 1000:g}s"
    return f"{minutes}m{whole}" if minutes else whole


class Ticket:
    """A request that was let in. Whoever holds it closes it, once; with `share` several may."""

    def __init__(self, limits: Limits, key: Key | None, account: _Account | None) -> None:
        self._limits, self._key, self._account = limits, key, account
        self._reserved = self._spent = 0
        self._holders = 1

    def reserve(self, tokens: int) -> None:
        """Books tokens that the request may take; ApiError 429 (400 where it can never be) if the
        key has not that many."""
        if self._key and self._account:
            self._limits.reserve(self._key, self._account, tokens)
            self._reserved += tokens

    def spend(self, tokens: int) -> None:
        """Tokens that the request has really taken, prompt and answer."""
        self._spent += tokens

    def share(self) -> "Ticket":
        """For work that goes on when the answer was sent: it closes the ticket, too."""
        self._holders += 1
        return self

    def close(self) -> None:
        """The last holder's call makes room for another request and sets the tokens right."""
        assert self._holders > 0, "closed more often than shared"
        self._holders -= 1
        if self._holders == 0:
            if self._account:
                self._limits.give_back(self._account, self._reserved - self._spent)
            self._limits.leave(self._account)


@dataclass(slots=True)
class _Door:
    """What the layer and the routes below it know of one request. It lies in the ASGI scope."""

    limits: Limits
    key: Key | None = None
    ticket: Ticket | None = None


_DOOR = "pronk.door"


def enter(connection: HTTPConnection, caller: "Caller", *, limited: bool) -> None:
    """A caller was let in by its key; `limited`: and now by the limits."""
    door: _Door | None = connection.scope.get(_DOOR)
    if door is None:  # an application without the layer has no limits
        return
    door.key = caller.key
    if limited and door.ticket is None:
        door.ticket = door.limits.admit(caller)


def ticket_of(connection: HTTPConnection) -> Ticket | None:
    """The ticket of a request, None where nothing limits it."""
    door: _Door | None = connection.scope.get(_DOOR)
    return door.ticket if door else None


class LimitsLayer:
    """ASGI middleware: closes tickets when answers have ended, however they end, and tells the
    callers with limits what is left."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        door = scope[_DOOR] = _Door(self.limits)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and door.key:
                for name, value in self.limits.headers(door.key).items():
                    add_header(message, name, value)
            await send(message)

        try:
            await self.app(scope, receive, told)
        finally:
            if door.ticket:
                door.ticket.close()


# Schemas.


def check_schema(name: str, schema: Any, *, max_bytes: int, depth: int = SCHEMA_DEPTH) -> None:
    """Refuses a JSON schema, or a grammar's text, that is larger or deeper than anybody's: making a
    grammar of it would take long. UserError begins with `name`, the parameter."""
    level, waiting = 0, [schema]
    while waiting:  # level by level: a recursion would need the very depth that is forbidden
        level += 1
        if level > depth:
            raise UserError(f"{name}: nested more than {depth} levels deep")
        waiting = [
            child
            for value in waiting
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > max_bytes:
        raise UserError(f"{name}: {size} bytes, at most {max_bytes} are allowed")
