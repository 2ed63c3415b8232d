"""Reading the assistant's output: every form, and the same result however it arrives in pieces."""

import json
import random
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import NAMES, OUTPUTS, ByteTokenizer, cut
from pronk.text import tools as prompts
from pronk.text.events import (
    Event,
    Reply,
    SpecialToken,
    TextDelta,
    ToolCallAbort,
    ToolCallArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
)
from pronk.text.messages import ToolCall
from pronk.text.parse import ReplyParser, parse_reply, split_specials
from pronk.text.tools import BUILTIN_CALLS
from pronk.text.vocabulary import Tokenizer

Pieces = list[str | SpecialToken]


def parser_of(tools: Iterable[str] | None) -> ReplyParser:
    """A parser that counts its calls, with the built-in ones of `tools` offered as such."""
    own = None if tools is None else [name for name in tools if name not in BUILTIN_CALLS]
    known = [name for name in tools or () if name in BUILTIN_CALLS]
    return ReplyParser(own, known, call_id="call_{}".format)


def read(pieces: str | Iterable[str | SpecialToken], tools: Iterable[str] | None) -> Reply:
    return Reply.of(events_of([pieces] if isinstance(pieces, str) else pieces, tools))


def events_of(pieces: Iterable[str | SpecialToken], tools: Iterable[str] | None) -> list[Event]:
    parser = parser_of(tools)
    return [event for piece in pieces for event in parser.push(piece)] + parser.finish()


def joined(events: Iterable[Event]) -> list[Event]:
    """Events with neighbouring deltas of the same kind joined."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            out[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ToolCallArgumentsDelta) and isinstance(last, ToolCallArgumentsDelta):
            out[-1] = ToolCallArgumentsDelta(event.index, last.json + event.json)
        else:
            out.append(event)
    return out


def check_consistent(events: list[Event]) -> None:
    """What every stream of events promises."""
    argument_texts: dict[int, str] = {}
    for event in events:
        if isinstance(event, ToolCallStart):
            assert event.index == len(argument_texts)
            argument_texts[event.index] = ""
        elif isinstance(event, ToolCallArgumentsDelta):
            assert event.json
            argument_texts[event.index] += event.json
        elif isinstance(event, ToolCallEnd):
            assert json.loads(argument_texts[event.index]) == event.call.arguments
        elif isinstance(event, TextDelta):
            assert event.text
    closed = [e.index for e in events if isinstance(e, ToolCallEnd | ToolCallAbort)]
    assert closed == list(argument_texts)


@pytest.mark.parametrize(("raw", "text", "calls"), OUTPUTS, ids=range(len(OUTPUTS)))
def test_every_form(raw: str, text: str, calls: list[Any]) -> None:
    reply = read(split_specials(raw), NAMES)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == calls
    assert reply.text == (raw if text == "*" else text)


@pytest.mark.parametrize(("raw", "text", "calls"), OUTPUTS, ids=range(len(OUTPUTS)))
def test_no_tools_no_calls(raw: str, text: str, calls: list[Any]) -> None:
    pieces = split_specials(raw)
    reply = read(pieces, ())
    assert reply == Reply("".join(p for p in pieces if isinstance(p, str)), ())


def test_any_name_without_a_list_of_tools() -> None:
    assert read('{"name": "anything", "arguments": {"x": 1}}', None).tool_calls == (
        ToolCall("anything", {"x": 1}, "call_0"),
    )
    assert read("[f(a=1), g.h()]", None).tool_calls == (
        ToolCall("f", {"a": 1}, "call_0"),
        ToolCall("g.h", {}, "call_1"),
    )
    pieces: Pieces = [SpecialToken("<|python_tag|>"), 'my_tool.call(query="x")']
    assert read(pieces, None).tool_calls == (ToolCall("my_tool", {"query": "x"}, "call_0"),)
    assert read('people.call(query="x")', None) == Reply('people.call(query="x")', ())


def test_code_needs_the_code_interpreter() -> None:
    pieces: Pieces = [SpecialToken("<|python_tag|>"), "print(1)"]
    assert read(pieces, ["add"]) == Reply("print(1)", ())
    assert read(pieces, ["code_interpreter"]).tool_calls[0].arguments == {"code": "print(1)"}


def test_call_ids() -> None:
    reply = parse_reply("[f(), f()]", tools=None, call_id=lambda i: f"id{i}")
    assert [call.id for call in reply.tool_calls] == ["id0", "id1"]


def test_python_tag_spelled_out_begins_a_call_but_never_code() -> None:
    spelled = "<|python_" + "tag|>"
    assert read(spelled + "[add(a=1)]", NAMES).tool_calls[0].arguments == {"a": 1}
    explained = f"The {spelled} token marks a call: {spelled}print(1)"
    assert read(explained, NAMES) == Reply(explained, ())


def test_prose_is_passed_on_at_once() -> None:
    parser = parser_of(NAMES)
    for piece in [
        "The",
        " city",
        " of",
        " Paris",
        ",",
        " \n",
        "**bold",
        "** (x)",
        ": 3 > 2",
        " {",
        "}",
    ]:
        out = "".join(e.text for e in parser.push(piece) if isinstance(e, TextDelta))
        assert out.strip() == piece.strip() or piece in (" {", "}")
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("held", "then"),
    [
        ("Look: [ad", "vice]"),
        ("I am b", "ack"),
        ("x <func", "ional>"),
        ('{"name": "ge', 'neral"}'),
        ("```js", "x"),
        ("end. ", "More"),
    ],
)
def test_only_what_may_become_a_call_is_held(held: str, then: str) -> None:
    parser = parser_of(NAMES)
    first = Reply.of(parser.push(held)).text
    assert first != held
    assert held.startswith(first)
    assert first + Reply.of(parser.push(then)).text == held + then


def test_arguments_are_streamed_before_the_call_is_complete() -> None:
    parser = parser_of(NAMES)
    assert parser.push('{"name": "add", "parameters": {"a": "one') == [
        ToolCallStart(0, "call_0", "add"),
        ToolCallArgumentsDelta(0, '{"a": "one'),
    ]
    assert parser.push(" two") == [ToolCallArgumentsDelta(0, " two")]
    call = ToolCall("add", {"a": "one two"}, "call_0")
    assert parser.push('"}}') == [ToolCallArgumentsDelta(0, '"}'), ToolCallEnd(0, call)]
    assert parser.finish() == []


def test_a_call_that_goes_wrong_is_taken_back() -> None:
    raw = 'Wait. {"name": "add", "parameters": {"a": 1, oops'
    events = joined(events_of([raw], NAMES))
    assert events == [
        TextDelta("Wait."),
        ToolCallStart(0, "call_0", "add"),
        ToolCallArgumentsDelta(0, '{"a": 1, "oops"'),
        ToolCallAbort(0),
        TextDelta(raw[5:]),
    ]
    assert Reply.of(events) == Reply(raw, ())


def random_output(rng: random.Random) -> str:
    """An output of the corpus, several of them, or a damaged one."""
    raw = "".join(
        rng.choice(OUTPUTS)[0] + rng.choice(["", " ", "\n", "; ", "text "])
        for _ in range(rng.choice([1, 1, 1, 2, 3]))
    )
    if rng.random() < 0.4 and raw:
        at = rng.randrange(len(raw))
        damage = rng.choice(["", raw[:at], rng.choice("{}[]()<>\"'`\\,;:= \nx")])
        raw = raw[:at] + damage + raw[at + rng.randint(0, 2) :]
    return raw if rng.random() < 0.9 else raw[: rng.randrange(len(raw) + 1)]


def test_pieces_do_not_matter() -> None:
    """10,000 random outputs, each in random pieces: the same events as in one piece."""
    rng = random.Random(20240723)
    n_calls = n_aborts = 0
    for case in range(10_000):
        raw = random_output(rng)
        tools = rng.choice([NAMES, NAMES, None, ("add", "get_weather")])
        whole = split_specials(raw)
        pieces: Pieces = []
        for part in whole:
            pieces += cut(part, rng) if isinstance(part, str) else [part]
        expected = joined(events_of(whole, tools))
        events = events_of(pieces, tools)
        assert joined(events) == expected, (case, raw, pieces)
        check_consistent(events)
        n_calls += sum(isinstance(event, ToolCallEnd) for event in events)
        n_aborts += sum(isinstance(event, ToolCallAbort) for event in events)
    assert n_calls > 5_000
    assert n_aborts > 500


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("{}[]()<>=\"'`\\,;:. \nabgetd_1|/é"), max_size=60))
def test_text_without_a_call_is_kept_to_the_letter(text: str) -> None:
    reply = read(text, ["get", "add"])
    if not reply.tool_calls:
        assert reply.text == text
    assert read(list(text), ["get", "add"]) == reply


ARGUMENTS = st.dictionaries(
    st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(ARGUMENTS, st.integers(0, 2**32))
def test_written_calls_are_read_back(arguments: Any, seed: int) -> None:
    """What tools.py writes for the history is what this reads, in every format."""
    rng = random.Random(seed)
    calls = [ToolCall("add", arguments, "call_0"), ToolCall("get_time", {}, "call_1")]
    texts = [
        "; ".join(map(prompts.json_call, calls)),
        "\n".join(map(prompts.hf_json_call, calls)),
        "".join(map(prompts.function_tag_call, calls)),
        "[" + ", ".join(map(prompts.pythonic_call, calls)) + "]",
        "; ".join(map(prompts.builtin_call, calls)),
    ]
    for text in texts:
        reply = read(cut(text, rng), NAMES)
        assert reply == Reply("", tuple(calls)), text


def pieces_of(tokenizer: Tokenizer, ids: Iterable[int]) -> Pieces:
    """Token ids as they reach the parser."""
    stream, pieces = tokenizer.stream(), []
    texts = {id: text for text, id in tokenizer.special_ids.items()}
    for id in ids:
        pieces += [stream.push(id)]
        pieces += [SpecialToken(texts[id])] if id in texts else []
    return [*pieces, stream.flush()]


def test_token_ids() -> None:
    tokenizer = ByteTokenizer()
    text = 'Grüße 🙂\n<|python_tag|>{"name": "add", "parameters": {"a": "é"}}<|eom_id|>'
    events = events_of(pieces_of(tokenizer, tokenizer.encode(text, special=True)), NAMES)
    assert Reply.of(events) == Reply("Grüße 🙂", (ToolCall("add", {"a": "é"}, "call_0"),))
    assert "�" not in "".join(e.text for e in events if isinstance(e, TextDelta))
    assert read(pieces_of(tokenizer, "é".encode()[:1]), NAMES) == Reply("�", ())


def test_arguments_of_own_tools_keep_their_names() -> None:
    """Only built-in tools that were offered have one known argument."""
    text = '{"name": "photogen", "parameters": {"prompt": "a cat"}}'
    own = parse_reply(text, tools=["photogen"])
    assert [call.arguments for call in own.tool_calls] == [{"prompt": "a cat"}]
    known = parse_reply(text, tools=["add"], builtins=["photogen"])
    assert [call.arguments for call in known.tool_calls] == [{"query": "a cat"}]
    code: Pieces = [SpecialToken("<|python_tag|>"), "print(1)"]
    assert parse_reply(code, tools=["code_interpreter"]) == Reply("print(1)", ())


def test_call_ids_are_random_and_told_once() -> None:
    first, second = (parse_reply("[f(), f()]", tools=["f"]).tool_calls for _ in range(2))
    ids = [call.id for call in (*first, *second)]
    assert len(set(ids)) == 4
    assert all(re.fullmatch("call_[0-9a-f]{24}", id or "") for id in ids)
    parser = ReplyParser(["f"])
    events = parser.push('{"name": "f"}') + parser.finish()
    started, ended = events[0], events[-1]
    assert isinstance(started, ToolCallStart)
    assert isinstance(ended, ToolCallEnd)
    assert started.id == ended.call.id


@pytest.mark.parametrize(
    "code",
    [
        "add(x=data)\nprint(1)",
        "add(x=1)\nprint(1)",
        "add(x=1); add(x=2)\nadd",
        "[add(x=1)]\nprint(1)",
        "[add(x=1), other(y=2)]",
        "add.call(x=1).result",
    ],
)
def test_code_that_begins_like_a_call_is_code(code: str) -> None:
    pieces: Pieces = [SpecialToken("<|python_tag|>"), *code]
    expected = (ToolCall("code_interpreter", {"code": code}, "call_0"),)
    events = events_of(pieces, NAMES)
    check_consistent(events)
    assert Reply.of(events) == Reply("", expected)


@pytest.mark.parametrize("text", ['{"name": "ad', '{"name": "add", "par', '[{"name": "ad', "<func"])
def test_a_call_cut_off_is_no_code(text: str) -> None:
    assert read([SpecialToken("<|python_tag|>"), text], NAMES) == Reply(text, ())


@pytest.mark.parametrize(
    "text",
    [
        'Config: {"steps": [{"name": "add", "arguments": {}}], "n": 2}',
        'Config: {"steps": [{"name": "add", "arguments": {}}], "n": ',
        '```json\n{"steps": [{"name": "add", "arguments": {}}], "n": 2}\n```',
        '{"n": "a \\"b\\" }", "add": {"name": "add"}}',
        "[add(a=1), unknown(b=2)]",
        '[add(a={"name": "add"}), unknown(b={"name": "add"})]',
        '[{"name": "add", "arguments": {}}, {"name": "unknown", "arguments": {}}]',
        '[{"name": "add", "arguments": {}}, 3]',
    ],
)
def test_a_call_inside_other_data_is_data(text: str) -> None:
    for pieces in ([text], list(text)):
        assert events_of(pieces, NAMES) != []
        assert read(pieces, NAMES) == Reply(text, ())
    assert len(read(text + ' done {"name": "add"}', NAMES).tool_calls) == 1


@pytest.mark.parametrize("prose", ['{"foo bar" he said. ', "[see: this ", "{x then ", "[1] and "])
def test_brackets_in_prose_hide_no_call(prose: str) -> None:
    reply = read(prose + '{"name": "add"}', NAMES)
    assert reply == Reply(prose.strip(), (ToolCall("add", {}, "call_0"),))


@pytest.mark.parametrize("fence", ["```JSON", "````json", "```Tool_Call", "`````"])
def test_fences(fence: str) -> None:
    ticks = fence.rstrip("abcdefghijklmnopqrstuvwxyzJSONTC_")
    reply = read(f'{fence}\n{{"name": "add"}}\n{ticks}\nDone', NAMES)
    assert reply == Reply("Done", (ToolCall("add", {}, "call_0"),))


@pytest.mark.parametrize(
    "text",
    [
        "{" * 30_000,
        '{"name": "add", "parameters": ' + '{"a": ' * 30_000,
        "[" * 30_000,
        '{"parameters": {"a": "' + "x " * 100_000,
        "add.call(" * 20_000,
        "a" * 300_000,
        '{"name": "add", "parameters": {"a": ' + "9" * 100_000,
        "`" * 30_000,
    ],
    ids=range(8),
)
def test_hostile_output_takes_no_quadratic_time(text: str) -> None:
    begun = time.perf_counter()
    assert read(text, NAMES) == Reply(text, ())
    assert time.perf_counter() - begun < 20  # about 1 s; quadratic would be minutes
