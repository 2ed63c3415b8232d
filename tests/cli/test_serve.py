"""`pronk serve` as a process: how it starts, what it says, how it stops."""

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cli.conftest import Pronk
from engine.tiny_models import write_gguf

PATIENCE = 60
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}


class Served:
    """A server in a process of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        command = [sys.executable, "-m", "pronk", "serve", *arguments, "--port", "0"]
        command += ["--data-dir", str(folder / "data"), "--kv-disk", "0"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self._greeted = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._greeted.wait(PATIENCE), self.lines
        self.url = re.search(r"https?://\S+", self.said)[0]  # type: ignore[index]

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "control token" in line:
                self._greeted.set()
        self._greeted.set()

    def until(self, words: str) -> None:
        """Waits until it has said so."""
        for _ in range(PATIENCE * 100):
            if words in self.said:
                return
            threading.Event().wait(0.01)
        raise AssertionError(self.said)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Served] = []

    def start(*arguments: str) -> Served:
        model = write_gguf(tmp_path / "tiny.gguf", **{"llama.context_length": 8192})
        started.append(Served([str(model), *arguments], tmp_path))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.kill()
            served.wait()


def stream(url: str, n: int) -> Iterator[str]:
    """The chunks of a chat of `n` tokens."""
    body = {**CHAT, "max_tokens": n, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line:
                yield line.removeprefix("data: ")


def test_it_says_where_it_is_and_stops_cleanly(serve: Serve) -> None:
    served = serve()
    assert "serving tiny at http://127.0.0.1:" in served.said
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready"}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={**CHAT, "max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert served.stop(signal.SIGINT) == 130
    assert "unloaded model=tiny" in served.said
    assert "Traceback" not in served.said
    assert served.said.count("\n") == len(served.lines)


def test_the_control_token_loads_and_unloads(serve: Serve) -> None:
    served = serve()
    token = re.search(r"control token .*: (\w+)", served.said)[1]  # type: ignore[index]
    url = f"{served.url}/v1/unload_model"
    assert httpx.post(url, json={"model": "tiny"}).status_code == 401
    headers = {"Authorization": f"Bearer {token}"}
    assert httpx.post(url, json={"model": "tiny"}, headers=headers).json()["loaded"] is False
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={**CHAT, "max_tokens": 3})
    assert answer.status_code == 200, "it is loaded again by the request"


def test_requests_in_flight_may_end(serve: Serve) -> None:
    served = serve()
    chunks = stream(served.url, 400)
    next(chunks)
    served.process.send_signal(signal.SIGTERM)
    rest = list(chunks)
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
    assert served.wait() in (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_requests_that_do_not_end_are_ended(serve: Serve) -> None:
    served = serve("--drain", "1")
    chunks = stream(served.url, 8000)
    next(chunks)
    served.process.send_signal(signal.SIGTERM)
    last = json.loads(list(chunks)[-1])
    assert last["error"]["message"] == "the server is stopping"
    served.wait()
    assert "Traceback" not in served.said


def test_also_those_without_a_stream(serve: Serve) -> None:
    served = serve("--drain", "1")
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {**CHAT, "max_tokens": 8000}
        answers.append(httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=PATIENCE))

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(PATIENCE * 100):
        if "num_requests_running{" in (text := httpx.get(f"{served.url}/metrics").text) and (
            re.search(r"num_requests_running\{.*\} 1\.0", text)
        ):
            break
        threading.Event().wait(0.01)
    served.stop()
    thread.join()
    assert answers[0].status_code == 503
    assert answers[0].headers["retry-after"]
    assert answers[0].json()["error"]["message"] == "the server is stopping"


def test_a_second_signal_ends_what_the_first_waits_for(serve: Serve) -> None:
    served = serve()
    chunks = stream(served.url, 8000)
    next(chunks)
    served.process.send_signal(signal.SIGINT)
    served.until("stopping: 1 requests in flight")
    served.process.send_signal(signal.SIGINT)
    *_, last = chunks
    assert "the server is stopping" in json.loads(last)["error"]["message"]
    assert served.wait() == 130
    assert "Traceback" not in served.said


def test_two_signals_at_once(serve: Serve) -> None:
    served = serve()
    served.process.send_signal(signal.SIGINT)
    served.process.send_signal(signal.SIGINT)
    assert served.wait() == 130
    assert "Traceback" not in served.said


def test_tls(serve: Serve, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    served = serve("--tls-cert", str(certificate), "--tls-key", str(key))
    assert served.url.startswith("https://")
    context = ssl.create_default_context(cafile=certificate)
    assert httpx.get(f"{served.url}/health", verify=context).json() == {"status": "ok"}


def test_logs_as_json(serve: Serve) -> None:
    served = serve("--log-format", "json")
    httpx.get(f"{served.url}/v1/models", headers={"x-request-id": "mine"})
    served.stop(signal.SIGINT)
    entries = [json.loads(line) for line in served.lines if line.startswith("{")]
    found = next(entry for entry in entries if entry.get("request_id") == "mine")
    assert (found["path"], found["status"]) == ("/v1/models", 200)


def test_a_draft_model(serve: Serve, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "draft.gguf", **{"llama.context_length": 8192})
    served = serve("--draft", str(other))
    body = {**CHAT, "max_tokens": 64, "temperature": 0}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=PATIENCE).json()
    assert answer["usage"]["completion_tokens"] == 64


def test_a_draft_model_of_another_vocabulary(pronk: Pronk, tiny: str, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "draft.gguf", chat=False)
    ran = pronk("serve", tiny, "--draft", str(other), "--data-dir", str(tmp_path / "data"))
    assert ran.code == 2
    assert "draft: " in ran.err
    assert "<|start_header_id|>" in ran.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "MODEL: unknown model 'nope'"),
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 lets other machines in, and there are no keys"),
        (["--host", "203.0.113.7", "--no-auth"], "--port: 8000 of 203.0.113.7 cannot be used"),
        (["--host", "127.evil.example"], "lets other machines in"),
        (["--host", "::1:2"], "lets other machines in"),
        (["--allow-origin", "evil"], "--allow-origin: 'evil' is no origin"),
        (["--allow-host", "http://a"], "--allow-host: 'http://a' is no name of a host"),
        (["--port", "70000"], "--port: 70000 is not a whole number from 0 to 65535"),
        (["--api-key-file", "none.json"], "none.json"),
        (["--no-auth", "--api-key-file", "keys.json"], "--no-auth: contradicts --api-key-file"),
        (["--tls-cert", "c.pem"], "--tls-cert: needs --tls-key, too"),
        (["--tls-cert", "c.pem", "--tls-key", "k.pem"], "--tls-cert: c.pem cannot be read"),
        (["--tls-cert", __file__, "--tls-key", __file__], "are no certificate and its key"),
        (["--otlp-endpoint", "nonsense"], "--otlp-endpoint: 'nonsense' is no URL"),
        (["--alias", "x"], "--alias: x is not NAME=VALUE"),
        (["--adapter", "a=/nowhere"], "/nowhere"),
        (["--ctx", "100000"], "ctx: 100000 is not a whole number from 1 to 512"),
        (["--draft", "nope"], "--draft: unknown model 'nope'"),
        (["--database", "nonsense"], "database: not a URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(
    pronk: Pronk, tiny: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    ran = pronk("serve", tiny, *arguments, "--data-dir", str(tmp_path / "data"))
    assert ran.code == 2, ran.err
    last = ran.err.rstrip().splitlines()[-1]
    assert last.startswith("pronk: error: ")
    assert says in last
    assert "Traceback" not in ran.err
