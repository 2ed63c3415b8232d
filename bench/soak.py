"""Hundreds of clients that vanish at random moments, and what is left behind by them.

    python bench/soak.py MODEL.gguf --minutes 5 --out docs/results/soak.png
    python bench/soak.py http://127.0.0.1:8000 --pid PID --minutes 5

Starts its own server for a model, or takes one that runs on this machine (`--pid`: its process).
Each client sends requests of all kinds one after another (chats, completions, messages, tools, JSON
schemas, several answers, long prompts, with and without streams) and goes away before the body is
sent, while it waits, in the middle of the answer, or not at all; by closing or by resetting the
connection. In the end all leave at once. First the KV cache is filled and every kind of request is
answered once, so that what grows afterwards grows without need.

Exits with 1 where something was left behind or went wrong: requests running or waiting, blocks in
use, requests in flight, open files, threads, memory that grows after the second minute, answers
with 5xx, tracebacks in the log; with 2 where nothing could be measured. With `--out` (needs
matplotlib) draws what was seen.
"""

import argparse
import asyncio
import importlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

from cpu_peers import count
from server_lab import (
    Json,
    LabError,
    Server,
    exchange,
    first_model,
    metrics_of,
    request_bytes,
    start_pronk,
    story,
)

MOMENTS = ("in the body", "while waiting", "in the answer", "never")
WEIGHTS = (1, 2, 3, 2)
LONGEST_WAIT = 4.0
"""Seconds until a client that waits goes away."""
PATIENCE = 120
"""Seconds after the last client until everything must have ended."""
LONG = 60
"""Sentences of a long prompt, about 13 tokens each."""
MORE_FILES, MORE_THREADS = 8, 48
"""More than these are a leak. Pools of threads grow as far as 40 and some, whatever comes."""
MORE_MEMORY = 0.05
"""Of the resident memory in the second minute."""
LEAST_MEMORY = 16 << 20
"""Bytes that may always come in addition."""

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


# Requests.


def kinds(model: str, draw: random.Random) -> dict[str, tuple[str, Json]]:
    """Path and body of one request of each kind."""
    text = story(draw.randint(1, 4), str(draw.random()))
    base = {"model": model, "max_tokens": draw.choice((4, 8, 16, 32)), "temperature": 0.9}
    streamed = {**base, "stream": True}
    chat = {"messages": [{"role": "user", "content": text}]}
    chats, completions = "/v1/chat/completions", "/v1/completions"
    json_schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA}}
    return {
        "chat": (chats, {**streamed, **chat}),
        "completion": (completions, {**streamed, "prompt": text}),
        "messages": ("/v1/messages", {**streamed, **chat}),
        "tools": (chats, {**streamed, **chat, "tools": [_TOOL], "tool_choice": "required"}),
        "schema": (chats, {**streamed, **chat, "response_format": json_schema}),
        "several": (chats, {**streamed, **chat, "n": 3}),
        "long": (completions, {**streamed, "prompt": f"{text} {story(LONG, text)}"}),
        "whole": (chats, {**base, **chat}),
        "whole completion": (completions, {**base, "prompt": [text, f"{text} Then"]}),
    }


class Client(asyncio.Protocol):
    """A connection that ends early, by itself or by its user."""

    def __init__(self) -> None:
        self.head = b""
        self.n_received = 0
        self.transport: asyncio.Transport | None = None
        self.leave_after: int | None = None
        """Bytes of the answer after which it goes away."""
        self.rude = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.n_received += len(data)
        if len(self.head) < 16:
            self.head += data[:16]
        if self.leave_after is not None and self.n_received > self.leave_after:
            self.leave()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def leave(self) -> None:
        assert self.transport is not None
        if self.rude:
            self.transport.abort()
        else:
            self.transport.close()

    @property
    def status(self) -> int | None:
        """None where nothing of an answer has come."""
        words = self.head.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else None


async def one_request(
    port: int, model: str, draw: random.Random, seen: Counter[str], connected: set[Client]
) -> None:
    kind, (path, body) = draw.choice(list(kinds(model, draw).items()))
    (moment,) = draw.choices(MOMENTS, WEIGHTS)
    data = request_bytes(path, body)
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(Client, "127.0.0.1", port)
    assert client.transport is not None
    client.rude = draw.random() < 0.5
    connected.add(client)
    client.over.add_done_callback(lambda _: connected.discard(client))
    seen[f"left {moment}"] += 1
    seen[f"kind {kind}"] += 1
    if moment == "in the body":
        client.transport.write(data[: draw.randrange(10, len(data))])
        await asyncio.sleep(draw.uniform(0, 0.5))
        client.leave()
    else:
        client.transport.write(data)
        if moment == "in the answer":
            client.leave_after = draw.randrange(4000)
        if moment == "while waiting":
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(client.over), draw.uniform(0, LONGEST_WAIT))
            client.leave()
    await client.over
    seen[f"status {client.status}"] += 1


async def clients(port: int, model: str, n: int, until: float, seen: Counter[str]) -> None:
    """`n` of them until the end; then those that are still there leave at once."""
    connected: set[Client] = set()

    async def one(number: int) -> None:
        draw = random.Random(number)
        await asyncio.sleep(draw.uniform(0, 2))
        while time.monotonic() < until:
            try:
                await one_request(port, model, draw, seen, connected)
            except OSError as error:
                seen[f"no connection: {type(error).__name__}"] += 1
                await asyncio.sleep(0.1)

    tasks = [asyncio.ensure_future(one(number)) for number in range(n)]
    while any(not task.done() for task in tasks):
        await asyncio.sleep(0.2)
        if time.monotonic() > until:
            for client in list(connected):
                client.leave()
    await asyncio.gather(*tasks)


# What is seen of the server.


@dataclass(frozen=True)
class Sample:
    """The server at a moment."""

    at: float
    """Seconds since the first client."""
    memory: int
    """Resident bytes."""
    files: int
    threads: int
    running: float
    waiting: float
    kv_used: float
    """Part of the KV cache, 0 to 1."""
    in_flight: float
    """HTTP requests, without the one that asks."""


def look(url: str, pid: int, started: float) -> Sample:
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    found = metrics_of(url)
    return Sample(
        round(time.monotonic() - started, 2),
        int(status["VmRSS"].split()[0]) << 10,
        len(list((process / "fd").iterdir())),
        int(status["Threads"]),
        found["vllm:num_requests_running"],
        found["vllm:num_requests_waiting"],
        found["vllm:kv_cache_usage_perc"],
        found["pronk_http_requests_in_flight"] - 1,
    )


async def watch(url: str, pid: int, started: float, samples: list[Sample]) -> None:
    while True:
        try:
            samples.append(await asyncio.to_thread(look, url, pid, started))
        except URLError as error:
            print(f"soak: /metrics does not answer: {error.reason}", file=sys.stderr)
        await asyncio.sleep(1)


async def warm_up(port: int, url: str, model: str) -> None:
    """Fills the KV cache and answers every kind of request once."""
    for kind, (path, body) in kinds(model, random.Random("warm")).items():
        reply = (await exchange(port, request_bytes(path, body))).reply()
        if reply.status != 200:
            raise LabError(f"a request of kind {kind!r} is answered with {reply.body.decode()}")
    for n in range(200):
        found = await asyncio.to_thread(metrics_of, url)
        if found["pronk_kv_blocks_cached"] > 0.9 * found["pronk_kv_blocks"]:
            return
        body = {"model": model, "max_tokens": 1, "prompt": story(LONG, f"fill {n}")}
        await exchange(port, request_bytes("/v1/completions", body))


async def settled(url: str, pid: int, started: float) -> Sample:
    """The server once nothing is in flight any more, or when patience ends."""
    until = time.monotonic() + PATIENCE
    while True:
        last = await asyncio.to_thread(look, url, pid, started)
        idle = not (last.running or last.waiting or last.in_flight or last.kv_used)
        if idle or time.monotonic() > until:
            return last
        await asyncio.sleep(1)


# The verdict.


@dataclass(frozen=True)
class Result:
    before: Sample
    after: Sample
    samples: Sequence[Sample]
    seen: Counter[str]
    log: str

    def memory_in(self, first: float, last: float) -> float | None:
        found = [s.memory for s in self.samples if first <= s.at <= last]
        return statistics.median(found) if found else None


def leaks(result: Result) -> list[str]:
    """What is wrong, a line each."""
    before, after = result.before, result.after
    found = [
        f"{name}: {value:g} after {PATIENCE} seconds without clients"
        for name, value in (
            ("running", after.running), ("waiting", after.waiting), ("in flight", after.in_flight),
            ("part of the KV cache in use", after.kv_used),
        )
        if value
    ]  # fmt: skip
    for name, old, new, more in (
        ("open files", before.files, after.files, MORE_FILES),
        ("threads", before.threads, after.threads, MORE_THREADS),
    ):
        if new > old + more:
            found.append(f"{name}: {new} after, {old} before")
    found += grown(result)
    bad = {k: n for k, n in result.seen.items() if k.startswith("status 5")}
    bad |= {k: n for k, n in result.seen.items() if k.startswith("no connection")}
    found += [f"{name}: {n} times" for name, n in bad.items()]
    for word in ("Traceback", "ERROR", "never retrieved"):
        if n := result.log.count(word):
            line = next(line for line in result.log.splitlines() if word in line)
            found.append(f"log: {n} times {word}: {line.strip()[:300]}")
    return found


def grown(result: Result) -> list[str]:
    """Memory that has come since the second minute (the second quarter of a short run)."""
    early, late = memories(result)
    if early is None or late is None:
        return ["memory: too few samples"]
    if late - early > max(MORE_MEMORY * early, LEAST_MEMORY):
        return [f"memory: {late / 1e6:.0f} MB at the end, {early / 1e6:.0f} MB early on"]
    return []


def memories(result: Result) -> tuple[float | None, float | None]:
    """Early and at the end, while the clients were there."""
    end = max((s.at for s in result.samples), default=0.0)
    unit = min(60.0, end / 4)
    return result.memory_in(unit, 2 * unit), result.memory_in(end - unit, end)


def report(result: Result) -> str:
    early, late = memories(result)
    seen = result.seen
    lines = []
    for title in ("left", "status", "kind"):
        parts = [f"{k.removeprefix(title + ' ')} {n}" for k, n in sorted(seen.items())
                 if k.startswith(title + " ")]  # fmt: skip
        lines.append(f"{title}: {', '.join(parts)}")
    most = max(result.samples, key=lambda s: s.in_flight, default=result.after)
    lines.append(
        f"most in flight {most.in_flight:g}; open files {result.before.files} before,"
        f" {max(s.files for s in result.samples)} at most, {result.after.files} after; threads"
        f" {result.before.threads}, {max(s.threads for s in result.samples)},"
        f" {result.after.threads}"
    )
    lines.append(
        f"memory {result.before.memory / 1e6:.0f} MB before, {(early or 0) / 1e6:.0f} early,"
        f" {(late or 0) / 1e6:.0f} at the end, {result.after.memory / 1e6:.0f} after"
    )
    return "\n".join(lines)


def draw_plot(result: Result, out: Path) -> None:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    panels: list[tuple[str, Callable[[Sample], float]]] = [
        ("resident memory, MB", lambda s: s.memory / 1e6),
        ("open files", lambda s: s.files),
        ("threads", lambda s: s.threads),
        ("requests running", lambda s: s.running),
        ("requests in flight", lambda s: s.in_flight),
    ]
    samples = [*result.samples, result.after]
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(8, 9))
    for axis, (name, value) in zip(axes, panels, strict=True):
        axis.plot([s.at / 60 for s in samples], [value(s) for s in samples], linewidth=1)
        axis.axhline(value(result.before), color="gray", linewidth=0.7, linestyle=":")
        axis.set_ylim(0, 1.1 * max([1, *map(value, samples)]))
        axis.set_ylabel(name, fontsize=8)
    axes[-1].set_xlabel("minutes; dotted: before the first client")
    figure.suptitle("Clients that vanish at random", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


# The command.


async def soak(url: str, pid: int, server: Server | None, args: argparse.Namespace) -> Result:
    port, model = int(url.rpartition(":")[2].strip("/")), first_model(url)
    await warm_up(port, url, model)
    await asyncio.sleep(1)
    started = time.monotonic()
    before = await settled(url, pid, started)
    samples: list[Sample] = []
    seen: Counter[str] = Counter()
    watching = asyncio.ensure_future(watch(url, pid, started, samples))
    try:
        await clients(port, model, args.clients, started + 60 * args.minutes, seen)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    after = await settled(url, pid, started)
    return Result(before, after, samples, seen, server.log if server else "")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="a model, or the address of a server on this machine")
    parser.add_argument("--pid", type=count, help="process of a server that runs")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=count, default=500)
    parser.add_argument("--python", default=sys.executable, help="interpreter with Pronk")
    parser.add_argument("--raw", type=Path, help="JSON lines of what was seen")
    parser.add_argument("--out", type=Path, help="plot, PNG")
    args = parser.parse_args(argv)
    if args.target.startswith("http://") != (args.pid is not None):
        parser.error("--pid: needed for an address, and for nothing else")
    if args.minutes <= 0:
        parser.error(f"--minutes: {args.minutes:g} is not above 0")
    for name, path in (("--raw", args.raw), ("--out", args.out)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{name}: there is no folder {path.parent}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        with ExitStack() as stack:
            url, pid, server = args.target, args.pid, None
            if pid is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))
                server = stack.enter_context(
                    start_pronk(
                        args.python,
                        args.target,
                        "--data-dir",
                        folder,
                        "--ctx",
                        "4096",
                        "--max-queue",
                        str(2 * args.clients),
                        "--kv-disk",
                        "0",
                    )
                )
                url, pid = server.url, server.pid
            result = asyncio.run(soak(url, pid, server, args))
            if server and not server.running:
                raise LabError("the server has ended")
    except (LabError, URLError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report(result))
    if args.raw:
        lines = [json.dumps(asdict(sample)) for sample in (*result.samples, result.after)]
        args.raw.write_text("\n".join(lines) + "\n")
    if args.out:
        draw_plot(result, args.out)
    found = leaks(result)
    for line in found:
        print(f"LEFT BEHIND: {line}")
    if not found:
        print("nothing was left behind")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
