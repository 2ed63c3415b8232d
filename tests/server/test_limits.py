"""Rates, requests at once, bodies and schemas: refused at once, told in numbers, and given back."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from service_app import Service, add_key, bearer, exchange, make_app, scope_of
from starlette.types import Message

from pronk.core.errors import UserError
from pronk.server.auth import ANONYMOUS, Caller
from pronk.server.errors import ApiError
from pronk.server.keys import Key
from pronk.server.limits import Bucket, Limits, _duration, check_schema
from pronk.server.metrics import Metrics
from pronk.server.usage import Usage

CHAT = "/v1/chat/completions"
Open = Callable[..., TestClient]


@pytest.fixture
def open_app(tmp_path: Path) -> Iterator[Open]:
    apps: list[FastAPI] = []

    def open_one(**settings: Any) -> TestClient:
        apps.append(make_app(tmp_path / f"data{len(apps)}", **settings))
        return TestClient(apps[-1], raise_server_exceptions=False)

    yield open_one
    for app in apps:
        app.state.service.store.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def service(client: TestClient) -> Service:
    app: Any = client.app
    found: Service = app.state.service
    return found


def limited(**limits: int) -> Caller:
    key = Key("key_1", "alice", "", frozenset(), 0, **limits)
    return Caller(key.id, key.name, frozenset({"inference"}), None, key)


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def limits_with(clock: Clock, max_queue: int = 10**6) -> Limits:
    return Limits(max_queue=max_queue, metrics=Metrics(), clock=clock)


# Buckets.


def test_a_bucket_fills_in_a_minute_and_holds_no_more() -> None:
    bucket = Bucket(60, now=0)
    bucket.take(60, now=0)
    assert bucket.level(0) == 0
    assert bucket.wait(1, 0) == pytest.approx(1)
    assert bucket.wait(60, 0) == pytest.approx(60)
    assert bucket.level(30) == pytest.approx(30)
    assert bucket.level(500) == 60
    bucket.take(90, now=500)
    assert bucket.wait(1, 500) == pytest.approx(31)
    bucket.take(-1000, now=500)
    assert bucket.level(500) == 60


def test_a_new_limit_counts_what_was_used_under_the_old_one() -> None:
    bucket = Bucket(60, now=0)
    bucket.take(50, now=0)
    bucket.change(100, now=0)
    assert bucket.level(0) == 50
    bucket.change(20, now=0)
    assert bucket.level(0) == -30


@pytest.mark.parametrize("seed", range(5))
def test_no_minute_sees_more_than_twice_the_rate_and_no_hour_more_than_its_share(seed: int) -> None:
    """Anything that asks whenever it likes: the burst and the steady gain are all there is."""
    rng, rate = random.Random(seed), 30
    bucket, now, taken = Bucket(rate, 0), 0.0, []
    while now < 3600:
        now += rng.expovariate(rng.choice([0.2, 5]))
        if not bucket.wait(1, now):
            bucket.take(1, now)
            taken.append(now)
    assert len(taken) <= rate * 60 + rate + rate
    for start in range(0, 3600, 7):
        assert sum(start <= at < start + 60 for at in taken) <= 2 * rate


# Requests of a key.


def test_requests_a_minute() -> None:
    clock = Clock()
    limits, who = limits_with(clock), limited(requests_per_minute=3)
    for _ in range(3):
        limits.admit(who).close()
    with pytest.raises(ApiError, match=r"'alice' has used its 3 requests a minute.* in 20s") as one:
        limits.admit(who)
    assert one.value.status == 429
    assert one.value.headers == {"Retry-After": "20"}
    assert one.value.code == "rate_limit_exceeded"
    clock.now += 19.9
    with pytest.raises(ApiError):
        limits.admit(who)
    clock.now += 0.1
    limits.admit(who).close()  # what Retry-After said is right
    limits.admit(ANONYMOUS).close()


def test_requests_at_once() -> None:
    limits, who = limits_with(Clock()), limited(max_concurrency=2)
    first, second = limits.admit(who), limits.admit(who)
    with pytest.raises(ApiError, match="has 2 requests in flight, its limit is 2") as raised:
        limits.admit(who)
    assert (raised.value.status, raised.value.headers) == (429, {"Retry-After": "1"})
    first.close()
    third = limits.admit(who)
    second.close()
    third.close()
    assert limits.in_flight == 0


def test_tokens_are_booked_and_set_right() -> None:
    clock = Clock()
    limits, who = limits_with(clock), limited(tokens_per_minute=600)
    assert who.key
    ticket = limits.admit(who)
    ticket.reserve(500)
    assert limits.headers(who.key)["x-ratelimit-remaining-tokens"] == "100"
    other = limits.admit(who)
    with pytest.raises(ApiError, match=r"its 600 tokens a minute; .* for the 200 .* in 10s") as one:
        other.reserve(200)
    assert (one.value.status, one.value.headers) == (429, {"Retry-After": "10"})
    other.close()
    ticket.spend(50)
    ticket.close()
    assert limits.headers(who.key)["x-ratelimit-remaining-tokens"] == "550"


def test_more_tokens_than_booked_are_a_debt() -> None:
    clock = Clock()
    limits, who = limits_with(clock), limited(tokens_per_minute=60)
    ticket = limits.admit(who)
    ticket.reserve(10)
    ticket.spend(90)
    ticket.close()
    with pytest.raises(ApiError, match=r"enough in 31s") as raised:
        limits.admit(who)
    assert raised.value.headers == {"Retry-After": "31"}
    clock.now += 31
    limits.admit(who).close()


def test_a_request_that_never_fits_is_told_so_and_not_to_try_again() -> None:
    limits, who = limits_with(Clock()), limited(tokens_per_minute=60)
    ticket = limits.admit(who)
    with pytest.raises(ApiError, match=r"may take 61 tokens .* has 60 a minute; ask") as raised:
        ticket.reserve(61)
    assert (raised.value.status, raised.value.headers) == (400, {})
    ticket.close()
    assert who.key
    assert limits.headers(who.key)["x-ratelimit-remaining-tokens"] == "60"


def test_the_whole_server_is_full_at_once_and_for_everybody() -> None:
    limits = limits_with(Clock(), max_queue=2)
    tickets = [limits.admit(ANONYMOUS), limits.admit(limited(requests_per_minute=5))]
    who = limited(requests_per_minute=5)
    assert who.key
    left = limits.headers(who.key)["x-ratelimit-remaining-requests"]
    for caller in (ANONYMOUS, who):
        with pytest.raises(ApiError, match="busy: 2 requests are in flight") as raised:
            limits.admit(caller)
        assert raised.value.status == 503
        assert raised.value.headers == {"Retry-After": "1"}
    assert limits.headers(who.key)["x-ratelimit-remaining-requests"] == left == "4"
    tickets[0].close()
    limits.admit(who).close()


def test_work_that_outlives_its_answer_keeps_its_place() -> None:
    limits = limits_with(Clock(), max_queue=1)
    ticket = limits.admit(ANONYMOUS)
    background = ticket.share()
    ticket.close()
    with pytest.raises(ApiError):
        limits.admit(ANONYMOUS)
    background.close()
    assert limits.in_flight == 0


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_everything_is_given_back(seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    limits = limits_with(clock, max_queue=8)
    who = limited(requests_per_minute=500, tokens_per_minute=3000, max_concurrency=4)
    assert who.key
    open_tickets = []
    for _ in range(300):
        clock.now += rng.random()
        with contextlib.suppress(ApiError):
            match rng.randrange(4):
                case 0 | 1:
                    open_tickets.append(limits.admit(rng.choice([who, ANONYMOUS])))
                case 2 if open_tickets:
                    rng.choice(open_tickets).reserve(rng.randrange(400))
                case 3 if open_tickets:
                    ticket = open_tickets.pop(rng.randrange(len(open_tickets)))
                    ticket.spend(rng.randrange(400))
                    ticket.close()
        assert limits.in_flight == len(open_tickets) <= 8
    for ticket in open_tickets:
        ticket.close()
    clock.now += 3600
    assert limits.in_flight == 0
    headers = limits.headers(who.key)
    assert headers["x-ratelimit-remaining-requests"] == "500"
    assert headers["x-ratelimit-remaining-tokens"] == "3000"
    assert headers["x-ratelimit-reset-tokens"] == "0ms"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0ms"), (0.017, "17ms"), (1, "1s"), (1.5, "1.5s"), (59.9995, "1m0s"), (360, "6m0s"),
     (61.25, "1m1.25s")],
)  # fmt: skip
def test_times_look_like_openais(seconds: float, shown: str) -> None:
    assert _duration(seconds) == shown


# Over HTTP.


def test_headers_of_a_limited_key(open_app: Open, file: Path) -> None:
    secret = add_key(file, "alice", requests_per_minute=2, tokens_per_minute=600)
    free = add_key(file, "bob")
    client = open_app(keys=file)

    def ask(**query: int) -> Any:
        return client.post(CHAT, headers=bearer(secret), params=query)

    first = ask(reserve=300, used=120)
    assert first.status_code == 200
    shown = {name: value for name, value in first.headers.items() if "ratelimit" in name}
    assert shown == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "300",
        "x-ratelimit-reset-tokens": "30s",
    }
    assert ask().headers["x-ratelimit-remaining-tokens"] == "480"
    refused = ask()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "30"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    # what costs nothing is not counted, but tells what is left
    other = client.get("/v1/models", headers=bearer(secret))
    assert other.status_code == 200
    assert other.headers["x-ratelimit-remaining-requests"] == "0"
    assert client.post("/v1/responses/r/cancel", headers=bearer(secret)).status_code == 200
    unlimited = client.post(CHAT, headers=bearer(free))
    assert not [name for name in unlimited.headers if "ratelimit" in name]
    service(client).now[0] += 30
    assert ask().status_code == 200
    assert service(client).limits.in_flight == 0


def test_a_full_server_answers_503_at_once(open_app: Open) -> None:
    client = open_app(max_queue=1)
    ticket = service(client).limits.admit(ANONYMOUS)
    refused = client.post(CHAT)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "overloaded"
    assert client.get("/v1/models").status_code == 200
    assert client.post("/v1/responses/r/cancel").status_code == 200
    ticket.close()
    assert client.post(CHAT).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/stream", "/v1/fail", "/v1/fail_late", "/v1/echo"])
def test_however_an_answer_ends_its_place_is_free(path: str, open_app: Open) -> None:
    client = open_app(max_queue=1)
    for _ in range(3):
        assert client.post(path).status_code in (200, 400, 422, 500)
        assert service(client).limits.in_flight == 0


def test_a_cancelled_request_gives_its_place_back(open_app: Open) -> None:
    client = open_app(max_queue=1)
    app: Any = client.app

    async def run() -> None:
        begun, body = asyncio.Event(), [b""]

        async def receive() -> Message:
            if not body:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": body.pop()}

        async def send(message: Message) -> None:
            begun.set()
            await asyncio.Event().wait()  # a client that reads nothing

        task = asyncio.create_task(app(scope_of("/v1/stream"), receive, send))
        await begun.wait()
        assert service(client).limits.in_flight == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert service(client).limits.in_flight == 0


# Bodies.


def test_a_body_that_says_it_is_too_large_is_not_read(open_app: Open) -> None:
    client = open_app(max_body_bytes=10)
    app: Any = client.app
    scope = scope_of("/v1/echo", {"content-length": "11", "content-type": "application/json"})

    async def receive() -> Message:
        raise AssertionError("it was read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413
    assert b"body: more than 10 bytes" in sent[1]["body"]


@pytest.mark.parametrize("path", ["/v1/echo", "/v1/messages"])
@pytest.mark.parametrize("declared", [{}, {"content-length": "5"}, {"content-length": "x"}])
def test_a_body_is_counted_while_it_comes(
    path: str, declared: dict[str, str], open_app: Open
) -> None:
    client = open_app(max_body_bytes=20)
    scope = scope_of(path, {"content-type": "application/json", **declared})
    sent = asyncio.run(exchange(client.app, scope, [b'{"a": "', *[b"x" * 5] * 5, b'"}']))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 413
    shape = b'{"type": "error"' if path == "/v1/messages" else b'{"error": {"message"'
    assert sent[1]["body"].startswith(shape)
    names = [name for name, _ in sent[0]["headers"]]
    assert names.count(b"x-request-id") == 1


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_body_of_just_the_limit_passes(chunk: int, open_app: Open) -> None:
    client = open_app(max_body_bytes=20)
    body = b'{"a": "' + b"x" * 11 + b'"}'
    assert len(body) == 20
    chunks = [body[i : i + chunk] for i in range(0, 20, chunk)]
    scope = scope_of("/v1/echo", {"content-type": "application/json"})
    sent = asyncio.run(exchange(client.app, scope, chunks))
    assert sent[0]["status"] == 200


def test_files_may_be_larger(open_app: Open) -> None:
    client = open_app(max_body_bytes=10)
    assert client.post("/v1/files", content=b"x" * 100).json() == 100
    assert client.post("/v1/files", content=b"x" * 101).status_code == 413


# Schemas.


def test_schemas_that_are_too_large_or_too_deep() -> None:
    schema: dict[str, Any] = {"type": "object"}
    check_schema("schema", schema, max_bytes=20)
    with pytest.raises(UserError, match="schema: 18 bytes, at most 17 are allowed"):
        check_schema("schema", schema, max_bytes=17)
    check_schema("regex", "é" * 10, max_bytes=20)
    with pytest.raises(UserError, match="regex: 22 bytes"):
        check_schema("regex", "é" * 11, max_bytes=20)
    deep: Any = {}
    for _ in range(100_000):  # deeper than Python could recurse
        deep = {"items": deep}
    with pytest.raises(UserError, match=r"tools\[0\]: nested more than 64 levels deep"):
        check_schema("tools[0]", deep, max_bytes=10**9)
    while deep:  # taken apart level by level: its end would recurse, too
        deep = deep["items"]


# Usage.


def test_usage_is_kept_by_key_and_day(open_app: Open, file: Path) -> None:
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    boss = add_key(file, "boss", scopes=frozenset({"inference", "admin"}))
    client = open_app(keys=file)
    for secret, used in ((alice, 5), (alice, 7), (bob, 11)):
        client.post(CHAT, headers=bearer(secret), params={"used": used})

    def used(secret: str, **query: Any) -> Any:
        return client.get("/v1/usage", headers=bearer(secret), params=query)

    own = used(alice).json()["data"]
    assert [(day["name"], day["requests"], day["prompt_tokens"]) for day in own] == [
        ("alice", 2, 12)
    ]
    refused = used(alice, everybody=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
    everybody = used(boss, everybody=True).json()["data"]
    assert sorted((day["name"], day["prompt_tokens"]) for day in everybody) == [
        ("alice", 12), ("bob", 11),
    ]  # fmt: skip
    day = own[0]["day"]
    assert used(alice, start=day, end=day).json()["data"] == own
    assert used(alice, end="2001-01-01").json()["data"] == []


class _FailingRows:
    def __init__(self) -> None:
        self.failing = True
        self.rows: dict[str, dict[str, int]] = {}

    def add(self, owner: str, **numbers: int) -> None:
        if self.failing and owner == "b":
            raise OSError("no disk")
        assert owner not in self.rows
        self.rows[owner] = numbers


class _FailingStore:
    def __init__(self) -> None:
        self.usage = _FailingRows()


def test_usage_that_cannot_be_written_is_kept() -> None:
    store = _FailingStore()
    usage = Usage(store)  # type: ignore[arg-type]
    for owner in ("a", "b", "c", "b"):
        usage.add(owner, prompt_tokens=2, completion_tokens=3)
    with pytest.raises(OSError, match="no disk"):
        usage.flush()
    store.usage.failing = False
    usage.flush()
    usage.flush()
    one = {"requests": 1, "prompt_tokens": 2, "completion_tokens": 3}
    assert store.usage.rows == {"a": one, "c": one, "b": {name: 2 * n for name, n in one.items()}}
