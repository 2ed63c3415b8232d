"""Grammars of whole answers: tool calls whose arguments fit their schemas, in the form that the
model was told to use, and the text or JSON around or instead of them.

What these admit is what parse.py reads as calls, so a call that has begun is never taken back. A
model that may also answer in words ("auto") is free until it has written the beginning of a call
with the name of an offered tool; from there on the schema holds (llguidance's lazy lexemes).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pronk.core.errors import UserError
from pronk.text.grammar import JSON_OPTIONS, Grammar, Matchers
from pronk.text.json_schema import enforceable
from pronk.text.tools import Tool

_SPACE = r"( |\n {0,16})?"
_TEXT = "TEXT: /(.|\\n)*/"
_STRING = r'/"([^"\\\x00-\x1f]|\\["\\\/bfnrt]|\\u[0-9a-fA-F]{4})*"/'
_CODE = r"/[^\s\{\[](.|\n)*/"  # what begins with a brace is a call
_TAG = "<|python_tag|>"
_COMBINING = ("allOf", "anyOf", "oneOf", "if", "$ref", "not", "patternProperties",
              "unevaluatedProperties", "additionalProperties", "dependentSchemas")  # fmt: skip


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may be made of."""

    tools: Sequence[Tool] = ()
    builtins: Sequence[str] = ()
    choice: str = "auto"
    """"auto", "none", "required" or the name of a tool."""
    parallel: bool = True
    """Whether there may be several calls."""
    schema: Mapping[str, Any] | bool | None = None
    """Of an answer that calls nothing; None: any text."""
    python_tag: bool = False
    """Whether the vocabulary has the special token that Llama 3.1 begins its calls with."""
    loose: set[str] = field(default_factory=set)
    """Filled by `answer_grammar`: tools whose schemas cannot be enforced, so that their arguments
    are any JSON object."""


def answer_grammar(form: AnswerForm, strict: Sequence[str] = ()) -> Grammar | None:
    """The grammar of an answer, None where anything goes.

    Raises UserError for a schema that cannot be enforced of a tool that is `strict` or must be
    called; such a schema of another tool is relaxed to any object, and the tool noted in `loose`.
    """
    names = [tool.name for tool in form.tools] + list(form.builtins)
    if not names or form.choice == "none":
        return None if form.schema is None else Grammar.of_json_schema(form.schema)
    forced = form.choice != "auto"
    offered = [form.choice] if forced and form.choice != "required" else names
    rules = _Rules(form, {*strict, *(offered if forced else ())})
    if forced or form.schema is not None:
        start = rules.instead_of_text(offered, None if forced else form.schema)
    else:
        start = rules.in_text(offered)
    lines = ["%llguidance {}", f"start: {start}", _TEXT, f"STRING: {_STRING}", *rules.lines]
    return Grammar.of_our_own("\n".join(lines) + "\n")


class _Rules:
    """Lark rules of the calls of an answer."""

    def __init__(self, form: AnswerForm, strict: set[str]) -> None:
        self.lines: list[str] = []
        self._form = form
        self._beside_json = False
        self._arguments = {tool.name: self._schema(tool, strict) for tool in form.tools}
        for i, tool in enumerate(form.tools):
            self.lines.append(f"args_{i}: {self.json(self._arguments[tool.name])}")
        self._number = {tool.name: i for i, tool in enumerate(form.tools)}

    def _schema(self, tool: Tool, strict: set[str]) -> Mapping[str, Any]:
        where = f"tools[{tool.name!r}].parameters"
        schema = closed(tool.parameters)
        try:
            Grammar.of_json_schema(schema, where)
        except UserError:
            if tool.name in strict:
                raise
            self._form.loose.add(tool.name)
            return {"type": "object"}
        return enforceable(schema, where)

    def json(self, schema: Mapping[str, Any]) -> str:
        return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})

    def calls(self, offered: Sequence[str], *, bare: bool) -> str:
        """A rule of one call or more: without the python tag (calls of the caller's tools only, as
        built-in ones without it could be text), or behind it."""
        own = [n for n in offered if n in self._number]
        forms = [self._call(n) for n in own]
        if not bare or not self._form.python_tag:
            forms += [_builtin(n) for n in offered if n in self._form.builtins]
        if not forms:
            return ""
        name = "bare" if bare else "tagged"
        one = f"{name}_call"
        self.lines.append(f"{one}: " + " | ".join(forms))
        several = self._form.parallel and self._form.choice in ("auto", "required")
        rule = f"{one} (/;? ?\\n?/ {one})*" if several else one
        if not bare:
            rule = f"{_TAG} {rule}"
            if "code_interpreter" in offered:
                rule += f" | {_TAG} {_CODE}"
        self.lines.append(f"{name}: {rule}")
        return name

    def instead_of_text(
        self, offered: Sequence[str], schema: Mapping[str, Any] | bool | None
    ) -> str:
        """Calls, or JSON of a schema if there is one. Which of both begins with `{"name": ` is open
        then, so calls are JSON of schemas, too: a lexeme longer than theirs would shut them out."""
        self._beside_json = schema is not None
        parts = [self.calls(offered, bare=True)]
        if self._form.python_tag:
            parts.append(self.calls(offered, bare=False))
        if schema is not None:
            Grammar.of_json_schema(schema)  # whose errors, by itself, name no rules of ours
            parts.append(self.json(enforceable(schema)))
        return " | ".join(filter(None, parts))

    def in_text(self, offered: Sequence[str]) -> str:
        """Text in which a call may begin anywhere."""
        parts = []
        for name in offered:
            if name in self._number:
                i = self._number[name]
                self.lines += [
                    f"open_{i}[lazy]: TEXT /{_head(name)}/",
                    f"call_{i}: open_{i} {_SEPARATOR} args_{i} /{_SPACE}\\}}/",
                    f"otag_{i}[lazy]: TEXT {json.dumps(f'<function={name}>')}",
                    f'tag_{i}: otag_{i} args_{i} "</function>"',
                ]
                parts += [f"call_{i}", f"tag_{i}"]
        if self._form.python_tag:
            self.calls(offered, bare=False)
            parts.append("TEXT tagged")
        else:
            for name in offered:
                if name in self._form.builtins and name != "code_interpreter":
                    self.lines.append(
                        f"open_{name}[lazy]: TEXT {json.dumps(name + '.call(query=')}"
                    )
                    parts.append(f'open_{name} STRING ")"')
        if not parts:
            return "TEXT"
        anyone = f"({' | '.join(parts)})"
        return f"{anyone}* TEXT" if self._form.parallel else f"TEXT | {anyone}"

    def _call(self, name: str) -> str:
        if self._beside_json:
            return self._call_as_json(name)
        return f"/{_head(name)}/ {_SEPARATOR} args_{self._number[name]} /{_SPACE}\\}}/"

    def _call_as_json(self, name: str) -> str:
        """The same by schemas of the whole call."""
        return " | ".join(
            self.json(_call_schema(name, key, self._arguments[name]))
            for key in ("parameters", "arguments")
        )


def _call_schema(name: str, key: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "name": {"const": name},
            key: _moved(arguments, f"#/properties/{key}"),
        },
        "required": ["name", key],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references into itself still hold where it lies at `root` of another."""
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(part, root) for part in schema] if isinstance(schema, list) else schema


def _head(name: str) -> str:
    """A regular expression of the beginning of a call, up to and with its name."""
    kind = rf'("type"{_SPACE}:{_SPACE}"function"{_SPACE},{_SPACE})?'
    return rf'\{{{_SPACE}{kind}"name"{_SPACE}:{_SPACE}"{re.escape(name)}"'


_BETWEEN = rf'{_SPACE},{_SPACE}"(parameters|arguments)"{_SPACE}:{_SPACE}'
_SEPARATOR = f"/{_BETWEEN}/"


def _builtin(name: str) -> str:
    return (
        _CODE if name == "code_interpreter" else f'{json.dumps(name + ".call(query=")} STRING ")"'
    )


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema without the properties that it allows by not forbidding them: what the grammar
    then admits is still admitted by the schema, and a model does not make up names. Schemas that
    are put together of several stay as they are."""
    if any(key in schema for key in _COMBINING):
        return schema
    out = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        out["properties"] = {
            name: closed(part) if isinstance(part, Mapping) else part
            for name, part in properties.items()
        }
        out["additionalProperties"] = False
    if isinstance(items := schema.get("items"), Mapping):
        out["items"] = closed(items)
    return out


class CallJudge:
    """Which calls of an answer the grammar has held to their schemas, and whether others fit
    (`Judge` of parse.py). Models write calls in more forms than a grammar can hold: what begins
    like the form that they were told to use is held, and what does not is looked at when it is
    whole."""

    def __init__(self, tools: Sequence[Tool], matchers: Matchers) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._matchers = matchers

    def enforced(self, name: str, source: str) -> bool:
        begins = f"{_head(name)}{_BETWEEN}|<function={re.escape(name)}>"
        return name in self._tools and re.fullmatch(begins, source) is not None

    def admits(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Whether arguments fit the schema of their tool, as far as it can be enforced."""
        tool = self._tools.get(name)
        if tool is None:  # a built-in one, which takes any text
            return True
        try:
            grammar = Grammar.of_json_schema(tool.parameters)
        except UserError:
            return True
        text = json.dumps(in_order(arguments, tool.parameters), ensure_ascii=False)
        return self._matchers.admits(grammar, text)


def in_order(value: Any, schema: Any) -> Any:
    """A JSON value with its names in the order of the schema, in which a grammar wants them."""
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, list):
        return [in_order(item, schema.get("items")) for item in value]
    properties = schema.get("properties")
    if not isinstance(value, Mapping) or not isinstance(properties, Mapping):
        return value
    names = [name for name in properties if name in value]
    names += [name for name in value if name not in properties]
    return {name: in_order(value[name], properties.get(name)) for name in names}
