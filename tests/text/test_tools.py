"""Tool definitions and the prompt texts made of them."""

import json
from typing import Any

import pytest

from chat_samples import ADD, WEATHER
from pronk.core.errors import UserError
from pronk.text import tools as prompts
from pronk.text.messages import ToolCall
from pronk.text.tools import Tool, tools_from_dicts

WEATHER_TOOL, ADD_TOOL = tools_from_dicts([WEATHER, ADD])


def test_from_dicts_and_back() -> None:
    assert WEATHER_TOOL.name == "get_weather"
    assert [tool.to_dict() for tool in (WEATHER_TOOL, ADD_TOOL)] == [WEATHER, ADD]
    [bare] = tools_from_dicts([{"type": "function", "function": {"name": "now"}}])
    assert bare == Tool("now", "", {"type": "object", "properties": {}})


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        (3, "tools[1]: expected an object, got int"),
        ({"type": "web_search"}, "tools[1].type: must be 'function', got 'web_search'"),
        ({"type": "function", "function": {}, "x": 1}, "tools[1].x: unknown key"),
        ({"type": "function"}, "tools[1].function: expected an object, got nothing"),
        ({"type": "function", "function": {}}, "tools[1].function.name: expected text"),
        (function(name="a b"), "tools[1].function.name: 'a b' must be 1 to 64 of letters"),
        (function(name=""), "must be 1 to 64"),
        (function(name="get_weather"), "tools[1].function.name: 'get_weather' is defined twice"),
        (function(strict=True), "tools[1].function.strict: unknown key; known are description"),
        (function(description=1), "tools[1].function.description: expected text, got int"),
        (function(parameters=[]), "tools[1].function.parameters: expected an object, got list"),
        (function(parameters={"type": "array"}), "parameters.type: arguments are an 'object'"),
        (function(parameters={"properties": []}), "parameters.properties: expected an object"),
        (
            function(parameters={"properties": {"a": 1}}),
            "properties.a: expected an object, got int",
        ),
        (function(parameters={"required": "a"}), "parameters.required: expected a list of names"),
        (function(parameters={"x": object()}), "parameters: not writable as JSON"),
    ],
)
def test_refused(tool: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        tools_from_dicts([WEATHER, tool])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_no_list() -> None:
    with pytest.raises(UserError, match="tools: expected a list of tools, got dict"):
        tools_from_dicts(WEATHER)


def test_json_prompt_has_true_schemas_unless_metas_are_wanted() -> None:
    head, body = prompts.json_prompt([ADD_TOOL]).split("JSON format:\n", 1)
    assert head.startswith("Answer the user's question by making use of the following functions")
    assert json.loads(body.removesuffix("\nReturn function calls in JSON format.")) == ADD
    body = prompts.json_prompt([ADD_TOOL], meta_schemas=True).split("JSON format:\n", 1)[1]
    schema = json.loads(body.removesuffix("\nReturn function calls in JSON format."))
    assert schema["function"]["parameters"] == {
        "type": "object",
        "properties": [
            {"a": {"type": "object", "description": "the first"}},
            {"b": {"type": "object", "description": "größer"}},
        ],
        "required": ["a", "b"],
    }
    assert '        "required": ["a", "b"]\n' in body


def test_function_tag_prompt_keeps_what_the_schema_says() -> None:
    text = prompts.function_tag_prompt([WEATHER_TOOL, ADD_TOOL])
    entries = [json.loads(line) for line in text.splitlines() if line.startswith('{"name"')]
    assert entries[0]["parameters"] == {
        "city": {"description": "The name of the city", "param_type": "string", "required": True},
        "metric": {"description": "The unit", "param_type": "string", "required": False},
    }
    assert entries[1]["description"] == ADD["function"]["description"]
    assert entries[1]["parameters"]["b"] == {
        "description": "größer",
        "enum": [1, 2],
        "param_type": "integer",
        "required": True,
    }


def test_pythonic_prompt_is_json() -> None:
    text = prompts.pythonic_prompt([WEATHER_TOOL, ADD_TOOL])
    weather, add = json.loads(text[text.index("\n[\n") :])
    assert weather["parameters"]["properties"] == WEATHER["function"]["parameters"]["properties"]
    assert add["parameters"]["type"] == "dict"
    assert add["parameters"]["required"] == ["a", "b"]


@pytest.mark.parametrize("in_user_message", [True, False])
def test_hf_prompt(in_user_message: bool) -> None:
    text = prompts.hf_prompt([ADD_TOOL], in_user_message=in_user_message)
    head, body = text.split("Do not use variables.\n\n")
    assert head.startswith("Given the following" if in_user_message else "You have access to the")
    assert body == json.dumps(ADD, indent=4, ensure_ascii=False) + "\n\n"


def test_a_property_without_keywords() -> None:
    anything = Tool("f", "d", {"type": "object", "properties": {"x": True}})
    assert '"x": {"required": false}' in prompts.function_tag_prompt([anything])
    assert '"x": {}' in prompts.pythonic_prompt([anything])


def test_call_texts() -> None:
    call = ToolCall("f", {"s": 'a"b\\c\né', "d": {"k": [True, None, 1.5]}})
    assert prompts.pythonic_call(call) == 'f(s="a\\"b\\\\c\\né", d={"k": [True, None, 1.5]})'
    assert prompts.builtin_call(ToolCall("brave_search", {"query": "é"})) == (
        'brave_search.call(query="é")'
    )
    assert prompts.function_tag_call(ToolCall("f", {"a": 1})) == '<function=f>{"a": 1}</function>'
    assert json.loads(prompts.json_call(call)) == {
        "type": "function",
        "name": "f",
        "parameters": call.arguments,
    }
    assert json.loads(prompts.hf_json_call(call)) == {"name": "f", "parameters": call.arguments}
