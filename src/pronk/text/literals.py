"""Reads JSON and Python literals from text that arrives in pieces, and writes them as JSON.

Models mix both notations, forget to escape quotes, and stop in the middle. `read_value` accepts
what can be read in one way only and appends canonical JSON (the text `json.dumps` would write) to
a list while it goes, so that the arguments of a call can be streamed before the call is complete.

Every reader here is a generator that is resumed when more text is there (`Steps`); what it does
depends on the characters alone and never on how they were cut into pieces. Not a validator: parse
errors raise Mismatch, which parse.py turns back into plain text.
"""

import json
import math
import re
from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")
Steps = Generator[None, None, _T]
"""A reader that yields when it needs text that has not arrived, and returns what it read."""

MAX_DEPTH = 64
"""Nesting beyond this is no argument of a call."""


class Mismatch(Exception):
    """The next character cannot continue what is being read."""


class Source:
    """Text read so far and what of it has been consumed; `ended` when no more will come."""

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.ended = False

    def push(self, text: str) -> None:
        self.text += text

    def forget(self) -> None:
        """Drop consumed text except its last character, which look-behind needs."""
        if self.pos > 1:
            self.text, self.pos = self.text[self.pos - 1 :], 1

    def peek(self, ahead: int = 0) -> Steps[str]:
        """The character `ahead` of the position, "" at the end."""
        while self.pos + ahead >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.pos + ahead]

    def skip(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Consume characters while each matches `pattern`; the next one (or "" at the end)."""
        while (c := (yield from self.peek())) and pattern.match(c):
            self.pos += 1
        return c

    def token(self) -> Steps[str]:
        """Consume white space; the next character."""
        return (yield from self.skip(_SPACE))

    def at(self, literal: str, any_case: bool = False) -> Steps[bool]:
        """Whether `literal` (in small letters, if `any_case`) comes next; waits only while it still
        may."""
        for i, expected in enumerate(literal):
            c = yield from self.peek(i)
            if (c.lower() if any_case else c) != expected:
                return False
        return True

    def take(self, literal: str) -> Steps[None]:
        """Consume `literal` or fail at the first character that differs."""
        for expected in literal:
            if (yield from self.peek()) != expected:
                raise Mismatch
            self.pos += 1


_SPACE = re.compile(r"\s")
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_PLAIN = re.compile(r"[^\"'\\]+")
_WORD = re.compile(r"[\w.+-]")
_KEY = re.compile(r"[^\W\d]\w*")
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)", re.ASCII)
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_MAX_WORD = 400
_CONSTANTS = {"true": "true", "True": "true", "false": "false", "False": "false",
              "null": "null", "None": "null"}  # fmt: skip
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v",
            "0": "\0", "\n": "", '"': '"', "'": "'", "\\": "\\", "/": "/"}  # fmt: skip
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


def read_value(source: Source, out: list[str], ends: str, depth: int = 0) -> Steps[None]:
    """Read one value and append it to `out` as JSON.

    `ends` are the characters that may follow: a quote that none of them follows (white space
    aside) is taken for part of the string, because models forget to escape quotes.
    """
    c = yield from source.token()
    if not c or depth > MAX_DEPTH:
        raise Mismatch
    if c == "{":
        yield from _object(source, out, depth + 1)
    elif c in "[(":
        yield from _list(source, out, depth + 1)
    elif c in "\"'":
        yield from read_string(source, out, ends)
    else:
        yield from _atom(source, out)


def _object(source: Source, out: list[str], depth: int) -> Steps[None]:
    yield from source.take("{")
    out.append("{")
    first = True
    while (yield from source.token()) != "}":
        out.append("" if first else ", ")
        first = False
        yield from _key(source, out)
        out.append(": ")
        yield from read_value(source, out, ",}", depth)
        if (yield from source.token()) == ",":
            source.pos += 1
        elif (yield from source.peek()) != "}":
            raise Mismatch
    source.pos += 1
    out.append("}")


def _key(source: Source, out: list[str]) -> Steps[None]:
    """A key and its separator: quoted or bare, `:` or (Meta's pythonic encoder) `=`."""
    if (yield from source.token()) in ('"', "'"):
        yield from read_string(source, out, ":=")
    else:
        word = yield from _word(source)
        if not _KEY.fullmatch(word):
            raise Mismatch
        out.append(json.dumps(word, ensure_ascii=False))
    if (yield from source.token()) not in (":", "="):
        raise Mismatch
    source.pos += 1


def _list(source: Source, out: list[str], depth: int) -> Steps[None]:
    """A JSON or Python list, or a tuple."""
    close = "]" if (yield from source.peek()) == "[" else ")"
    source.pos += 1
    out.append("[")
    first = True
    while (yield from source.token()) != close:
        out.append("" if first else ", ")
        first = False
        yield from read_value(source, out, "," + close, depth)
        if (yield from source.token()) == ",":
            source.pos += 1
        elif (yield from source.peek()) != close:
            raise Mismatch
    source.pos += 1
    out.append("]")


def skip_container(source: Source) -> Steps[None]:
    """Consume one `{...}` or `[...]` of JSON or of Python, calls included, at any depth.

    Fails where no such text can go on: at prose, or where a value follows another one.
    """
    closing: list[str] = []
    after_value = False
    while True:
        c = yield from source.token()
        if c in _CLOSING and (not after_value or c == "("):
            closing.append(_CLOSING[c])
            after_value = False
        elif closing and c == closing[-1]:
            closing.pop()
            after_value = True
        elif c and c in ",:=":
            after_value = False
        elif after_value or not c:
            raise Mismatch
        elif c in "\"'":
            yield from _skip_string(source, c)
            after_value = True
        else:
            yield from _skip_word(source)
            after_value = True
            continue
        source.pos += 1
        if not closing:
            return


def _skip_word(source: Source) -> Steps[None]:
    start = source.pos
    yield from source.skip(_WORD)
    if source.pos == start:
        raise Mismatch


def _skip_string(source: Source, quote: str) -> Steps[None]:
    """Up to the quote that ends the string."""
    source.pos += 1
    while (c := (yield from source.peek())) != quote:
        if not c:
            raise Mismatch
        if c == "\\" and (yield from source.peek(1)):
            source.pos += 1
        source.pos += 1


def read_string(source: Source, out: list[str], ends: str) -> Steps[None]:
    """A string in single, double or tripled quotes; see `read_value` for `ends`."""
    quote = yield from source.peek()
    source.pos += 1
    if (yield from source.at(quote * 2)):
        source.pos += 2
        quote *= 3
    out.append('"')
    while True:
        c = yield from source.peek()
        if not c:
            raise Mismatch
        if run := _PLAIN.match(source.text, source.pos):
            out.append(escaped(run.group()))
            source.pos = run.end()
        elif c == "\\":
            source.pos += 1
            out.append(escaped((yield from _escape(source))))
        elif (yield from source.at(quote)) and (yield from _closes(source, ends, len(quote) - 1)):
            break
        else:
            out.append(escaped(c))
            source.pos += 1
    source.pos += len(quote)
    out.append('"')


def _closes(source: Source, ends: str, ahead: int) -> Steps[bool]:
    """Whether the quote `ahead` of the position ends its string, by what follows it."""
    while True:
        ahead += 1
        c = yield from source.peek(ahead)
        if not c or c in ends:
            return True
        if not _SPACE.match(c):
            return False


def _escape(source: Source) -> Steps[str]:
    """What the escape behind a backslash stands for; one that means nothing stays as it is."""
    c = yield from source.peek()
    if not c:
        raise Mismatch
    source.pos += 1
    if c in _ESCAPES:
        return _ESCAPES[c]
    if c not in _HEX_DIGITS:
        return "\\" + c
    code = yield from _hex(source, _HEX_DIGITS[c])
    if code is None:
        return "\\" + c
    if 0xD800 <= code < 0xDC00:
        code = yield from _surrogate_pair(source, code)
    return "\ufffd" if 0xD800 <= code < 0xE000 or code > 0x10FFFF else chr(code)


def _hex(source: Source, n: int) -> Steps[int | None]:
    """The number in `n` hexadecimal digits, consumed; None, and nothing consumed, if not there."""
    digits = ""
    for i in range(n):
        c = yield from source.peek(i)
        if not c or c not in "0123456789abcdefABCDEF":
            return None
        digits += c
    source.pos += n
    return int(digits, 16)


def _surrogate_pair(source: Source, high: int) -> Steps[int]:
    """The character of which `high` is the first half; `high` itself if no second half follows."""
    if not (yield from source.at("\\u")):
        return high
    source.pos += 2
    low = yield from _hex(source, 4)
    if low is not None and 0xDC00 <= low < 0xE000:
        return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00)
    source.pos -= 2 if low is None else 6
    return high


def _atom(source: Source, out: list[str]) -> Steps[None]:
    word = yield from _word(source)
    out.append(_CONSTANTS[word] if word in _CONSTANTS else _number(word))


def _word(source: Source) -> Steps[str]:
    start = source.pos
    while (c := (yield from source.peek())) and _WORD.match(c):
        source.pos += 1
        if source.pos - start > _MAX_WORD:
            raise Mismatch
    return source.text[start : source.pos]


def _number(word: str) -> str:
    if _INTEGER.fullmatch(word):
        return json.dumps(int(word))
    if not _NUMBER.fullmatch(word) or not math.isfinite(value := float(word)):
        raise Mismatch
    return json.dumps(value)


def escaped(text: str) -> str:
    """`text` as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
