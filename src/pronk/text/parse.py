"""Reads what the assistant wrote into text and tool calls, piece by piece or whole.

There is one parser, the incremental one; the whole parse is the incremental one fed once, so both
agree whatever the pieces. Prose is passed on at once, only what may still become a call is held.
Accepted are all forms that Llama models write (with `name` among the offered tools):

    {"name": ..., "parameters": {...}}     also "arguments", "type": "function", a nested
                                           "function", a list of these, Python quotes, no arguments
    <function=name>{...}</function>        nested objects too; the closing tag may be missing
    [name(a=1), name(b="x")]               every call of the list
    name.call(query="...")                 built-in form
    <|python_tag|>                         before any of these; else the rest is Python source,
                                           a call of code_interpreter
    ```json ... ```, <tool_call> ... </tool_call>, text before and after, several calls separated
    by ";", "," or white space

An unfinished or malformed call is text. If its arguments had begun to be streamed, it is taken
back by a ToolCallAbort. A list is taken as a whole: if one entry is no call, none is; and what
looks like a call inside other JSON is part of that JSON. After the python tag, `name(...)` may be
the beginning of Python source; where code can be run, such calls are told only when it is certain
that nothing but calls follows. Never evaluates anything.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

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
from pronk.text.literals import Mismatch, Source, Steps, escaped, read_value, skip_container
from pronk.text.messages import ToolCall
from pronk.text.tools import BUILTIN_CALLS


def parse_reply(
    reply: str | Iterable[str | SpecialToken],
    *,
    tools: Collection[str] | None,
    builtins: Collection[str] = (),
    call_id: Callable[[int], str] | None = None,
) -> Reply:
    """Text and calls of a complete answer; see ReplyParser for the parameters.

    A string is taken as text throughout; use `split_specials` for a transcript in which special
    tokens are spelled out.
    """
    parser = ReplyParser(tools, builtins, call_id)
    events: list[Event] = []
    for piece in [reply] if isinstance(reply, str) else reply:
        events += parser.push(piece)
    return Reply.of(events + parser.finish())


_SPELLED = re.compile(r"(<\|(?:python_tag|eom_id|eot_id|end_of_text)\|>)")
_ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def split_specials(transcript: str) -> list[str | SpecialToken]:
    """Pieces for the parser from a raw transcript of Llama's output in which special tokens are
    spelled out; a leading assistant header is dropped."""
    pieces = _SPELLED.split(transcript.removeprefix(_ASSISTANT_HEADER))
    return [SpecialToken(p) if i % 2 else p for i, p in enumerate(pieces) if p]


@dataclass(slots=True)
class _Draft:
    """A call while it is being read; `json` is the JSON of its arguments so far."""

    name: str | None = None
    id: str = ""
    json: list[str] = field(default_factory=list)
    n_sent: int = 0
    """Entries of `json` that have been sent."""
    complete: bool = False
    """Whether `json` is."""
    held: bool = False
    """Whether the arguments are sent only when complete, as they may be renamed."""
    started: bool = False
    ended: bool = False


@dataclass(slots=True)
class _Hold:
    """Events that wait until all that belongs to them has been read, and what was before them."""

    index: int
    gap: str
    after_call: bool
    mark: int
    events: list[Event] = field(default_factory=list)


_CODE = "code_interpreter"
_CALL_KEYS = frozenset({"name", "parameters", "arguments", "type", "function", "id"})
_CALL_TYPES = frozenset({"function"})
_LANGUAGES = ("json", "tool_call", "tool_code", "python", "")
_NO_CODE = re.compile(rf"[\[\s]*([{{<]|({'|'.join(sorted(BUILTIN_CALLS))})\.call\()")
"""How calls begin and source code hardly ever does."""
_TICKS = re.compile("`")
_MAX_TICKS = 8
_ANY_NAME = re.compile(r"[\w.\-/]{1,80}")
_FORGET = 4096  # characters; dropping consumed text copies the rest
_BETWEEN = re.compile(r"[\s;,]")
_BETWEEN_CHARS = " \t\r\n;,"


class Judge(Protocol):
    """Knows whether calls are what their tools' schemas admit (calling.py)."""

    def enforced(self, name: str, source: str) -> bool:
        """Whether a grammar sees to it that a call which begins like `source`, up to its arguments,
        ends well."""
        ...

    def admits(self, name: str, arguments: dict[str, Any]) -> bool: ...


class ReplyParser:
    """The incremental parser.

    `tools` are the names of the caller's own tools, whose arguments are passed on as they are, and
    `builtins` the built-in ones that were offered, which have one argument and are given its true
    name. With neither, everything is text; `tools` None accepts any name (also that of a person in
    a JSON answer) and every built-in. The built-in `code_interpreter` makes Python source after
    `<|python_tag|>` a call. `call_id(index)` makes the calls' ids; by default they are random, so
    that no two answers share one. With a `judge` a call that no grammar enforces is told as a
    whole, and only if its arguments fit.
    White space around calls and separators between them are no text.
    """

    def __init__(
        self,
        tools: Collection[str] | None,
        builtins: Collection[str] = (),
        call_id: Callable[[int], str] | None = None,
        judge: Judge | None = None,
    ) -> None:
        self._judge = judge
        self._called_at = 0  # where the call being read begins
        self._builtins = BUILTIN_CALLS if tools is None else frozenset(builtins)
        self._names = None if tools is None else self._builtins.union(tools)
        self._call_id = call_id or _random_id
        self._trigger = _trigger(self._names)
        self._events: list[Event] = []
        self._hold: _Hold | None = None
        self._passing = False  # what is being read is text, whatever it turns out to be
        self._opened: int | None = None  # where the JSON or list of the call being read begins
        self._index = 0
        self._draft = _Draft()
        self._gap = ""  # white space (and separators, after a call) that may yet be dropped
        self._after_call = False
        self._any_text = False
        self._mark = 0  # text from here on belongs to no finished call
        self._finished = False
        self._begin_segment(python=False)

    def push(self, piece: str | SpecialToken) -> list[Event]:
        """Events that `piece` makes certain."""
        assert not self._finished, "push after finish"
        if isinstance(piece, SpecialToken):
            self._end_segment()
            self._begin_segment(python=piece.text == "<|python_tag|>")
        else:
            self._source.push(piece)
            self._resume()
        return self._take_events()

    def finish(self) -> list[Event]:
        """The rest: what was held is decided as if nothing could follow."""
        assert not self._finished, "finish called twice"
        self._finished = True
        self._end_segment()
        if self._gap and not self._after_call:
            self._events.append(TextDelta(self._gap))
        return self._take_events()

    # --- segments: the text between two special tokens -----------------------------------------

    def _begin_segment(self, python: bool) -> None:
        self._source = Source()
        self._mark = 0
        self._steps: Steps[None] | None = self._segment(python)

    def _end_segment(self) -> None:
        self._source.ended = True
        self._resume()
        assert self._steps is None, "a segment outlived its text"

    def _resume(self) -> None:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
            self._flush()
            if self._passing:
                self._text_to(self._source.pos)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return _merged(events)

    def _segment(self, python: bool) -> Steps[None]:
        source = self._source
        if python and self._names != frozenset():
            yield from self._python()
        while (yield from source.peek()):
            if source.pos > _FORGET:
                source.forget()
            found = self._trigger and self._trigger.search(source.text, source.pos)
            stop = found.start() if found else len(source.text)
            if stop > source.pos:
                self._text(source.text[source.pos : stop])
                source.pos = stop
            else:
                yield from self._attempt(self._candidate())

    def _attempt(self, steps: Steps[None]) -> Steps[None]:
        """Read a call or more; what turns out to be none, up to where that shows, is text."""
        self._mark = begun = self._source.pos
        self._opened = None
        try:
            yield from steps
        except Mismatch:
            if self._source.pos == begun:
                self._source.pos += 1
            yield from self._give_up()

    def _give_up(self) -> Steps[None]:
        """What has been read since the last finished call is text; so is, to its end, the JSON or
        list in which that showed, whatever stands in it."""
        source = self._source
        self._take_back()
        failed_at = source.pos
        if self._opened is not None:
            source.pos = max(self._opened, self._mark)
            self._passing = True
            try:
                yield from skip_container(source)
            except Mismatch:
                source.pos = max(source.pos, failed_at)
            self._passing = False
        self._text_to(source.pos)

    def _text_to(self, end: int) -> None:
        if end > self._mark:
            self._text(self._source.text[self._mark : end])
            self._mark = end

    def _candidate(self) -> Steps[None]:
        """One call, or calls in a wrapping, at a character that may begin them."""
        source = self._source
        c = yield from source.peek()
        if c == "`":
            yield from self._fence()
        elif c == "<" and (yield from source.at("<tool_call>")):
            yield from source.take("<tool_call>")
            yield from self._wrapped("</tool_call>")
        elif c == "<" and (yield from source.at("<|python_tag|>")):
            yield from source.take("<|python_tag|>")
            yield from source.token()
            yield from self._call(bare=True)
        else:
            yield from self._call(bare=False)

    def _fence(self) -> Steps[None]:
        """Backticks and a language that calls are fenced with."""
        source = self._source
        start = source.pos
        while source.pos - start < _MAX_TICKS and (yield from source.peek()) == "`":
            source.pos += 1
        ticks = source.text[start : source.pos]
        for language in _LANGUAGES:
            if (yield from source.at(language, any_case=True)):
                source.pos += len(language)
                break
        yield from self._wrapped(ticks[:3])

    def _wrapped(self, close: str) -> Steps[None]:
        """Calls up to `close`, which may be missing."""
        yield from self._source.token()
        yield from self._call(bare=False)
        while True:
            c = yield from self._source.skip(_BETWEEN)
            closed = yield from self._source.at(close)
            if closed:
                yield from self._source.take(close)
                if close[0] == "`":
                    yield from self._source.skip(_TICKS)
            if closed or not c:
                self._mark = self._source.pos
                return
            yield from self._call(bare=False)

    def _python(self) -> Steps[None]:
        """After the python tag: calls, or else source code if code can be run."""
        source = self._source
        c = yield from source.token()
        n_before = self._index
        self._mark = 0
        self._opened = None
        runs = _CODE in self._builtins
        if runs and c not in "{<":
            self._begin_hold()
        try:
            while c:
                yield from self._call(bare=True)
                c = yield from source.skip(_BETWEEN)
            self._release()
        except Mismatch:
            no_call = self._hold is not None or (
                self._index == n_before and not self._draft.started
            )
            cut_off = source.pos >= len(source.text) and _NO_CODE.match(source.text)
            if runs and no_call and not cut_off:
                self._take_back()
                source.pos = 0
                yield from self._code()
            else:
                yield from self._give_up()

    def _code(self) -> Steps[None]:
        """Everything that is left, as source code."""
        source = self._source
        draft = self._draft = _Draft(_CODE, json=['{"code": "'])
        self._start(draft, certain=True)
        while (yield from source.peek()):
            draft.json.append(escaped(source.text[source.pos :]))
            source.pos = len(source.text)
        draft.json.append('"}')
        self._end(draft)

    # --- the forms of a call --------------------------------------------------------------------

    def _call(self, bare: bool) -> Steps[None]:
        """One call or list of calls in any form; `bare` allows `name(...)` without brackets."""
        c = yield from self._source.peek()
        self._called_at = self._source.pos
        self._opened = self._source.pos if c in ("{", "[") else None
        if c == "{":
            yield from self._json_call()
        elif c == "[":
            yield from self._list()
        elif c == "<":
            yield from self._function_tag()
        else:
            openings = (".call(", "(") if bare and self._names else (".call(",)
            names = self._names if bare or self._names else BUILTIN_CALLS
            yield from self._keyword_call(openings, names)
        self._mark = self._source.pos
        self._opened = None

    def _json_call(self) -> Steps[None]:
        draft = self._draft = _Draft()
        yield from self._members(draft, nested=False)
        if not draft.ended:
            if draft.name is None:
                raise Mismatch
            draft.json, draft.complete = ["{}"], True
            self._settle(draft)

    def _members(self, draft: _Draft, nested: bool) -> Steps[None]:
        source = self._source
        yield from source.take("{")
        while (yield from source.token()) != "}":
            if draft.ended:  # the call stands; whatever else the object says is skipped
                yield from read_value(source, [], ":")
                yield from source.token()
                yield from source.take(":")
                yield from read_value(source, [], ",}")
            else:
                key = yield from self._quoted(_CALL_KEYS)
                yield from source.token()
                yield from source.take(":")
                yield from source.token()
                yield from self._member(draft, key, nested)
                self._settle(draft)
            if (yield from source.token()) == ",":
                source.pos += 1
            elif (yield from source.peek()) != "}":
                raise Mismatch
        source.pos += 1

    def _member(self, draft: _Draft, key: str, nested: bool) -> Steps[None]:
        c = yield from self._source.peek()
        if key == "id":
            yield from read_value(self._source, [], ",}")
        elif key == "type":
            yield from self._quoted(_CALL_TYPES)
        elif key == "function" and c == "{" and not nested:
            yield from self._members(draft, nested=True)
        elif key in ("name", "function"):
            draft.name = yield from self._quoted(self._names)
            draft.held = draft.name in self._builtins
        else:
            yield from self._arguments(draft, c)

    def _arguments(self, draft: _Draft, c: str) -> Steps[None]:
        """An object, the JSON text of one (as OpenAI writes it), or null."""
        draft.json = []  # given twice, the last ones count
        if c == "{":
            if draft.name is not None:
                self._start(draft)
            yield from read_value(self._source, draft.json, ",}")
        else:
            out: list[str] = []
            yield from read_value(self._source, out, ",}")
            draft.json = [json.dumps(_object_in("".join(out)), ensure_ascii=False)]
        draft.complete = True

    def _function_tag(self) -> Steps[None]:
        source = self._source
        yield from source.take("<function=")
        name = yield from self._name((">", "{", "<"), self._names)
        draft = self._draft = _Draft(name, held=name in self._builtins)
        if source.text[source.pos - 1] != ">":  # a forgotten ">"
            source.pos -= 1
        if (yield from source.token()) == "{":
            self._start(draft)
            yield from read_value(source, draft.json, "<")
        else:
            yield from source.take("</function>")
            draft.json.append("{}")
        draft.complete = True
        self._settle(draft)
        end = source.pos
        if (yield from source.token()) and (yield from source.at("</function>")):
            yield from source.take("</function>")
        else:
            source.pos = end

    def _list(self) -> Steps[None]:
        """Calls in brackets: pythonic ones or JSON objects. All of them or none; the bracket at
        the end may be missing."""
        source = self._source
        alone = self._hold is None
        if alone:
            self._begin_hold()
        yield from source.take("[")
        while True:
            if (yield from source.token()) == "{":
                yield from self._json_call()
            else:
                yield from self._keyword_call(("(",), self._names)
            if (yield from source.token()) == ",":
                source.pos += 1
            if (yield from source.token()) in ("]", ""):
                break
        if not source.ended or source.pos < len(source.text):
            source.pos += 1
        if alone:
            self._release()

    def _keyword_call(self, openings: tuple[str, ...], names: frozenset[str] | None) -> Steps[None]:
        """One of `names` and of `openings`, then keyword arguments and ")"."""
        source = self._source
        name = yield from self._name(openings, names)
        draft = self._draft = _Draft(name, held=name in self._builtins)
        out = draft.json
        out.append("{")
        while (yield from source.token()) != ")":
            key = yield from self._keyword()
            out.append(f'{", " if len(out) > 1 else ""}"{key}": ')
            self._start(draft)
            yield from read_value(source, out, ",)")
            if (yield from source.token()) == ",":
                source.pos += 1
            elif (yield from source.peek()) != ")":
                raise Mismatch
        source.pos += 1
        out.append("}")
        draft.complete = True
        self._settle(draft)

    def _keyword(self) -> Steps[str]:
        source = self._source
        start = source.pos
        while (c := (yield from source.peek())).isalnum() or c == "_":
            source.pos += 1
        word = source.text[start : source.pos]
        if not word.isidentifier():
            raise Mismatch
        yield from source.token()
        yield from source.take("=")
        return word

    # --- names ----------------------------------------------------------------------------------

    def _quoted(self, words: frozenset[str] | None) -> Steps[str]:
        """One of `words` in quotes."""
        quote = yield from self._source.peek()
        if quote not in ('"', "'"):
            raise Mismatch
        self._source.pos += 1
        return (yield from self._name((quote,), words))

    def _name(self, ends: tuple[str, ...], names: frozenset[str] | None) -> Steps[str]:
        """One of `names` and one of `ends`, consumed; fails as soon as it can be neither."""
        start = self._source.pos
        while True:
            word = self._source.text[start : self._source.pos]
            for end in ends:
                name = word.removesuffix(end)
                if name != word and (name in names if names is not None else _is_name(name)):
                    return name
            c = yield from self._source.peek()
            if not c or not _may_become(word + c, ends, names):
                raise Mismatch
            self._source.pos += 1

    # --- what comes out -------------------------------------------------------------------------

    def _text(self, text: str) -> None:
        """Text that is certain; white space at its end waits to see whether a call follows."""
        if self._names == frozenset():
            self._events.append(TextDelta(text))
            return
        text = self._gap + text
        if self._after_call:
            if not text.strip(_BETWEEN_CHARS):
                self._gap = text
                return
            self._after_call = False
            if not self._any_text:
                text = text.lstrip(_BETWEEN_CHARS)
        body = text.rstrip()
        self._gap = text[len(body) :]
        if body:
            self._any_text = True
            self._events.append(TextDelta(body))

    def _settle(self, draft: _Draft) -> None:
        """Start and end the call if both its name and its arguments are known."""
        if draft.name is None or not draft.complete or draft.ended:
            return
        judge = None if draft.started else self._judge
        if judge and not judge.admits(draft.name, json.loads("".join(draft.json))):
            raise Mismatch
        self._start(draft, certain=True)
        self._end(draft)

    def _start(self, draft: _Draft, *, certain: bool = False) -> None:
        """Tells of the call, unless it may yet turn out to be none."""
        if not draft.started:
            assert draft.name is not None
            source = self._source.text[self._called_at : self._source.pos]
            if not certain and self._judge and not self._judge.enforced(draft.name, source):
                return
            draft.started = True
            draft.id = self._call_id(self._index)
            self._emit(ToolCallStart(self._index, draft.id, draft.name))

    def _flush(self) -> None:
        """Send what is there of the arguments of the call being read."""
        draft = self._draft
        if draft.started and not draft.held and (new := "".join(draft.json[draft.n_sent :])):
            draft.n_sent = len(draft.json)
            self._emit(ToolCallArgumentsDelta(self._index, new))

    def _end(self, draft: _Draft) -> None:
        assert draft.name is not None
        arguments = json.loads("".join(draft.json))
        if draft.held:
            arguments = _builtin_arguments(draft.name, arguments)
            draft.json, draft.held = [json.dumps(arguments, ensure_ascii=False)], False
        self._flush()
        self._emit(ToolCallEnd(self._index, ToolCall(draft.name, arguments, draft.id)))
        self._leave(draft)
        self._gap = ""
        self._after_call = True
        self._mark = self._source.pos

    def _emit(self, event: Event) -> None:
        (self._events if self._hold is None else self._hold.events).append(event)

    def _begin_hold(self) -> None:
        self._hold = _Hold(self._index, self._gap, self._after_call, self._mark)

    def _release(self) -> None:
        """What was held is certain."""
        if self._hold is not None:
            self._events += self._hold.events
            self._hold = None

    def _take_back(self) -> None:
        """The call being read is none, nor are those that were held with it."""
        if self._hold is not None:
            self._index, self._gap = self._hold.index, self._hold.gap
            self._after_call, self._mark = self._hold.after_call, self._hold.mark
            self._hold = None
            self._draft = _Draft()
        elif self._draft.started and not self._draft.ended:
            self._flush()  # so that the events do not tell how the text was cut
            self._events.append(ToolCallAbort(self._index))
            self._leave(self._draft)

    def _leave(self, draft: _Draft) -> None:
        draft.ended = True
        self._index += 1
        self._draft = _Draft()


def _trigger(names: frozenset[str] | None) -> re.Pattern[str] | None:
    """What may begin a call in text: brackets and quotes of the wrapped forms, and at the start of
    a word the first letter of a name that can be called; None if nothing can be called."""
    if names == frozenset():
        return None
    firsts = "".join(sorted({re.escape(name[0]) for name in names or BUILTIN_CALLS}))
    return re.compile(rf"[{{\[<`]|(?<![\w.])[{firsts}]")


def _random_id(index: int) -> str:
    return "call_" + os.urandom(12).hex()


def _is_name(text: str) -> bool:
    return _ANY_NAME.fullmatch(text) is not None


def _may_become(word: str, ends: tuple[str, ...], names: frozenset[str] | None) -> bool:
    """Whether one of `names` (None: any name) and one of `ends` can begin with `word`."""
    if names is not None:
        return any((name + end).startswith(word) for name in names for end in ends)
    begun = _is_name(word[:-1]) or len(word) == 1
    return begun and (_is_name(word[-1]) or word[-1] in {end[-1] for end in ends})


def _builtin_arguments(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Built-in tools have one argument; called as custom tools, models give it other names."""
    key = "code" if name == _CODE else "query"
    return {key: next(iter(arguments.values()))} if len(arguments) == 1 else arguments


def _object_in(text: str) -> dict[str, Any]:
    """The object that JSON `text` stands for: null none, a string the object written in it."""
    value = json.loads(text)
    if isinstance(value, str):
        try:
            value = json.loads(value, strict=False, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise Mismatch from None
    if value is not None and not isinstance(value, dict):
        raise Mismatch
    return value or {}


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _merged(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring texts joined."""
    merged: list[Event] = []
    for event in events:
        if merged and isinstance(event, TextDelta) and isinstance(last := merged[-1], TextDelta):
            merged[-1] = TextDelta(last.text + event.text)
        else:
            merged.append(event)
    return merged
