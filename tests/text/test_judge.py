"""Calls in forms that the grammar does not hold: told as a whole if they fit, else text."""

import json
from pathlib import Path

import pytest

from chat_samples import CHATML_SPECIALS, ByteTokenizer
from engine.tiny_models import write_gguf
from pronk import LLM
from pronk.engine.replies import ReplyText
from pronk.text.calling import CallJudge, in_order
from pronk.text.events import ToolCallAbort, ToolCallArgumentsDelta, ToolCallStart
from pronk.text.grammar import Matchers
from pronk.text.tools import tools_from_dicts

TOOLS = tools_from_dicts(
    [
        {
            "type": "function",
            "function": {
                "name": "get",
                "parameters": {
                    "type": "object",
                    "properties": {"n": {"type": "integer"}, "word": {"type": "string"}},
                    "required": ["n"],
                },
            },
        }
    ]
)
HELD = ['{"name": "get", "parameters": %s}', '{"type": "function", "name": "get", "arguments": %s}',
        "<function=get>%s</function>", 'Well: {"name":"get","parameters":%s} then']  # fmt: skip
LOOSE = ['{"parameters": %s, "name": "get"}', '{"function": "get", "parameters": %s}',
         '{"type": "function", "function": {"name": "get", "arguments": %s}}',
         '{"name":\t"get", "parameters": %s}', '{"id": "1", "name": "get", "arguments": %s}',
         "<function=get%s</function>", '[{"name": "get", "parameters": %s}]']  # fmt: skip
PYTHONIC = ["[get(n=%s)]", "get.call(n=%s)", "{'name': 'get', 'parameters': {'n': %s}}"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> CallJudge:
    path = write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with LLM(path, backend="reference") as llm:
        return CallJudge(TOOLS, Matchers(llm.tokenizer))


def read(judge: CallJudge, text: str) -> ReplyText:
    tokenizer = ByteTokenizer(CHATML_SPECIALS, eos_id=258)
    reply = ReplyText(tokenizer, (), ["get"], judge=judge)
    for token in tokenizer.encode(text):
        reply.feed(token)
    reply.finish()
    return reply


def text_of(reply: ReplyText) -> str:
    return "".join(getattr(event, "text", "") for event in reply.events)


@pytest.mark.parametrize("form", HELD)
def test_what_the_grammar_holds_is_told_as_it_comes(judge: CallJudge, form: str) -> None:
    reply = read(judge, form % '{"n": 12345, "word": "abc"}')
    deltas = [e.json for e in reply.events if isinstance(e, ToolCallArgumentsDelta)]
    assert len(deltas) > 3
    assert json.loads("".join(deltas)) == {"n": 12345, "word": "abc"}
    assert [call.arguments for call in reply.calls] == [{"n": 12345, "word": "abc"}]


@pytest.mark.parametrize("form", LOOSE)
@pytest.mark.parametrize("arguments", ['{"n": 7}', '{"word": "x", "n": 7}', '{"n": 7, "more": 1}'])
def test_other_forms_are_told_whole_if_they_fit(
    judge: CallJudge, form: str, arguments: str
) -> None:
    reply = read(judge, form % arguments)
    assert [call.arguments for call in reply.calls] == [json.loads(arguments)]
    starts = [i for i, e in enumerate(reply.events) if isinstance(e, ToolCallStart)]
    assert len(starts) == 1
    assert isinstance(reply.events[starts[0] + 1], ToolCallArgumentsDelta)


@pytest.mark.parametrize("form", LOOSE)
@pytest.mark.parametrize("arguments", ['{"n": "no"}', "{}", '{"n": 7, "word": 1}', '{"n": '])
def test_other_forms_are_text_if_they_do_not_fit(
    judge: CallJudge, form: str, arguments: str
) -> None:
    reply = read(judge, form % arguments)
    assert not reply.calls
    assert not any(isinstance(e, ToolCallStart | ToolCallAbort) for e in reply.events)
    assert text_of(reply) == form % arguments


@pytest.mark.parametrize("form", PYTHONIC)
def test_pythonic_forms(judge: CallJudge, form: str) -> None:
    assert [call.arguments for call in read(judge, form % 7).calls] == [{"n": 7}]
    reply = read(judge, form % '"no"')
    assert not reply.calls
    assert text_of(reply) == form % '"no"'


def test_a_call_without_needed_arguments_is_text(judge: CallJudge) -> None:
    assert text_of(read(judge, '{"name": "get"}')) == '{"name": "get"}'


def test_names_are_put_in_the_order_of_the_schema() -> None:
    inner = {"properties": {"x": {}, "y": {}}}
    schema = {"properties": {"a": inner, "b": {"items": inner}}}
    value = {"c": 1, "b": [{"y": 1, "x": 2}], "a": {"y": 3, "z": 4, "x": 5}}
    found = in_order(value, schema)
    assert found == value
    assert json.dumps(found) == ('{"a": {"x": 5, "y": 3, "z": 4}, "b": [{"x": 2, "y": 1}], "c": 1}')
    assert in_order(value, True) is value


def test_only_offered_names_are_judged(judge: CallJudge, tmp_path: Path) -> None:
    assert not judge.enforced("other", '{"name": "other", "parameters": ')
    assert judge.admits("brave_search", {"query": 1})
