"""Chat dictionaries: what is understood, and what is refused with which words."""

from typing import Any

import pytest

from pronk.core.errors import UserError
from pronk.text.messages import Message, ToolCall, messages_from_dicts, to_dict

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}


def test_shapes() -> None:
    messages = messages_from_dicts(
        [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}] * 2},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "ipython", "content": ""},
            {"role": "assistant", "content": "Done.", "annotations": []},
        ]
    )
    assert messages == [
        Message("system", "Be kind."),
        Message("user", "aa", name="Ann"),
        Message("assistant", "", (ToolCall("add", {"a": "é"}, "c1"),)),
        Message("tool", "3", tool_call_id="c1"),
        Message("tool", ""),
        Message("assistant", "Done."),
    ]
    assert messages_from_dicts([to_dict(message) for message in messages]) == messages


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_as_text_or_object(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    [message] = messages_from_dicts([{"role": "assistant", "tool_calls": [call]}])
    assert message.tool_calls == (ToolCall("f", {"a": 1}),)


def test_no_arguments() -> None:
    call = {"function": {"name": "f", "arguments": ""}}
    [message] = messages_from_dicts([{"role": "assistant", "tool_calls": [call]}])
    assert message.tool_calls == (ToolCall("f", {}),)


def assistant(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("hi", "messages[1]: expected an object, got str"),
        ({1: 2}, "messages[1]: keys must be text, got 1"),
        ({"content": "x"}, "messages[1].role: unknown role None; use one of system, developer"),
        ({"role": "bot", "content": "x"}, "messages[1].role: unknown role 'bot'; use one of"),
        ({"role": ["user"], "content": "x"}, "messages[1].role: unknown role ['user']"),
        (
            {"role": "user"},
            "messages[1].content: expected text or a list of text parts, got nothing",
        ),
        ({"role": "user", "content": 3}, "messages[1].content: expected text or a list"),
        (
            {"role": "user", "content": "x", "tool_calls": []},
            "messages[1].tool_calls: unknown key in a user message; known are content, name, role",
        ),
        ({"role": "user", "content": "x", "cotnent": 1}, "messages[1].cotnent: unknown key"),
        (
            {"role": "assistant", "content": "x", "refusal": "no"},
            "messages[1].refusal: unknown key",
        ),
        ({"role": "assistant", "content": None}, "messages[1].content: expected text"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "messages[1].content[0].type: only 'text'",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]},
            "content[0].y: unknown key",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "content[0].text: expected text, got nothing",
        ),
        (
            {"role": "user", "content": "a\ud800"},
            r"messages[1].content: lone surrogate '\ud800' at 1",
        ),
        ({"role": "user", "content": "x", "name": 1}, "messages[1].name: expected text, got int"),
        (
            {"role": "assistant", "tool_calls": "f"},
            "messages[1].tool_calls: expected a list of calls",
        ),
        ({"role": "assistant", "tool_calls": [1]}, "tool_calls[0]: expected an object, got int"),
        (
            {"role": "assistant", "tool_calls": [{"function": {}, "x": 1}]},
            "tool_calls[0].x: unknown key",
        ),
        (
            {"role": "assistant", "tool_calls": [{"type": "web"}]},
            "tool_calls[0].type: must be 'function'",
        ),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls[0].function: expected an object"),
        (assistant(arguments={}), "function.name: expected text, got nothing"),
        (assistant(name="", arguments={}), "function.name: must not be empty"),
        (assistant(name="f", x=1), "function.x: unknown key; known are arguments, name"),
        (
            assistant(name="f"),
            "function.arguments: expected a JSON object or its text, got nothing",
        ),
        (
            assistant(name="f", arguments="[1]"),
            "arguments: expected a JSON object or its text, got list",
        ),
        (
            assistant(name="f", arguments='{"a": '),
            "arguments: not the text of a JSON object: '{\"a\": '",
        ),
        (assistant(name="f", arguments='{"a": NaN}'), "arguments: not the text of a JSON object"),
        (
            assistant(name="f", arguments='{"a":' * 100_000),
            "arguments: not the text of a JSON object",
        ),
        (assistant(name="f", arguments={"a": {1, 2}}), "arguments: not writable as JSON"),
        (assistant(name="f", arguments={"a": float("inf")}), "arguments: not writable as JSON"),
        (assistant(name="f", arguments='{"a": "\\ud800"}'), "arguments: not writable as JSON"),
    ],
)
def test_refused(message: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        messages_from_dicts([{"role": "user", "content": "x"}, message])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages", ["hi", {"role": "user"}, None, 3])
def test_no_list(messages: Any) -> None:
    with pytest.raises(UserError, match="messages: expected a list of messages, got"):
        messages_from_dicts(messages)


def test_empty() -> None:
    with pytest.raises(UserError, match="messages: the list is empty"):
        messages_from_dicts([])
