"""Tools that a model may call: their definitions, the prompt texts that offer them to a Llama 3.1
model, and the texts of the calls themselves. No tokens here; chat.py places these texts.

The prompt texts are Meta's (llama-models `prompt_format.md` of 3.1 and 3.2 and the generators
behind them), because the models were trained on those words. Where Meta's generators lose or break
the tool's definition, the definition is written properly instead:

- JSON format: Meta writes `properties` as a list and every type as "object", so types are lost;
  here the true JSON schema stands in the same frame (`meta_schemas=True` gives Meta's).
- Names and descriptions go through JSON escaping; Meta pastes them raw between quotes.
- The `<function=>` format: Meta HTML-escapes (`'` becomes `\\u0027`) and keeps only description,
  type and required; here schema keywords beyond those (enum, items, ...) are kept.
- Pythonic format: defaults keep their JSON type; Meta turns them all into strings.

Call texts follow Meta's encoder, except that quotes, backslashes and control characters inside
values are escaped (Meta's text cannot be parsed back), nested objects of the pythonic format are
Python dictionaries (Meta writes `{k="v"}`), and several calls of one message are one list or are
separated by `; `, as the models write them (Meta glues them together).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pronk.core.errors import UserError
from pronk.text.messages import ToolCall, check_json, check_object, check_text

ToolFormat = Literal["json", "function_tag", "pythonic"]

BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "code_interpreter")
"""Tools that Llama 3.1 knows without a definition."""

BUILTIN_CALLS = frozenset({*BUILTIN_TOOLS, "photogen"})
"""Names that are written and read in the built-in form `name.call(query="...")`."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}

REQUIRED_SENTENCE = (
    "You MUST use one of the provided functions/tools to answer the user query."  # prompt text
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is the JSON schema of its arguments object."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: dict(_NO_PARAMETERS))

    def to_dict(self) -> dict[str, Any]:
        """The OpenAI shape, which is also what Hugging Face templates print."""
        description = {"description": self.description} if self.description else {}
        function = {"name": self.name, **description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def tools_from_dicts(dicts: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Tools from OpenAI dictionaries `{"type": "function", "function": {...}}`.

    Raises UserError naming the index and the key of what is wrong, and for a repeated name.
    """
    if isinstance(dicts, str | bytes | Mapping) or not isinstance(dicts, Sequence):
        raise UserError(f"tools: expected a list of tools, got {type(dicts).__name__}")
    tools = [_tool(item, f"tools[{i}]") for i, item in enumerate(dicts)]
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            raise UserError(f"tools[{i}].function.name: {tool.name!r} is defined twice")
        seen.add(tool.name)
    return tools


def _tool(item: object, where: str) -> Tool:
    outer = check_object(item, where)
    if outer.get("type") != "function":
        raise UserError(f"{where}.type: must be 'function', got {outer.get('type')!r}")
    if extra := sorted(outer.keys() - {"type", "function"}):
        raise UserError(f"{where}.{extra[0]}: unknown key; known are function, type")
    where += ".function"
    function = check_object(outer.get("function"), where)
    if extra := sorted(function.keys() - {"name", "description", "parameters"}):
        raise UserError(f"{where}.{extra[0]}: unknown key; known are description, name, parameters")
    name = check_text(function.get("name"), f"{where}.name")
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}.name: {name!r} must be 1 to 64 of letters, digits, '_', '-', '.'")
    description = function.get("description")
    return Tool(
        name,
        "" if description is None else check_text(description, f"{where}.description"),
        _schema(function.get("parameters"), f"{where}.parameters"),
    )


def _schema(value: object, where: str) -> dict[str, Any]:
    """A schema whose parts that the prompts read have the right shape."""
    if value is None:
        return dict(_NO_PARAMETERS)
    schema = check_object(value, where)
    check_json(schema, where)
    if schema.get("type", "object") != "object":
        raise UserError(f"{where}.type: arguments are an 'object', got {schema['type']!r}")
    properties = check_object(schema.get("properties", {}), f"{where}.properties")
    for name, part in properties.items():
        if not isinstance(part, bool):
            check_object(part, f"{where}.properties.{name}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise UserError(f"{where}.required: expected a list of names, got {required!r}")
    return schema


def _properties(tool: Tool) -> dict[str, dict[str, Any]]:
    """Name -> schema; the schemas `true` and `false` have no keywords to print."""
    properties: dict[str, Any] = tool.parameters.get("properties", {})
    return {name: part if isinstance(part, dict) else {} for name, part in properties.items()}


def _required(tool: Tool) -> list[str]:
    return list(tool.parameters.get("required", []))


def _dumps(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


# --- offering tools ---------------------------------------------------------------------------


def json_prompt(tools: Sequence[Tool], *, meta_schemas: bool = False) -> str:
    """The user message that offers tools to be called in JSON (llama3_1/prompt_format.md)."""
    entries = [_meta_json_entry(t) if meta_schemas else _dumps(t.to_dict(), 4) for t in tools]
    return (
        "Answer the user's question by making use of the following functions if needed.\n"
        "If none of the function can be used, please say so.\n"
        "Here is a list of functions in JSON format:\n"
        + "".join(entry + "\n" for entry in entries)
        + "\nReturn function calls in JSON format."
    )


def _meta_json_entry(tool: Tool) -> str:
    """Meta's layout: `properties` is a list, each type is "object", `required` is on one line."""
    properties = [
        {name: {"type": "object", "description": part.get("description", "")}}
        for name, part in _properties(tool).items()
    ]
    parameters = {"type": "object", "properties": properties, "required": "REQUIRED"}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    head, _, tail = _dumps({"type": "function", "function": function}, 4).rpartition('"REQUIRED"')
    return head + _dumps(_required(tool)) + tail


def function_tag_prompt(tools: Sequence[Tool]) -> str:
    """The user message that offers tools to be called as `<function=name>{...}</function>`."""
    return (
        "You have access to the following functions:\n\n"
        + "".join(_function_tag_entry(tool) for tool in tools)
        + "Think very carefully before calling functions.\n"
        "If you choose to call a function ONLY reply in the following format with no prefix or"
        " suffix:\n\n"
        '<function=example_function_name>{"example_name": "example_value"}</function>\n\n'
        "Reminder:\n"
        "- If looking for real time information use relevant functions before falling back to"
        " brave_search\n"
        "- Function calls MUST follow the specified format, start with <function= and end with"
        " </function>\n"
        "- Required parameters MUST be specified\n"
        "- Only call one function at a time\n"
        "- Put the entire function call reply on one line"
    )


def _function_tag_entry(tool: Tool) -> str:
    required = _required(tool)
    parameters = {
        name: _flat(part, "param_type") | {"required": name in required}
        for name, part in _properties(tool).items()
    }
    inner = json.dumps(parameters, ensure_ascii=False, sort_keys=True)
    return (
        f"Use the function '{tool.name}' to '{tool.description}':\n"
        f'{{"name": {_dumps(tool.name)}, "description": {_dumps(tool.description)},'
        f' "parameters": {inner}}}\n\n'
    )


def _flat(part: Mapping[str, Any], type_key: str) -> dict[str, Any]:
    """A property without its default, its type under Meta's name for it, the rest as it is."""
    renamed = {type_key if key == "type" else key: value for key, value in part.items()}
    renamed.pop("default", None)
    return renamed


def pythonic_prompt(tools: Sequence[Tool]) -> str:
    """The system text that offers tools to be called as `[f(a=1), g()]`
    (llama3_2/text_prompt_format.md)."""
    functions = [
        {
            "name": tool.name,
            "description": tool.description,
            "parameters": {
                "type": "dict",
                "required": _required(tool),
                "properties": _properties(tool),
            },
        }
        for tool in tools
    ]
    return (
        "You are an expert in composing functions. You are given a question and a set of possible"
        " functions.\n"
        "Based on the question, you will need to make one or more function/tool calls to achieve"
        " the purpose.\n"
        "If none of the function can be used, point it out. If the given question lacks the"
        " parameters required by the function,\n"
        "also point it out. You should only return the function call in tools call sections.\n\n"
        "If you decide to invoke any of the function(s), you MUST put it in the format of"
        " [func_name1(params_name1=params_value1, params_name2=params_value2...),"
        " func_name2(params)]\n"
        "You SHOULD NOT include any other text in the response.\n\n"
        "Here is a list of functions in JSON format that you can invoke.\n\n" + _dumps(functions, 4)
    )


def hf_prompt(tools: Sequence[Tool], *, in_user_message: bool) -> str:
    """The text that the official Hugging Face template of 3.1 puts before the first user text, or
    before the system text. The missing spaces are the template's."""
    answer = (
        'espond in the format {"name": function name, "parameters": dictionary of argument name'
        " and its value}.Do not use variables.\n\n"
    )
    head = (
        "Given the following functions, please respond with a JSON for a function call with its"
        f" proper arguments that best answers the given prompt.\n\nR{answer}"
        if in_user_message
        else "You have access to the following functions. To call a function, please respond with"
        f" JSON for a function call.R{answer}"
    )
    return head + "".join(_dumps(tool.to_dict(), 4) + "\n\n" for tool in tools)


def tool_choice_sentence(tool_choice: str) -> str:
    """What the system text says when a tool must be called: any of them ("required"), or the one
    named; empty for "auto" and "none"."""
    if tool_choice in ("auto", "none"):
        return ""
    if tool_choice == "required":
        return REQUIRED_SENTENCE
    return f"You MUST use the tool `{tool_choice}` to answer the user query."


# --- calling tools ----------------------------------------------------------------------------


def json_call(call: ToolCall) -> str:
    """`{"type": "function", "name": ..., "parameters": ...}`, ASCII as Meta's encoder writes it."""
    return json.dumps({"type": "function", "name": call.name, "parameters": call.arguments})


def hf_json_call(call: ToolCall) -> str:
    """`{"name": ..., "parameters": ...}` as the Hugging Face template writes it."""
    return f'{{"name": {_dumps(call.name)}, "parameters": {_dumps(call.arguments)}}}'


def function_tag_call(call: ToolCall) -> str:
    """`<function=name>{json}</function>`."""
    return f"<function={call.name}>{json.dumps(call.arguments)}</function>"


def pythonic_call(call: ToolCall) -> str:
    """`name(a="x", b=1)`; the calls of one message stand in one list."""
    return f"{call.name}({_keywords(call.arguments)})"


def builtin_call(call: ToolCall) -> str:
    """`name.call(query="...")`, with as many keyword arguments as there are."""
    return f"{call.name}.call({_keywords(call.arguments)})"


def _keywords(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_literal(value)}" for name, value in arguments.items())


def _literal(value: object) -> str:
    """A Python literal; strings in double quotes, with JSON's escapes, which are Python's too."""
    if isinstance(value, str):
        return _dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
