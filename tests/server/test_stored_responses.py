"""Responses that are stored: chains, the background, what survives a client and a server."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import Live, live_server
from openai import OpenAI
from openai.types.responses import ResponseInputMessageItem
from openai_strict import checked_events, events_of, kinds, response, strict
from response_calls import HI, LOGPROBS, WEATHER, YES_NO, made, post, text_of
from service_app import add_key, bearer

from engine.tiny_models import write_gguf
from pronk.server.response_events import TERMINAL

LONG = {"input": "Hi", "max_output_tokens": 1900, "ignore_eos": True, "seed": 1}
"""Long enough to be caught on its way."""


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", **{"llama.context_length": 2048})


def get(url: str, id: str, path: str = "", **query: Any) -> httpx.Response:
    return httpx.get(f"{url}/v1/responses/{id}{path}", params=query, timeout=60)


def events_from(url: str, id: str, after: int | None = None) -> list[dict[str, Any]]:
    more = {} if after is None else {"starting_after": after}
    return events_of(get(url, id, stream=True, **more))


def ended(server: Live, id: str, url: str | None = None) -> dict[str, Any]:
    """The response once it has ended."""
    server.until(lambda: get(server.url, id).json()["status"] in TERMINAL)
    data: dict[str, Any] = get(server.url, id).json()
    response(data)
    return data


# Stored, and not.


def test_what_was_answered_can_be_had_again(server_url: str, openai_client: OpenAI) -> None:
    data = made(server_url)
    assert get(server_url, data["id"]).json() == data
    assert openai_client.responses.retrieve(data["id"]).id == data["id"]
    openai_client.responses.delete(data["id"])
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(data["id"])
    assert get(server_url, data["id"]).json()["error"]["code"] == "not_found"


def test_what_is_not_to_be_stored_is_not(server_url: str) -> None:
    for more in ({}, {"stream": True}):
        answer = post(server_url, **HI, store=False, **more)
        data = events_of(answer)[-1]["response"] if more else answer.json()
        assert data["store"] is False
        assert get(server_url, data["id"]).status_code == 404


def test_deleting_answers_and_forgets(server_url: str) -> None:
    id = made(server_url)["id"]
    url = f"{server_url}/v1/responses/{id}"
    assert httpx.delete(url).json() == {"id": id, "object": "response", "deleted": True}
    assert httpx.delete(url).status_code == 404


def test_log_probabilities_are_shown_to_those_who_ask(
    server_url: str, openai_client: OpenAI
) -> None:
    data = made(server_url, include=[LOGPROBS])
    plain = get(server_url, data["id"]).json()
    assert plain["output"][0]["content"][0]["logprobs"] == []
    assert get(server_url, data["id"], include=LOGPROBS).json() == data
    found = openai_client.responses.retrieve(data["id"], include=[LOGPROBS])
    assert len(found.output[0].content[0].logprobs) == len(
        data["output"][0]["content"][0]["logprobs"]
    )


def test_input_items_by_pages(server_url: str, openai_client: OpenAI) -> None:
    said = [{"role": "user", "content": f"{i}"} for i in range(5)]
    id = made(server_url, input=said)["id"]
    items = get(server_url, id, "/input_items", order="asc").json()
    assert [item["content"][0]["text"] for item in items["data"]] == list("01234")
    for item in items["data"]:
        strict(ResponseInputMessageItem, item)
    assert (items["object"], items["has_more"]) == ("list", False)
    pages = openai_client.responses.input_items.list(id, limit=2)
    assert [item.content[0].text for item in pages] == list("43210")
    first = get(server_url, id, "/input_items", limit=2).json()
    assert first["has_more"] is True
    assert first["last_id"] == first["data"][-1]["id"] == items["data"][3]["id"]
    assert get(server_url, id, "/input_items", after="msg_no").status_code == 400
    assert get(server_url, "resp_no", "/input_items").status_code == 404


# Chains.


def test_a_chain_says_all_that_was_said(server_url: str) -> None:
    first = made(server_url, instructions="Be brief.", input="One")
    second = made(server_url, input="Two", previous_response_id=first["id"])
    third = made(
        server_url, input="Three", previous_response_id=second["id"], instructions="Be long."
    )
    said = [
        {"role": "system", "content": "Be long."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": text_of(second)},
        {"role": "user", "content": "Three"},
    ]
    alone = made(server_url, input=said)
    assert third["usage"]["input_tokens"] == alone["usage"]["input_tokens"]
    assert text_of(third) == text_of(alone)
    assert third["previous_response_id"] == second["id"]
    only_three = get(server_url, third["id"], "/input_items").json()["data"]
    assert [item["content"][0]["text"] for item in only_three] == ["Three"]


def test_a_chain_that_is_broken_is_refused(server_url: str) -> None:
    first = made(server_url)
    second = made(server_url, previous_response_id=first["id"])
    httpx.delete(f"{server_url}/v1/responses/{first['id']}")
    answer = post(server_url, **HI, previous_response_id=second["id"])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "previous_response_not_found"


def test_items_are_referred_to_by_their_ids(server_url: str) -> None:
    first = made(server_url, input="One", instructions="x")
    asked = get(server_url, first["id"], "/input_items").json()["data"][0]["id"]
    refs = [{"type": "item_reference", "id": asked}, {"id": first["output"][0]["id"]}]
    second = made(server_url, input=[*refs, {"role": "user", "content": "Two"}])
    chained = made(server_url, input="Two", previous_response_id=first["id"])
    assert text_of(second) == text_of(chained)
    assert second["usage"]["input_tokens"] == chained["usage"]["input_tokens"]


# Truncation.


def test_the_oldest_turns_are_left_out_where_that_is_asked_for(server_url: str) -> None:
    turns: list[dict[str, Any]] = []
    for i in range(12):
        turns += [{"role": "user", "content": f"{i} " + "long " * 90},
                  {"role": "assistant", "content": "yes"}]  # fmt: skip
    said = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "Now?"}]
    body: dict[str, Any] = HI | {"input": said, "tools": [WEATHER]}
    assert post(server_url, **body).json()["error"]["code"] == "context_length_exceeded"
    data = made(server_url, **body, truncation="auto", instructions="And kind.")
    dropped = data["truncated_items"]
    assert dropped > 0
    assert dropped % 2 == 0  # whole turns
    kept = [said[0], *said[1 + dropped :]]
    alone = made(server_url, **body | {"input": kept}, instructions="And kind.")
    assert alone["usage"]["input_tokens"] == data["usage"]["input_tokens"]
    assert text_of(alone) == text_of(data)
    more = made(server_url, **body | {"input": said[-3:]}, truncation="auto")
    assert more["truncated_items"] == 0
    last = {"input": [*said[:1], {"role": "user", "content": "long " * 900}]}
    answer = post(server_url, **body | last, truncation="auto")
    assert answer.json()["error"]["code"] == "context_length_exceeded"


# The background.


def test_the_background_answers_at_once_and_ends_later(tiny_server: Live) -> None:
    url = tiny_server.url
    answer = post(url, **HI, background=True)
    queued = answer.json()
    response(queued)
    assert (queued["status"], queued["output"], queued["usage"]) == ("queued", [], None)
    data = ended(tiny_server, queued["id"])
    assert data["status"] in ("completed", "incomplete")
    assert data["background"] is True
    assert text_of(data) == text_of(made(url))


def test_a_stream_of_the_background_can_be_resumed(tiny_server: Live) -> None:
    url = tiny_server.url
    body = {"model": "tiny", **HI, "ignore_eos": True, "max_output_tokens": 300}
    lines: list[str] = []
    with httpx.stream(
        "POST", f"{url}/v1/responses", json={**body, "background": True, "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if "output_text.delta" in line:
                break  # the client goes away
    seen = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    id = seen[0]["response"]["id"]
    rest = events_from(url, id, seen[-1]["sequence_number"])
    assert rest[0]["sequence_number"] == seen[-1]["sequence_number"] + 1
    whole = events_from(url, id)
    assert whole == seen + rest
    assert kinds(whole)[:4] == ["created", "queued", "in_progress", "output_item.added"]
    assert whole[-1]["response"] == get(url, id).json() == ended(tiny_server, id)
    assert events_from(url, id, len(whole) - 2) == whole[-1:]
    assert get(url, id, stream=True, starting_after=len(whole)).text == "data: [DONE]\n\n"
    assert get(url, id, starting_after=1).status_code == 400


@pytest.mark.parametrize(
    "more",
    [
        {"text": {"format": YES_NO}},
        {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 300},
        {"include": [LOGPROBS], "top_logprobs": 2},
    ],
)
def test_the_events_of_a_stored_response_are_those_of_its_stream(
    server_url: str, more: dict[str, Any]
) -> None:
    events = events_of(post(server_url, **HI | more, stream=True))
    assert events_from(server_url, events[0]["response"]["id"]) == events


def test_the_client_resumes_a_stream(openai_client: OpenAI) -> None:
    stream = openai_client.responses.create(
        model="tiny", input="Hi", background=True, stream=True, max_output_tokens=30
    )
    with stream:
        first = next(stream)
        assert first.type == "response.created"
    again = openai_client.responses.retrieve(first.response.id, stream=True, starting_after=0)
    with again:
        types = [event.type for event in again]
    assert types[0] == "response.queued"
    assert types[-1] in ("response.completed", "response.incomplete")


def test_the_background_is_cancelled(tiny_server: Live, openai_client: OpenAI) -> None:
    begun = openai_client.responses.create(
        model="tiny", input="Hi", background=True, max_output_tokens=1900,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    tiny_server.until(lambda: openai_client.responses.retrieve(begun.id).status == "in_progress")
    cancelled = openai_client.responses.cancel(begun.id)
    assert cancelled.status == "cancelled"
    data = ended(tiny_server, begun.id)
    assert data["status"] == "cancelled"
    assert data["usage"]["output_tokens"] < 1900
    assert all(item["status"] == "incomplete" for item in data["output"])
    assert openai_client.responses.cancel(begun.id).status == "cancelled"
    events = events_from(tiny_server.url, begun.id)
    assert (events[-1]["type"], events[-1]["response"]) == ("response.incomplete", data)
    tiny_server.until(lambda: not tiny_server.busy)


def test_only_the_background_is_cancelled(server_url: str) -> None:
    id = made(server_url)["id"]
    answer = httpx.post(f"{server_url}/v1/responses/{id}/cancel")
    assert answer.status_code == 400
    assert httpx.post(f"{server_url}/v1/responses/resp_no/cancel").status_code == 404


def test_a_running_one_is_no_predecessor_and_can_be_deleted(tiny_server: Live) -> None:
    url = tiny_server.url
    id = post(url, **LONG, background=True).json()["id"]
    answer = post(url, **HI, previous_response_id=id)
    assert answer.status_code == 400
    assert "wait for its end" in answer.json()["error"]["message"]
    assert httpx.delete(f"{url}/v1/responses/{id}", timeout=60).status_code == 200
    assert get(url, id).status_code == 404
    tiny_server.until(lambda: not tiny_server.busy)


def test_the_background_counts_as_requests_in_flight(tiny_model: Path, tmp_path: Path) -> None:
    with live_server([tiny_model], tmp_path / "data", max_queue=1) as server:
        id = post(server.url, **LONG, background=True).json()["id"]
        answer = post(server.url, **HI)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert httpx.post(f"{server.url}/v1/responses/{id}/cancel", timeout=60).is_success
        server.until(lambda: server.service.limits.in_flight == 0)
        assert post(server.url, **HI).status_code == 200


# Clients and servers that go away.


def test_a_stream_without_its_client_is_cancelled(tiny_server: Live) -> None:
    url = tiny_server.url
    with httpx.stream(
        "POST", f"{url}/v1/responses", json={"model": "tiny", **LONG, "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                id = json.loads(line[6:])["response"]["id"]
                break
    data = ended(tiny_server, id)
    assert data["status"] == "cancelled"
    tiny_server.until(lambda: not tiny_server.busy)
    assert events_from(url, id)[-1]["response"] == data


def test_a_server_that_stops_ends_what_runs(tiny_model: Path, tmp_path: Path) -> None:
    with live_server([tiny_model], tmp_path / "data") as server:
        id = post(server.url, **LONG, background=True).json()["id"]
    with live_server([tiny_model], tmp_path / "data") as server:
        data = ended(server, id)
        assert data["status"] == "failed"
        assert "stopped" in data["error"]["message"]
        assert events_from(server.url, id)[-1]["type"] == "response.failed"


def test_a_server_that_dies_leaves_failed_responses(tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data_dir, url = tmp_path / "data", f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "pronk", "serve", str(tiny_model), "--port", str(port),
               "--data-dir", str(data_dir)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        waiter = Live(url, None)  # type: ignore[arg-type]
        waiter.until(lambda: is_ready(url))
        id = post(url, **LONG, background=True).json()["id"]
        waiter.until(lambda: get(url, id).json()["status"] != "queued")
        assert get(url, id).json()["status"] == "in_progress"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with live_server([tiny_model], data_dir) as server:
        data = ended(server, id)
        assert data["status"] == "failed"
        assert data["error"]["code"] == "server_error"
        events = events_from(server.url, id)
        assert kinds(events)[-1] == "failed"


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


# Owners.


def test_nobody_sees_what_others_own(tiny_model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    mine, yours = (bearer(add_key(keys, name)) for name in ("me", "you"))
    with live_server([tiny_model], tmp_path / "data", api_key_file=keys) as server:
        url = f"{server.url}/v1/responses"
        body = {"model": "tiny", **HI}
        assert httpx.post(url, json=body).status_code == 401
        begun = httpx.post(url, json={**body, "background": True}, headers=mine).json()
        one = f"{url}/{begun['id']}"
        calls = [("GET", one), ("GET", f"{one}/input_items"), ("POST", f"{one}/cancel"),
                 ("GET", f"{one}?stream=true"), ("DELETE", one)]  # fmt: skip
        for method, path in calls:
            assert httpx.request(method, path, headers=yours).status_code == 404
        chained = {**body, "previous_response_id": begun["id"]}
        assert httpx.post(url, json=chained, headers=yours).status_code == 400
        events = checked_events(httpx.get(f"{one}?stream=true", headers=mine, timeout=60).text)
        item = events[-1]["response"]["output"][0]["id"]
        refers = {**body, "input": [{"type": "item_reference", "id": item}]}
        assert httpx.post(url, json=refers, headers=yours, timeout=60).status_code == 400
        assert httpx.post(url, json=refers, headers=mine, timeout=60).status_code == 200
