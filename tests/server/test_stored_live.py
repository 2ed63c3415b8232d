"""Files, batches and stored chats of a whole server with a model, by the official client."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import PATIENCE, Live

from engine.tiny_models import write_gguf

CHAT = "/v1/chat/completions"
FINAL = {"completed", "failed", "cancelled", "expired"}
Json = dict[str, Any]


@pytest.fixture
def sdk(tiny_server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat_line(n: int, **body: Any) -> Json:
    messages = [{"role": "user", "content": f"say {n}"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0} | body
    return {"custom_id": f"c{n}", "method": "POST", "url": CHAT, "body": body}


def submit(sdk: openai.OpenAI, lines: list[Json], endpoint: Any = CHAT) -> str:
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    source = sdk.files.create(file=("in.jsonl", data), purpose="batch")
    made = sdk.batches.create(input_file_id=source.id, endpoint=endpoint, completion_window="24h")
    return made.id


def wait_for(sdk: openai.OpenAI, id: str) -> Any:
    for _ in range(PATIENCE * 20):
        batch = sdk.batches.retrieve(id)
        if batch.status in FINAL:
            return batch
        time.sleep(0.1)
    raise AssertionError(f"not ended: {batch}")


def read(sdk: openai.OpenAI, id: str | None) -> list[Json]:
    assert id is not None
    return [json.loads(line) for line in sdk.files.content(id).text.splitlines()]


def test_batch_of_chats_answers_as_the_route_does(sdk: openai.OpenAI) -> None:
    lines = [chat_line(n) for n in range(6)]
    lines[3]["body"]["max_tokens"] = 0
    lines[4]["body"]["model"] = "nobody"
    batch = wait_for(sdk, submit(sdk, lines))
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (4, 2)
    good = read(sdk, batch.output_file_id)
    assert [one["custom_id"] for one in good] == ["c0", "c1", "c2", "c5"]
    for one, n in zip(good, (0, 1, 2, 5), strict=True):
        live = sdk.chat.completions.create(**lines[n]["body"])
        body = one["response"]["body"]
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"] == live.choices[0].message.content
    assert batch.usage.output_tokens == 16
    bad, unknown = (one["response"] for one in read(sdk, batch.error_file_id))
    assert (bad["status_code"], bad["body"]["error"]["param"]) == (400, "max_tokens")
    assert unknown["status_code"] == 404


@pytest.mark.parametrize(
    ("endpoint", "body", "kind", "used"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 3}, "text_completion", 3),
        ("/v1/embeddings", {"input": ["hello", "you"]}, "list", 0),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 16, "store": False},
         "response", None),
    ],
)  # fmt: skip
def test_batches_of_other_endpoints(
    sdk: openai.OpenAI, endpoint: str, body: Json, kind: str, used: int | None
) -> None:
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": "tiny"} | body}
    batch = wait_for(sdk, submit(sdk, [line], endpoint))
    assert batch.error_file_id is None, read(sdk, batch.error_file_id)
    (one,) = read(sdk, batch.output_file_id)
    assert one["response"]["body"]["object"] == kind
    assert batch.usage.input_tokens > 0
    assert used is None or batch.usage.output_tokens == used


def test_cancelled_batch_stops_its_requests(sdk: openai.OpenAI, tiny_server: Live) -> None:
    id = submit(sdk, [chat_line(n, max_tokens=1500, ignore_eos=True) for n in range(400)])
    tiny_server.until(lambda: tiny_server.busy > 0)
    assert sdk.batches.cancel(id).status in ("cancelling", "cancelled")
    batch = wait_for(sdk, id)
    assert batch.status == "cancelled"
    assert batch.request_counts.completed < 400
    codes = {one["error"]["code"] for one in read(sdk, batch.error_file_id)}
    assert codes == {"batch_cancelled"}
    tiny_server.until(lambda: tiny_server.busy == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_stored_chats(sdk: openai.OpenAI, stream: bool) -> None:
    name = f"stored {stream}"
    options: Json = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}],
                     "max_tokens": 5, "store": True, "metadata": {"test": name}}  # fmt: skip
    if stream:
        chunks = list(sdk.chat.completions.create(stream=True, **options))
        id, text = (
            chunks[0].id,
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        )
    else:
        made = sdk.chat.completions.create(**options)
        id, text = made.id, made.choices[0].message.content or ""
    found = sdk.chat.completions.retrieve(id)
    assert (found.choices[0].message.content or "") == text
    assert found.metadata == {"test": name}
    assert [chat.id for chat in sdk.chat.completions.list(metadata={"test": name})] == [id]
    (message,) = sdk.chat.completions.messages.list(id)
    assert (message.id, message.content) == (f"{id}-0", "hi")
    assert sdk.chat.completions.delete(id).deleted
    options["store"] = False
    unstored = sdk.chat.completions.create(**options)
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.retrieve(unstored.id)


@contextmanager
def serving(model: Path, data: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "pronk", "serve", str(model), "--port", str(port),
               "--data-dir", str(data)]  # fmt: skip
    with open(data.with_suffix(".log"), "ab") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(PATIENCE * 20):
            assert child.poll() is None, data.with_suffix(".log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield child
    finally:
        child.kill()
        child.wait()


def test_killed_server_finishes_a_batch_of_200_once(tmp_path: Path, free_port: int) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", **{"llama.context_length": 2048})
    url = f"http://127.0.0.1:{free_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as sdk:
        with serving(model, tmp_path / "data", free_port) as child:
            id = submit(sdk, [chat_line(n, max_tokens=40) for n in range(200)])
            while (counts := sdk.batches.retrieve(id).request_counts) is None or (
                counts.completed < 20
            ):
                time.sleep(0.01)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        with serving(model, tmp_path / "data", free_port):
            assert sdk.batches.retrieve(id).request_counts.completed >= counts.completed
            batch = wait_for(sdk, id)
            assert batch.status == "completed"
            assert batch.request_counts.model_dump() == {
                "total": 200, "completed": 200, "failed": 0,
            }  # fmt: skip
            got = read(sdk, batch.output_file_id)
            assert [one["custom_id"] for one in got] == [f"c{n}" for n in range(200)]
