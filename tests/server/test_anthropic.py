"""Anthropic's own client against a live server."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from live import Live, live_server
from pydantic import BaseModel, TypeAdapter
from service_app import add_key

from engine.tiny_models import write_gguf
from pronk.server.anthropic import content_of, with_pings
from pronk.server.anthropic_models import Cursor, model_info
from pronk.text.events import (
    TextDelta,
    ToolCallAbort,
    ToolCallArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
)
from pronk.text.messages import ToolCall

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
    },
}
SEED = {"seed": 11}
JSON = {"Content-Type": "application/json"}


def client(server: Live, **more: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, **more)


@pytest.fixture(scope="module")
def tiny(tiny_server: Live) -> Iterator[anthropic.Anthropic]:
    with client(tiny_server) as one:
        yield one


@pytest.fixture(scope="module")
def smollm2(smollm2_server: Live) -> Iterator[anthropic.Anthropic]:
    with client(smollm2_server) as one:
        yield one


def ask(one: anthropic.Anthropic, model: str = "tiny", **body: Any) -> Message:
    body = {"messages": HI, "max_tokens": 16, "extra_body": SEED} | body
    return one.messages.create(model=model, **body)


def post(server: Live, path: str = "/v1/messages", **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "tiny", "messages": HI} | body, timeout=60)


def stream(server: Live, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """The events as they are sent: names and contents."""
    answer = post(server, stream=True, **{"max_tokens": 16, **SEED} | body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for part in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def same(streamed: Message, whole: Message) -> None:
    """But for ids, and for what the second of the two found cached."""

    def content(message: Message) -> Any:
        found = message.model_dump(include={"content", "stop_reason", "stop_sequence", "model"})
        for block in found["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
        return found

    def counts(message: Message) -> tuple[int, int]:
        return prompt_tokens(message), message.usage.output_tokens

    assert content(streamed) == content(whole)
    assert counts(streamed) == counts(whole)


def prompt_tokens(message: Message) -> int:
    usage = message.usage
    assert usage.cache_creation_input_tokens == 0
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


# Answers.


def test_an_answer(tiny_server: Live, tiny: anthropic.Anthropic) -> None:
    message = ask(tiny)
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert [block.type for block in message.content] == ["text"]
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 16
    raw = post(tiny_server, max_tokens=4).json()
    Message.model_validate(raw, strict=True)


def test_a_stream_is_what_the_client_expects(tiny_server: Live) -> None:
    events = stream(tiny_server)
    for name, data in events:
        assert name == data["type"]
        EVENT.validate_python(data, strict=True)
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0][1]["message"]["content"] == []
    assert events[0][1]["message"]["stop_reason"] is None


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"stop_sequences": ["e", "a"]},
        {"tools": [WEATHER], "tool_choice": {"type": "any"}, "max_tokens": 120},
        {"tools": [WEATHER], "tool_choice": {"type": "any"}, "max_tokens": 40},  # cut
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"},
         "max_tokens": 120},
        {"tools": [WEATHER], "max_tokens": 40},
        {"messages": [*HI, {"role": "assistant", "content": "Well,"}]},
    ],
    ids=["text", "stop", "any", "cut", "named", "auto", "prefill"],
)  # fmt: skip
def test_streamed_is_the_same_as_whole(tiny: anthropic.Anthropic, body: dict[str, Any]) -> None:
    whole = ask(tiny, **body)
    settings = {"messages": HI, "max_tokens": 16, "extra_body": SEED} | body
    with tiny.messages.stream(model="tiny", **settings) as events:
        same(events.get_final_message(), whole)


def test_the_async_client(tiny_server: Live) -> None:
    async def both() -> tuple[Message, Message]:
        url = tiny_server.url
        async with anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as one:
            settings: Any = {
                "model": "tiny", "messages": HI, "max_tokens": 20, "extra_body": SEED,
            }  # fmt: skip
            whole = await one.messages.create(**settings)
            async with one.messages.stream(**settings) as events:
                texts = "".join([text async for text in events.text_stream])
                streamed = await events.get_final_message()
            assert texts == streamed.content[0].text  # type: ignore[union-attr]
            return streamed, whole

    same(*asyncio.run(both()))


def test_stop_sequences(tiny: anthropic.Anthropic) -> None:
    text = ask(tiny, max_tokens=40).content[0].text  # type: ignore[union-attr]
    stop = text[5:7]
    message = ask(tiny, max_tokens=40, stop_sequences=["never found", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]


def test_the_context_ends_an_answer(tiny: anthropic.Anthropic) -> None:
    message = ask(tiny, max_tokens=4000, extra_body={"seed": 1, "top_k": 1})
    assert message.stop_reason in ("model_context_window_exceeded", "end_turn")
    if message.stop_reason != "end_turn":
        assert prompt_tokens(message) + message.usage.output_tokens == 2048


def test_what_was_computed_before_counts_as_read_from_the_cache(
    tiny: anthropic.Anthropic,
) -> None:
    long = [{"role": "user", "content": "It was a dark and stormy night. " * 6}]
    first, second = ask(tiny, messages=long), ask(tiny, messages=long)
    assert first.usage.cache_read_input_tokens == 0
    assert (second.usage.cache_read_input_tokens or 0) > 100
    assert prompt_tokens(first) == prompt_tokens(second)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": HI},
        {"messages": HI, "system": "You are terse."},
        {"messages": HI, "tools": [WEATHER]},
        {"messages": [*HI, {"role": "assistant", "content": "Well,"}]},
    ],
)
def test_counted_tokens_are_those_of_the_usage(
    tiny: anthropic.Anthropic, body: dict[str, Any]
) -> None:
    counted = tiny.messages.count_tokens(model="tiny", **body)
    assert isinstance(counted, MessageTokensCount)
    assert counted.input_tokens == prompt_tokens(ask(tiny, **body))


# What the model is told.


def prompt_of(server: Live, **body: Any) -> int:
    answer = post(server, "/v1/messages/count_tokens", **body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["input_tokens"])


def chat_tokens(server: Live, messages: list[dict[str, Any]], **body: Any) -> int:
    answer = post(server, "/tokenize", messages=messages, **body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["count"])


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_texts_and_blocks_say_the_same(tiny_server: Live) -> None:
    plain = prompt_of(tiny_server, messages=[user("Hi there")], system="Be brief.")
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    blocks = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there", **cached}]
    system = [{"type": "text", "text": "Be brief.", **cached}]
    assert prompt_of(tiny_server, messages=[user(blocks)], system=system) == plain
    with_role = [{"role": "system", "content": "Be brief."}, user("Hi there")]
    assert prompt_of(tiny_server, messages=with_role) == plain
    assert chat_tokens(tiny_server, with_role) == plain


def test_messages_of_one_role_are_one(tiny_server: Live) -> None:
    several = [user("One"), user("Two"), assistant("A"), assistant("B"), user("Three")]
    merged = [user("One\n\nTwo"), assistant("A\n\nB"), user("Three")]
    assert prompt_of(tiny_server, messages=several) == chat_tokens(tiny_server, merged)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"content": "warm"}, "warm"),
        ({"content": [{"type": "text", "text": "warm"}]}, "warm"),
        ({"content": "no such city", "is_error": True}, "Error: no such city"),
        ({"is_error": True}, "Error"),
        ({}, ""),
    ],
)
def test_results_of_calls(tiny_server: Live, block: dict[str, Any], told: str) -> None:
    use = {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Rome"}}
    text = {"type": "text", "text": "Let me see."}
    result = {"type": "tool_result", "tool_use_id": "c1", **block}
    ours = [*HI, assistant([text, use]), user([result, {"type": "text", "text": "And?"}])]
    call = {
        "id": "c1", "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
    }  # fmt: skip
    theirs = [
        *HI,
        {**assistant("Let me see."), "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": told},
        user("And?"),
    ]
    assert prompt_of(tiny_server, messages=ours) == chat_tokens(tiny_server, theirs)


def test_a_prefill_is_continued(tiny_server: Live) -> None:
    llm = next(iter(tiny_server.service.models)).loaded.llm  # type: ignore[union-attr]
    begun = prompt_of(tiny_server, messages=[*HI, assistant("Well,")])
    assert begun == prompt_of(tiny_server, messages=HI) + len(llm.tokenizer.encode("Well,"))


# Refusals.


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": None}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": [user([{"type": "image", "source": {}}])]}, "image"),
        ({"messages": [user([{"type": "document", "source": {}}])]}, "document"),
        ({"messages": [user("\ud800")]}, "surrogate"),
        ({"messages": [*HI, assistant([{"type": "thinking", "thinking": "?"}])]}, "thinking"),
        ({"messages": [user([{"type": "tool_result", "tool_use_id": "x"}])]}, "tool_use_id: "),
        ({"messages": [*HI, assistant("Well, ")]}, "white space"),
        ({"messages": [*HI, assistant([{"type": "tool_use", "id": "1", "name": "a",
                                        "input": {}}])]}, "without results"),
        ({"messages": [*HI, assistant("W")], "tools": [WEATHER],
          "tool_choice": {"type": "any"}}, "forced tool"),
        ({"messages": [*HI, assistant("W")],
          "output_config": {"format": {"type": "json_schema", "schema": {}}}}, "format"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]},
         "tools[0].type: only tools of type 'custom'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [{**WEATHER, "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
        ({"tools": [{**WEATHER, "name": "auto"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "twice"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice: "),
        ({"tool_choice": {"type": "any"}}, "tool_choice: "),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking: "),
        ({"thinking": {"type": "adaptive"}}, "thinking: "),
        ({"output_config": {"effort": "high"}}, "effort"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
         "output_config.format.schema: "),
        ({"messages": [user([])]}, "messages[0]"),
        ({"messages": [assistant("Well")]}, "none before"),
        ({"container": "c"}, "container"),
        ({"thread": {"type": "create"}}, "thread: "),
        ({"top_p": 0}, "top_p"),
        ({"temperature": "warm"}, "temperature"),
        ({"n": 2}, "n: this server does not know"),
        ({"stop_sequences": [""]}, "stop"),
        ({"messages": [user("a " * 1100)]}, "n_ctx=2048"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(
    tiny_server: Live, body: dict[str, Any], words: str
) -> None:
    body = {"max_tokens": 5} | body
    sent = {"model": "tiny", "messages": HI, **{k: v for k, v in body.items() if v is not None}}
    answer = httpx.post(tiny_server.url + "/v1/messages", content=json.dumps(sent), headers=JSON)
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["request_id"] == answer.headers["request-id"]
    assert words in answer.json()["error"]["message"]


def test_what_asks_for_nothing_is_accepted(tiny: anthropic.Anthropic) -> None:
    message = ask(
        tiny,
        metadata={"user_id": "u1"},
        service_tier="auto",
        thinking={"type": "disabled"},
        cache_control={"type": "ephemeral"},
        tools=[{**WEATHER, "type": "custom", "cache_control": {"type": "ephemeral"}}],
        tool_choice={"type": "none"},
        extra_body={"temperature": 0, "top_k": 3, "top_p": 0.5, "container": None},
        extra_headers={"anthropic-beta": "token-efficient-tools-2025-02-19"},
    )
    assert message.content[0].type == "text"


def test_errors_of_the_client(tiny: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not served here") as missing:
        ask(tiny, model="gpt-4")
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id is not None
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as bad:
        ask(tiny, max_tokens=-1)
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        tiny.messages.batches.list()


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    good = add_key(file, "good", scopes=frozenset({"inference"}))
    weak = add_key(file, "weak", scopes=frozenset({"files"}))
    model = write_gguf(tmp_path / "tiny.gguf")
    with live_server([model], tmp_path / "data", api_key_file=file) as server:
        for key, error in (("no", anthropic.AuthenticationError), (weak, None), (good, None)):
            with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as one:
                if key == good:
                    assert ask(one).stop_reason == "max_tokens"
                    assert one.messages.count_tokens(model="tiny", messages=HI).input_tokens > 1
                    continue
                with pytest.raises(error or anthropic.PermissionDeniedError):
                    ask(one)
                with pytest.raises(error or anthropic.PermissionDeniedError):
                    one.messages.count_tokens(model="tiny", messages=HI)


def test_a_client_that_goes_away_ends_the_answer(
    smollm2_server: Live, smollm2: anthropic.Anthropic
) -> None:
    before = smollm2_server.aborted()
    body: Any = {"model": "smollm2", "messages": [user("Write a novel.")], "max_tokens": 1900}
    with smollm2.messages.create(stream=True, **body) as events:
        next(events)
    smollm2_server.until(lambda: smollm2_server.aborted() == before + 1)
    smollm2_server.leave("/v1/messages", body)
    smollm2_server.until(lambda: smollm2_server.aborted() == before + 2)
    smollm2_server.leave("/v1/messages", {**body, "stream": True})
    smollm2_server.until(lambda: smollm2_server.aborted() == before + 3)
    smollm2_server.until(lambda: smollm2_server.busy == 0)
    assert smollm2_server.service.models.default.users == 0


# Pieces of it.


def test_pings_while_nothing_comes() -> None:
    async def gather() -> list[str | None]:
        gate = asyncio.Event()

        async def updates() -> AsyncIterator[Any]:
            await gate.wait()
            yield "a"
            yield "b"

        found: list[Any] = []
        async for update in with_pings(updates(), 0.001):
            found.append(update)
            if len(found) == 3:
                gate.set()
        return found

    found = asyncio.run(gather())
    assert found[:3] == [None] * 3
    assert found[-2:] == ["a", "b"]


def test_blocks_keep_their_order() -> None:
    content = content_of(
        [
            TextDelta("I "), TextDelta("look. "),
            ToolCallStart(0, "c0", "f"), ToolCallArgumentsDelta(0, '{"a"'),
            ToolCallArgumentsDelta(0, ": 1}"), ToolCallEnd(0, ToolCall("f", {"a": 1})),
            TextDelta("And"),
            ToolCallStart(1, "c1", "f"), ToolCallAbort(1), TextDelta(" not"),
            ToolCallStart(2, "c2", "g"), ToolCallArgumentsDelta(2, '{"b": [1, 2'),
            ToolCallAbort(2, at_end=True), TextDelta('{"name": "g"'),
        ]
    )  # fmt: skip
    assert [block.model_dump(exclude={"type", "citations"}) for block in content] == [
        {"text": "I look. "},
        {"id": "c0", "name": "f", "input": {"a": 1}},
        {"text": "And not"},
        {"id": "c2", "name": "g", "input": {"b": [1, 2]}},
    ]


# Lists of models.


def test_models(tiny: anthropic.Anthropic, server_url: str) -> None:
    models = tiny.models.list()
    assert [model.id for model in models] == ["tiny"]
    one = tiny.models.retrieve("tiny")
    assert (one.type, one.display_name, one.max_input_tokens) == ("model", "tiny", 2048)
    with pytest.raises(anthropic.NotFoundError):
        tiny.models.retrieve("other")
    with pytest.raises(anthropic.NotFoundError):
        tiny.models.list(after_id="other")
    openai = httpx.get(f"{server_url}/v1/models").json()
    assert openai["object"] == "list"
    assert openai["data"][0]["id"] == "tiny"


def test_pages_of_models() -> None:
    infos = [model_info(name, name, 0, None) for name in "abcde"]

    def page(**cursor: Any) -> tuple[str, bool]:
        found = Cursor(**{"limit": 2, "after_id": None, "before_id": None} | cursor).page(infos)
        ids = [info.id for info in found.data]
        assert [found.first_id, found.last_id] == ([ids[0], ids[-1]] if ids else [None, None])
        return "".join(ids), found.has_more

    assert page() == ("ab", True)
    assert page(after_id="b") == ("cd", True)
    assert page(after_id="d") == ("e", False)
    assert page(after_id="e") == ("", False)
    assert page(before_id="d") == ("bc", True)
    assert page(before_id="b") == ("a", False)
    assert infos[0].created_at == "1970-01-01T00:00:00Z"


# With a model that means what it says.


def test_turns_and_a_system_text(smollm2: anthropic.Anthropic) -> None:
    def answer(messages: list[Any], **more: Any) -> Message:
        greedy = {"temperature": 0}
        return ask(smollm2, "smollm2", messages=messages, max_tokens=60, extra_body=greedy, **more)

    messages: list[Any] = [user("What is the capital of France?")]
    first = answer(messages)
    assert "Paris" in first.content[0].text  # type: ignore[union-attr]
    assert first.stop_reason == "end_turn"
    second = answer([*messages, assistant(first.content), user("And of Italy?")])
    assert "Rome" in second.content[0].text  # type: ignore[union-attr]
    pirate = answer([user("Who are you?")], system="You are a pirate called Captain Hook.")
    assert "Hook" in pirate.content[0].text  # type: ignore[union-attr]


def test_a_prefill_is_not_repeated(smollm2: anthropic.Anthropic) -> None:
    messages = [user("What is the capital of France?"), assistant("The capital of France is")]
    message = ask(
        smollm2, "smollm2", messages=messages, max_tokens=20, extra_body={"temperature": 0}
    )
    assert message.content[0].text.startswith(" Paris")  # type: ignore[union-attr]


def test_a_round_with_a_tool(smollm2: anthropic.Anthropic) -> None:
    messages: list[Any] = [user("What is the weather in Rome?")]
    settings: Any = {"tools": [WEATHER], "max_tokens": 200, "extra_body": {"temperature": 0}}
    forced = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    first = ask(smollm2, "smollm2", messages=messages, tool_choice=forced, **settings)
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("get_weather", {"city": "Rome"})
    result = {"type": "tool_result", "tool_use_id": call.id, 
              "content": "The weather in Rome: 17 degrees and rain."}  # fmt: skip
    again = {"type": "text", "text": "Repeat the answer of the function."}
    messages += [assistant(first.content), user([result, again])]
    none = {"type": "none"}
    second = ask(smollm2, "smollm2", messages=messages, tool_choice=none, **settings)
    assert "17" in second.content[0].text  # type: ignore[union-attr]


def test_the_client_runs_tools(smollm2: anthropic.Anthropic) -> None:
    """It asks for a thread first, and goes on without one."""
    asked = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city

        Args:
            city: The name of the city
        """
        asked.append(city)
        return "The weather is sunny."

    runner = smollm2.beta.messages.tool_runner(
        model="smollm2",
        max_tokens=100,
        tools=[get_weather],
        messages=[user("What is the weather in Rome?")],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_iterations=2,
        extra_body={"temperature": 0},
    )
    messages = list(runner)
    assert [message.stop_reason for message in messages] == ["tool_use"] * 2
    assert len(asked) == 2
    assert "Rome" in asked[0]


def test_parse_with_a_pydantic_model(smollm2: anthropic.Anthropic) -> None:
    class City(BaseModel):
        name: str
        capital: bool

    parsed = smollm2.messages.parse(
        model="smollm2", max_tokens=100, messages=[user("Tell me of Paris")], output_format=City
    )
    assert isinstance(parsed.parsed_output, City)
    with smollm2.messages.stream(
        model="smollm2", max_tokens=100, messages=[user("Of Rome")], output_format=City
    ) as events:
        assert isinstance(events.get_final_message().parsed_output, City)
