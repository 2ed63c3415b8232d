"""`pronk chat`: what its arguments mean, one answer, and the conversation on a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Pronk
from engine.tiny_models import write_gguf
from pronk import LLM
from pronk.cli import chat as chat_verb
from pronk.cli import conversation
from pronk.cli.chat import model_and_prompt
from pronk.cli.input import read_chat_prompt
from pronk.core.config import ModelConfig
from pronk.core.errors import ContextLengthError, UserError
from pronk.engine.replies import Piece, Reply, Timings, Usage
from pronk.text.messages import Message, ToolCall


def test_what_the_arguments_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for first, second, meaning in (
        (None, None, ("smollm2-135m", None)),
        ("What is it?", None, ("smollm2-135m", "What is it?")),
        ("hello", None, ("smollm2-135m", "hello")),
        ("Explain a/b and x.gguf", None, ("smollm2-135m", "Explain a/b and x.gguf")),
        ("SmolLM2", None, ("SmolLM2", None)),
        ("llama-3.1-8b", None, ("llama-3.1-8b", None)),
        ("owner/name", None, ("owner/name", None)),
        ("./missing.gguf", None, ("./missing.gguf", None)),
        ("folder", None, ("folder", None)),
        ("smollm2", "hi", ("smollm2", "hi")),
    ):
        assert model_and_prompt(first, second) == meaning
    with pytest.raises(UserError, match=r"did you mean llama-3\.1-8b-instruct"):
        model_and_prompt("llama-3.1-8b-instrct", None)
    with pytest.raises(UserError, match=r"'how'; .* \(a prompt of several words needs quotes\)"):
        model_and_prompt("how", "are")


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "some words"}]
OPTIONS = ("--system", "Be brief.", "--temperature", "0", "--max-tokens", "6")


def test_one_answer(tiny: str, pronk: Pronk) -> None:
    expected = LLM(tiny).chat(MESSAGES, temperature=0, max_tokens=6)
    ran = pronk("chat", tiny, "some words", *OPTIONS)
    assert ran.code == 0
    assert ran.out.rstrip("\n") == expected.text.rstrip("\n")
    assert ran.out.endswith("\n")
    assert ran.err == "(cut after 6 tokens)\n"
    for piped in (b"some words", b"some words\n", b"some words\r\n"):
        assert pronk("chat", tiny, *OPTIONS, stdin=piped).out == ran.out


def test_prompt_and_stdin_are_joined(tiny: str, pronk: Pronk) -> None:
    joined = pronk("chat", tiny, "Summarize:\n\nfirst\nsecond", *OPTIONS)
    assert joined.code == 0
    assert pronk("chat", tiny, "Summarize:", *OPTIONS, stdin=b"first\nsecond\n") == joined
    assert pronk("chat", tiny, "", *OPTIONS, stdin=b"Summarize:\n\nfirst\nsecond\n") == joined
    alone = pronk("chat", tiny, "Summarize:", *OPTIONS)
    assert alone.out != joined.out
    assert pronk("chat", tiny, "Summarize:", *OPTIONS, stdin=b"\n") == alone
    ran = pronk("chat", tiny, "Summarize:", stdin=b"abc\xff")
    assert (ran.code, ran.out) == (2, "")
    assert "PROMPT: stdin is not UTF-8: byte 3 is 0xff" in ran.err


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The end of a pipe to write to; the other one is stdin."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield writer


def test_a_pipe_that_stays_open_does_not_hang(
    pipe: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pronk.cli.input._WAIT_S", 0.05)
    began = time.monotonic()
    assert read_chat_prompt("one") == "one"
    assert time.monotonic() - began < 5
    said = "(nothing came on stdin within 0.05 s; this answers PROMPT alone)"
    assert said in capsys.readouterr().err
    os.close(pipe)
    assert read_chat_prompt("one") == "one"
    assert capsys.readouterr().err == ""


def test_a_slow_pipe_is_read_to_its_end(pipe: int) -> None:
    def write() -> None:
        for part in (b"two\n", b"three\n"):
            time.sleep(0.2)
            os.write(pipe, part)
        os.close(pipe)

    thread = threading.Thread(target=write)
    thread.start()
    assert read_chat_prompt("one") == "one\n\ntwo\nthree"
    thread.join()


def test_stdin_that_is_a_file_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two").write_text("two\n")
    with (tmp_path / "two").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_chat_prompt("one") == "one\n\ntwo"
    with Path(os.devnull).open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_chat_prompt("one") == "one"
    monkeypatch.setattr(sys, "stdin", None)
    assert read_chat_prompt("one") == "one"
    with pytest.raises(UserError, match="PROMPT: it is empty"):
        read_chat_prompt(None)
    assert capsys.readouterr().err == ""


def test_a_full_context_is_told(tiny: str, pronk: Pronk, typed: "Typed") -> None:
    endless = ("--logit-bias", "70=100", "--ctx", "40")
    full = "(the context of 40 tokens is full"
    assert pronk("chat", tiny, "hi", *endless).err == f"{full})\n"
    assert pronk("chat", tiny, "hi", *endless, "--max-tokens", "2").err == "(cut after 2 tokens)\n"
    typed.lines = ["hi"]
    assert f"{full}; /clear begins a new conversation)\n" in typed.run("chat", tiny, *endless).err


def test_one_answer_as_json(tiny: str, pronk: Pronk) -> None:
    expected = LLM(tiny).chat(MESSAGES, temperature=0, max_tokens=6)
    ran = pronk("chat", tiny, "some words", *OPTIONS, "--json")
    assert (ran.code, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert result["text"] == expected.text
    assert result["token_ids"] == expected.token_ids
    assert result["finish_reason"] == "length"
    assert result["tool_calls"] == []
    assert result["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert result["timings"]["decode_speed"] > 0


def test_a_base_model_cannot_chat(tmp_path: Path, pronk: Pronk, typed: "Typed") -> None:
    base = str(write_gguf(tmp_path / "base.gguf", chat=False))
    ran = pronk("chat", base, "hi")
    assert (ran.code, ran.out) == (2, "")
    assert "base model without a chat format" in ran.err
    typed.lines = ["hi"]
    ran = typed.run("chat", base)
    assert (ran.code, ran.out) == (2, "")
    assert "base model without a chat format; use generate" in ran.err
    assert typed.lines == ["hi"]  # said before the first prompt


class FakeLLM:
    """Answers with the texts and tool calls that a test wants, and remembers what it was asked."""

    config = ModelConfig(8, 1, 1, 1, 8, 8, 8, 8)
    context = 8
    backend_name = "fake"
    chat_format = "any"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[list[Message], dict[str, Any]]] = []
        self.closed = 0

    def stream(self, messages: list[Message], **options: Any) -> Iterator[Piece]:
        self.asked.append((list(messages), options))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return self._pieces(answer)

    def _pieces(self, answer: Any) -> Iterator[Piece]:
        text, calls = answer if isinstance(answer, tuple) else (answer, ())
        try:
            for word in text.split(" "):
                if word == "CTRL-C":
                    os.kill(os.getpid(), signal.SIGINT)
                    word = ""
                yield Piece(word and f"{word} ")
            yield Piece(
                "",
                Reply(
                    text, [1, 2, 3], "tool_calls" if calls else "stop", Usage(5, 3, 0),
                    Timings(0.5, 0.1, 5, 2), 7, None, tuple(calls),
                ),
            )  # fmt: skip
        finally:
            self.closed += 1

    def chat(self, messages: list[Message], **options: Any) -> Reply:
        *_, last = self.stream(messages, **options)
        assert last.reply is not None
        return last.reply

    @property
    def contents(self) -> list[list[str]]:
        return [[message.content for message in messages] for messages, _ in self.asked]


class Typed:
    """A terminal on which `lines` are typed, then Ctrl-D; an exception is raised instead."""

    def __init__(self, pronk: Pronk, monkeypatch: pytest.MonkeyPatch) -> None:
        self._pronk, self._monkeypatch = pronk, monkeypatch
        self.lines: list[Any] = []
        self.prompts: list[str] = []

    def run(self, *arguments: str, llm: FakeLLM | None = None) -> Any:
        self._monkeypatch.setattr(conversation, "_input", self._next)
        self._monkeypatch.setattr(chat_verb, "on_a_terminal", lambda: True)
        if llm is not None:
            self._monkeypatch.setattr(chat_verb, "load_model", lambda *_, **__: llm)
        return self._pronk(*arguments)

    def _next(self, prompt: str) -> str:
        self.prompts.append(prompt)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        assert isinstance(line, str)
        return line


@pytest.fixture
def typed(pronk: Pronk, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return Typed(pronk, monkeypatch)


def test_a_conversation(typed: Typed) -> None:
    llm = FakeLLM("First answer.", "Second answer.")
    typed.lines = ["one", "", "   ", "two"]
    ran = typed.run("chat", "--system", "Be kind.", llm=llm)
    assert ran.code == 0
    assert ran.out == "First answer. \nSecond answer. \n"
    assert llm.contents == [
        ["Be kind.", "one"],
        ["Be kind.", "one", "First answer.", "two"],
    ]
    assert "/help lists the commands" in ran.err
    assert ran.err.count("[3 tokens, 20.0 tokens/s, first after 0.50 s]") == 2
    assert llm.closed == 2


def test_options_reach_the_model(typed: Typed) -> None:
    llm = FakeLLM("x")
    typed.lines = ["one"]
    typed.run("chat", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--seed", "3",
              "--logit-bias", "4=-2.5", llm=llm)  # fmt: skip
    assert llm.asked[0][1] == {
        "tools": None, "temperature": 0.5, "stop": ["a", "b"], "seed": 3, "logit_bias": {4: -2.5},
    }  # fmt: skip


def test_commands(typed: Typed) -> None:
    llm = FakeLLM("A.", "B.", "C.")
    typed.lines = [
        "one", "/system Be short.", "/system", "two", "/clear", "three", "/help", "/nonsense",
        "/quit", "never asked",
    ]  # fmt: skip
    ran = typed.run("chat", llm=llm)
    assert ran.code == 0
    assert llm.contents == [
        ["one"],
        ["Be short.", "one", "A.", "two"],
        ["Be short.", "three"],
    ]
    assert ran.err.count("[system prompt: Be short.]") == 2
    assert "/tool RESULT" in ran.err
    assert "pronk: error: /nonsense: unknown command; /help lists them" in ran.err
    assert typed.lines == ["never asked"]


def test_several_lines(typed: Typed) -> None:
    llm = FakeLLM("A.", "B.")
    typed.lines = ['"""first', "", 'second"""', '"""one"""']
    typed.run("chat", llm=llm)
    assert llm.contents[0] == ["first\n\nsecond"]
    assert llm.contents[1][-1] == "one"
    assert typed.prompts == ["> ", ". ", ". ", "> ", "> "]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(typed: Typed) -> None:
    llm = FakeLLM("some words CTRL-C never said", "B.", "CTRL-C x", "C.")
    typed.lines = ["one", "two", "three", "four"]
    ran = typed.run("chat", llm=llm)
    assert ran.code == 0
    assert ran.out == "some words \nB. \nC. \n"
    assert "[stopped]" in ran.err
    assert llm.contents[1] == ["one", "some words ", "two"]
    assert llm.contents[3] == ["one", "some words ", "two", "B.", "four"]  # "three" is forgotten
    assert llm.closed == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


HINT = "\n(Ctrl-C again or /exit leaves)\n"


def test_two_ctrl_c_at_the_prompt_leave(typed: Typed) -> None:
    typed.lines = [KeyboardInterrupt(), KeyboardInterrupt(), "never asked"]
    ran = typed.run("chat", llm=FakeLLM())
    assert ran.code == 130
    assert ran.err.endswith(f"{HINT}\npronk: interrupted\n")
    assert typed.lines == ["never asked"]


def test_one_ctrl_c_at_the_prompt_clears_it(typed: Typed) -> None:
    llm = FakeLLM("A.", "B.")
    typed.lines = [KeyboardInterrupt(), "one", '"""never', KeyboardInterrupt(), "two"]
    ran = typed.run("chat", llm=llm)
    assert ran.code == 0
    assert ran.err.count(HINT) == 2
    assert llm.contents[1] == ["one", "A.", "two"]


@pytest.mark.parametrize("word", ["/exit", "/quit", "/q", "/EXIT", "/Quit"])
def test_leaving_prints_nothing(typed: Typed, word: str) -> None:
    typed.lines = [word, "never asked"]
    ran = typed.run("chat", llm=FakeLLM())
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.endswith("Ctrl-D leaves.\n")
    assert typed.lines == ["never asked"]


def test_typed_bytes_that_are_no_text(typed: Typed) -> None:
    llm = FakeLLM("A.")
    undecodable = UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte")
    typed.lines = ["caf\udce9", undecodable, "one"]
    ran = typed.run("chat", llm=llm)
    assert ran.code == 0
    assert "pronk: error: PROMPT: invalid UTF-8 at byte 3 (0xe9)\n" in ran.err
    assert "pronk: error: PROMPT: invalid UTF-8 at byte 1 (0xff)\n" in ran.err
    assert llm.contents == [["one"]]


def test_a_second_ctrl_c_ends_an_answer_that_does_not_begin(typed: Typed) -> None:
    class Slow(FakeLLM):
        def _pieces(self, answer: Any) -> Iterator[Piece]:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            yield Piece("never")

    typed.lines = ["one"]
    ran = typed.run("chat", llm=Slow("x"))
    assert (ran.code, ran.out) == (130, "")


def test_a_refused_prompt_leaves_the_conversation_as_it_was(typed: Typed) -> None:
    llm = FakeLLM("A.", ContextLengthError(600, 512), "B.")
    typed.lines = ["one", "much too long", "two"]
    ran = typed.run("chat", llm=llm)
    assert ran.code == 0
    assert (
        "pronk: error: prompt: 600 tokens do not fit the context of 512 (one must stay free for the"
        " answer); shorten it or /clear the conversation\n"
    ) in ran.err
    assert llm.contents[2] == ["one", "A.", "two"]


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture
def tools(tmp_path: Path) -> str:
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    return str(tmp_path / "tools.json")


def test_tool_calls_are_printed_as_json(
    tools: str, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [ToolCall("weather", {"place": "Zürich"}, "a"), ToolCall("weather", {}, "b")]
    llm = FakeLLM(("", calls), ("Let me see.", calls[:1]), ("", calls))
    monkeypatch.setattr(chat_verb, "load_model", lambda *_, **__: llm)
    ran = pronk("chat", "smollm2", "Is it warm?", "--tools", tools)
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert lines == [
        {"name": "weather", "arguments": {"place": "Zürich"}},
        {"name": "weather", "arguments": {}},
    ]
    assert llm.asked[0][1]["tools"] == [WEATHER]
    ran = pronk("chat", "smollm2", "Is it warm?", "--tools", tools)
    assert ran.out.splitlines()[0] == "Let me see. "
    result = json.loads(pronk("chat", "smollm2", "Is it warm?", "--tools", tools, "--json").out)
    assert result["finish_reason"] == "tool_calls"
    assert result["tool_calls"][0] == {
        "name": "weather", "arguments": {"place": "Zürich"}, "id": "a",
    }  # fmt: skip


def test_tool_results_are_typed(tools: str, typed: Typed) -> None:
    calls = [ToolCall("weather", {}, "a"), ToolCall("weather", {}, "b")]
    llm = FakeLLM(("", calls), "Warm and cold.")
    typed.lines = ["/tool early", "Is it warm?", "/tool 30 degrees", "/tool 3 degrees"]
    ran = typed.run("chat", "--tools", tools, llm=llm)
    assert "pronk: error: /tool: there is no tool call to answer" in ran.err
    assert "[answer the call with /tool RESULT]" in ran.err
    asked = llm.asked[1][0]
    assert [message.role for message in asked] == ["user", "assistant", "tool", "tool"]
    assert asked[1].tool_calls == tuple(calls)
    assert [(m.content, m.tool_call_id, m.name) for m in asked[2:]] == [
        ("30 degrees", "a", "weather"), ("3 degrees", "b", "weather"),
    ]  # fmt: skip
    assert ran.out.endswith("Warm and cold. \n")


def test_json_needs_a_prompt(typed: Typed) -> None:
    ran = typed.run("chat", "--json", llm=FakeLLM())
    assert (ran.code, ran.out) == (2, "")
    assert "PROMPT: --json needs one" in ran.err


def test_a_gated_model_is_not_fetched_unasked(typed: Typed) -> None:
    ran = typed.run("chat", "llama-3.1-8b-instruct")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "pronk: error: MODEL: llama-3.1-8b-instruct is not on disk; fetch it (16.1 GB) with `pronk"
        " pull llama-3.1-8b-instruct`, which needs a Hugging Face token and Meta's licence accepted"
        " at https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct\n"
    )


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner)
        os.close(inner)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        """Reads until `text` has been shown since the last call."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self.fd)
        return code


def test_a_real_terminal(tiny: str) -> None:
    options = ("--max-tokens", "30", "--temperature", "0", "--backend", "reference")
    terminal = Terminal(sys.executable, "-m", "pronk", "chat", tiny, *options)
    terminal.wait_for("/help lists the commands")
    terminal.wait_for("> ")
    terminal.type("hello there\n")
    terminal.wait_for("tokens/s")
    terminal.wait_for("> ")
    terminal.type("/system Be brief.\n")
    terminal.wait_for("[system prompt: Be brief.]")
    terminal.wait_for("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.exit_code() == 0


SLOW = """
import sys, time
from pronk.backends import reference
from pronk.cli.app import main
fast = reference.sample
def sample(*arguments):
    time.sleep(0.05)
    return fast(*arguments)
reference.sample = sample
raise SystemExit(main(sys.argv[1:]))
"""


def test_ctrl_c_on_a_real_terminal(tiny: str) -> None:
    endless = ("--logit-bias", "70=100", "--max-tokens", "450", "--backend", "reference")
    terminal = Terminal(sys.executable, "-c", SLOW, "chat", tiny, *endless)
    token = LLM(tiny).tokenizer.decode([70])
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for(token * 3)
    terminal.ctrl_c()
    terminal.wait_for("[stopped]")
    terminal.wait_for("> ")
    time.sleep(0.5)  # readline shows its prompt a moment before it listens
    terminal.type("half a li")
    terminal.wait_for("half a li")
    time.sleep(0.5)
    terminal.ctrl_c()
    terminal.wait_for("(Ctrl-C again or /exit leaves)")
    terminal.wait_for("> ")
    time.sleep(0.5)
    terminal.ctrl_c()
    terminal.wait_for("interrupted")
    assert terminal.exit_code() == 130
