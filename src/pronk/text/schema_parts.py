"""Parts of JSON schemas: what keywords may be, formats as regular expressions, patterns that every
dialect reads alike, constants that can be written exactly, and schemas that shut each other out."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from itertools import combinations
from typing import Any

TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP}-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_CLOCK})"

FORMATS: Mapping[str, tuple[str | None, int | None]] = {
    "date": (f"^{_DATE}$", None),
    "time": (f"^{_TIME}$", None),
    "date-time": (f"^{_DATE}T{_TIME}$", None),
    "duration": (None, None),
    "email": (None, 254),
    "hostname": (None, 253),
    "ipv4": (None, None),
    "ipv6": (None, None),
    "uuid": (None, None),
    "uri": (None, None),
}
"""A pattern of our own (RFC 3339 by the calendar, without leap seconds; None: llguidance's is
right) and the most characters (RFC 1123, RFC 5321)."""

_GROUP = re.compile(r"\(\?(?::|P?<[A-Za-z_]\w*>|[is]+[:)])")
_HEX = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})")


def check_pattern(pattern: str) -> str | None:
    """Why a regular expression cannot be enforced as JSON Schema means it (ECMA 262), or None.
    What is left has one meaning there, in Rust, which matches here, and, but for Python's letters
    and digits of all scripts, in Python; Rust itself refuses back references and the like."""
    in_class, i = False, 0
    while i < len(pattern):
        char, two = pattern[i], pattern[i : i + 2]
        if char == "\\":
            escaped = two[1:]
            if escaped in ("x", "u"):
                if not _HEX.match(pattern, i):
                    return f"the escape \\{escaped} needs its hexadecimal digits"
            elif not escaped or (escaped.isalnum() and escaped not in "dDwWsStnrfvpP"):
                return f"the escape {two} is not supported"
            i += 2
            continue
        if in_class:
            if char == "[" or two in ("&&", "--", "~~"):
                return (
                    f"{char if char == '[' else two} within [...] has several meanings; escape it"
                )
            in_class = char != "]"
        elif char == "[":
            in_class = True
            i += pattern.startswith("[^", i)
            if pattern.startswith("]", i + 1):
                return "a class that begins with ] has several meanings; escape it"
        elif two == "(?" and not _GROUP.match(pattern, i):
            return "look-around and special groups are not supported"
        elif char == "{" and pattern.startswith(",", i + 1):
            return "{,n} has several meanings; write {0,n}"
        i += 1
    return None


def check_constant(value: Any) -> str | None:
    """Why a value cannot be required exactly, or None."""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            exact = float(value) == value
        except OverflowError:
            exact = False
        return None if exact else f"{value} has more digits than a double holds"
    if isinstance(value, str) and re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]", value):
        return f"{value!r:.60} has control characters that cannot be written"
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(check_constant, inner)), None)


def decimal(value: int | float) -> tuple[int, int] | None:
    """Coefficient and exponent of a number `c / 10**e`, found as llguidance finds them; None if
    that way, by doubles, does not give them exactly."""
    try:
        scaled, exponent = float(value), 0
    except OverflowError:
        return None
    while not scaled.is_integer() and exponent < 20:
        scaled, exponent = scaled * 10, exponent + 1
    if Decimal(repr(value)) != Decimal(int(scaled)).scaleb(-exponent):
        return None
    return int(scaled), exponent


def disjoint(options: Sequence[Any], resolved: Callable[[Any], Any]) -> bool:
    """Whether no value can satisfy two of the schemas, as far as types, constants and constants of
    required properties tell; `resolved` follows references."""
    if (values := [_values(option) for option in options]) and None not in values:
        flat = [value for some in values if some is not None for value in some]
        return len(flat) == len(set(flat))
    return all(_shut_out(a, b, resolved) for a, b in combinations(options, 2))


def _shut_out(a: Any, b: Any, resolved: Callable[[Any], Any]) -> bool:
    a, b = resolved(a), resolved(b)
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return a is False or b is False
    mine, yours = _values(a), _values(b)
    if mine is not None and yours is not None:
        return not mine & yours
    common = _kinds(a) & _kinds(b)
    if common != {"object"}:
        return not common
    named, others = a.get("properties", {}), b.get("properties", {})
    return any(
        name in named and name in others and _shut_out(named[name], others[name], resolved)
        for name in [*a.get("required", ()), *b.get("required", ())]
    )


def _values(schema: Any) -> set[str] | None:
    """The values that a schema is limited to, as texts; None if it is not."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return {_canonical(schema["const"])}
    return set(map(_canonical, schema["enum"])) if "enum" in schema else None


def _canonical(value: Any) -> str:
    """A text that is the same for values that are the same in JSON."""

    def plain(part: Any) -> Any:
        if isinstance(part, float) and part.is_integer():
            return int(part)
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        return [plain(inner) for inner in part] if isinstance(part, list) else part

    return json.dumps(plain(value), sort_keys=True)


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    values = _values(schema)
    if values is not None:
        return {_kind(json.loads(value)) for value in values}
    kinds = schema.get("type")
    if kinds is None:
        return {"null", "boolean", "number", "string", "array", "object"}
    return {
        "number" if k == "integer" else k for k in ([kinds] if isinstance(kinds, str) else kinds)
    }


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "boolean"
    names = ((str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in names if isinstance(value, kind)), "number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_type(value: Any) -> bool:
    kinds = [value] if isinstance(value, str) else value
    return isinstance(kinds, list) and bool(kinds) and all(kind in TYPES for kind in kinds)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


COUNTS = frozenset(
    {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
)
SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"one or several of {', '.join(TYPES)}"),
    "enum": (_is_list, "a list of values"),
    "required": (_is_texts, "a list of names"),
    "pattern": (lambda value: isinstance(value, str), "a regular expression"),
    "format": (lambda value: isinstance(value, str), "the name of a format"),
    "$ref": (lambda value: isinstance(value, str), "a reference"),
    **dict.fromkeys(COUNTS, (_is_count, "a count")),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), (_is_number, "a number")),
    **dict.fromkeys(
        ("exclusiveMinimum", "exclusiveMaximum"),
        (lambda value: isinstance(value, int | float), "a number"),
    ),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), (_is_list, "a list of schemas")),
    **dict.fromkeys(
        ("properties", "patternProperties"),
        (lambda value: isinstance(value, dict), "an object of schemas"),
    ),
}
"""What a keyword must be, and what to say of one that is not."""
