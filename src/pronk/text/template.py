"""Chat formats given as a Jinja template, for models that are not Llama 3.

The template is an untrusted program (sandbox.py runs it) over trusted and untrusted texts. Before
rendering, texts that look like special tokens are broken up by a private character inside the
messages and tools; after rendering, what still looks like a special token was made by the template
and becomes one, and the rest goes through ordinary BPE without the private character. So user text
never becomes a special token, and text between two special tokens is encoded in one piece.

Text is broken up whatever the case of its letters, as templates write `content|lower`. Other
transformations that make a special token out of what was none (`reverse`, `replace`, or the
template's own text on both sides of the user's) are not covered: that template is at fault.
"""

import datetime
import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pronk.core.errors import UserError
from pronk.text.chat import Offer, Rendered, check_offer, english_date
from pronk.text.described import described
from pronk.text.messages import Message
from pronk.text.sandbox import Meter, compile_template

if TYPE_CHECKING:
    from pronk.text.tokenizer import Tokenizer
    from pronk.text.tools import Tool

_BASE_BUDGET = 1_000_000
_BUDGET_PER_CHARACTER = 50
_MAX_DATE = 200
# Unicode's noncharacters are never text; the private use area is a reserve.
_PRIVATE = (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))

Span = tuple[int, int]
"""Start and end of a stretch of rendered text, in characters."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """The ids of a special token, or of the text between two of them."""

    start: int
    text: str
    ids: list[int]
    is_special: bool


class JinjaFormat:
    """A chat format in the dialect of Hugging Face templates (`messages`, `tools`,
    `add_generation_prompt`, `bos_token`, `eos_token`, `date_string`, `strftime_now`,
    `raise_exception`, `{% generation %}`).

    Raises UserError, in one line, if the template is no valid Jinja, refuses the messages, or runs
    or writes too much; and if it is given tools or calls that it would leave out silently.
    There is exactly one BOS in front if the template or the vocabulary wants any.
    """

    def __init__(self, tokenizer: "Tokenizer", source: str) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self._template = compile_template(source)
        # A special token of one character cannot be told from text; no template relies on one.
        texts = sorted((t for t in tokenizer.special_ids if len(t) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        folded = [text.casefold() for text in texts]
        self._folded = re.compile("|".join(map(re.escape, folded)) or r"(?!)")
        self._prefixes = tuple({t[:n] for t in folded for n in range(1, len(t))})
        self._texts = {id: text for text, id in tokenizer.special_ids.items()}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: "Sequence[Tool]" = (),
        builtin_tools: Sequence[str] = (),
        tool_choice: str = "auto",
        date: datetime.date | str | None = None,
        add_generation_prompt: bool = True,
    ) -> Rendered:
        """See `ChatFormat.render`. Where the template has no place for tools or calls they are
        described in words (described.py); only then are there words for a `tool_choice` other than
        "auto" and "none". A `date` is what `date_string` holds; a `datetime.date` also what
        `strftime_now` writes.

        The assistant mask comes from the template's `{% generation %}` blocks. Without these it
        comes from rendering every beginning of the chat, up to the model's end token; asked for
        it, a template that does not repeat its beginnings raises UserError. A token belongs to
        whoever wrote its first character.
        """
        offer = check_offer(tools, builtin_tools, tool_choice)
        if offer.builtins and "builtin_tools" not in self._template.variables:
            raise UserError("builtin_tools: this model's chat template knows no built-in tools")
        if self.describes_tools(messages, offer):
            messages = described(messages, offer)
            offer = Offer((), (), "")
        job = _Job(self, messages, offer, date)
        text, spans = job.without_marks(job.whole(add_generation_prompt))
        pieces = self._pieces(text, job.shield)
        ids = [id for piece in pieces for id in piece.ids]
        n_bos = next((i for i, id in enumerate(ids) if id != self.tokenizer.bos_id), len(ids))
        wants_bos = n_bos > 0 or self.tokenizer.add_bos
        bos = [self.tokenizer.bos_id] if wants_bos and self.tokenizer.bos_id is not None else []

        def mask() -> list[bool]:
            starts = [start for piece in pieces for start in self._starts(piece, job.shield)]
            if self._template.marks_generation:
                written = spans
            else:
                written = [self._up_to_stop(s, ids, starts) for s in job.reply_spans(text)]
            return [False] * len(bos) + _inside(starts, written)[n_bos:]

        return Rendered(bos + ids[n_bos:], mask)

    def shielded(self, value: Any, shield: str) -> Any:
        """`value` with no text in it, nor the end of one, that may become a special token."""
        if isinstance(value, str):
            return self._shielded_text(value, shield)
        if isinstance(value, list):
            return [self.shielded(item, shield) for item in value]
        if isinstance(value, dict):
            return {self.shielded(k, shield): self.shielded(v, shield) for k, v in value.items()}
        return value

    def _shielded_text(self, text: str, shield: str) -> str:
        folded, owners = _casefolded(text)
        cuts, at = [], 0
        while found := self._folded.search(folded, at):
            at = found.start() + 1
            cuts.append(owners[found.start()] + 1)
        if folded.rstrip().endswith(self._prefixes):
            cuts.append(len(text.rstrip()))
        edges = [0, *cuts, len(text)]
        return shield.join(text[a:b] for a, b in itertools.pairwise(edges))

    def run(self, variables: dict[str, Any], meter: Meter) -> str:
        """The template's text for `variables`."""
        ids = {"bos_token": self.tokenizer.bos_id, "eos_token": self.tokenizer.eos_id}
        tokens = {name: "" if id is None else self._texts[id] for name, id in ids.items()}
        return self._template.render(tokens | variables, meter)

    def describes_tools(self, messages: Sequence[Message], offer: Offer) -> bool:
        """Whether the template would leave tools or calls out of the prompt without a word."""
        no_tools = not {"tools", "custom_tools"} & self._template.variables
        no_calls = "tool_calls" not in self.source
        calls = any(message.tool_calls for message in messages)
        return bool(offer.tools and no_tools) or (calls and no_calls)

    def _pieces(self, text: str, shield: str) -> list[_Piece]:
        """Special tokens and the text between them, encoded."""
        pieces: list[_Piece] = []
        at = 0
        for found in self._special.finditer(text):
            pieces.append(self._text_piece(at, text[at : found.start()], shield))
            id = self.tokenizer.special_ids[found[0]]
            pieces.append(_Piece(found.start(), found[0], [id], is_special=True))
            at = found.end()
        pieces.append(self._text_piece(at, text[at:], shield))
        return pieces

    def _text_piece(self, start: int, text: str, shield: str) -> _Piece:
        plain = text.replace(shield, "")
        return _Piece(start, text, self.tokenizer.encode(plain) if plain else [], False)

    def _starts(self, piece: _Piece, shield: str) -> list[int]:
        """Where in the rendered text each token of `piece` starts."""
        if piece.is_special:
            return [piece.start]
        owner = [i for i, c in enumerate(piece.text) if c != shield for _ in c.encode()]
        starts, at = [], 0
        for id in piece.ids:
            starts.append(piece.start + owner[at])
            at += len(self.tokenizer.token_bytes(id))
        assert at == len(owner), (at, len(owner))
        return starts

    def _up_to_stop(self, span: Span, ids: list[int], starts: list[int]) -> Span:
        """`span` without what the template puts behind the model's last end token in it."""
        first, end = bisect_left(starts, span[0]), bisect_left(starts, span[1])
        for i in reversed(range(first, end)):
            if ids[i] in self.tokenizer.stop_ids:
                return span[0], starts[i] + 1
        return span


class _Job:
    """One chat to render: its shielded variables, and private characters it does not contain."""

    def __init__(
        self,
        format: JinjaFormat,
        messages: Sequence[Message],
        offer: Offer,
        date: datetime.date | str | None,
    ) -> None:
        plain = {
            "messages": [_template_dict(message) for message in messages],
            "tools": [tool.to_dict() for tool in offer.tools] or None,
            "names": list(offer.builtins),
            "date": english_date(date, short=True) if isinstance(date, datetime.date) else date,
        }
        everything = json.dumps(plain, ensure_ascii=False)
        used = set(everything) | set(format.source)
        private = (chr(c) for c in _PRIVATE if chr(c) not in used)
        self._open, self._close, self.shield = next(private), next(private), next(private)
        self._seal = next(private)
        self._has_calls = any(message.tool_calls for message in messages)
        self._budget = _BASE_BUDGET + _BUDGET_PER_CHARACTER * len(everything)
        self._format = format
        self._messages = messages
        shielded = format.shielded(plain, self.shield)
        self._dicts = [
            {**fields, "role": message.role}
            for message, fields in zip(messages, shielded["messages"], strict=True)
        ]
        self._variables: dict[str, Any] = {"tools": shielded["tools"], "strftime_now": _clock(date)}
        if offer.builtins:
            self._variables["builtin_tools"] = shielded["names"]
        if date is not None:
            self._variables["date_string"] = shielded["date"]

    def whole(self, add_generation_prompt: bool) -> str:
        """The chat, rendered; UserError if a call in it would not be in the prompt.

        A message of calls without text has no content (`content is none` is how some templates
        find the calls), except where the template would write "None" for it, fail, or lose calls.
        """
        if not self._has_calls:
            return self.run(len(self._messages), add_generation_prompt)
        none, empty = (self._try(content, add_generation_prompt) for content in (None, ""))
        if isinstance(none, str) and isinstance(empty, str):
            chosen = None if none.count("None") <= empty.count("None") else ""
        else:
            chosen = None if isinstance(none, str) else ""
        text = self._try(chosen, add_generation_prompt)
        if isinstance(text, UserError):
            raise text
        return text

    def _try(self, content: str | None, add_generation_prompt: bool) -> str | UserError:
        """The chat with that content for calls without text, now and in later runs; or what is
        wrong with it."""
        for message, fields in zip(self._messages, self._dicts, strict=True):
            if message.tool_calls and not message.content:
                fields["content"] = content
        try:
            text = self.run(len(self._messages), add_generation_prompt)
            self._check_calls(text)
        except UserError as error:
            return error
        return text

    def _check_calls(self, text: str) -> None:
        """Every call must be in the prompt. Its name may be there for other reasons (it was
        offered), so the chat is rendered again with a seal on the names of calls."""
        calls = [(i, call) for i, m in enumerate(self._messages) for call in m.tool_calls]
        dicts, numbers = self._dicts, itertools.count()
        self._dicts = [self._sealed(fields, numbers) for fields in dicts]
        try:
            sealed = self.run(len(dicts), False)
            found = {int(n) for n in re.findall(f"{self._seal}(\\d+){self._seal}", sealed)}
        except UserError:  # the template knows its tools by name: only the name itself is left
            plain = text.replace(self.shield, "")
            names = [json.dumps(call.name, ensure_ascii=False)[1:-1] for _, call in calls]
            found = {n for n, name in enumerate(names) if name in plain}
        finally:
            self._dicts = dicts
        for n, (i, call) in enumerate(calls):
            if n not in found:
                raise UserError(
                    f"messages[{i}].tool_calls: this model's chat template leaves out the call of"
                    f" {call.name!r}"
                )

    def _sealed(self, fields: dict[str, Any], numbers: Iterator[int]) -> dict[str, Any]:
        """`fields` of a message with the names of its calls numbered."""
        if "tool_calls" not in fields:
            return fields
        calls = []
        for call in fields["tool_calls"]:
            name = f"{call['function']['name']}{self._seal}{next(numbers)}{self._seal}"
            calls.append(call | {"function": call["function"] | {"name": name}})
        return fields | {"tool_calls": calls}

    def run(self, n_messages: int, add_generation_prompt: bool) -> str:
        """The first `n_messages` of the chat, rendered."""
        variables = {
            **self._variables,
            "messages": self._dicts[:n_messages],
            "add_generation_prompt": add_generation_prompt,
        }
        meter = Meter(self._budget, self._open, self._close, self.shield)
        return self._format.run(variables, meter)

    def without_marks(self, marked: str) -> tuple[str, list[Span]]:
        """The text without the marks of generation blocks, and the spans between them."""
        text = ""
        edges: list[int] = []
        for part in re.split(f"[{self._open}{self._close}]", marked):
            text += part
            edges.append(len(text))
        return text, list(zip(edges[:-1:2], edges[1::2], strict=False))

    def reply_spans(self, text: str) -> list[Span]:
        """Where in `text` each assistant message is, found by rendering the chat up to it and
        including it."""
        spans = []
        for i, message in enumerate(self._messages):
            if message.role == "assistant":
                before, after = self.run(i, True), self.run(i + 1, False)
                if not (text.startswith(after) and after.startswith(before)):
                    raise UserError(
                        "assistant mask: this model's chat template has no {% generation %} blocks"
                        f" and writes the chat up to messages[{i}] differently when it goes on"
                    )
                spans.append((len(before), len(after)))
        return spans


def _casefolded(text: str) -> tuple[str, Sequence[int]]:
    """`text` without the case of its letters, and of which character each of its characters is."""
    if text.isascii():
        return text.lower(), range(len(text))
    folded = [c.casefold() for c in text]
    return "".join(folded), [i for i, part in enumerate(folded) for _ in part]


def _inside(starts: list[int], spans: list[Span]) -> list[bool]:
    """Whether each of the sorted `starts` lies in one of `spans`."""
    inside = [False] * len(starts)
    for begin, end in spans:
        for i in range(bisect_left(starts, begin), bisect_left(starts, end)):
            inside[i] = True
    return inside


def _template_dict(message: Message) -> dict[str, Any]:
    """The shape that templates expect: arguments as objects, and no key without a value."""
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
                **({} if call.id is None else {"id": call.id}),
            }
            for call in message.tool_calls
        ]
    for key in ("tool_call_id", "name"):
        if (value := getattr(message, key)) is not None:
            out[key] = value
    return out


def _clock(date: datetime.date | str | None) -> Callable[[str], str]:
    """`strftime_now` of a day, or of now."""

    def strftime_now(format: str) -> str:
        if len(format) > _MAX_DATE:  # the C library would pad each field as far as it is told
            raise UserError(f"strftime_now: a format of more than {_MAX_DATE} characters")
        day = date if isinstance(date, datetime.date) else datetime.datetime.now()
        return day.strftime(format)

    return strftime_now
