"""The native Llama 3.1 format: structure, masks, tools, and what no user text can do."""

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import ADD, CHATML_SPECIALS, LLAMA_SPECIALS, WEATHER, ByteTokenizer
from pronk.core.errors import UserError
from pronk.text.chat import Llama31Format, Rendered, Style, chat_format_for, english_date
from pronk.text.messages import Message, ToolCall
from pronk.text.template import JinjaFormat
from pronk.text.tools import Tool, ToolFormat, tools_from_dicts

TOKENIZER = ByteTokenizer()
TOOLS = tools_from_dicts([WEATHER, ADD])
USER = Message("user", "Hi")


def shown(rendered: Rendered) -> str:
    return TOKENIZER.decode(rendered.ids)


def written(rendered: Rendered) -> str:
    """What the mask says the assistant wrote."""
    pairs = zip(rendered.ids, rendered.assistant_mask, strict=True)
    return TOKENIZER.decode(id for id, mine in pairs if mine)


def turn(role: str, text: str, end: str = "<|eot_id|>") -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}{end}"


def assistant(*calls: ToolCall, text: str = "") -> Message:
    return Message("assistant", text, calls)


OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"
BOS = "<|begin_of_text|>"


@pytest.mark.parametrize("style", ["meta", "hf"])
def test_dialog_and_mask(style: Style) -> None:
    messages = [Message("system", "Be brief."), USER, assistant(text="Hello"), USER]
    rendered = Llama31Format(TOKENIZER, style=style).render(messages)
    preamble = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    assert shown(rendered) == (
        BOS
        + turn("system", ("" if style == "meta" else preamble) + "Be brief.")
        + turn("user", "Hi")
        + turn("assistant", "Hello")
        + turn("user", "Hi")
        + OPEN
    )
    assert written(rendered) == "Hello<|eot_id|>"
    closed = Llama31Format(TOKENIZER, style=style).render(messages, add_generation_prompt=False)
    assert shown(closed) + OPEN == shown(rendered)


def test_contents_are_verbatim_in_meta_and_trimmed_in_hf() -> None:
    messages = [Message("system", " s "), Message("user", "\n u "), assistant(text=" a ")]
    meta = shown(Llama31Format(TOKENIZER).render(messages, add_generation_prompt=False))
    assert meta == BOS + turn("system", " s ") + turn("user", "\n u ") + turn("assistant", " a ")
    hf = shown(Llama31Format(TOKENIZER, style="hf").render(messages, date="D"))
    assert "Today Date: D\n\ns<|eot_id|>" in hf
    assert turn("user", "u") + turn("assistant", "a") in hf


SPECIAL_TEXT = st.lists(
    st.sampled_from([*LLAMA_SPECIALS, "<|", "eot_id", "|>", "x", " ", "\n", "é"]), max_size=8
).map("".join)


@settings(max_examples=100, deadline=None)
@given(SPECIAL_TEXT, SPECIAL_TEXT, SPECIAL_TEXT, st.sampled_from(["meta", "hf"]))
def test_no_text_becomes_a_special_token(system: str, user: str, result: str, style: Style) -> None:
    call = ToolCall("get_weather", {"city": user})
    messages = [
        Message("system", system),
        Message("user", user),
        assistant(call),
        Message("tool", result),
    ]
    tool = Tool("get_weather", user, {"type": "object", "properties": {"city": {"title": system}}})
    rendered = Llama31Format(TOKENIZER, style=style).render(messages, tools=[tool])
    plain = Llama31Format(TOKENIZER, style=style).render(
        [Message("system", "s"), USER, assistant(ToolCall("get_weather", {})), Message("tool", "")],
        tools=[Tool("get_weather")],
    )
    specials = [[id for id in r.ids if TOKENIZER.is_special(id)] for r in (rendered, plain)]
    assert specials[0] == specials[1]
    assert specials[0].count(TOKENIZER.special_ids[BOS]) == 1


@pytest.mark.parametrize(
    ("tool_format", "tools", "builtins", "date", "system"),
    [
        ("json", [], [], "D", "Cutting Knowledge Date: December 2023\nToday Date: D\n\nS\n"),
        (
            "json",
            [],
            ["brave_search", "code_interpreter", "wolfram_alpha"],
            "D",
            "Environment: ipython\nTools: brave_search, wolfram_alpha\n"
            "Cutting Knowledge Date: December 2023\nToday Date: D\n\nS\n",
        ),
        (
            "json",
            [],
            ["code_interpreter"],
            "D",
            "Environment: ipython\n\nCutting Knowledge Date: December 2023\nToday Date: D\n\nS\n",
        ),
        (
            "json",
            TOOLS,
            [],
            "D",
            "Environment: ipython\n\nCutting Knowledge Date: December 2023\nToday Date: D\n\nS\n",
        ),
        ("function_tag", TOOLS, [], None, "Environment: ipython\n\nS\n"),
        ("json", [], ["brave_search"], None, "Environment: ipython\nTools: brave_search\n\nS\n"),
        ("json", [], [], None, "S"),
    ],
)
def test_system_text_of_meta(
    tool_format: ToolFormat, tools: list[Tool], builtins: list[str], date: str | None, system: str
) -> None:
    rendered = Llama31Format(TOKENIZER, tool_format).render(
        [Message("system", "S"), USER], tools=tools, builtin_tools=builtins, date=date
    )
    assert shown(rendered).startswith(BOS + turn("system", system))
    assert shown(rendered).endswith(turn("user", "Hi") + OPEN)
    assert shown(rendered).count("<|start_header_id|>user") == (2 if tools else 1)


def test_system_message_only_where_one_is_needed() -> None:
    format = Llama31Format(TOKENIZER)
    assert shown(format.render([USER])) == BOS + turn("user", "Hi") + OPEN
    assert shown(format.render([Message("system", ""), USER])).startswith(BOS + turn("system", ""))
    assert "Environment: ipython\n<|eot_id|>" in shown(format.render([USER], tools=TOOLS))


def test_pythonic_tools_are_in_the_system_text() -> None:
    format = Llama31Format(TOKENIZER, "pythonic")
    text = shown(format.render([Message("system", "S"), USER], tools=TOOLS))
    assert text.startswith(BOS + "<|start_header_id|>system<|end_header_id|>\n\nYou are an expert")
    assert text.endswith("]\n\nS<|eot_id|>" + turn("user", "Hi") + OPEN)
    assert "ipython" not in text


@pytest.mark.parametrize("style", ["meta", "hf"])
def test_tools_in_the_system_message(style: Style) -> None:
    format = Llama31Format(TOKENIZER, style=style, tools_in_user_message=False)
    text = shown(format.render([Message("system", "S"), USER], tools=TOOLS))
    system, rest = text.split("<|eot_id|>", 1)
    assert '"name": "get_weather"' in system
    assert system.strip().endswith("S")
    assert rest == turn("user", "Hi") + OPEN


def test_tools_of_hf_are_in_the_first_user_message() -> None:
    format = Llama31Format(TOKENIZER, style="hf")
    text = shown(format.render([assistant(text="Yes?"), USER, USER], tools=TOOLS))
    assert turn("assistant", "Yes?") + "<|start_header_id|>user<|end_header_id|>\n\nGiven" in text
    assert text.endswith("}\n\nHi<|eot_id|>" + turn("user", "Hi") + OPEN)
    with pytest.raises(UserError, match="tools are offered in the first user message"):
        format.render([Message("system", "S")], tools=TOOLS)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("required", "You MUST use one of the provided functions/tools to answer the user query."),
        ("add", "You MUST use the tool `add` to answer the user query."),
    ],
)
def test_tool_choice(choice: str, sentence: str) -> None:
    for style in ("meta", "hf"):
        format = Llama31Format(TOKENIZER, style=style)
        text = shown(format.render([USER], tools=TOOLS, tool_choice=choice))
        assert f"\n{sentence}" in text.split("<|eot_id|>")[0]
        nothing = shown(format.render([USER], tools=TOOLS, tool_choice="none"))
        assert nothing == shown(format.render([USER]))


WEATHER_CALL = ToolCall("get_weather", {"city": "Zürich"}, "c1")
WEATHER_JSON = '{"type": "function", "name": "get_weather", "parameters": {"city": "Z\\u00fcrich"}}'
ADD_CALL = ToolCall("add", {"a": 1, "b": 2})
ADD_JSON = '{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}'
SEARCH = ToolCall("brave_search", {"query": 'a "b"'})
CODE = ToolCall("code_interpreter", {"code": 'print("x")\n'})


@pytest.mark.parametrize(
    ("tool_format", "calls", "text", "end"),
    [
        ("json", [WEATHER_CALL], "<|python_tag|>" + WEATHER_JSON, "<|eom_id|>"),
        ("json", [ADD_CALL, ADD_CALL], f"<|python_tag|>{ADD_JSON}; {ADD_JSON}", "<|eom_id|>"),
        ("function_tag", [ADD_CALL], '<function=add>{"a": 1, "b": 2}</function>', "<|eot_id|>"),
        (
            "pythonic",
            [WEATHER_CALL, ADD_CALL],
            '[get_weather(city="Zürich"), add(a=1, b=2)]',
            "<|eot_id|>",
        ),
        ("json", [SEARCH], r'<|python_tag|>brave_search.call(query="a \"b\"")', "<|eom_id|>"),
        ("pythonic", [SEARCH], r'<|python_tag|>brave_search.call(query="a \"b\"")', "<|eom_id|>"),
        ("json", [CODE], '<|python_tag|>print("x")\n', "<|eom_id|>"),
        (
            "pythonic",
            [SEARCH, ADD_CALL],
            r'<|python_tag|>brave_search.call(query="a \"b\""); [add(a=1, b=2)]',
            "<|eom_id|>",
        ),
    ],
)
def test_calls_in_the_history_of_meta(
    tool_format: ToolFormat, calls: list[Any], text: str, end: str
) -> None:
    messages = [USER, assistant(*calls, text="So."), Message("tool", ' {"t": 1} ')]
    rendered = Llama31Format(TOKENIZER, tool_format).render(messages, tools=TOOLS)
    result = turn("ipython", ' {"t": 1} ')
    assert shown(rendered).endswith(turn("assistant", "So." + text, end) + result + OPEN)
    assert written(rendered) == "So." + text + end


def test_json_calls_outside_of_an_ipython_environment() -> None:
    messages = [USER, assistant(ADD_CALL), Message("tool", "3")]
    format = Llama31Format(TOKENIZER)
    assert turn("assistant", ADD_JSON) in shown(format.render(messages))
    system = Message("system", "Environment: ipython")
    tagged = turn("assistant", "<|python_tag|>" + ADD_JSON, "<|eom_id|>")
    assert tagged in shown(format.render([system, *messages]))


@pytest.mark.parametrize(
    ("builtins", "calls", "text", "end"),
    [
        (
            [],
            [WEATHER_CALL],
            '{"name": "get_weather", "parameters": {"city": "Zürich"}}',
            "<|eot_id|>",
        ),
        (
            ["brave_search"],
            [ADD_CALL],
            '{"name": "add", "parameters": {"a": 1, "b": 2}}',
            "<|eom_id|>",
        ),
        (
            ["brave_search"],
            [SEARCH],
            r'<|python_tag|>brave_search.call(query="a \"b\"")',
            "<|eom_id|>",
        ),
        (["code_interpreter"], [CODE], '<|python_tag|>print("x")\n', "<|eom_id|>"),
        (
            [],
            [ADD_CALL, ADD_CALL],
            '{"name": "add", "parameters": {"a": 1, "b": 2}}; '
            '{"name": "add", "parameters": {"a": 1, "b": 2}}',
            "<|eot_id|>",
        ),
    ],
)
def test_calls_in_the_history_of_hf(
    builtins: list[str], calls: list[Any], text: str, end: str
) -> None:
    messages = [USER, assistant(*calls), Message("tool", "25 °C")]
    rendered = Llama31Format(TOKENIZER, style="hf").render(messages, builtin_tools=builtins)
    result = turn("ipython", '"25 °C"')
    assert shown(rendered).endswith(turn("assistant", text, end) + result + OPEN)


def test_a_custom_tool_may_have_a_built_in_name() -> None:
    mine = Tool("brave_search")
    rendered = Llama31Format(TOKENIZER).render([USER, assistant(SEARCH)], tools=[mine])
    assert '"name": "brave_search", "parameters"' in written(rendered)


def test_dates() -> None:
    day = datetime.date(2024, 9, 1)
    texts: dict[Style, str] = {"meta": "01 September 2024", "hf": "01 Sep 2024"}
    for style, text in texts.items():
        format = Llama31Format(TOKENIZER, style=style)
        assert f"Today Date: {text}\n" in shown(format.render([USER], date=day))
        assert "Today Date: soon\n" in shown(format.render([USER], date="soon"))
    assert english_date(datetime.date(2026, 12, 31), short=True) == "31 Dec 2026"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"builtin_tools": ["photogen"]}, "builtin_tools: unknown tool 'photogen'; known are"),
        (
            {"tool_choice": "sub"},
            "tool_choice: unknown 'sub'; use one of auto, none, required, get_w",
        ),
        (
            {"tools": [], "tool_choice": "required"},
            "tool_choice: 'required' needs at least one tool",
        ),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools: 'get_weather' is offered twice"),
        ({"messages": [assistant(CODE, CODE)]}, "a code_interpreter call must be the only call"),
        (
            {"messages": [assistant(ToolCall("code_interpreter", {"x": 1}))]},
            "the one argument 'code'",
        ),
    ],
)
def test_refused(change: dict[str, Any], says: str) -> None:
    options: dict[str, Any] = {"messages": [USER], "tools": TOOLS, **change}
    messages = options.pop("messages")
    with pytest.raises(UserError) as error:
        Llama31Format(TOKENIZER).render(messages, **options)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tool_format": "xml"}, "tool_format: unknown 'xml'; use json, function_tag or pythonic"),
        ({"style": "x"}, "style: unknown 'x'; use meta or hf"),
        ({"style": "hf", "tool_format": "pythonic"}, "style: 'hf' offers tools in JSON"),
        ({"style": "hf", "meta_schemas": True}, "style: 'hf' offers tools in JSON"),
    ],
)
def test_options_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Llama31Format(TOKENIZER, **options)


def test_a_token_that_the_vocabulary_lacks() -> None:
    old = ByteTokenizer([s for s in LLAMA_SPECIALS if s != "<|python_tag|>"])
    with pytest.raises(
        UserError, match=r"chat: this model's tokenizer has no <\|python_tag\|> token"
    ):
        Llama31Format(old).render([USER, assistant(CODE)])


def test_choice_of_the_format() -> None:
    llama = "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    assert isinstance(chat_format_for(TOKENIZER), Llama31Format)
    assert isinstance(chat_format_for(ByteTokenizer(chat_template=llama)), Llama31Format)
    assert isinstance(chat_format_for(ByteTokenizer(chat_template="{{ 1 }}")), JinjaFormat)
    chatml = ByteTokenizer(CHATML_SPECIALS, chat_template="{{ messages[0].content }}")
    assert isinstance(chat_format_for(chatml), JinjaFormat)
    assert chat_format_for(ByteTokenizer(CHATML_SPECIALS)) is None


@pytest.mark.parametrize(
    ("template", "native"),
    [
        ("{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>' }}", True),
        ("{% set c = '<|start_header_id|>' + message[\"role\"] %}", True),
        ("<|start_header_id|>{{- m.role }}<|end_header_id|>", True),
        ("{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>' }}", True),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nTask: is there unsafe content in the "
            "messages?\n<BEGIN UNSAFE CONTENT CATEGORIES>\n{% for m in messages %}{{ m.role }}: "
            "{{ m.content }}{% endfor %}<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
            False,
        ),
        ("{{ '<|start_header_id|>' }}", False),
    ],
)
def test_headers_of_one_role_are_another_format(template: str, native: bool) -> None:
    """Llama Guard's template writes the chat into one message."""
    chosen = chat_format_for(ByteTokenizer(chat_template=template))
    assert isinstance(chosen, Llama31Format if native else JinjaFormat)
