"""Reading the assistant's output: every form, and the same result however it arrives in pieces."""

import json
import random
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import NAMES, OUTPUTS, ByteTokenizer, cut
from pronk.text import tools as prompts
from pronk.text.messages import ToolCall
from pronk.text.parse import (
    Event,
    Reply,
    ReplyParser,
    SpecialToken,
    TextDelta,
    TokenReplyParser,
    ToolCallAbort,
    ToolCallArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
    parse_reply,
    split_specials,
)

Pieces = list[str | SpecialToken]


def events_of(pieces: Iterable[str | SpecialToken], tools: Iterable[str] | None) -> list[Event]:
    parser = ReplyParser(None if tools is None else tuple(tools))
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
    reply = parse_reply(split_specials(raw), tools=NAMES)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == calls
    assert reply.text == (raw if text == "*" else text)


@pytest.mark.parametrize(("raw", "text", "calls"), OUTPUTS, ids=range(len(OUTPUTS)))
def test_no_tools_no_calls(raw: str, text: str, calls: list[Any]) -> None:
    pieces = split_specials(raw)
    reply = parse_reply(pieces, tools=())
    assert reply == Reply("".join(p for p in pieces if isinstance(p, str)), ())


def test_any_name_without_a_list_of_tools() -> None:
    assert parse_reply('{"name": "anything", "arguments": {"x": 1}}', tools=None).tool_calls == (
        ToolCall("anything", {"x": 1}, "call_0"),
    )
    assert parse_reply("[f(a=1), g.h()]", tools=None).tool_calls == (
        ToolCall("f", {"a": 1}, "call_0"),
        ToolCall("g.h", {}, "call_1"),
    )
    pieces: Pieces = [SpecialToken("<|python_tag|>"), 'my_tool.call(query="x")']
    assert parse_reply(pieces, tools=None).tool_calls == (
        ToolCall("my_tool", {"query": "x"}, "call_0"),
    )
    assert parse_reply('people.call(query="x")', tools=None) == Reply('people.call(query="x")', ())


def test_code_needs_the_code_interpreter() -> None:
    pieces: Pieces = [SpecialToken("<|python_tag|>"), "print(1)"]
    assert parse_reply(pieces, tools=["add"]) == Reply("print(1)", ())
    assert parse_reply(pieces, tools=["code_interpreter"]).tool_calls[0].arguments == {
        "code": "print(1)"
    }


def test_call_ids() -> None:
    reply = parse_reply("[f(), f()]", tools=None, call_id=lambda i: f"id{i}")
    assert [call.id for call in reply.tool_calls] == ["id0", "id1"]


def test_python_tag_spelled_out_begins_a_call_but_never_code() -> None:
    spelled = "<|python_" + "tag|>"
    assert parse_reply(spelled + "[add(a=1)]", tools=NAMES).tool_calls[0].arguments == {"a": 1}
    explained = f"The {spelled} token marks a call: {spelled}print(1)"
    assert parse_reply(explained, tools=NAMES) == Reply(explained, ())


def test_prose_is_passed_on_at_once() -> None:
    parser = ReplyParser(NAMES)
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
    parser = ReplyParser(NAMES)
    first = Reply.of(parser.push(held)).text
    assert first != held
    assert held.startswith(first)
    assert first + Reply.of(parser.push(then)).text == held + then


def test_arguments_are_streamed_before_the_call_is_complete() -> None:
    parser = ReplyParser(NAMES)
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
    reply = parse_reply(text, tools=["get", "add"])
    if not reply.tool_calls:
        assert reply.text == text
    assert parse_reply(list(text), tools=["get", "add"]) == reply


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
        reply = parse_reply(cut(text, rng), tools=NAMES)
        assert reply == Reply("", tuple(calls)), text


def test_token_ids() -> None:
    tokenizer = ByteTokenizer()
    text = 'Grüße 🙂\n<|python_tag|>{"name": "add", "parameters": {"a": "é"}}<|eom_id|>'
    parser = TokenReplyParser(tokenizer, NAMES)
    events = [e for id in tokenizer.encode(text, special=True) for e in parser.push(id)]
    events += parser.finish()
    assert Reply.of(events) == Reply("Grüße 🙂", (ToolCall("add", {"a": "é"}, "call_0"),))
    assert "�" not in "".join(e.text for e in events if isinstance(e, TextDelta))
    cut_short = TokenReplyParser(tokenizer, NAMES)
    events = [e for id in "é".encode()[:1] for e in cut_short.push(id)]
    assert Reply.of(events + cut_short.finish()) == Reply("�", ())


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
    assert parse_reply(text, tools=NAMES) == Reply(text, ())
    assert time.perf_counter() - begun < 20  # about 1 s; quadratic would be minutes
