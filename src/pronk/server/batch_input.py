"""The input of a batch: one JSON object a line,

    {"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

read line by line, for a file may be larger than memory. All of it is checked before anything runs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pronk.core.files import is_unicode

MOST_LINES = 50_000
MOST_ERRORS = 100
"""Further ones are not looked for."""
_CUSTOM_ID_LENGTH = 512
_NAMES = ("custom_id", "method", "url", "body")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """A line: its number in the file, from 1 on, and what it asks for."""

    line: int
    custom_id: str
    body: Json


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file holds: `total` lines, all for `model` if that is not None, or what is wrong, as
    OpenAI lists it."""

    total: int
    model: str | None
    errors: list[Json]


class _BadLine(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def check_input(path: Path, endpoint: str, max_line_bytes: int) -> Checked:
    """Reads a whole file and lists what is wrong with it."""
    errors: list[Json] = []
    lines: dict[str, int] = {}
    models: set[str | None] = set()
    for number, data in _lines(path, max_line_bytes):
        try:
            if len(lines) == MOST_LINES:
                raise _BadLine("too_many_lines", f"A batch has at most {MOST_LINES} lines.")
            item = _item(number, data, endpoint, max_line_bytes)
            if (first := lines.setdefault(item.custom_id, number)) != number:
                raise _BadLine(
                    "duplicate_custom_id",
                    f"The custom_id {item.custom_id!a:.80} is that of line {first}, too.",
                    "custom_id",
                )
        except _BadLine as bad:
            error = {"code": bad.code, "message": bad.message, "param": bad.param, "line": number}
            errors.append(error)
            if len(errors) == MOST_ERRORS or bad.code == "too_many_lines":
                break
        else:
            model = item.body.get("model")
            models.add(model if isinstance(model, str) and is_unicode(model) else None)
    if not lines and not errors:
        message = "The input file is empty."
        errors.append({"code": "empty_file", "message": message, "param": None, "line": None})
    return Checked(len(lines), models.pop() if len(models) == 1 else None, errors)


def read_input(path: Path, endpoint: str, max_line_bytes: int) -> Iterator[Item]:
    """The lines of a file that was checked."""
    for number, data in _lines(path, max_line_bytes):
        yield _item(number, data, endpoint, max_line_bytes)


def _lines(path: Path, most: int) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers. Blank ones count only if something follows them; of one that is
    longer than `most` bytes one byte more is given."""
    blank: list[int] = []
    number = 0
    with open(path, "rb") as file:
        while line := file.readline(most + 1):
            number += 1
            if len(line) > most and not line.endswith(b"\n"):
                _skip_line(file.readline)
            if not line.strip():
                blank.append(number)
                continue
            yield from ((at, b"") for at in blank)
            blank.clear()
            yield number, line


def _skip_line(readline: Any) -> None:
    while (rest := readline(1 << 20)) and not rest.endswith(b"\n"):
        pass


def _item(number: int, data: bytes, endpoint: str, max_line_bytes: int) -> Item:
    """_BadLine says what is wrong."""
    if not data:
        raise _BadLine("invalid_json_line", "This line is blank.")
    if len(data) > max_line_bytes:
        raise _BadLine("line_too_long", f"This line has more than {max_line_bytes} bytes.")
    fields = _parse(data)
    for name in _NAMES:
        if name not in fields:
            raise _BadLine("missing_required_parameter", f"{name!r} is missing.", name)
    if unknown := fields.keys() - set(_NAMES):
        name = min(unknown)[:80]
        raise _BadLine("unknown_parameter", f"{name!a} is not known; nothing is ignored.", name)
    custom_id, method, url, body = (fields[name] for name in _NAMES)
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _CUSTOM_ID_LENGTH:
        raise _bad_value("custom_id", f"a text of 1 to {_CUSTOM_ID_LENGTH} characters", custom_id)
    if method != "POST":
        raise _BadLine("invalid_method", f"'method' must be 'POST', is {method!a:.80}.", "method")
    if url != endpoint:
        message = f"'url' must be the endpoint of the batch, {endpoint!r}, is {url!a:.80}."
        raise _BadLine("invalid_url", message, "url")
    if not isinstance(body, dict):
        raise _bad_value("body", "an object", body)
    if body.get("stream"):
        raise _bad_value("body.stream", "false: a batch has nobody to stream to", body["stream"])
    return Item(number, custom_id, body)


def _bad_value(name: str, wanted: str, value: object) -> _BadLine:
    return _BadLine("invalid_value", f"{name!r} must be {wanted}, is {value!a:.80}.", name)


def _parse(data: bytes) -> Json:
    try:
        fields = json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise _BadLine("invalid_json_line", "This line is not UTF-8.") from None
    except RecursionError:
        raise _BadLine("invalid_json_line", "This line is nested too deeply.") from None
    except ValueError as error:
        raise _BadLine("invalid_json_line", f"This line is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise _BadLine("invalid_json_line", "This line is no JSON object.")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
