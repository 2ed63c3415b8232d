"""A chat in the terminal: its messages, its commands, its answers as they come.

What `pronk chat` means by its arguments is in chat.py.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from pronk.cli.common import counted, human_count, length_explained, note, note_cut, text
from pronk.core.errors import UserError

if TYPE_CHECKING:
    from pronk.engine.llm import LLM
    from pronk.engine.replies import Piece, Reply
    from pronk.text.messages import Message, ToolCall

HELP = """\
/system TEXT   set the system prompt (without TEXT: show it)
/clear         forget the conversation, keep the system prompt
/tool RESULT   answer the tool call that the model has just made
/help          this list
/exit, /q      leave, like Ctrl-D and /quit
\"\"\"            begins and ends a prompt of several lines
Ctrl-C stops an answer; at the prompt it clears the line, and twice it leaves."""


class Conversation:
    """The messages so far, and how the next one is made."""

    def __init__(
        self,
        llm: "LLM",
        system: str | None,
        tools: list[dict[str, Any]] | None,
        sampling: dict[str, Any],
    ) -> None:
        self.llm = llm
        self.system = system
        self.turns: list[Message] = []
        self._options = {"tools": tools, **sampling}

    @property
    def messages(self) -> "list[Message]":
        from pronk.text.messages import Message

        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    @property
    def open_calls(self) -> "list[ToolCall]":
        """Tool calls of the last answer that have no result yet."""
        calls: list[ToolCall] = []
        for turn in self.turns:
            calls = calls[1:] if turn.role == "tool" else list(turn.tool_calls)
        return calls

    def ask(self, prompt: str) -> None:
        from pronk.text.messages import Message

        self.turns.append(Message("user", prompt))

    def give_result(self, result: str) -> None:
        """Answers the first open tool call."""
        from pronk.text.messages import Message

        call = self.open_calls[0]
        self.turns.append(Message("tool", result, tool_call_id=call.id, name=call.name))

    def answer(self) -> "Reply":
        with length_explained(self.llm):
            return self.llm.chat(self.messages, **self._options)

    def stream(self, *advice: str) -> "Generator[Piece]":
        """The answer in pieces; `advice` is for a conversation that does not fit."""
        with length_explained(self.llm, *advice):
            yield from self.llm.stream(self.messages, **self._options)


def say(pieces: "Generator[Piece]", stopped: Callable[[], bool] = lambda: False) -> "Said":
    """Prints an answer as it comes, its tool calls as one line of JSON each at the end. Between
    two pieces `stopped` may end it."""
    parts: list[str] = []
    reply = None
    with contextlib.closing(pieces):
        for piece in pieces:
            parts.append(piece.text)
            click.echo(piece.text, nl=False)
            reply = piece.reply
            if stopped():
                break
    text = "".join(parts)
    if text and not text.endswith("\n"):
        click.echo()
    for call in reply.tool_calls if reply else ():
        click.echo(json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False))
    return Said(text, reply)


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    text: str
    reply: "Reply | None"
    """None for an answer that was stopped."""


class Leave(Exception):
    """The user wants out of the conversation."""


class Cleared(Exception):
    """Ctrl-C at the prompt: what was typed is forgotten."""


def converse(conversation: Conversation, model: str) -> None:
    """The conversation on a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing and history)

    llm = conversation.llm
    if llm.chat_format is None:
        raise UserError(f"MODEL: {model} is a base model without a chat format; use generate")
    note(
        f"{model}: {human_count(llm.config.n_params)} parameters, context {llm.context} tokens,"
        f" {llm.backend_name} backend. /help lists the commands, Ctrl-D leaves."
    )
    interrupted = False
    while True:
        try:
            line = read_line()
            interrupted = False
            turn(conversation, line)
        except Leave:
            return
        except EOFError:
            click.echo(err=True)  # the prompt's line is still open
            return
        except Cleared:
            if interrupted:
                raise KeyboardInterrupt from None
            interrupted = True
            note("\n(Ctrl-C again or /exit leaves)")
        except UserError as error:
            click.echo(f"pronk: error: {error}", err=True)


def turn(conversation: Conversation, line: str) -> None:
    """One line of the user: a command or a prompt. An answer that fails leaves the conversation
    as it was."""
    before = list(conversation.turns)
    if line.startswith("/"):
        if not command(conversation, line):
            return
    elif line.strip():
        conversation.ask(line)
    else:
        return
    try:
        with stop_by_ctrl_c() as stop:
            said = say(conversation.stream("/clear the conversation"), stop.is_set)
    except BaseException:
        conversation.turns = before
        raise
    if said.reply:
        conversation.turns.append(said.reply.message)
        note_cut(said.reply, conversation.llm.context, "; /clear begins a new conversation")
        note(summary(said.reply))
    elif said.text:
        from pronk.text.messages import Message

        conversation.turns.append(Message("assistant", said.text))
        note("[stopped]")
    else:
        conversation.turns = before
        note("[stopped before the first word; the prompt is forgotten]")


def summary(reply: "Reply") -> str:
    timings = reply.timings
    line = (
        f"[{counted(reply.usage.completion_tokens, 'token')}, {timings.decode_speed:.1f} tokens/s,"
        f" first after {timings.prompt_seconds:.2f} s]"
    )
    return f"{line}\n[answer the call with /tool RESULT]" if reply.tool_calls else line


def command(conversation: Conversation, line: str) -> bool:
    """Runs a slash command; True if the model is to answer now."""
    name, _, text = line.partition(" ")
    text = text.strip()
    match name.lower():
        case "/exit" | "/quit" | "/q":
            raise Leave
        case "/help":
            note(HELP)
        case "/clear":
            conversation.turns.clear()
            note("[cleared]")
        case "/system":
            if text:
                conversation.system = text
            note(f"[system prompt: {conversation.system or 'none'}]")
        case "/tool":
            if not conversation.open_calls:
                raise UserError("/tool: there is no tool call to answer")
            conversation.give_result(text)
            return not conversation.open_calls
        case _:
            raise UserError(f"{name}: unknown command; /help lists them")
    return False


def read_line() -> str:
    """A prompt from the terminal: one line, or several between two \"\"\"."""
    try:
        return _read_line()
    except KeyboardInterrupt:
        raise Cleared from None


def _read_line() -> str:
    line = typed("> ")
    if not line.lstrip().startswith('"""'):
        return line
    block = line.lstrip()[3:]
    while not block.rstrip().endswith('"""'):
        block += "\n" + typed(". ")
    return block.rstrip().removesuffix('"""').strip("\n")


def typed(prompt: str) -> str:
    """A line of text; bytes that are no UTF-8 are refused."""
    try:
        return text(_input(prompt))
    except UnicodeDecodeError as error:  # where Python reads stdin strictly
        byte = error.object[error.start]
        words = f"invalid UTF-8 at byte {error.start} (0x{byte:02x})"
    except click.BadParameter as error:
        words = error.message
    raise UserError(f"PROMPT: {words}")


def _input(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)  # the answers go to a file, the prompt must not
    return input()


@contextlib.contextmanager
def stop_by_ctrl_c() -> Iterator[threading.Event]:
    """Inside, a first Ctrl-C sets the event, so that a step of the engine is never torn; a second
    one is a KeyboardInterrupt, for an answer that does not even begin."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
