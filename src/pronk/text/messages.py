"""Chat messages as plain values, and their OpenAI wire shape.

Everything that renders or parses a chat works on `Message`; the dictionaries that users write are
checked here, once, so that a wrong key is an error and never a silently ignored wish. No tokens
and no prompt text here: see chat.py, template.py and tools.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pronk.core.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "ipython": "tool",
}
_KEYS: dict[Role, frozenset[str]] = {
    "system": frozenset({"role", "content", "name"}),
    "user": frozenset({"role", "content", "name"}),
    "assistant": frozenset({"role", "content", "name", "tool_calls"}),
    "tool": frozenset({"role", "content", "name", "tool_call_id"}),
}
# Fields of a reply that clients send back as they got it. Empty they say nothing; filled they ask
# for something that cannot be rendered.
_EMPTY_ONLY = frozenset({"refusal", "audio", "annotations", "function_call"})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the assistant asks for; `arguments` holds JSON values only."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` belongs to assistant messages, `tool_call_id` to tool results."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


def messages_from_dicts(dicts: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages from OpenAI chat dictionaries.

    Content is a string or a list of `{"type": "text", "text": ...}` parts (joined without a
    separator); an assistant message with tool calls may have none. Role `developer` becomes
    `system`, `ipython` becomes `tool`. Raises UserError naming the index and the key.
    """
    if isinstance(dicts, str | bytes | Mapping) or not isinstance(dicts, Sequence):
        raise UserError(f"messages: expected a list of messages, got {type(dicts).__name__}")
    if not dicts:
        raise UserError("messages: the list is empty; a chat needs at least one message")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(dicts)]


def to_dict(message: Message) -> dict[str, Any]:
    """The OpenAI shape of a message; `messages_from_dicts([to_dict(m)]) == [m]`."""
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        out["content"] = message.content or None
        out["tool_calls"] = [_call_dict(call) for call in message.tool_calls]
    for key in ("tool_call_id", "name"):
        if (value := getattr(message, key)) is not None:
            out[key] = value
    return out


def _call_dict(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    out: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
    return out if call.id is None else {"id": call.id, **out}


def _message(item: object, where: str) -> Message:
    fields = check_object(item, where)
    role = _role(fields.get("role"), f"{where}.role")
    _check_keys(fields, role, where)
    calls = _tool_calls(fields.get("tool_calls"), f"{where}.tool_calls")
    return Message(
        role,
        _content(fields.get("content"), f"{where}.content", optional=bool(calls)),
        calls,
        _optional_text(fields, "tool_call_id", where),
        _optional_text(fields, "name", where),
    )


def _role(value: object, where: str) -> Role:
    if not isinstance(value, str) or value not in _ROLES:
        raise UserError(f"{where}: unknown role {value!r}; use one of {', '.join(_ROLES)}")
    return _ROLES[value]


def _check_keys(fields: Mapping[str, Any], role: Role, where: str) -> None:
    for key, value in fields.items():
        if key in _KEYS[role] or (key in _EMPTY_ONLY and value in (None, [])):
            continue
        known = ", ".join(sorted(_KEYS[role]))
        raise UserError(f"{where}.{key}: unknown key in a {role} message; known are {known}")


def _content(value: object, where: str, optional: bool) -> str:
    if isinstance(value, str):
        return check_text(value, where)
    if isinstance(value, list):
        return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
    if value is None and optional:
        return ""
    raise UserError(f"{where}: expected text or a list of text parts, got {_kind(value)}")


def _part(value: object, where: str) -> str:
    part = check_object(value, where)
    if part.get("type") != "text":
        raise UserError(f"{where}.type: only 'text' parts are supported, got {part.get('type')!r}")
    if extra := sorted(part.keys() - {"type", "text"}):
        raise UserError(f"{where}.{extra[0]}: unknown key in a text part; known are text, type")
    return check_text(part.get("text"), f"{where}.text")


def _optional_text(fields: Mapping[str, Any], key: str, where: str) -> str | None:
    value = fields.get(key)
    return None if value is None else check_text(value, f"{where}.{key}")


def _tool_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list of calls, got {_kind(value)}")
    return tuple(_tool_call(item, f"{where}[{i}]") for i, item in enumerate(value))


def _tool_call(value: object, where: str) -> ToolCall:
    call = check_object(value, where)
    if extra := sorted(call.keys() - {"id", "type", "function"}):
        raise UserError(f"{where}.{extra[0]}: unknown key; known are function, id, type")
    if call.get("type", "function") != "function":
        raise UserError(f"{where}.type: must be 'function', got {call['type']!r}")
    function = check_object(call.get("function"), f"{where}.function")
    if extra := sorted(function.keys() - {"name", "arguments"}):
        raise UserError(f"{where}.function.{extra[0]}: unknown key; known are arguments, name")
    name = check_text(function.get("name"), f"{where}.function.name")
    if not name:
        raise UserError(f"{where}.function.name: must not be empty")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    return ToolCall(name, arguments, _optional_text(call, "id", where))


def _arguments(value: object, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = _json_object(value, where) if value.strip() else {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object or its text, got {_kind(value)}")
    check_json(value, where)
    return value


def _json_object(text: str, where: str) -> object:
    try:
        return cast(object, json.loads(text, parse_constant=_no_constant))
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not the text of a JSON object: {_short(text)}") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON


def check_json(value: object, where: str) -> None:
    """Refuse what cannot be written as JSON in UTF-8, naming `where`."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not writable as JSON: {error}") from None


def check_object(value: object, where: str) -> dict[str, Any]:
    """`value` as a dictionary with text keys, or UserError naming `where`."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected an object, got {_kind(value)}")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{where}: keys must be text, got {key!r}")
    return dict(value)


def check_text(value: object, where: str) -> str:
    """`value` as a string that UTF-8 can hold, or UserError naming `where`."""
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = value[error.start]
        raise UserError(f"{where}: lone surrogate {bad!r} at {error.start} is not text") from None
    return value


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
