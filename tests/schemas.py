"""200 JSON schemas of growing difficulty, always the same ones, whose answers end within some 300
tokens: strings and lists have a most, and what holds itself may leave that out."""

import random
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]
NAMES = [
    'say "hi"',
    "back\\slash",
    "é",
    "日本",
    "🙂",
    "",
    "a b",
    "tab\there",
    "$ref",
    "a/b~c",
    "\u0001",
]
FORMATS = [
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
]  # fmt: skip
PATTERNS = [
    "^[a-f]{2,4}$", r"^\d{3}-\d{2}$", r"^\w{1,5}$", "^(ab|cd|e?f){1,3}$", "^$", "^[^a-z]{2}$",
    r"^\s?x\.y$", "^[éü日]{1,3}$", r"^\"\\[\]]{1,2}$", "^(?:a|b)?c{0,3}$", r"^[\w.]{1,4}@x\.org$",
    r"^\u0041[\x42-\x44]$", "^a|^b$", r"^\/a\/$",
]  # fmt: skip


def schemas() -> list[Schema]:
    """In levels: values, numbers, strings, lists, objects, combinations, references, the shapes of
    real programs, and nests of all of these drawn at random."""
    levels = [
        _values(), _numbers(), _strings(), _lists(), _objects(), _combinations(), _references(),
        _programs(),
    ]  # fmt: skip
    found = [schema for level in levels for schema in level]
    rng = random.Random(0)
    n_rest = 200 - len(found)
    while (n_missing := 200 - len(found)) > 0:
        schema = _nest(rng, 6 - 6 * (n_missing - 1) // n_rest)
        if schema not in found:
            found.append(schema)
    return found


def text(most: int = 6, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def thing(required: list[str] | None = None, /, **properties: Any) -> Schema:
    """An object of just these properties, all required unless told which."""
    names = list(properties) if required is None else required
    return {
        "type": "object", "properties": properties, "required": names,
        "additionalProperties": False,
    }  # fmt: skip


def _values() -> Iterator[Schema]:
    for kind in ("null", "boolean", "integer"):
        yield {"type": kind}
    yield {"type": ["boolean", "null"]}
    yield {"type": ["integer", "null", "string"], "maxLength": 3}
    for value in (
        None,
        True,
        0,
        -7,
        1.5,
        1.0,
        1e30,
        -0.25,
        "",
        'é\n"\\\t/',
        "🙂",
        [],
        {},
        [1, [None]],
    ):
        yield {"const": value}
    yield {"const": {"a": [1, {"b c": "\\"}], "": None}}
    yield {"enum": ["red", 3, None, {"a": [1]}, False, 2.5]}
    yield {"type": "string", "enum": ["a", 1, None, "b\n"]}
    yield {"enum": [f"item-{i:03}" for i in range(1000)]}
    yield {"enum": list(range(-50, 2000, 7))}
    yield {"title": "T", "description": "d", "examples": [1], "default": 1, "const": 2}


def _numbers() -> Iterator[Schema]:
    for low, high in (
        (0, 0),
        (0, 9),
        (-5, 5),
        (10, 99),
        (-1000, -998),
        (7, 12345),
        (-(2**53), 2**53),
    ):
        yield {"type": "integer", "minimum": low, "maximum": high}
    yield {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}
    yield {"type": "integer", "minimum": -0.5, "maximum": 1.5}
    yield {"type": "integer", "minimum": 2**60 + 1, "maximum": 2**63 - 1}
    yield {"type": "integer", "minimum": -(2**63), "maximum": 2**64}
    yield {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 7}
    yield {"type": "integer", "multipleOf": 12, "minimum": -60, "maximum": 60}
    yield {"type": "number"}
    yield {"type": "number", "minimum": 0}
    yield {"type": "number", "minimum": -1.5, "maximum": 1.25}
    yield {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    yield {"type": "number", "exclusiveMinimum": 0}
    yield {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.01}
    yield {"type": "number", "minimum": 0, "maximum": 99, "multipleOf": 0.5}
    yield {"type": "number", "minimum": 0.1, "maximum": 0.3}
    yield {"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 9}


def _strings() -> Iterator[Schema]:
    for low, high in ((0, 0), (1, 1), (0, 8), (5, 7)):
        yield {"type": "string", "minLength": low, "maxLength": high}
    for pattern in PATTERNS:
        yield text(12, pattern=pattern)
    for form in FORMATS:
        yield text({"uuid": 36, "date-time": 40}.get(form, 30), format=form)
    yield text(12, minLength=3, pattern="^[a-z]*$")
    yield text(10, format="date", pattern="^2")


def _lists() -> Iterator[Schema]:
    yield {"type": "array", "items": {"type": "boolean"}, "maxItems": 0}
    yield {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
    yield {"type": "array", "items": False}
    yield {"type": "array", "items": text(3), "maxItems": 4}
    yield {"type": "array", "prefixItems": [{"type": "integer"}, text(2)], "items": False}
    yield {
        "type": "array", "prefixItems": [{"const": 1}], "items": {"type": "null"}, "maxItems": 4,
    }  # fmt: skip
    yield {
        "type": "array",
        "prefixItems": [{"const": i} for i in "abc"],
        "items": False,
        "minItems": 2,
    }
    yield {"items": {"type": "null"}, "type": "array", "maxItems": 9, "minItems": 9}
    yield {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "array",
        "items": [{"type": "integer"}], "allOf": [{"minItems": 1}], "additionalItems": False,
    }  # fmt: skip
    for depth in (2, 4, 6):
        inner: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
        for _ in range(depth):
            inner = {"type": "array", "items": inner, "minItems": 1, "maxItems": 2}
        yield inner


def _objects() -> Iterator[Schema]:
    bit = {"enum": [0, 1]}
    yield thing()
    yield thing(id={"type": "integer", "minimum": 0, "maximum": 9}, ok={"const": True})
    yield thing([], a=bit, b=bit, c=bit)
    yield thing(["c"], a=bit, b=bit, c=bit)
    yield thing(**{f"p{i}": bit for i in range(15)})
    yield thing(["p3", "p27"], **{f"p{i}": bit for i in range(30)})
    for name in NAMES:
        yield thing(**{name: bit, "z" + name: bit})
    yield {"type": "object", "additionalProperties": bit, "maxProperties": 2}
    yield {
        "type": "object", "properties": {"a": {"type": "integer"}, "n\n": {"type": "null"}},
        "required": ["a"], "additionalProperties": {"type": "boolean"}, "maxProperties": 3,
    } | {"required": ["a", "n\n"]}  # fmt: skip
    yield {
        "type": "object", "patternProperties": {"^x[0-9]$": bit}, "additionalProperties": False,
        "minProperties": 1, "maxProperties": 2,
    }  # fmt: skip
    yield {
        "type": "object", "properties": {"x1": {}}, "patternProperties": {"^x[0-9]$": bit},
        "anyOf": [{"required": ["x1"]}], "additionalProperties": False, "required": ["x1", "x2"],
    }  # fmt: skip
    yield thing([], a=bit, b=bit, c=bit) | {"minProperties": 1}
    yield thing([], a=bit, b=bit, c=bit) | {"minProperties": 1, "maxProperties": 1}
    yield {"type": "object", "required": ["new"], "additionalProperties": bit, "maxProperties": 1}
    yield thing(["a"], a=bit, b=False)


def _combinations() -> Iterator[Schema]:
    small = {"type": "integer", "minimum": 0, "maximum": 9}
    yield {"anyOf": [small, {"type": "null"}, text(3)]}
    yield {
        "anyOf": [thing(a=small), thing(b=small), {"type": "array", "items": small, "maxItems": 2}]
    }
    yield {
        "type": "integer",
        "anyOf": [{"maximum": 5}, {"minimum": 90}],
        "minimum": 0,
        "maximum": 99,
    }
    yield {"oneOf": [{"type": "integer"}, {"type": "null"}]}
    yield {"oneOf": [{"const": 1}, {"const": 2}, {"enum": [3, "x"]}]}
    yield {"oneOf": [thing(kind={"const": k}, v=small) for k in ("cat", "dog", "eel")]}
    yield {"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}
    yield {"allOf": [text(6), {"pattern": "^a"}, {"pattern": "b$"}]}
    yield {
        "allOf": [
            {"type": "object", "properties": {"a": small}, "required": ["a"]},
            {"properties": {"b": text(2), "a": {"maximum": 3}}, "required": ["b"]},
            {"additionalProperties": {"type": "null"}, "maxProperties": 2,
             "properties": {"a": True, "b": True}, "required": ["a", "b"]},
        ]
    }  # fmt: skip
    yield {"enum": [1, "1", [1], None], "type": ["string", "array"]}
    yield {"type": "string", "anyOf": [{"const": "x"}, {"maxLength": 2, "minLength": 1}]}
    yield {"allOf": [{"anyOf": [{"multipleOf": 2}, {"multipleOf": 3}]}], **small}
    yield thing(["a"], a={"anyOf": [small, {"type": "null"}], "default": None}, b=text(2))
    yield {"anyOf": [{"anyOf": [{"anyOf": [{"const": [i]} for i in range(3)]}]}, {"const": "z"}]}


def _references() -> Iterator[Schema]:
    yield {"$ref": "#/$defs/a", "$defs": {"a": {"type": "boolean"}}}
    yield {"$ref": "#/definitions/a%20b~1c", "definitions": {"a b/c": {"enum": [1, 2]}}}
    yield {
        "$ref": "#/$defs/d0",
        "$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(60)}, "d60": text(2)},
    }
    yield {**thing(a=text(3), b={"$ref": "#/properties/a"}), "$id": "https://example.org/s"}
    yield {**thing([], v={"type": "boolean"}, next={"$ref": "#"})}
    node = thing(v={"enum": [1, 2]}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})
    yield {"$ref": "#/$defs/node", "$defs": {"node": node}}
    tree = thing(
        ["n"],
        n={"enum": [0]},
        kids={"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1},
    )
    yield {"$defs": {"t": tree}, **thing(root={"$ref": "#/$defs/t"})}
    ping, pong = (
        thing(["p"], p={"const": 1}, q={"$ref": "#/$defs/b"}),
        thing([], r={"$ref": "#/$defs/a"}),
    )
    yield {"$defs": {"a": ping, "b": pong}, "$ref": "#/$defs/a"}
    yield {"$ref": "#/$defs/n", "maximum": 3, "$defs": {"n": {"type": "integer", "minimum": 1}}}
    yield {
        "$defs": {"e": {"oneOf": [
            thing(op={"const": "num"}, v={"enum": [1, 2]}),
            thing(op={"const": "neg"}, of={"$ref": "#/$defs/e"}),
        ]}},
        "$ref": "#/$defs/e",
    }  # fmt: skip
    yield {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}


def _programs() -> Iterator[Schema]:
    """What invoices, calendars and calls of functions look like, and what pydantic writes."""
    money = {"type": "number", "minimum": 0, "maximum": 999, "multipleOf": 0.01}
    line = thing(what=text(8), n={"type": "integer", "minimum": 1, "maximum": 9}, price=money)
    yield thing(
        number=text(9, pattern="^INV-[0-9]{4}$"), date=text(10, format="date"),
        lines={"type": "array", "items": line, "minItems": 1, "maxItems": 2}, total=money,
        currency={"enum": ["EUR", "USD", "JPY"]},
    )  # fmt: skip
    yield thing(
        ["title", "start"], title=text(10), start={"type": "string", "format": "date-time"},
        allDay={"type": "boolean"}, place={"type": ["string", "null"], "maxLength": 5},
        guests={"type": "array", "items": text(12, format="email"), "maxItems": 2},
    )  # fmt: skip
    yield thing(
        ["city"],
        city=text(8),
        unit={"enum": ["C", "F"]},
        days={"type": "integer", "maximum": 9, "minimum": 1},
    )
    yield {
        "$defs": {
            "Address": {
                "properties": {
                    "street": {"maxLength": 8, "title": "Street", "type": "string"},
                    "zip": {"anyOf": [{"maxLength": 5, "type": "string"}, {"type": "null"}],
                            "default": None, "title": "Zip"},
                },
                "required": ["street"], "title": "Address", "type": "object",
                "additionalProperties": False,
            },
            "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"},
        },
        "properties": {
            "name": {"maxLength": 8, "title": "Name", "type": "string"},
            "age": {"exclusiveMinimum": 0, "maximum": 150, "title": "Age", "type": "integer"},
            "home": {"$ref": "#/$defs/Address"},
            "color": {"allOf": [{"$ref": "#/$defs/Color"}], "default": "red"},
            "scores": {"maxItems": 2, "items": {"type": "number"}, "title": "S", "type": "array"},
            "friend": {"anyOf": [{"$ref": "#/$defs/Address"}, {"type": "null"}], "default": None},
        },
        "required": ["name", "age", "home"], "title": "Person", "type": "object",
        "additionalProperties": False,
    }  # fmt: skip
    pets = [
        {"type": "object", "title": kind, "required": ["kind"], "additionalProperties": False,
         "properties": {"kind": {"const": kind, "type": "string"}, "age": {"type": "integer"}}}
        for kind in ("Cat", "Dog")
    ]  # fmt: skip
    yield {
        "$defs": {"Cat": pets[0], "Dog": pets[1]}, "title": "Pet",
        "discriminator": {"propertyName": "kind"},
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    }  # fmt: skip
    step = thing(explanation=text(10), output=text(5))
    yield thing(
        steps={"type": "array", "items": step, "minItems": 1, "maxItems": 2}, answer=text(5)
    )
    yield thing(
        sentiment={"enum": ["good", "bad"]}, sure={"type": "number", "minimum": 0, "maximum": 1}
    )
    yield thing(
        type={"const": "Point"},
        coordinates={"type": "array", "minItems": 2, "maxItems": 2,
                     "items": {"type": "number", "minimum": -180, "maximum": 180}},
    )  # fmt: skip
    yield {
        "type": "array", "minItems": 1, "maxItems": 2,
        "items": thing(op={"enum": ["add", "remove"]}, path=text(6, pattern="^/")),
    }  # fmt: skip


def _nest(rng: random.Random, depth: int) -> Schema:
    """Something drawn at random that is nested up to `depth`."""
    leaves: list[Schema] = [
        {"type": "boolean"}, {"type": "null"}, {"enum": ["a", "é", 1]}, {"type": "integer"},
        text(rng.randint(1, 4)), text(4, pattern="^[ab]+$"), text(10, format="date"),
        {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
    ]  # fmt: skip
    if depth == 0:
        return rng.choice(leaves)
    kind = rng.choice(["object", "object", "list", "choice", "tuple"])
    if kind == "list":
        return {"type": "array", "items": _nest(rng, depth - 1), "minItems": 1, "maxItems": 1}
    if kind == "tuple":
        return {
            "type": "array", "items": False, "minItems": 1,
            "prefixItems": [_nest(rng, depth - 1), rng.choice(leaves)],
        }  # fmt: skip
    if kind == "choice":
        return {"anyOf": [_nest(rng, depth - 1), rng.choice(leaves)]}
    first, second = rng.sample(NAMES, 2)
    return thing([first], **{first: _nest(rng, depth - 1), second: rng.choice(leaves)})
