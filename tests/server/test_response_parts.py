"""Parts of the Responses API without a server: drafts and their events, items, turns, batches."""

import asyncio
import json
from typing import Any

import pytest
from live import Live
from openai_strict import checked_events, kinds, response
from response_calls import HI

from pronk.core.errors import UserError
from pronk.engine.request import SamplingParams
from pronk.server.auth import ANONYMOUS
from pronk.server.errors import ApiError
from pronk.server.execute import executor
from pronk.server.generation import Update
from pronk.server.response_events import Draft, error_event, feed, replay, sse
from pronk.server.response_items import (
    item_id,
    messages_of,
    response_of_item,
    split_turns,
    stored_items,
    without_oldest,
)
from pronk.server.response_objects import ResponseObject, response_object
from pronk.server.response_types import ResponseRequest
from pronk.server.streams import DONE
from pronk.text.events import (
    Event,
    TextDelta,
    ToolCallAbort,
    ToolCallArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
)
from pronk.text.messages import ToolCall

USAGE = {
    "input_tokens": 1, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 3,
}  # fmt: skip
PROB = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
CALL = [
    ToolCallStart(0, "call_1", "f"),
    ToolCallArgumentsDelta(0, '{"a"'),
    ToolCallArgumentsDelta(0, ": 1}"),
    ToolCallEnd(0, ToolCall("f", {"a": 1}, "call_1")),
]


def draft_of(**body: Any) -> Draft:
    asked = ResponseRequest.model_validate({"model": "m", "input": "Hi", **body})
    made = response_object(asked, SamplingParams(), id="resp_1", model="m", dropped=0)
    numbers = iter(range(1, 100))
    return Draft(made, lambda kind: item_id(kind, "resp_1", next(numbers)))


def fed(draft: Draft, *updates: list[Event], logprobs: list[Any] | None = None) -> Draft:
    draft.begin()
    for events in updates:
        if not draft.running:
            draft.run()
        feed(draft, Update(None, events, ()), logprobs or [])  # type: ignore[arg-type]
    return draft


def checked(draft: Draft) -> list[dict[str, Any]]:
    """The events of a finished draft, each as OpenAI has it; they are had again from its end."""
    events = checked_events("".join(map(sse, draft.events)) + DONE)
    response(draft.body)
    ResponseObject.model_validate(draft.body, strict=True)
    stored = json.loads(json.dumps({"body": draft.body, "cuts": draft.cuts}))
    assert replay(stored["body"], stored["cuts"], draft.running) == events
    return events


def test_text_calls_and_text_again() -> None:
    draft = fed(draft_of(), [TextDelta("I "), TextDelta("look.")], CALL, [TextDelta("Done.")])
    draft.finish("completed", completed_at=5, usage=USAGE)
    assert kinds(checked(draft)) == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [item["type"] for item in draft.body["output"]] == [
        "message", "function_call", "message",
    ]  # fmt: skip
    assert draft.body["output"][1]["arguments"] == '{"a": 1}'
    assert draft.cuts == [[[2, 0], [5, 0]], [[4, 0], [4, 0]], [[5, 0]]]
    assert {item["status"] for item in draft.body["output"]} == {"completed"}


def test_what_was_no_call_after_all_is_incomplete() -> None:
    draft = fed(draft_of(), [*CALL[:2], ToolCallAbort(0), TextDelta('{"a"')])
    draft.finish("completed", completed_at=5, usage=USAGE)
    checked(draft)
    assert [item["status"] for item in draft.body["output"]] == ["incomplete", "completed"]


def test_no_answer_is_an_empty_message() -> None:
    draft = fed(draft_of(), [])
    draft.finish("completed", completed_at=5, usage=USAGE)
    checked(draft)
    assert draft.body["output"][0]["content"][0]["text"] == ""


def test_the_queue_and_a_cancellation_in_it() -> None:
    draft = draft_of(background=True)
    draft.begin()
    draft.finish("cancelled", completed_at=None, usage=USAGE)
    assert kinds(checked(draft)) == ["created", "queued", "incomplete"]
    draft = fed(draft_of(background=True), [TextDelta("a")])
    draft.finish("cancelled", completed_at=None, usage=USAGE)
    assert kinds(checked(draft))[:3] == ["created", "queued", "in_progress"]
    assert draft.body["output"][0]["status"] == "incomplete"


def test_log_probabilities_go_with_the_text() -> None:
    draft = draft_of()
    fed(draft, [], [TextDelta("a")], logprobs=[PROB])  # the first token's text came with the second
    feed(draft, Update(None, [*CALL], ()), [PROB])  # type: ignore[arg-type]
    feed(draft, Update(None, [TextDelta("b")], ()), [PROB])  # type: ignore[arg-type]
    feed(draft, Update(None, [], ()), [PROB])  # type: ignore[arg-type]
    draft.finish("completed", completed_at=5, usage=USAGE)
    checked(draft)
    counts = [len(item["content"][0]["logprobs"]) for item in draft.body["output"][::2]]
    assert counts == [2, 2]
    assert draft.cuts == [[[1, 2]], [[4, 0], [4, 0]], [[1, 1], [0, 1]]]


def test_a_failure_takes_the_place_of_the_end() -> None:
    draft = fed(draft_of(), [TextDelta("a")])
    draft.finish("completed", completed_at=5, usage=USAGE)
    draft.fail(UserError("input: no"), completed_at=None)
    assert kinds(checked(draft))[-2:] == ["output_item.done", "failed"]
    assert draft.body["error"] == {"code": "invalid_prompt", "message": "input: no"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(ApiError(404, "x"), "invalid_prompt"), (ApiError(429, "x"), "rate_limit_exceeded"),
     (ValueError("secret"), "server_error")],
)  # fmt: skip
def test_failures_have_openais_codes(error: Exception, code: str) -> None:
    draft = fed(draft_of())
    draft.fail(error, completed_at=None)
    checked(draft)
    assert draft.body["error"]["code"] == code
    assert "secret" not in draft.body["error"]["message"]


def test_an_error_event_is_read_by_both_specifications() -> None:
    (event,) = checked_events(error_event(ApiError(503, "full", code="overloaded"), 4) + DONE)
    assert (event["code"], event["message"], event["sequence_number"]) == ("overloaded", "full", 4)
    assert event["error"]["message"] == "full"


def test_events_that_were_taken_are_not_kept() -> None:
    draft = fed(draft_of(), [TextDelta("a")])
    first = draft.taken()
    draft.finish("completed", completed_at=5, usage=USAGE)
    draft.fail(UserError("no"), completed_at=None)
    numbers = [event["sequence_number"] for event in (*first, *draft.taken())]
    assert numbers == list(range(draft.n_events))
    assert draft.events == []


# Items.


def message(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def call(id: str, arguments: str = "{}", status: str = "completed") -> dict[str, Any]:
    return {"type": "function_call", "call_id": id, "name": "f", "arguments": arguments,
            "status": status}  # fmt: skip


def test_ids_tell_their_response() -> None:
    response_id = "resp_" + "0123456789abcdef" * 2
    assert response_of_item(item_id("message", response_id[:29], 3)) == response_id[:29]
    assert response_of_item("msg_1") is None


def test_ids_of_clients_are_kept_where_they_can_be() -> None:
    asked = ResponseRequest.model_validate(
        {"model": "m", "input": [
            {"role": "user", "content": "a", "id": "one"},
            {"role": "user", "content": "b", "id": "one"},
            {"role": "user", "content": "c", "id": "no id"},
            {"role": "user", "content": "d", "id": "taken"},
            {"role": "user", "content": "e"},
        ]}
    )  # fmt: skip
    items = stored_items(asked.input, {"taken"}, lambda id: None, lambda kind, i: f"new{i}")
    assert [item["id"] for item in items] == ["one", "new1", "new2", "new3", "new4"]


def test_calls_join_the_text_before_them() -> None:
    result = {"type": "function_call_output", "call_id": "c2", "output": "x"}
    items = [message("user", "u"), message("assistant", "a"), call("c1"), call("c2"), result]
    messages = messages_of(items)
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert [c["id"] for c in messages[1]["tool_calls"]] == ["c1", "c2"]
    assert messages[2]["name"] == "f"


def test_a_call_that_was_cut_off_is_not_said_again() -> None:
    items = [message("user", "u"), call("c1", '{"a', "incomplete"), message("user", "v")]
    assert [m["role"] for m in messages_of(items)] == ["user", "user"]
    whole = [message("user", "u"), call("c1", "{}", "incomplete")]
    assert len(messages_of(whole)) == 2
    with pytest.raises(UserError, match="'c9'"):
        messages_of([{"type": "function_call_output", "call_id": "c9", "output": "x"}])


def test_turns_are_left_out_whole() -> None:
    items = [
        message("assistant", "0"), message("system", "s"), message("user", "1"),
        message("assistant", "1"), call("c"), message("developer", "d"), message("user", "2"),
    ]  # fmt: skip
    kept, turns = split_turns(items)
    assert kept == [items[1], items[5]]
    assert [len(turn) for turn in turns] == [1, 3, 1]
    assert without_oldest(items, 0) == items
    assert without_oldest(items, 2) == [items[1], items[5], items[6]]


# Batches.


def test_a_line_of_a_batch(tiny_server: Live) -> None:
    execute = executor(tiny_server.service)

    def run(**body: Any) -> tuple[int, dict[str, Any]]:
        line = execute("/v1/responses", {"model": "tiny", **HI, **body}, ANONYMOUS)
        return asyncio.run_coroutine_threadsafe(line, loop_of(tiny_server)).result(60)

    status, body = run()
    assert status == 200
    response(body)
    for name in ("stream", "background"):
        status, body = run(**{name: True})
        assert (status, body["error"]["param"]) == (400, name)
    status, body = run(tools=[{"type": "mcp"}])
    assert (status, body["error"]["code"]) == (400, "unsupported_parameter")


def loop_of(server: Live) -> asyncio.AbstractEventLoop:
    loaded = server.service.models.default.loaded
    assert loaded is not None
    return loaded.worker._loop
