"""Tools through OpenAI's client. The model is random: what it calls, and with which arguments, is
enforced or not there at all."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from live import Live
from sdk import HI, Choice, choices_of, client, joined, refusal

PATH = "/v1/chat/completions"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "minLength": 1, "maxLength": 8},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9},
                         "maxItems": 2},
            },
            "required": ["city", "unit"],
        },
    },
}  # fmt: skip
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add-2.x",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "boolean"}, "b": {"anyOf": [{"type": "null"}, {"const": "x"}]},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
NOW: Any = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, ADD, NOW]
SCHEMAS: dict[str, Any] = {
    tool["function"]["name"]: tool["function"].get("parameters", {"type": "object"})
    for tool in TOOLS
}
ANY = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def sdk(tiny_server: Live) -> Iterator[openai.OpenAI]:
    with client(tiny_server) as one:
        yield one


def both(sdk: openai.OpenAI, *, seeds: int = 5, **body: Any) -> list[Choice]:
    """Answers of many seeds, which are the same in streams."""
    found = []
    for seed in range(seeds):
        call: dict[str, Any] = {
            "model": "tiny", "messages": HI, "tools": TOOLS, "temperature": 1, "n": 4,
            "seed": 10 * seed, "max_tokens": [300, 25][seed % 2],
        } | body  # fmt: skip
        whole = choices_of(sdk.chat.completions.create(**call))
        assert joined(sdk.chat.completions.create(**call, stream=True)) == whole
        found += whole
    return found


def check_calls(choice: Choice, offered: set[str]) -> None:
    """Every call is of an offered tool, with arguments that fit, the last one perhaps cut."""
    for i, (name, arguments) in enumerate(choice.calls):
        assert name in offered
        try:
            values = json.loads(arguments)
        except json.JSONDecodeError:
            assert choice.finish_reason == "length"
            assert i + 1 == len(choice.calls)
        else:
            jsonschema.validate(values, SCHEMAS[name])


@pytest.mark.parametrize("parallel", [True, False])
def test_required(sdk: openai.OpenAI, parallel: bool) -> None:
    answers = both(sdk, tool_choice="required", parallel_tool_calls=parallel)
    for choice in answers:
        check_calls(choice, set(SCHEMAS))
        assert choice.finish_reason in ("tool_calls", "length")
        assert choice.calls or choice.finish_reason == "length"
        assert not (choice.text and choice.finish_reason == "tool_calls")
    assert (max(len(choice.calls) for choice in answers) > 1) == parallel
    assert len({name for choice in answers for name, _ in choice.calls}) > 1


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_one_tool_is_chosen(sdk: openai.OpenAI, name: str) -> None:
    chosen: Any = {"type": "function", "function": {"name": name}}
    answers = both(sdk, seeds=3, tool_choice=chosen)
    assert any(choice.calls for choice in answers)
    for choice in answers:
        check_calls(choice, {name})
        assert choice.finish_reason in ("stop", "length")
        assert len(choice.calls) == 1 or choice.finish_reason == "length"


def test_some_tools_are_allowed(sdk: openai.OpenAI) -> None:
    allowed: Any = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": n}} for n in ("now", "add-2.x")],
        },
    }
    answers = both(sdk, tool_choice=allowed)
    for choice in answers:
        check_calls(choice, {"now", "add-2.x"})
        assert choice.calls or choice.finish_reason == "length"
    assert any(choice.calls for choice in answers)
    allowed["allowed_tools"]["mode"] = "auto"
    for choice in both(sdk, tool_choice=allowed, logit_bias=TO_CALL):
        check_calls(choice, {"now", "add-2.x"})


def test_none(sdk: openai.OpenAI) -> None:
    tag = {str(python_tag(sdk)): 20}
    for choice in both(sdk, tool_choice="none", logit_bias=tag):
        assert choice.calls == []
        assert choice.finish_reason in ("stop", "length")


def python_tag(sdk: openai.OpenAI) -> int:
    """The token that Llama 3.1 begins calls with."""
    url = str(sdk.base_url).replace("/v1/", "/tokenize")
    body = {"prompt": "<|python_tag|>", "add_special_tokens": False, "parse_special": True}
    [token] = sdk.post(url, cast_to=object, body=body)["tokens"]  # type: ignore[index]
    return int(token)


TO_CALL = {str(ord("{")): 6}
"""Braces are likely: where calls begin."""


@pytest.mark.parametrize("parallel", [True, False])
def test_auto(sdk: openai.OpenAI, parallel: bool) -> None:
    """The tag begins a call for certain, anything else hardly ever."""
    bias = {str(python_tag(sdk)): 8}
    answers = both(sdk, logit_bias=bias, parallel_tool_calls=parallel)
    for choice in answers:
        check_calls(choice, set(SCHEMAS))
        ended = choice.finish_reason != "length"
        assert (choice.finish_reason == "tool_calls") == (bool(choice.calls) and ended)
        assert parallel or len(choice.calls) <= 1
    assert any(choice.calls for choice in answers)
    assert any(choice.calls and choice.text for choice in answers), "text, then a call"


def test_built_in_tools(sdk: openai.OpenAI) -> None:
    names = ["brave_search", "wolfram_alpha", "code_interpreter"]
    body = {"tools": [], "extra_body": {"builtin_tools": names}}
    answers = both(sdk, tool_choice="required", **body)
    for choice in answers:
        for name, arguments in choice.calls:
            assert name in names
            if choice.finish_reason == "tool_calls":
                [key] = json.loads(arguments)
                assert key == ("code" if name == "code_interpreter" else "query")
        assert choice.calls or choice.finish_reason == "length"
    called = {name for choice in answers for name, _ in choice.calls}
    assert called >= {"code_interpreter"}
    chosen: Any = {"type": "function", "function": {"name": "brave_search"}}
    quote = {str(ord('"')): 4}
    chosen_calls = both(sdk, tool_choice=chosen, logit_bias=quote, **body)
    for choice in chosen_calls:
        assert all(name == "brave_search" for name, _ in choice.calls)
        assert choice.calls or choice.finish_reason == "length"
    assert any(choice.calls for choice in chosen_calls)


def test_a_call_cut_anywhere(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "messages": HI, "tools": [WEATHER], "seed": 5, "temperature": 1,
        "tool_choice": "required", "parallel_tool_calls": False,
    }  # fmt: skip
    [full] = choices_of(sdk.chat.completions.create(**body, max_tokens=400))
    [(name, arguments)] = full.calls
    seen = set()
    for n in range(1, 120, 3):
        [whole] = choices_of(sdk.chat.completions.create(**body, max_tokens=n))
        assert joined(sdk.chat.completions.create(**body, max_tokens=n, stream=True)) == [whole]
        if whole == full:
            break
        assert whole.finish_reason == "length"
        for cut_name, cut in whole.calls:
            assert cut_name == name
            assert arguments.startswith(cut.rstrip("\ufffd"))  # a character, too
            assert whole.text == ""
            seen.add(cut)
    assert len(seen) > 3


def test_a_stop_string_in_a_call(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "messages": HI, "tools": [WEATHER], "seed": 5, "max_tokens": 400,
        "tool_choice": "required", "stop": '"unit', "temperature": 1,
    }  # fmt: skip
    [whole] = choices_of(sdk.chat.completions.create(**body))
    assert joined(sdk.chat.completions.create(**body, stream=True)) == [whole]
    assert (whole.finish_reason, whole.stop_reason) == ("stop", '"unit')
    assert "unit" not in whole.calls[0][1]


def test_no_tools_no_calls(sdk: openai.OpenAI) -> None:
    """Braces and tags are only text then."""
    bias = {**TO_CALL, str(python_tag(sdk)): 5}
    answers = both(sdk, tools=None, logit_bias=bias)
    assert any("{" in choice.text for choice in answers)
    assert all(not choice.calls for choice in answers)


UNENFORCEABLE: Any = {
    "type": "function",
    "function": {
        "name": "odd",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "array", "uniqueItems": True}},
        },
    },
}


def test_what_cannot_be_enforced_is_told(tiny_server: Live, sdk: openai.OpenAI) -> None:
    body: Any = {"model": "tiny", "messages": HI, "max_tokens": 4, "seed": 1}
    raw = sdk.chat.completions.with_raw_response.create(**body, tools=[UNENFORCEABLE, NOW])
    assert raw.headers["x-pronk-unenforced-tools"] == "odd"
    raw = sdk.chat.completions.with_raw_response.create(**body, tools=[NOW])
    assert "x-pronk-unenforced-tools" not in raw.headers
    strict = {**UNENFORCEABLE, "function": {**UNENFORCEABLE["function"], "strict": True}}
    chosen = {"tools": [UNENFORCEABLE], "tool_choice": "required"}
    for refused in ({"tools": [strict]}, chosen):
        status, param, _, message = refusal(tiny_server, PATH, {**body, **refused})
        assert status == 400
        assert param == "tools['odd'].parameters"
        assert "uniqueItems" in message


def test_a_conversation_with_calls_goes_on(sdk: openai.OpenAI) -> None:
    """What came back as a call can be sent again, with its result."""
    first = sdk.chat.completions.create(
        model="tiny", messages=HI, tools=TOOLS, tool_choice=NAMED, max_tokens=400, seed=5
    )
    message = first.choices[0].message
    assert message.tool_calls
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "22 C"}
    messages: Any = [*HI, message.model_dump(exclude_none=True, exclude={"annotations"}), result]
    again: Any = [*HI, message, result]
    bodies: list[Any] = [messages, again]
    answers = [
        sdk.chat.completions.create(model="tiny", messages=sent, tools=TOOLS, max_tokens=8, seed=5)
        for sent in bodies
    ]
    assert choices_of(answers[0]) == choices_of(answers[1])
    assert answers[0].usage
    assert first.usage
    assert answers[0].usage.prompt_tokens > first.usage.prompt_tokens
