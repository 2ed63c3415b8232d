"""The Responses API, by OpenAI's own client and types, against a live server: answers, streams."""

import asyncio
import json
from typing import Any, Literal

import pytest
from live import Live
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import InputTokenCountResponse
from openai_strict import events_of, kinds, response, strict
from pydantic import BaseModel
from response_calls import CITIES, HI, LOGPROBS, TIME, WEATHER, YES_NO, made, post, refused, text_of

# The whole.


def test_a_response_is_what_openai_says_it_is(server_url: str) -> None:
    data = made(
        server_url, ignore_eos=True, instructions="Be brief.", metadata={"a": "b"},
        temperature=0.5, top_p=0.9,
        user="me", safety_identifier="si", prompt_cache_key="k", service_tier="flex",
        reasoning={"effort": "none"}, text={"format": {"type": "text"}, "verbosity": "medium"},
    )  # fmt: skip
    found = response(data)
    assert found.id.startswith("resp_")
    assert found.model == "tiny"
    assert found.instructions == "Be brief."
    assert found.metadata == {"a": "b"}
    assert (found.temperature, found.top_p) == (0.5, 0.9)
    assert (found.user, found.safety_identifier, found.prompt_cache_key) == ("me", "si", "k")
    assert found.service_tier == "flex"
    assert found.usage is not None
    assert found.usage.output_tokens == 12
    assert found.usage.total_tokens == found.usage.input_tokens + 12
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.completed_at is None
    (message,) = data["output"]
    assert message["status"] == "incomplete"
    assert message["id"].startswith("msg_")


def test_one_that_ends_by_itself_is_completed(server_url: str) -> None:
    data = made(server_url, text={"format": YES_NO})
    assert data["status"] == "completed"
    assert data["completed_at"] >= data["created_at"]
    assert json.loads(text_of(data)) in ("yes", "no")
    assert data["output"][0]["status"] == "completed"
    assert data["incomplete_details"] is None


def test_the_defaults_are_shown(server_url: str) -> None:
    data = made(server_url)
    assert (data["temperature"], data["top_p"]) == (0.6, 0.9)
    assert (data["store"], data["background"], data["truncation"]) == (True, False, "disabled")
    assert data["tool_choice"] == "auto"
    assert data["parallel_tool_calls"] is True
    assert data["truncated_items"] is None


def test_the_same_seed_gives_the_same_text(server_url: str) -> None:
    texts = {text_of(made(server_url, temperature=2.0, seed=seed)) for seed in (1, 1, 2)}
    assert len(texts) == 2


def test_our_own_parameters_have_effect(server_url: str) -> None:
    first = text_of(made(server_url, temperature=0))
    assert first == text_of(made(server_url, top_k=1, temperature=1.5))
    stopped = made(server_url, temperature=0, stop=[first[2]])
    assert text_of(stopped) == first[: first.index(first[2])]
    assert stopped["status"] == "completed"
    assert text_of(made(server_url, temperature=0, repetition_penalty=5.0)) != first


def test_the_client_reads_it(openai_client: OpenAI) -> None:
    answer = openai_client.responses.create(
        model="tiny", input=[{"role": "user", "content": "Hi"}], max_output_tokens=8
    )
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens == 8


def test_the_asynchronous_client(server_url: str) -> None:
    async def ask() -> tuple[str, str]:
        options = {"seed": 3, "temperature": 1.0}
        async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="x", max_retries=0) as one:
            whole = await one.responses.create(
                model="tiny", input="Hi", max_output_tokens=20, extra_body=options
            )
            stream = await one.responses.create(
                model="tiny", input="Hi", max_output_tokens=20, stream=True, extra_body=options
            )
            deltas = [e.delta async for e in stream if e.type == "response.output_text.delta"]
            return whole.output_text, "".join(deltas)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


# What is said.


def count(url: str, **body: Any) -> int:
    answer = post(url, "/v1/responses/input_tokens", **body)
    assert answer.status_code == 200, answer.text
    found: InputTokenCountResponse = strict(InputTokenCountResponse, answer.json())
    return found.input_tokens


def test_messages_mean_the_same_in_every_form(server_url: str, openai_client: OpenAI) -> None:
    forms: list[Any] = [
        "Hi",
        [{"role": "user", "content": "Hi"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        [{"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "Hi"}],
    ]
    texts = {text_of(made(server_url, input=form)) for form in forms}
    assert len(texts) == 1
    assert len({count(server_url, input=form) for form in forms}) == 1
    assert openai_client.responses.input_tokens.count(
        model="tiny", input="Hi"
    ).input_tokens == count(server_url, input="Hi")


def test_input_tokens_are_those_of_the_response(server_url: str) -> None:
    body = {"input": "How is it?", "instructions": "Be brief.", "tools": [WEATHER]}
    data = made(server_url, **body)
    assert data["usage"]["input_tokens"] == count(server_url, **body)
    assert count(server_url, input="Hi") < count(server_url, input="Hi", tools=[WEATHER])
    without = post(server_url, "/v1/responses/input_tokens", input="Hi", model=None)
    assert without.json()["input_tokens"] == count(server_url, input="Hi")


def test_a_dialog_reaches_the_model_as_a_chat_does(server_url: str) -> None:
    dialog = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather",
         "arguments": '{"city": "Rome"}', "id": "fc_1", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "get_weather",
         "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "rain"}]},
    ]  # fmt: skip

    def call(id: str, city: str) -> dict[str, Any]:
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        return {"id": id, "type": "function", "function": function}

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.",
         "tool_calls": [call("c1", "Rome"), call("c2", "Paris")]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
    ]  # fmt: skip
    function = {name: WEATHER[name] for name in ("name", "description", "parameters")}
    chat = post(
        server_url,
        "/tokenize",
        messages=messages,
        tools=[{"type": "function", "function": function}],
    )
    assert count(server_url, input=dialog, tools=[WEATHER]) == chat.json()["count"]


# Formats.


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    by_train: bool


def test_parse_gives_a_value_of_the_model(openai_client: OpenAI) -> None:
    answer = openai_client.responses.parse(model="tiny", input="A trip?", text_format=Trip)
    assert isinstance(answer.output_parsed, Trip)
    assert answer.output_parsed.city in CITIES


def test_what_was_answered_can_be_sent_back(openai_client: OpenAI) -> None:
    said: list[Any] = [{"role": "user", "content": "A trip?"}]
    answer = openai_client.responses.parse(model="tiny", input=said, text_format=Trip)
    said += [*answer.output, {"role": "user", "content": "Why?"}]
    again = openai_client.responses.create(model="tiny", input=said, max_output_tokens=8)
    chained = openai_client.responses.create(
        model="tiny", input="Why?", previous_response_id=answer.id, max_output_tokens=8
    )
    assert again.usage is not None
    assert chained.usage is not None
    assert again.usage.input_tokens == chained.usage.input_tokens


def test_json_objects_and_schemas(server_url: str) -> None:
    schema = {**Trip.model_json_schema(), "additionalProperties": False}
    form = {"type": "json_schema", "name": "trip", "schema": schema, "strict": True}
    data = made(server_url, text={"format": form}, max_output_tokens=200)
    Trip.model_validate_json(text_of(data))
    assert data["text"]["format"]["schema"] == schema
    free = made(server_url, text={"format": {"type": "json_object"}}, max_output_tokens=400)
    if free["status"] == "completed":
        assert isinstance(json.loads(text_of(free)), dict)
    assert text_of(free).lstrip().startswith("{")


# Tools.


def test_a_tool_round_trip(openai_client: OpenAI) -> None:
    first = openai_client.responses.create(
        model="tiny", input="The weather in Rome?", tools=[WEATHER], tool_choice="required",
        parallel_tool_calls=False,
    )  # type: ignore[call-overload]  # fmt: skip
    (call,) = first.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments)["city"] in CITIES
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    chained = openai_client.responses.create(
        model="tiny", input=[output], previous_response_id=first.id, tools=[WEATHER],
        tool_choice="none", max_output_tokens=8, temperature=0,
    )  # type: ignore[call-overload]  # fmt: skip
    assert chained.output[0].type == "message"
    again = openai_client.responses.create(
        model="tiny", tools=[WEATHER], tool_choice="none", max_output_tokens=8, temperature=0,
        input=[{"role": "user", "content": "The weather in Rome?"}, call.to_dict(), output],
        store=False,
    )  # type: ignore[call-overload]  # fmt: skip
    assert again.output_text == chained.output_text
    assert again.usage == chained.usage or again.usage.input_tokens == chained.usage.input_tokens


def test_the_tool_that_is_chosen_is_called(server_url: str) -> None:
    choice = {"type": "function", "name": "get_time"}
    data = made(server_url, tools=[WEATHER, TIME], tool_choice=choice, max_output_tokens=200)
    assert data["tool_choice"] == choice
    assert [item["name"] for item in data["output"]] == ["get_time"]
    assert [tool["name"] for tool in data["tools"]] == ["get_weather", "get_time"]


def test_only_allowed_tools_are_called(server_url: str) -> None:
    allowed = {"type": "allowed_tools", "mode": "required",
               "tools": [{"type": "function", "name": "get_time"}]}  # fmt: skip
    data = made(
        server_url, tools=[WEATHER, TIME], tool_choice=allowed, parallel_tool_calls=False,
        max_output_tokens=200,
    )  # fmt: skip
    assert [item["name"] for item in data["output"]] == ["get_time"]


def test_a_call_that_was_cut_off_is_incomplete(server_url: str) -> None:
    data = made(server_url, tools=[WEATHER], tool_choice="required", max_output_tokens=60)
    whole = made(server_url, tools=[WEATHER], tool_choice="required", max_output_tokens=300)
    assert whole["output"][0]["status"] == "completed"
    assert data["status"] == "incomplete"
    for item in data["output"]:
        assert (item["type"], item["status"]) == ("function_call", "incomplete")


def test_tools_that_cannot_be_enforced_are_named(server_url: str) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}}
    tool = {"type": "function", "name": "odd", "parameters": odd}
    answer = post(server_url, **HI, tools=[tool])
    assert answer.headers["x-pronk-unenforced-tools"] == "odd"
    error = refused(server_url, tools=[{**tool, "strict": True}])
    assert "odd" in error["message"] or "tools[0]" in error["message"]


# Streams.


def test_a_stream_tells_everything_in_order(server_url: str) -> None:
    events = events_of(post(server_url, **HI, ignore_eos=True, stream=True))
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    done = next(e for e in events if e["type"].endswith("text.done"))
    last = events[-1]["response"]
    deltas = "".join(e["delta"] for e in events if e["type"].endswith("text.delta"))
    assert deltas == done["text"] == text_of(last) != ""
    assert events[0]["response"]["output"] == []
    assert {e["response"]["id"] for e in events if "response" in e} == {last["id"]}
    assert last["usage"]["output_tokens"] == 12


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"text": {"format": YES_NO}},
        {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 300},
        {"include": [LOGPROBS], "top_logprobs": 2},
    ],
)
def test_a_stream_is_the_whole_in_pieces(server_url: str, more: dict[str, Any]) -> None:
    whole = made(server_url, **more)
    streamed = events_of(post(server_url, **HI | more, stream=True))[-1]["response"]
    assert response(streamed).output_text == response(whole).output_text
    for data in (whole, streamed):
        for item in data["output"]:
            item.pop("id"), item.pop("call_id", None)
        for name in ("id", "created_at", "completed_at", "usage"):
            data.pop(name)
    assert streamed == whole


def test_a_streamed_call(server_url: str) -> None:
    body = HI | {"max_output_tokens": 300, "parallel_tool_calls": False}
    events = events_of(
        post(server_url, **body, tools=[WEATHER], tool_choice="required", stream=True)
    )
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    added = next(e["item"] for e in events if e["type"].endswith("item.added"))
    done = next(e["item"] for e in events if e["type"].endswith("item.done"))
    assert (added["arguments"], added["status"]) == ("", "in_progress")
    assert {name: done[name] for name in ("id", "call_id", "name")} == {
        name: added[name] for name in ("id", "call_id", "name")
    }
    deltas = "".join(e["delta"] for e in events if e["type"].endswith("arguments.delta"))
    assert deltas == done["arguments"]


def test_the_helper_of_the_client_for_streams(openai_client: OpenAI) -> None:
    with openai_client.responses.stream(model="tiny", input="A trip?", text_format=Trip) as stream:
        types = [event.type for event in stream]
        final = stream.get_final_response()
    assert types[0] == "response.created"
    assert types[-1] == "response.completed"
    assert isinstance(final.output_parsed, Trip)


def test_log_probabilities(server_url: str) -> None:
    data = made(server_url, include=[LOGPROBS], top_logprobs=3)
    (part,) = data["output"][0]["content"]
    assert len(part["logprobs"]) == 12
    assert all(len(entry["top_logprobs"]) == 3 for entry in part["logprobs"])
    ordinary = [e["bytes"] for e in part["logprobs"] if not e["token"].startswith("<|")]
    assert b"".join(map(bytes, ordinary)).decode("utf-8", "replace") == part["text"]
    events = events_of(post(server_url, **HI, include=[LOGPROBS], top_logprobs=3, stream=True))
    told = [p for e in events if e["type"].endswith("text.delta") for p in e["logprobs"]]
    assert told == part["logprobs"]
    assert made(server_url)["output"][0]["content"][0]["logprobs"] == []


def test_nothing_is_left_behind(tiny_server: Live) -> None:
    tiny_server.until(lambda: not tiny_server.busy)
    assert all(entry.users == 0 for entry in tiny_server.service.models)
