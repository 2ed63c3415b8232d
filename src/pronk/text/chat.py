"""Llama 3.1's chat format, built from token ids; and the choice of a format for a model.

Headers and end marks are put in as ids, roles and contents go through ordinary BPE, so nothing
that a user writes can become a special token and there is exactly one BOS. Other models' formats
come from their Jinja template (template.py); what the model answers is read in parse.py.
"""

import datetime
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

from pronk.core.errors import UserError
from pronk.text import tools as prompts
from pronk.text.messages import Message, ToolCall
from pronk.text.tools import BUILTIN_CALLS, BUILTIN_TOOLS, Tool, ToolFormat

if TYPE_CHECKING:
    from pronk.text.tokenizer import Tokenizer

Style = Literal["meta", "hf"]

_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
           "October", "November", "December")  # fmt: skip
_KNOWLEDGE = "Cutting Knowledge Date: December 2023\nToday Date: "
_ENVIRONMENT = "Environment: ipython"
_HF_DATE = "26 Jul 2024"  # what the Hugging Face template says when no date is given


_ANY_ROLE_HEADER = re.compile(
    r"""<\|start_header_id\|>(?:['"]\s*[+~]|\{\{-?)[\s(]*[\w.\[\]'"]*role"""
)
"""In a template: a header whose role is the message's, whatever that is."""


class Rendered:
    """A rendered chat: its token ids, and which of them the assistant wrote."""

    def __init__(self, ids: list[int], mask: Callable[[], list[bool]]) -> None:
        self.ids = ids
        self._mask = mask

    @cached_property
    def assistant_mask(self) -> list[bool]:
        """For each id: True where the assistant wrote it, its end token included, the header not.

        Computed when asked for. Raises UserError for a Jinja template that gives no way to tell.
        """
        return self._mask()


class ChatFormat(Protocol):
    """Turns messages into the tokens of one model's prompt format."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        builtin_tools: Sequence[str] = (),
        tool_choice: str = "auto",
        date: datetime.date | str | None = None,
        add_generation_prompt: bool = True,
    ) -> Rendered:
        """Ids of the whole chat, ending in an open assistant header if `add_generation_prompt`.

        `tool_choice` is "auto", "none" (nothing is offered), "required" or a tool's name; it only
        words the prompt, it does not constrain the model. `date` is told to the model as today's.
        """
        ...


def chat_format_for(tokenizer: "Tokenizer") -> ChatFormat | None:
    """The chat format of the model that `tokenizer` belongs to; None for a base model.

    Llama 3 header tokens select the native format, unless a chat template says that the model was
    tuned on another one: a ChatML tune of Llama 3 keeps Llama's tokens in its vocabulary, and
    Llama Guard puts the whole chat between the headers of one message. Native are templates that
    write a header with the role of a message in it.
    """
    template = tokenizer.chat_template
    has_headers = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= set(
        tokenizer.special_ids
    )
    if has_headers and (template is None or _ANY_ROLE_HEADER.search(template)):
        return Llama31Format(tokenizer)
    if template is None:
        return None
    from pronk.text.template import JinjaFormat  # jinja2 is only imported where it is needed

    return JinjaFormat(tokenizer, template)


def english_date(date: datetime.date, *, short: bool) -> str:
    """The form "26 July 2024", or "26 Jul 2024" if `short`, whatever the locale."""
    month = _MONTHS[date.month - 1]
    return f"{date.day:02d} {month[:3] if short else month} {date.year}"


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools that a prompt offers, checked against each other and against the choice."""

    tools: tuple[Tool, ...]
    builtins: tuple[str, ...]
    sentence: str

    def __bool__(self) -> bool:
        return bool(self.tools or self.builtins)


def check_offer(tools: Sequence[Tool], builtin_tools: Sequence[str], tool_choice: str) -> Offer:
    """What is offered under `tool_choice`; UserError if a name is unknown."""
    for name in builtin_tools:
        if name not in BUILTIN_TOOLS:
            known = ", ".join(BUILTIN_TOOLS)
            raise UserError(f"builtin_tools: unknown tool {name!r}; known are {known}")
    names = [*(tool.name for tool in tools), *builtin_tools]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(f"tools: {twice!r} is offered twice")
    if tool_choice == "none":
        return Offer((), (), "")
    if tool_choice == "required" and not names:
        raise UserError("tool_choice: 'required' needs at least one tool")
    if tool_choice not in ("auto", "required", *names):
        known = ", ".join(["auto", "none", "required", *names])
        raise UserError(f"tool_choice: unknown {tool_choice!r}; use one of {known}")
    return Offer(tuple(tools), tuple(builtin_tools), prompts.tool_choice_sentence(tool_choice))


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message as it will stand in the prompt: header role, text, calls behind the text."""

    role: str
    text: str
    calls: tuple[ToolCall, ...] = ()


class _Writer:
    """Collects ids and the assistant mask."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.mask: list[bool] = []

    def special(self, name: str, by_assistant: bool = False) -> None:
        try:
            self._add([self.tokenizer.special_ids[name]], by_assistant)
        except KeyError:
            raise UserError(f"chat: this model's tokenizer has no {name} token") from None

    def text(self, text: str, by_assistant: bool = False) -> None:
        self._add(self.tokenizer.encode(text), by_assistant)

    def header(self, role: str) -> None:
        self.special("<|start_header_id|>")
        self.text(role)
        self.special("<|end_header_id|>")
        self.text("\n\n")

    def _add(self, ids: list[int], by_assistant: bool) -> None:
        self.ids += ids
        self.mask += [by_assistant] * len(ids)


class Llama31Format:
    """The prompt format of Llama 3.1, 3.2 (text) and 3.3.

    `style="meta"`, the default, equals Meta's `ChatFormat` and prompt documents token for token:
    contents stand verbatim, a system message exists only if one is given (or tools or a date need
    one), and tools are offered with words that allow a plain answer and with the python tag, which
    marks a call by a special token instead of leaving it to be guessed from text. That is what
    the weights were trained on, so it is the right one for chatting with them. Not copied from
    Meta's code: it leaves out `<|python_tag|>` in the history of all calls but code (the model's
    own calls begin with it), puts an assistant's text behind the tag instead of before it, and see
    tools.py.

    `style="hf"` equals the chat template that the Hugging Face repositories ship (the 8B text),
    for comparing with systems that use it: contents trimmed, a system message with a date always,
    true JSON schemas inside the first user message, tool results as JSON strings. Where the
    template fails or loses something this does not: several calls in a message, text beside a
    call, tools with a first message that is not the user's, quotes in built-in arguments, code
    (written raw after the tag, as in training).

    `tool_format` says how custom tools are offered and how their calls in the history are written
    ("hf" knows "json" only). `tools_in_user_message=False` moves the JSON and `<function=>` offers
    into the system message. `meta_schemas=True` gives Meta's lossy JSON listing of parameters.
    `Message.name` has no place in this format and is not rendered.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        tool_format: ToolFormat = "json",
        style: Style = "meta",
        *,
        tools_in_user_message: bool = True,
        meta_schemas: bool = False,
    ) -> None:
        if tool_format not in ("json", "function_tag", "pythonic"):
            raise UserError(
                f"tool_format: unknown {tool_format!r}; use json, function_tag or pythonic"
            )
        if style not in ("meta", "hf"):
            raise UserError(f"style: unknown {style!r}; use meta or hf")
        if style == "hf" and (tool_format != "json" or meta_schemas):
            raise UserError("style: 'hf' offers tools in JSON with true schemas only; use 'meta'")
        self.tokenizer = tokenizer
        self.tool_format = tool_format
        self.style = style
        self.tools_in_user_message = tools_in_user_message and tool_format != "pythonic"
        self.meta_schemas = meta_schemas

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        builtin_tools: Sequence[str] = (),
        tool_choice: str = "auto",
        date: datetime.date | str | None = None,
        add_generation_prompt: bool = True,
    ) -> Rendered:
        """See `ChatFormat.render`. A `datetime.date` is written in the style's own way ("26 July
        2024" or "26 Jul 2024"); without a date "meta" tells none and "hf" tells 26 Jul 2024."""
        offer = check_offer(tools, builtin_tools, tool_choice)
        today = self._date_text(date)
        turns = (self._meta_turns if self.style == "meta" else self._hf_turns)(
            messages, offer, today
        )
        ipython = any(turn.role == "system" and _ENVIRONMENT in turn.text for turn in turns[:1])
        writer = _Writer(self.tokenizer)
        writer.special("<|begin_of_text|>")
        for turn in turns:
            self._write(writer, turn, offer, ipython)
        if add_generation_prompt:
            writer.header("assistant")
        return Rendered(writer.ids, lambda: writer.mask)

    def _date_text(self, date: datetime.date | str | None) -> str | None:
        if not isinstance(date, datetime.date):
            return date
        return english_date(date, short=self.style == "hf")

    # --- style "meta" -------------------------------------------------------------------------

    def _meta_turns(
        self, messages: Sequence[Message], offer: Offer, today: str | None
    ) -> list[_Turn]:
        given, rest = _split_system(messages)
        turns = [_Turn(_header_role(m), m.content, m.tool_calls) for m in rest]
        if offer.tools and self.tools_in_user_message:
            turns.insert(0, _Turn("user", self._meta_tools(offer)))
        system = self._meta_system(given, offer, today)
        return turns if system is None else [_Turn("system", system), *turns]

    def _meta_tools(self, offer: Offer) -> str:
        if self.tool_format == "json":
            return prompts.json_prompt(offer.tools, meta_schemas=self.meta_schemas)
        if self.tool_format == "function_tag":
            return prompts.function_tag_prompt(offer.tools)
        return prompts.pythonic_prompt(offer.tools)

    def _meta_system(self, given: str | None, offer: Offer, today: str | None) -> str | None:
        """The preamble, then tools if they belong here, then the caller's text. Meta's interface
        ends a text that has a preamble in a newline, and leaves one without a preamble alone."""
        preamble = self._meta_preamble(offer, today)
        blocks = [preamble] if preamble else []
        if offer.tools and not self.tools_in_user_message:
            blocks.append(self._meta_tools(offer))
        if given:
            blocks.append(given)
        if not blocks and not offer.sentence:
            return given
        text = "\n\n".join(blocks)
        if offer.sentence:
            text += "\n" + offer.sentence
        return text + "\n" if preamble else text

    def _meta_preamble(self, offer: Offer, today: str | None) -> str:
        lines = []
        if offer.builtins or (offer.tools and self.tool_format != "pythonic"):
            listed = [name for name in offer.builtins if name != "code_interpreter"]
            lines.append(_ENVIRONMENT)
            if listed:
                lines.append("Tools: " + ", ".join(listed))
            elif today is not None:
                lines.append("")  # Meta's generator leaves the Tools line empty
        if today is not None:
            lines.append(_KNOWLEDGE + today)
        return "\n".join(lines)

    # --- style "hf" ---------------------------------------------------------------------------

    def _hf_turns(
        self, messages: Sequence[Message], offer: Offer, today: str | None
    ) -> list[_Turn]:
        given, rest = _split_system(messages)
        system = self._hf_preamble(offer, today)
        turns = [_hf_turn(message) for message in rest]
        if offer.tools and self.tools_in_user_message:
            offered = prompts.hf_prompt(offer.tools, in_user_message=True)
            i = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
            if i is None:
                raise UserError("messages: tools are offered in the first user message; add one")
            turns[i] = _Turn("user", offered + turns[i].text)
        elif offer.tools:
            system += prompts.hf_prompt(offer.tools, in_user_message=False)
        system += (given or "").strip()
        if offer.sentence:
            system += "\n" + offer.sentence
        return [_Turn("system", system), *turns]

    def _hf_preamble(self, offer: Offer, today: str | None) -> str:
        text = _ENVIRONMENT + "\n" if offer else ""
        if offer.builtins:
            listed = (name for name in offer.builtins if name != "code_interpreter")
            text += "Tools: " + ", ".join(listed) + "\n\n"
        return text + _KNOWLEDGE + (_HF_DATE if today is None else today) + "\n\n"

    # --- writing ------------------------------------------------------------------------------

    def _write(self, writer: _Writer, turn: _Turn, offer: Offer, ipython: bool) -> None:
        writer.header(turn.role)
        mine = turn.role == "assistant"
        if turn.text:
            writer.text(turn.text, mine)
        end = "<|eot_id|>"
        if turn.calls:
            tag, text, end = self._calls(turn.calls, offer, ipython)
            if tag:
                writer.special("<|python_tag|>", mine)
            writer.text(text, mine)
        writer.special(end, mine)

    def _calls(
        self, calls: tuple[ToolCall, ...], offer: Offer, ipython: bool
    ) -> tuple[bool, str, str]:
        """Whether the python tag opens the calls, their text, and the token that ends them."""
        builtin = [self._is_builtin(call, offer) for call in calls]
        text = self._calls_text(calls, builtin)
        if self.style == "hf":
            return any(builtin), text, "<|eom_id|>" if offer.builtins else "<|eot_id|>"
        # Custom calls carry the tag and end the message, not the turn, where the system text
        # says "Environment: ipython" and they are JSON (llama3_1/prompt_format.md).
        tagged = any(builtin) or (ipython and self.tool_format == "json")
        return tagged, text, "<|eom_id|>" if tagged else "<|eot_id|>"

    def _is_builtin(self, call: ToolCall, offer: Offer) -> bool:
        if self.style == "hf":
            return call.name in offer.builtins
        return call.name in BUILTIN_CALLS and call.name not in {tool.name for tool in offer.tools}

    def _calls_text(self, calls: tuple[ToolCall, ...], builtin: list[bool]) -> str:
        if self.tool_format == "pythonic" and not any(builtin):
            return "[" + ", ".join(prompts.pythonic_call(call) for call in calls) + "]"
        for call, known in zip(calls, builtin, strict=True):
            if known and call.name == "code_interpreter":
                return _code(call, alone=len(calls) == 1)
        return "; ".join(
            prompts.builtin_call(call) if known else self._custom_call(call)
            for call, known in zip(calls, builtin, strict=True)
        )

    def _custom_call(self, call: ToolCall) -> str:
        if self.style == "hf":
            return prompts.hf_json_call(call)
        if self.tool_format == "json":
            return prompts.json_call(call)
        if self.tool_format == "function_tag":
            return prompts.function_tag_call(call)
        return f"[{prompts.pythonic_call(call)}]"


def _code(call: ToolCall, alone: bool) -> str:
    code = call.arguments.get("code")
    if not alone or len(call.arguments) != 1 or not isinstance(code, str):
        raise UserError(
            "messages: a code_interpreter call must be the only call of its message and have the"
            f" one argument 'code' with text, got {call.arguments!r:.80}"
        )
    return code


def _split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The text of the leading system message, and the messages after it."""
    if messages and messages[0].role == "system":
        return messages[0].content, messages[1:]
    return None, messages


def _header_role(message: Message) -> str:
    return "ipython" if message.role == "tool" else message.role


def _hf_turn(message: Message) -> _Turn:
    if message.role == "tool":
        return _Turn("ipython", json.dumps(message.content, ensure_ascii=False))
    return _Turn(_header_role(message), message.content.strip(), message.tool_calls)
