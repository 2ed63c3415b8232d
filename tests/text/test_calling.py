"""Grammars of tool calls, without a model: what they admit and what not, and that whatever they
admit is read as calls of offered tools, with arguments that fit."""

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest

from engine.tiny_models import SPECIAL
from pronk.core.errors import UserError
from pronk.engine.replies import ReplyText
from pronk.text.calling import AnswerForm, answer_grammar
from pronk.text.grammar import Matchers
from pronk.text.tokenizer import Tokenizer, tokenizer_from_gguf
from pronk.text.tokenizer_bpe import in_byte_alphabet
from pronk.text.tools import Tool
from vocabularies import ORDINARY, N, metadata_of

WEATHER = Tool("get_weather", "", {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 20},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city"],
})  # fmt: skip
ADD = Tool("add-2.x", "", {
    "type": "object",
    "properties": {"a": {"type": "number", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
})  # fmt: skip
GET = Tool("get", "", {"type": "object", "properties": {}})
TREE = Tool("tree", "", {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "$defs": {"node": {
        "type": "object",
        "properties": {"leaf": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
        "additionalProperties": False,
    }},
})  # fmt: skip
TOOLS = [WEATHER, ADD, GET, TREE]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [1, 22]}},
    "required": ["name"],
    "additionalProperties": False,
}
TAG = "<|python_tag|>"

CALL = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
TWO = CALL + '; {"name": "add-2.x", "parameters": {"a": 1.5}}'
SEARCH = 'brave_search.call(query="who?")'


def tokenizer(*special: str) -> Tokenizer:
    return tokenizer_from_gguf(
        metadata_of(
            tokens=[in_byte_alphabet(token) for token in ORDINARY] + list(special),
            token_type=[1] * N + [3] * len(special),
        )
    )


LLAMA = tokenizer(*SPECIAL)
OTHER = tokenizer(*(text for text in SPECIAL if text != TAG))
MATCHERS = {LLAMA: Matchers(LLAMA), OTHER: Matchers(OTHER)}
BOTH = pytest.mark.parametrize("vocabulary", [LLAMA, OTHER], ids=["llama", "other"])


def form_of(vocabulary: Tokenizer, **more: Any) -> AnswerForm:
    options: dict[str, Any] = {"tools": TOOLS, **more}
    return AnswerForm(**options, python_tag=vocabulary is LLAMA)


def admitted(vocabulary: Tokenizer, form: AnswerForm, text: str) -> bool:
    """Whether `text`, special tokens spelled out, is a whole answer."""
    grammar = answer_grammar(form)
    assert grammar is not None
    matcher = MATCHERS[vocabulary].matcher(grammar)
    ids = vocabulary.encode(text, special=True)
    return matcher.allowed(ids) == len(ids) and ends(matcher, ids)


def ends(matcher: Any, ids: Sequence[int]) -> bool:
    for id in ids:
        matcher.advance(id)
    return bool(matcher.complete)


FREE = [
    "", "Hello {there}", '{"city": "Paris"}', '{"name": "Bob"}', CALL, TWO, f"Sure: {CALL}",
    f"{CALL} done", '<function=get_weather>{"city": "x"}</function>',
    '{"type": "function", "name": "add-2.x", "arguments": {"a": 0}}',
    '{\n  "name": "get",\n  "parameters": {\n  }\n}',
]  # fmt: skip
WRONG = [
    '{"name": "get_weather", "parameters": {"town": "Paris"}}',
    '{"name": "get_weather", "parameters": {}}',
    '{"name": "get_weather", "parameters": {"city": 5}}',
    '{"name": "get_weather", "parameters": {"city": "Paris", "days": 21}}',
    '{"name": "add-2.x", "arguments": {"a": "1"}}',
    '{"name": "get", "parameters": {"x": 1}}',
    f"{CALL[:-1]}",
    '<function=get_weather>{"city": 5}</function>',
    '{"name": "tree", "parameters": {"root": {"leaf": 1}}}',
]


@BOTH
def test_auto(vocabulary: Tokenizer) -> None:
    form = form_of(vocabulary)
    for text in FREE:
        assert admitted(vocabulary, form, text), text
    for text in WRONG:
        assert not admitted(vocabulary, form, text), text
    one = form_of(vocabulary, parallel=False)
    assert admitted(vocabulary, one, CALL)
    assert admitted(vocabulary, one, f"I look it up. {CALL}")
    assert not admitted(vocabulary, one, TWO)


@BOTH
@pytest.mark.parametrize("parallel", [True, False])
def test_required(vocabulary: Tokenizer, parallel: bool) -> None:
    form = form_of(vocabulary, choice="required", parallel=parallel)
    assert admitted(vocabulary, form, CALL)
    assert admitted(vocabulary, form, '{"name": "tree", "parameters": {"root": {"next": {}}}}')
    assert admitted(vocabulary, form, TWO) == parallel
    for text in ("", "Hello", f"Sure: {CALL}", f"{CALL} done", '{"name": "Bob"}', *WRONG):
        assert not admitted(vocabulary, form, text), text


@BOTH
def test_one_tool(vocabulary: Tokenizer) -> None:
    form = form_of(vocabulary, choice="add-2.x")
    assert admitted(vocabulary, form, '{"name": "add-2.x", "parameters": {"a": 1}}')
    for text in ("", CALL, TWO, '{"name": "add-2.x", "parameters": {"a": 1}}; ' + CALL, *WRONG):
        assert not admitted(vocabulary, form, text), text
    form = form_of(vocabulary, choice="get")
    assert admitted(vocabulary, form, '{"name": "get", "parameters": {}}')
    assert not admitted(vocabulary, form, CALL), "whose name begins alike"


@BOTH
def test_json_or_calls(vocabulary: Tokenizer) -> None:
    """What both begin with shuts out neither."""
    form = form_of(vocabulary, schema=PERSON)
    assert admitted(vocabulary, form, '{"name": "Bob", "age": 22}')
    assert admitted(vocabulary, form, '{\n  "name": "get"\n}')
    for text in (CALL, TWO, '{ "type": "function" , "name": "get" , "arguments": {} }'):
        assert admitted(vocabulary, form, text), text
    for text in ("", "Hello", '{"age": 22}', '{"name": "Bob", "age": 3}', f"Sure: {CALL}", *WRONG):
        assert not admitted(vocabulary, form, text), text
    for schema in ({"type": "object"}, {}, True, {"$ref": "#/$defs/x", "$defs": {"x": PERSON}}):
        form = form_of(vocabulary, schema=schema)
        assert admitted(vocabulary, form, '{"name": "Al"}')
        assert admitted(vocabulary, form, TWO)
        assert not admitted(vocabulary, form, "Hello")
    with pytest.raises(UserError, match="schema: false admits no answer"):
        answer_grammar(form_of(vocabulary, schema=False))
    form = form_of(vocabulary, schema=PERSON, choice="required")
    assert admitted(vocabulary, form, CALL)
    assert not admitted(vocabulary, form, '{"name": "Bob"}')


def test_behind_the_python_tag() -> None:
    names = ("brave_search", "code_interpreter")
    for choice in ("auto", "required"):
        form = form_of(LLAMA, builtins=names, choice=choice)
        for text in (CALL, TWO, SEARCH, "import this\nprint(1)"):
            assert admitted(LLAMA, form, TAG + text), text
        for text in ('{"name": "get_weather", "parameters": {}}', '{"x": 1}', ""):
            assert not admitted(LLAMA, form, TAG + text), text
    assert admitted(LLAMA, form_of(LLAMA), f"I look. {TAG}{CALL}")
    assert not admitted(LLAMA, form_of(LLAMA, parallel=False), TAG + TWO)
    search = form_of(LLAMA, builtins=names, choice="brave_search")
    assert admitted(LLAMA, search, TAG + SEARCH)
    for text in (SEARCH, TAG + CALL, TAG + "import this", TAG + "brave_search.call(x)"):
        assert not admitted(LLAMA, search, text), text
    run = form_of(LLAMA, builtins=names, choice="code_interpreter")
    assert admitted(LLAMA, run, TAG + "print(1)")
    assert not admitted(LLAMA, run, "print(1)")


def test_built_in_tools_without_the_tag() -> None:
    form = form_of(OTHER, builtins=["brave_search"])
    for text in ("Hello", SEARCH, f"Let me see: {SEARCH}"):
        assert admitted(OTHER, form, text), text
    assert not admitted(OTHER, form, "brave_search.call(query=who)")
    forced = form_of(OTHER, builtins=["brave_search"], choice="brave_search")
    assert admitted(OTHER, forced, SEARCH)
    assert not admitted(OTHER, forced, CALL)


def test_nothing_is_offered() -> None:
    assert answer_grammar(AnswerForm()) is None
    assert answer_grammar(form_of(LLAMA, choice="none")) is None
    form = form_of(LLAMA, choice="none", schema=PERSON)
    assert admitted(LLAMA, form, '{"name": "Bob"}')
    assert not admitted(LLAMA, form, CALL)


def test_schemas_that_cannot_be_enforced() -> None:
    odd = Tool("odd", "", {"type": "object", "properties": {"x": {"uniqueItems": True}}})
    loose: set[str] = set()
    form = AnswerForm([odd, GET], loose=loose)
    assert admitted(OTHER, form, '{"name": "odd", "parameters": {"anything": [1, 1]}}')
    assert not admitted(OTHER, form, '{"name": "get", "parameters": {"anything": 1}}')
    assert loose == {"odd"}
    for choice, strict in (("auto", ["odd"]), ("required", []), ("odd", [])):
        with pytest.raises(UserError, match=r"tools\['odd'\]\.parameters: .*uniqueItems"):
            answer_grammar(AnswerForm([odd, GET], choice=choice), strict)
    loose.clear()
    answer_grammar(AnswerForm([odd, GET], choice="get", loose=loose), ["get"])
    assert loose == {"odd"}
    with pytest.raises(UserError, match="uniqueItems"):
        answer_grammar(AnswerForm([GET], schema={"uniqueItems": True}))


def walk(vocabulary: Tokenizer, form: AnswerForm, rng: random.Random) -> ReplyText:
    """An answer at random, as far as the grammar lets it; ends are likely where they may come."""
    grammar = answer_grammar(form)
    assert grammar is not None
    matcher = MATCHERS[vocabulary].matcher(grammar)
    reply = ReplyText(vocabulary, (), [tool.name for tool in form.tools], form.builtins)
    likely = [id for text in '"}{:,<n' for id in vocabulary.encode(text)]
    likely += [i for t, i in vocabulary.special_ids.items() if t == TAG]
    for _ in range(400):
        [mask] = matcher.masks([])
        assert mask is not None
        allowed = [i for i in range(vocabulary.vocab_size) if mask[i // 8] >> i % 8 & 1]
        assert allowed, "there is always a way on"
        stops = [id for id in allowed if id in vocabulary.stop_ids]
        shorter = [id for id in allowed if id in likely]
        if stops and (rng.random() < 0.2 or len(stops) == len(allowed)):
            break
        token = rng.choice(shorter if shorter and rng.random() < 0.7 else allowed)
        matcher.advance(token)
        if token in vocabulary.stop_ids:
            break
        reply.feed(token)
    reply.finish()
    return reply


@BOTH
@pytest.mark.parametrize(
    "form",
    [
        {}, {"parallel": False}, {"choice": "required"},
        {"choice": "required", "parallel": False}, {"choice": "tree"}, {"schema": PERSON},
        {"builtins": ("brave_search",), "choice": "required"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_admitted_is_read(vocabulary: Tokenizer, form: dict[str, Any]) -> None:
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    called = 0
    for seed in range(15):
        made = form_of(vocabulary, **form)
        reply = walk(vocabulary, made, random.Random(seed))
        called += len(reply.calls)
        for call in reply.calls:
            if call.name == "brave_search":
                assert isinstance(call.arguments["query"], str)
            else:
                jsonschema.validate(call.arguments, schemas[call.name])
        if not form.get("parallel", True):
            assert len(reply.calls) <= 1
        if form.get("choice") == "tree":
            assert {call.name for call in reply.calls} <= {"tree"}
        if form.get("schema") and not reply.calls:
            text = "".join(getattr(event, "text", "") for event in reply.events)
            if text.endswith("}"):
                jsonschema.validate(json.loads(text), PERSON)
    assert called or "choice" not in form
