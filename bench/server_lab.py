"""What the scripts that measure servers share: servers in processes of their own, an HTTP client
that is light enough to run beside them, and the raw file.

The client keeps what comes as it came, with the time, and reads it when nothing is measured any
more: on a machine of two cores its work would be taken from the server's.
"""

import asyncio
import bisect
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 300
STOP_SECONDS = 15

Json = dict[str, Any]


class LabError(Exception):
    """Nothing can be measured, and why: one line for the user."""


# Servers.


class Server:
    """A server in a process of its own, from its first answer to `close`."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        """Starts `command`; `wait_ready` then tells when it answers."""
        self.name, self.command = name, list(command)
        self.url = ""
        self._log = tempfile.NamedTemporaryFile("w+", prefix="server-", suffix=".log")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                env={**os.environ, **(env or {})},
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise LabError(f"cannot run {command[0]}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, address: str | None = None) -> None:
        """Waits for the first answer at `address`; None: at the one that Pronk's log tells."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if not self.running:
                raise LabError(f"{self.name} ended with {self._process.returncode}: {self._end()}")
            found = re.search(r"^serving .* at (http://\S+)$", self.log, re.M)
            url = address or (found[1] if found else None)
            if url and answers(url):
                self.url = url
                return
            time.sleep(0.1)
        raise LabError(f"{self.name} does not answer after {START_SECONDS} seconds: {self._end()}")

    def _end(self) -> str:
        """The last words of the log."""
        return " / ".join(line.strip() for line in self.log[-1000:].splitlines()[-3:])

    def cpu_seconds(self) -> float:
        """Processor time that it has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def kill(self) -> None:
        """As when the power fails: nothing of it runs any more afterwards."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Asks it to stop, and makes it."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_pronk(python: str, model: str, *flags: str) -> Server:
    """`pronk serve` on a free port of loopback, whose data is where `flags` say."""
    server = Server("pronk", [python, "-m", "pronk", "serve", model, "--port", "0", *flags])
    return ready(server)


def start_peer(python: str, model: str, *, context: int, threads: int) -> Server:
    """llama-cpp-python's server. It computes one request at a time; the next ones wait (as it
    comes, a new request would end the one that runs)."""
    port = free_port()
    options = {
        "model": model, "port": port, "host": "127.0.0.1", "n_ctx": context, "n_threads": threads,
        "n_threads_batch": threads, "logits_all": "false", "interrupt_requests": "false",
        "verbose": "false",
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    server = Server("llama-cpp-python", [python, "-m", "llama_cpp.server", *flags])
    return ready(server, f"http://127.0.0.1:{port}")


def ready(server: Server, address: str | None = None) -> Server:
    """The server once it answers; one that does not is ended."""
    try:
        server.wait_ready(address)
    except BaseException:
        server.close()
        raise
    return server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    try:
        call("GET", f"{url}/v1/models")
    except (URLError, ConnectionError, TimeoutError):
        return False
    return True


def call(method: str, url: str, body: Json | None = None, *, timeout: float = 60) -> Any:
    """The JSON that a server answers; its text where it is no JSON. HTTPError for an error."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(url, data, headers, method=method), timeout=timeout) as reply:
        text = reply.read().decode()
    return json.loads(text) if text.startswith(("{", "[")) else text


def status_of(method: str, url: str, body: Json | None = None) -> int:
    try:
        call(method, url, body)
    except HTTPError as error:
        return error.code
    return 200


def first_model(url: str) -> str:
    name: str = call("GET", f"{url}/v1/models")["data"][0]["id"]
    return name


def metrics_of(url: str) -> dict[str, float]:
    """By name; values of one name with several labels are summed."""
    values: dict[str, float] = {}
    for line in str(call("GET", f"{url}/metrics")).splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            plain = name.partition("{")[0]
            values[plain] = values.get(plain, 0.0) + float(value)
    return values


# The client.


@dataclass(slots=True)
class Piece:
    """An event of a stream, or of its end."""

    at: float
    data: Json


@dataclass(slots=True)
class Reply:
    """What came, read."""

    status: int
    began: float
    ended: float
    headers: dict[str, str]
    body: bytes
    """Without the framing."""
    pieces: list[Piece] = field(default_factory=list)
    """Of a stream."""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def done(self) -> bool:
        """Whether a stream has come to its end."""
        return self.body.rstrip().endswith(b"data: [DONE]")

    @property
    def texts(self) -> list[float]:
        """When pieces with text came."""
        return [piece.at for piece in self.pieces if _has_text(piece.data)]

    @property
    def to_first(self) -> float:
        """Seconds to the first text."""
        return self.texts[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between texts."""
        times = self.texts
        return [b - a for a, b in itertools.pairwise(times)]

    @property
    def finish_reason(self) -> str | None:
        reasons = (c.get("finish_reason") for p in self.pieces for c in p.data.get("choices", ()))
        return next((reason for reason in reasons if reason), None)

    @property
    def usage(self) -> Json | None:
        """Of the stream's last event that tells it."""
        found = [p.data["usage"] for p in self.pieces if p.data.get("usage")]
        return found[-1] if found else None


def _has_text(data: Json) -> bool:
    for choice in data.get("choices", ()):
        if choice.get("text") or choice.get("delta", {}).get("content"):
            return True
    return False


class Exchange(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.received: list[tuple[float, bytes]] = []
        self.began = time.perf_counter()
        self.ended = 0.0
        self.transport: asyncio.Transport | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.received.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = time.perf_counter()
        if not self.over.done():
            self.over.set_result(None)

    def reply(self) -> Reply:
        """Raises LabError for what is no answer."""
        data = b"".join(piece for _, piece in self.received)
        head, found, _ = data.partition(b"\r\n\r\n")
        if not found:
            raise LabError("a connection ended before the head of its answer")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (i.partition(":") for i in lines)
        }
        parts = list(_parts(self.received, len(head) + 4, headers))
        reply = Reply(
            int(status.split()[1]), self.began, self.ended, headers,
            b"".join(part for _, part in parts),
        )  # fmt: skip
        if "event-stream" in headers.get("content-type", ""):
            reply.pieces = list(_events(parts))
        return reply


def _parts(
    received: Sequence[tuple[float, bytes]], start: int, headers: Mapping[str, str]
) -> Iterator[tuple[float, bytes]]:
    """The pieces of a body, each with the time at which its last byte came."""
    data = b"".join(piece for _, piece in received)
    ends: list[int] = []
    for _, piece in received:
        ends.append((ends[-1] if ends else 0) + len(piece))

    def at(end: int) -> float:
        return received[bisect.bisect_left(ends, end)][0]

    if headers.get("transfer-encoding") != "chunked":
        yield at(len(data)), data[start:]
        return
    while (line := data.find(b"\r\n", start)) >= 0:
        size = int(data[start:line], 16)
        end = line + 2 + size
        if not size or end > len(data):
            return
        yield at(end), data[line + 2 : end]
        start = end + 2


def _events(parts: Sequence[tuple[float, bytes]]) -> Iterator[Piece]:
    rest = b""
    for at, part in parts:
        *whole, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: {"):
                yield Piece(at, json.loads(event[6:]))


def request_bytes(path: str, body: Json) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


async def exchange(port: int, request: bytes) -> Exchange:
    """Sends a request and waits for the end of the connection."""
    one = Exchange(request)
    await asyncio.get_running_loop().create_connection(lambda: one, "127.0.0.1", port)
    await one.over
    return one


async def all_at_once(port: int, requests: Sequence[bytes]) -> list[Exchange]:
    return list(await asyncio.gather(*(exchange(port, request) for request in requests)))


# Prompts.

_NOUNS = (
    "river engine letter garden window captain winter bridge village doctor market paper story"
    " forest kitchen station teacher island mountain machine evening harbor question family"
    " country shadow corner brother farmer sailor painter writer"
)
_VERBS = (
    "opened carried followed remembered painted found returned promised described repaired"
    " counted measured visited forgot"
)
_ADJECTIVES = (
    "simple quiet broken distant early heavy narrow empty golden little yellow silver old famous"
    " strange patient"
)


def story(sentences: int, seed: str) -> str:
    """Text that no other seed gives, of about 13 tokens a sentence."""
    draw = random.Random(seed)
    nouns, verbs, adjectives = (words.split() for words in (_NOUNS, _VERBS, _ADJECTIVES))

    def noun() -> str:
        return f"{draw.choice(adjectives)} {draw.choice(nouns)}"

    def sentence() -> str:
        return f"The {noun()} {draw.choice(verbs)} the {noun()} beside the {noun()}."

    return " ".join(sentence() for _ in range(sentences))


# The machine.


def processor_seconds() -> float:
    """Of all processes since the start, and what the host has taken away."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _wait, irq, soft, stolen = map(int, fields[1:9])
    return (user + nice + system + irq + soft + stolen) / TICKS


# The raw file: one JSON object a line, appended as it becomes known.


def append(raw: Path, kind: str, fields: Json) -> None:
    with raw.open("a") as file:
        file.write(json.dumps({"kind": kind, **fields}) + "\n")


def read_raw(raw: Path) -> list[Json]:
    """The lines of a raw file; none where there is no file. A last line without its end was not
    written to the end: it is cut off, so that the file can be gone on with. Raises LabError for
    what no script here writes."""
    if not raw.exists():
        return []
    data = raw.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found: list[Json] = []
    for n, line in enumerate(whole.splitlines(), 1):
        try:
            fields = json.loads(line)
            _ = fields["kind"]
        except (ValueError, KeyError, TypeError):
            raise LabError(f"--raw: line {n} of {raw} is not one that this script writes") from None
        found.append(fields)
    if len(whole) < len(data):
        os.truncate(raw, len(whole))
    return found
