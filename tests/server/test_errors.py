"""What is wrong with a body is told by its place, and quickly, however much is wrong."""

from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from pronk.server.anthropic_types import MessagesRequest
from pronk.server.errors import validation_error
from pronk.server.openai_types import ChatRequest, CompletionRequest
from pronk.server.response_types import ResponseRequest

HI = {"role": "user", "content": "hi"}


def told(kind: type[BaseModel], body: Any) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    assert found.value.error_count() < 20
    error = validation_error(found.value.errors(), body)
    assert error.status == 400
    assert len(error.message) < 300
    return error.param, error.message


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].type", "should be 'text'; got 'image_url'"),
        ({"messages": [{"role": "bot"}]}, "messages[0].role", "'bot' is not one of 'system',"),
        ({"messages": [HI, {"content": "x"}]}, "messages[1].role", "is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [HI | {"user": 1}]}, "messages[0].user", "does not know this parameter"),
        ({"messages": [{"role": "assistant",
                        "tool_calls": [{"id": "x", "function": {"name": 1}}]}]},
         "messages[0].tool_calls[0].function.name", "should be a valid string; got 1"),
        ({"tool_choice": {"type": "x"}}, "tool_choice.type", "'x' is not one of 'function',"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "is missing"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name",
         "is missing"),
        ({"tool_choice": {}}, "tool_choice.type", "is missing"),
        ({"tool_choice": "x"}, "tool_choice", "should be 'auto', 'none' or 'required'; got 'x'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}, "a": 1}},
         "response_format.a", "does not know this parameter"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "b": 1}}},
         "response_format.json_schema.b", "does not know this parameter"),
        ({"stop": ["a", 1]}, "stop[1]", "should be a valid string; got 1"),
        ({"logit_bias": {"7": "x"}}, "logit_bias.7", "should be a valid number; got 'x'"),
        ({"metadata": {"a.b": 1}}, "metadata.a.b", "should be a valid string; got 1"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_places(body: Any, param: str, words: str) -> None:
    found, message = told(ChatRequest, {"model": "m", "messages": [HI], **body})
    assert found == param
    assert message.startswith(f"{param}: ")
    assert words in message


MANY = 50_000


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatRequest, {"messages": [0] * MANY}, "messages[0]"),
        (ChatRequest, {"messages": [HI | {"content": [0] * MANY}]}, "messages[0].content[0]"),
        (ChatRequest, {"messages": [HI], "tools": [0] * MANY}, "tools[0]"),
        (ChatRequest, {"messages": [HI], "logit_bias": dict.fromkeys(map(str, range(MANY)), "x")},
         "logit_bias.0"),
        (ChatRequest, {"messages": [HI], **{f"x{i}": 0 for i in range(MANY)}}, "body"),
        (ChatRequest, {"messages": [HI | {f"x{i}": 0 for i in range(MANY)}]}, "messages[0]"),
        (CompletionRequest, {"prompt": ["a"] + [0] * MANY}, "prompt[1]"),
        (CompletionRequest, {"prompt": [["a"]] * MANY}, "prompt[0][0]"),
        (ResponseRequest, {"input": [0] * MANY}, "input[0]"),
        (MessagesRequest, {"max_tokens": 1, "messages": [0] * MANY}, "messages[0]"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_bodies_of_nothing_but_mistakes(kind: type[BaseModel], body: Any, param: str) -> None:
    assert told(kind, {"model": "m", **body})[0] == param


@pytest.mark.parametrize(
    ("path", "meant"),
    [("/chat/completions", "/v1/chat/completions"), ("/v1/v1/messages", "/v1/messages")],
)
def test_a_wrong_base_url_is_told(server_url: str, path: str, meant: str) -> None:
    answer = httpx.post(f"{server_url}{path}", json={})
    assert answer.status_code == 404
    assert f"did you mean {meant}?" in answer.text
