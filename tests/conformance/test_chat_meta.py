"""The native format and the parser against Meta's code and documents (`llama-models`).

Compared are Meta's `ChatFormat` on random dialogs, every prompt that Meta's documents print, and
Meta's own tests, run on our functions through thin adapters. What is deliberately not copied:

- Meta's code leaves out `<|python_tag|>` in the history of all calls but code; its documents and
  its models write it for built-in and (under "Environment: ipython") JSON calls.
- It puts the text of a message with a code call behind the tag, where it would be code.
- Quotes in built-in and pythonic arguments are not escaped there; nested pythonic objects are
  `{k="v"}`; several calls are glued together.
- `<function=...>` arguments are cut at the first "}" and apostrophes in them become quotes; JSON
  calls without "parameters" raise KeyError; of several calls only the first is read.
- The 3.2 document writes one past pythonic call with a python tag, which the answers that it shows
  do not have.
- The types in Meta's JSON listing of parameters are all "object" (`meta_schemas=True` copies it).
"""

import importlib.util
import random
import re
import unittest
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pronk.text.chat import Llama31Format
from pronk.text.messages import Message, ToolCall
from pronk.text.parse import parse_reply, split_specials
from pronk.text.tokenizer import tokenizer_from_meta
from pronk.text.tools import Tool, ToolFormat

meta_format = pytest.importorskip("llama_models.llama3.chat_format")
meta_types = pytest.importorskip("llama_models.datatypes")
PACKAGE = Path(meta_format.__file__).parents[1]
TOKENIZER = tokenizer_from_meta(PACKAGE / "llama3/tokenizer.model")
PYTHON_TAG = TOKENIZER.special_ids["<|python_tag|>"]


@pytest.fixture(scope="module")
def theirs() -> Any:
    from llama_models.llama3.tokenizer import Tokenizer

    return meta_format.ChatFormat(Tokenizer.get_instance())


# --- random dialogs against ChatFormat ----------------------------------------------------------

WORDS = ["Hello", " world", "\n", "\n\n", "  ", "\t", "é", "日本語", "🙂", "123456", "'s", ".", " ",
         "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", '{"a": 1}',
         "def f(x):\n    return x"]  # fmt: skip
META_FORMATS = {"json": "json", "function_tag": "function_tag", "pythonic": "python_list"}


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, 12)))


def random_call(rng: random.Random) -> ToolCall:
    """A call that Meta's encoders can write."""
    if rng.random() < 0.4:
        name = rng.choice(["brave_search", "wolfram_alpha", "photogen"])
        return ToolCall(name, {"query": rng.choice(["what's é?", "", "a, b (c)"])})
    values = ["x y", "日本", 1, -2.5, True, None, [1, "a"]]
    keys = rng.sample(["city", "unit", "n"], rng.randint(0, 3))
    return ToolCall("get_weather", {key: rng.choice(values) for key in keys})


def random_dialog(rng: random.Random) -> list[Message]:
    messages = [Message("system", random_text(rng))] if rng.random() < 0.6 else []
    for _ in range(rng.randint(1, 4)):
        messages.append(Message("user", random_text(rng)))
        kind = rng.random()
        if kind < 0.3:
            messages.append(Message("assistant", random_text(rng), (random_call(rng),)))
            messages.append(Message("tool", random_text(rng)))
        elif kind < 0.5:
            code = ToolCall("code_interpreter", {"code": random_text(rng)})
            messages.append(Message("assistant", "", (code,)))
            messages.append(Message("tool", random_text(rng)))
        messages.append(Message("assistant", random_text(rng)))
    return messages[: rng.randint(1, len(messages))]


def to_meta(message: Message) -> Any:
    """Meta's message; calls of built-in tools end the message, others (without an ipython
    environment) the turn."""
    calls = [
        meta_types.ToolCall(call_id="", tool_name=call.name, arguments=call.arguments)
        for call in message.tool_calls
    ]
    builtin = any(isinstance(call.tool_name, meta_types.BuiltinTool) for call in calls)
    reason = meta_types.StopReason("end_of_message" if builtin else "end_of_turn")
    return meta_types.RawMessage(
        role=message.role, content=message.content, tool_calls=calls, stop_reason=reason
    )


def without_tag(ids: list[int]) -> list[int]:
    return [id for id in ids if id != PYTHON_TAG]


@pytest.mark.parametrize("tool_format", META_FORMATS)
def test_random_dialogs(theirs: Any, tool_format: ToolFormat) -> None:
    rng = random.Random(31)
    n_calls = 0
    for _ in range(400):
        dialog = random_dialog(rng)
        rendered = Llama31Format(TOKENIZER, tool_format).render(dialog)
        expected = theirs.encode_dialog_prompt(
            [to_meta(message) for message in dialog],
            meta_types.ToolPromptFormat(META_FORMATS[tool_format]),
        ).tokens
        assert without_tag(rendered.ids) == without_tag(expected), dialog
        calls = [call for message in dialog for call in message.tool_calls]
        if all(call.name in ("code_interpreter", "get_weather") for call in calls):
            assert rendered.ids == expected, dialog  # the tag too
        n_calls += len(calls)
    assert n_calls > 200


# --- the prompts printed in Meta's documents ----------------------------------------------------


def documented(name: str, heading: str) -> str:
    """The prompt that a document prints under a heading, without the empty lines behind it."""
    text = (PACKAGE / name).read_text().split(f"\n## {heading}\n", 1)[1]
    prompt = text.split("##### Input Prompt Format\n```\n", 1)[1].split("\n```\n", 1)[0]
    return re.sub(r"(<\|end_header_id\|>\n\n)\n*\Z", r"\1", prompt)


USER_31 = Message("user", "Use tools to get latest trending songs")
SYSTEM_31 = Message("system", "You are a helpful assistant.")
SONGS = Tool("trending_songs", "Returns the trending songs on a Music site", {
    "type": "object",
    "properties": {
        "n": {"type": "int", "description": "The number of songs to return"},
        "genre": {"type": "str", "description": "The genre of the songs to return"},
    },
    "required": ["n"],
})  # fmt: skip
WEATHER = Tool("get_weather", "Get weather info for places", {
    "type": "object",
    "properties": {
        "city": {
            "type": "string", "description": "The name of the city to get the weather for",
        },
        "metric": {
            "type": "string",
            "description": "The metric for weather. Options are: celsius, fahrenheit",
            "default": "celsius",
        },
    },
    "required": ["city"],
})  # fmt: skip
SF = ToolCall("get_weather", {"city": "San Francisco", "metric": "celsius"})
DOC_31, DOC_32 = "llama3_1/prompt_format.md", "llama3_2/text_prompt_format.md"

DOCUMENTED: list[tuple[str, str, ToolFormat, list[Message], dict[str, Any]]] = [
    (DOC_31, "User and assistant conversation", "json", [
        Message("system", "You are a helpful assistant"),
        Message("user", "Answer who are you in the form of jeopardy?"),
    ], {}),
    (DOC_31, "Builtin Tool Calling", "json", [
        SYSTEM_31, Message("user", "Search the web for the latest price of 1oz gold?"),
    ], {"builtin_tools": ["brave_search", "wolfram_alpha"]}),
    (DOC_31, "Builtin Code Interpreter", "json", [
        Message("system", "Environment: ipython"),
        Message("user", "Write code to check if number is prime, use that to see if the number 7 is"
                " prime"),
    ], {"date": None}),
    (DOC_31, "JSON based tool calling", "json", [SYSTEM_31, USER_31], {"tools": [SONGS]}),
    (DOC_31, "`<function>` based tool calling", "function_tag", [SYSTEM_31, USER_31],
     {"tools": [SONGS]}),
    (DOC_32, "Zero shot function calling", "pythonic", [
        Message("user", "What is the weather in SF and Seattle?"),
    ], {"tools": [WEATHER], "date": None}),
    (DOC_32, "Code Interpreter", "json", [
        Message("user", "Write code to check if number is prime. Use it to verify if number 7 is"
                " prime"),
    ], {"builtin_tools": ["code_interpreter"], "date": "24 September 2024"}),
    (DOC_32, "Zero shot function calling E2E format", "pythonic", [
        Message("user", "What is the weather in SF?"),
        Message("assistant", "", (SF,)),
        Message("tool", '"25 C"'),
    ], {"tools": [WEATHER], "date": None}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "heading", "tool_format", "messages", "options"),
    DOCUMENTED,
    ids=[case[1] for case in DOCUMENTED],
)
def test_documented_prompts(
    document: str, heading: str, tool_format: ToolFormat, messages: Any, options: dict[str, Any]
) -> None:
    date = None if heading.startswith("User") else "21 September 2024"
    format = Llama31Format(TOKENIZER, tool_format, meta_schemas=tool_format == "json")
    rendered = format.render(messages, **({"date": date} | options))
    expected = documented(document, heading)
    if heading.endswith("E2E format"):
        expected = expected.replace("<|python_tag|>[", "[")
    assert TOKENIZER.decode(rendered.ids) == expected
    assert rendered.ids == TOKENIZER.encode(expected, special=True)


def test_documented_history_of_a_built_in_tool() -> None:
    expected = documented(DOC_31, "Built-in tools full interaction")
    result = expected.split("ipython<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]
    rendered = Llama31Format(TOKENIZER).render(
        [
            Message("system", "Environment: ipython\nTools: brave_search, wolfram_alpha\n"),
            Message("user", "What is the 100th decimal of pi?"),
            Message(
                "assistant", "", (ToolCall("wolfram_alpha", {"query": "100th decimal of pi"}),)
            ),
            Message("tool", result),
        ]
    )
    # By text: the result begins with a newline, which as in ChatFormat does not merge with the
    # header's.
    assert TOKENIZER.decode(rendered.ids) == expected
    written = [id for id, mine in zip(rendered.ids, rendered.assistant_mask, strict=True) if mine]
    assert TOKENIZER.decode(written) == (
        '<|python_tag|>wolfram_alpha.call(query="100th decimal of pi")<|eom_id|>'
    )


ANSWERS = {
    (DOC_31, "Builtin Tool Calling"): ("brave_search", {"query": "latest price of 1oz gold"}),
    (DOC_31, "JSON based tool calling"): ("trending_songs", {"n": "10", "genre": "all"}),
    (DOC_31, "`<function>` based tool calling"): ("trending_songs", {"n": 10}),
    (DOC_32, "Zero shot function calling with user message"): (
        "get_user_info",
        {"user_id": 7890, "special": "black"},
    ),
}


@pytest.mark.parametrize(("where", "call"), ANSWERS.items(), ids=[name for _, name in ANSWERS])
def test_documented_answers(where: tuple[str, str], call: tuple[str, dict[str, Any]]) -> None:
    text = (PACKAGE / where[0]).read_text().split(f"\n## {where[1]}\n", 1)[1]
    answer = text.split("##### Model Response Format\n```\n", 1)[1].split("\n```\n", 1)[0]
    reply = parse_reply(split_specials(answer), tools=None)
    assert reply.text == ""
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [call]


# --- Meta's own tests on our code ---------------------------------------------------------------


def calls_in(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """The calls in a text that holds nothing else."""
    reply = parse_reply(split_specials(text), tools=None)
    calls = [(call.name, call.arguments) for call in reply.tool_calls]
    return calls if calls and not reply.text else None


class OurToolUtils:
    @staticmethod
    def maybe_extract_custom_tool_call(text: str) -> tuple[str, dict[str, Any]] | None:
        calls = calls_in(text)
        return calls[0] if calls else None


class OurTokenizer:
    """The interface of Meta's tokenizer that its tests use."""

    special_tokens = TOKENIZER.special_ids

    @staticmethod
    def get_instance() -> "OurTokenizer":
        return OurTokenizer()

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        return TOKENIZER.encode(text, bos=bos, eos=eos)

    def decode(self, ids: list[int]) -> str:
        return TOKENIZER.decode(ids)


class OurChatFormat:
    """The interface of Meta's ChatFormat that its tests use."""

    def __init__(self, tokenizer: object) -> None:
        self.format = Llama31Format(TOKENIZER)

    def encode_dialog_prompt(self, messages: list[Any]) -> SimpleNamespace:
        ours = [Message(message.role, message.content) for message in messages]
        return SimpleNamespace(tokens=self.format.render(ours).ids)

    def encode_message(
        self, message: Any, tool_prompt_format: object
    ) -> tuple[list[int], list[Any]]:
        ours = Message(message.role, message.content)
        return self.format.render([ours], add_generation_prompt=False).ids[1:], []


def meta_tests(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PACKAGE / f"llama3/tests/api/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_all(module: ModuleType) -> int:
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    result = unittest.TestResult()
    suite.run(result)
    assert result.errors + result.failures == []
    return result.testsRun


def test_metas_tests_of_tool_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    module = meta_tests("test_tool_utils")
    monkeypatch.setattr(module, "ToolUtils", OurToolUtils)
    monkeypatch.setattr(module, "is_valid_python_list", lambda text: calls_in(text) is not None)
    monkeypatch.setattr(module, "parse_python_list_for_function_calls", calls_in)
    assert run_all(module) == 20


def test_metas_tests_of_the_tokenizer_and_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    module = meta_tests("test_tokenizer")
    monkeypatch.setattr(module, "Tokenizer", OurTokenizer)
    monkeypatch.setattr(module, "ChatFormat", OurChatFormat)
    assert run_all(module) == 5


# --- decoding against ChatFormat ----------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        "Plain text.<|eot_id|>",
        '<|python_tag|>brave_search.call(query="a b")<|eom_id|>',
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}<|eom_id|>',
        '{"name": "f", "parameters": {"a": {"b": 1}}}<|eot_id|>',
        '<function=f>{"a": 1, "b": "x"}</function><|eot_id|>',
        "[f(a='x', b=1)]<|eot_id|>",
        "<|python_tag|>print('hi')\nx = 1<|eom_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "f", "parameters": {}}<|eot_id|>',
        '{"name": "brave_search", "parameters": {"q": "x"}}<|eom_id|>',
        '{"not": "a call"}<|eot_id|>',
    ],
)
def test_decoding(theirs: Any, raw: str) -> None:
    expected = theirs.decode_assistant_message_from_content(raw, None)
    reply = parse_reply(split_specials(raw), tools=None)
    assert reply.text == expected.content
    names = [getattr(call.tool_name, "value", call.tool_name) for call in expected.tool_calls]
    assert [call.name for call in reply.tool_calls] == names
    arguments = [call.arguments for call in expected.tool_calls]
    assert [call.arguments for call in reply.tool_calls] == arguments
