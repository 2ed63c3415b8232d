"""200 schemas on models: every answer is JSON that its schema admits. And every keyword of JSON
Schema is either enforced, which walks at random under the masks show, or refused by its place."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal, localcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.tiny_models import write_gguf
from pronk import LLM
from pronk.core.errors import UserError
from pronk.engine.prompts import AnswerShape, Chat
from pronk.engine.request import Request
from pronk.text.grammar import Grammar, Matchers
from pronk.text.json_schema import REFUSED, enforceable
from pronk.text.messages import messages_from_dicts
from pronk.text.tokenizer import Tokenizer
from schemas import schemas

jsonschema = pytest.importorskip("jsonschema")


def exact(text: str) -> Any:
    """JSON with numbers as they are written."""
    return json.loads(text, parse_float=Decimal)


def check(text: str, schema: Any) -> None:
    """Raises for an answer that is not JSON of the schema."""
    schema = exact(json.dumps(schema))
    if isinstance(schema, dict) and schema.get("exclusiveMinimum") is True:  # as draft 4 says it
        schema["exclusiveMinimum"] = schema.pop("minimum")
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    with localcontext() as context:
        context.prec = 500
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(exact(text))


def ask(llm: LLM, prompt: str, schema: Any, temperature: float, seed: int) -> Request:
    options = {"temperature": temperature, "seed": seed, "max_tokens": 400, "top_p": 1.0}
    chat = Chat(
        messages_from_dicts([{"role": "user", "content": prompt}]), answer=AnswerShape(schema)
    )
    return llm.prompter.chat(chat, options)


def run_all(llm: LLM, requests: Sequence[tuple[Any, Request]]) -> None:
    """Answers end by themselves with what their schemas admit; a few may go on, as admitted."""
    llm.engine.run([request for _, request in requests])
    n_cut = 0
    for schema, request in requests:
        if request.finish_reason == "length":
            n_cut += 1
            matcher = Matchers(llm.tokenizer).matcher(Grammar.of_json_schema(schema))
            assert matcher.allowed(request.output) == len(request.output)
            continue
        assert request.finish_reason == "stop", (schema, request.text, request.error)
        check(request.text, schema)
    assert n_cut <= 5


def test_random_weights_always_write_what_the_schema_admits(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    with LLM(path, backend="reference", max_batch=16) as llm:
        asked = [(s, ask(llm, "", s, 5.0, i)) for i, s in enumerate(schemas())]
        run_all(llm, asked)
    assert len(asked) == 200


def test_smollm2_always_writes_what_the_schema_admits(smollm2_path: Path) -> None:
    with LLM(smollm2_path, max_batch=16, ctx=1024) as llm:
        run_all(llm, [
            (s, ask(llm, f"Invent JSON of this schema: {json.dumps(s)[:150]}", s, 0.8, i))
            for i, s in enumerate(schemas())
        ])  # fmt: skip


ANNOTATIONS = {
    "title": "t", "description": "d", "default": 1, "examples": [1], "deprecated": True,
    "readOnly": True, "writeOnly": True, "$comment": "c", "contentMediaType": "text/html",
    "contentEncoding": "base64", "contentSchema": {"type": "null"}, "$id": "https://example.org/x",
    "$schema": "http://json-schema.org/draft-07/schema#", "$anchor": "a", "$dynamicAnchor": "a",
    "$vocabulary": {}, "$defs": {"unused": {"not": {}}}, "definitions": {"unused": {"not": {}}},
    "$recursiveAnchor": True,
}  # fmt: skip
SMALL = {"type": "integer", "minimum": 0, "maximum": 3}
ENFORCED: dict[str, list[Any]] = {
    "type": [{"type": kind} for kind in ("null", "boolean", "integer", "number")],
    "const": [{"const": value} for value in (1, 1.5, "a\n", [1, {"b": None}], -0.0, 1e-7)],
    "enum": [{"enum": [1, "1", None, 2.5, {"a": 1}, [1]]}, {"type": "string", "enum": ["x", 3]}],
    "multipleOf": [
        {"type": "number", "multipleOf": 0.01, "minimum": -2, "maximum": 2},
        {"type": "integer", "multipleOf": 7}, {"type": "integer", "multipleOf": 1.5},
        {"allOf": [{"multipleOf": 4}, {"multipleOf": 6}], "type": "integer"},
    ],
    "minimum": [{"type": "integer", "minimum": -3}, {"type": "number", "minimum": 0.125}],
    "maximum": [{"type": "integer", "maximum": 2**53 + 1}, {"type": "number", "maximum": -0.125}],
    "exclusiveMinimum": [
        {"type": kind, "exclusiveMinimum": low} for kind in ("integer", "number")
        for low in (0, -1, 0.5, 2**54)
    ],
    "exclusiveMaximum": [
        {"type": kind, "exclusiveMaximum": high} for kind in ("integer", "number")
        for high in (0, 1, -0.5, 2**54)
    ],
    "minLength": [{"type": "string", "minLength": 2, "maxLength": 4}],
    "maxLength": [{"type": "string", "maxLength": 2}],
    "pattern": [{"type": "string", "maxLength": 9, "pattern": "^(a|é)+b?$"}],
    "format": [{"type": "string", "format": f, "maxLength": 36} for f in ("date", "ipv4", "uuid")],
    "items": [{"type": "array", "items": SMALL, "maxItems": 4}],
    "prefixItems": [{"type": "array", "prefixItems": [SMALL, {"const": "x"}], "maxItems": 3}],
    "additionalItems": [
        {"type": "array", "items": [SMALL], "additionalItems": {"type": "null"}, "maxItems": 3,
         "$schema": "http://json-schema.org/draft-07/schema#"},
    ],
    "minItems": [{"type": "array", "items": SMALL, "minItems": 2, "maxItems": 5}],
    "maxItems": [{"type": "array", "items": SMALL, "maxItems": 1}],
    "properties": [{"type": "object", "properties": {"a": SMALL, "b": {"const": 1}},
                    "additionalProperties": False}],
    "additionalProperties": [
        {"type": "object", "properties": {"a": SMALL, "\\": SMALL}, "maxProperties": 3,
         "required": ["a", "\\"], "additionalProperties": {"type": "null"}},
    ],
    "patternProperties": [
        {"type": "object", "patternProperties": {"^a": SMALL, "^[b-z]$": {"type": "null"}},
         "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    ],
    "required": [{"type": "object", "required": ["a"], "properties": {"a": SMALL, "b": SMALL},
                  "additionalProperties": False}],
    "minProperties": [{"type": "object", "additionalProperties": SMALL, "minProperties": 1,
                       "maxProperties": 2}],
    "maxProperties": [{"type": "object", "additionalProperties": SMALL, "maxProperties": 1}],
    "allOf": [{"type": "integer", "allOf": [{"minimum": 3}, {"maximum": 9, "multipleOf": 2}]}],
    "anyOf": [{"type": "integer", "anyOf": [{"maximum": 3}, {"minimum": 7}], "minimum": 0}],
    "oneOf": [{"oneOf": [SMALL, {"type": "string", "maxLength": 1}, {"type": "null"}]}],
    "$ref": [{"$ref": "#/$defs/a~1b", "$defs": {"a/b": SMALL, "a~1b": {"type": "null"}}}],
}  # fmt: skip


def keywords() -> set[str]:
    """All keywords of draft 2020-12 and of draft 7."""
    registry = pytest.importorskip("jsonschema_specifications").REGISTRY
    vocabularies = (
        "core", "applicator", "unevaluated", "validation", "meta-data", "format-annotation",
        "content",
    )  # fmt: skip
    found = set(jsonschema.Draft7Validator.META_SCHEMA["properties"])
    for name in vocabularies:
        found |= set(
            registry.contents(f"https://json-schema.org/draft/2020-12/meta/{name}")["properties"]
        )
    return found


def test_every_keyword_is_enforced_refused_or_an_annotation() -> None:
    assert keywords() <= ENFORCED.keys() | REFUSED | ANNOTATIONS.keys()
    assert not ENFORCED.keys() & REFUSED


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    with LLM(
        write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"), backend="reference"
    ) as llm:
        yield llm.tokenizer


@pytest.fixture(scope="module")
def matchers(tokenizer: Tokenizer) -> Matchers:
    return Matchers(tokenizer)


def walk(tokenizer: Tokenizer, matchers: Matchers, schema: Any, seed: int) -> str | None:
    """An answer drawn among what is admitted, with a liking for what could go wrong: escapes,
    signs, points, zeros and quotes. None if it gets long."""
    rng = random.Random(seed)
    matcher = matchers.matcher(Grammar.of_json_schema(schema))
    likes = {tokenizer.encode(char)[0] for char in '\\"u0019.-,}]ae'}
    written: list[int] = []
    while len(written) < 150:
        bits = np.frombuffer(matcher.masks([])[0] or b"", dtype=np.uint8)
        admitted = set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())
        assert admitted
        texts = admitted - tokenizer.stop_ids
        if texts != admitted and (not texts or len(written) > 40 or rng.random() < 0.3):
            return tokenizer.decode(written)
        liked = sorted(texts & likes)
        token = rng.choice(liked if liked and rng.random() < 0.6 else sorted(texts))
        matcher.advance(token)
        written.append(token)
    return None


@pytest.mark.parametrize("keyword", ENFORCED)
def test_walks_under_the_masks_stay_within_the_schema(
    tokenizer: Tokenizer, matchers: Matchers, keyword: str
) -> None:
    for schema in ENFORCED[keyword]:
        texts = [walk(tokenizer, matchers, schema, seed) for seed in range(40)]
        for text in filter(None, texts):
            check(text, schema)
        assert sum(text is not None for text in texts) > 10, schema


def test_annotations_change_nothing() -> None:
    plain = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert enforceable({**plain, **ANNOTATIONS}).keys() - plain.keys() <= ANNOTATIONS.keys()
    noted = {key: value for key, value in ANNOTATIONS.items() if key != "$id"}
    Grammar.of_json_schema({**plain, "properties": {"a": {"type": "integer", **noted}}})


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_keywords_that_cannot_be_enforced_are_refused_by_their_place(keyword: str) -> None:
    schema: Any = {"type": "object", keyword: {"x": {"const": 1}}}
    if keyword in ("if", "then", "else"):
        schema = {"if": {"const": 1}, "then": {"const": 1}, "else": {"const": 2}}
    if keyword in ("minContains", "maxContains"):
        schema = {"contains": {"const": 1}, keyword: 2}
    whole = {"$schema": "http://json-schema.org/draft-04/schema#", "properties": {"a/b": schema}}
    with pytest.raises(UserError, match=r"^tool: #/properties/a~1b/\S+: this keyword cannot be"):
        Grammar.of_json_schema(whole, "tool")
    assert keyword in schema


@pytest.mark.parametrize(
    ("schema", "admitted", "not_admitted"),
    [
        ({"properties": {"a": SMALL}, "additionalProperties": {"type": "string"}, "type": "object"},
         ['{"a":1}', '{"\\n":"x"}'], ['{"\\u0061":"x"}', '{"a":"x"}']),
        ({"const": 1.0}, ["1"], ["1.5", "2"]),
        ({"type": "number", "multipleOf": 0.01}, ["0.07", "-1.1", "5"], ["0.075", "1e-3"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.25}, ["0.1"], ["0", "0.0", "-0"]),
        ({"type": "number", "exclusiveMaximum": -1, "minimum": -1.5}, ["-1.1"], ["-1", "-1.0"]),
        ({"type": "number", "exclusiveMaximum": 1}, ["0.999"], ["0." + "9" * 20, "1", "1.0"]),
        ({"type": "integer", "minimum": 2**53 + 1}, [str(2**53 + 2)], [str(2**53)]),
        ({"type": "integer"}, ["0", str(2**62), str(-(2**62))], ["9" * 30, "1.0", "01"]),
        ({"type": "string", "minLength": 2, "maxLength": 2}, ['"🙂é"', '"\\n\\\\"'],
         ['"🙂"', '"abc"', '"\\u00e9a"']),
        ({"type": "string", "pattern": r"^\d\w$"}, ['"1a"'], ['"٣a"', '"1é"']),
        ({"type": "string", "pattern": "b"}, ['"abc"', '"b"'], ['"ac"']),
        ({"format": "date"}, ['"2024-02-29"', "5", '"2000-02-29"'],
         ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"', '"2023-04-31"']),
        ({"format": "date-time"}, ['"2024-02-29T23:59:59.5+02:00"'], ['"2024-06-01T10:59:60Z"']),
        ({"type": "integer", "format": "int32"}, ["7"], ['"7"']),
        ({"type": "string", "format": "hostname"}, ['"a.b"'], ['"' + "a." * 130 + 'b"']),
        ({"prefixItems": [SMALL], "$schema": "http://json-schema.org/draft-07/schema#",
          "type": "array"}, ["[1]"], ['["a"]']),
        ({"minimum": 3, "exclusiveMinimum": True, "anyOf": [{"type": "integer"}]}, ["4"], ["3"]),
        ({"items": [SMALL], "anyOf": [{"minItems": 1}], "additionalItems": False, "type": "array"},
         ["[1]"], ["[1,2]", "[]"]),
        ({"type": "object", "x-guidance": {"item_separator": ";"}},
         ['{"a":1,"b":2}'], ['{"a":1;"b":2}']),
        (True, ["1", "{}"], ["x"]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_corners(
    tokenizer: Tokenizer, matchers: Matchers, schema: Any, admitted: list[str],
    not_admitted: list[str],
) -> None:  # fmt: skip
    for text in admitted + not_admitted:
        matcher = matchers.matcher(Grammar.of_json_schema(schema))
        ids = tokenizer.encode(text)
        whole = matcher.allowed(ids) == len(ids)
        if whole:
            for id in ids:
                matcher.advance(id)
        assert (whole and matcher.complete) == (text in admitted), text


DEEP: Any = {"type": "integer"}
for _ in range(80):
    DEEP = {"type": "array", "items": DEEP}
CHAIN = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(3000)}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"const": 2**53 + 1}, "#/const: 9007199254740993 has more digits"),
        ({"enum": ["a", ["\x01"]]}, "#/enum/1: .* control characters"),
        ({"type": "integer", "minimum": 1e19}, "#/minimum: .* beyond 64 bits"),
        ({"type": "number", "multipleOf": 0.07}, "#/multipleOf: multiples of 0.07"),
        ({"type": "number", "multipleOf": 0}, "#/multipleOf: multiples of 0"),
        ({"type": "integer", "multipleOf": 1000003}, "#/multipleOf: multiples of 1000003"),
        ({"allOf": [{"multipleOf": 9999}, {"multipleOf": 9998}, {"multipleOf": 9997}]}, "together"),
        ({"minProperties": 2, "type": "object"}, "#/minProperties: more than one beyond"),
        ({"maxProperties": 2, "properties": {"a": {}}}, "#/maxProperties: .* optional"),
        ({"format": "regex"}, "#/format: 'regex' cannot be enforced; date"),
        ({"prefixItems": [{}], "additionalItems": False}, "#/additionalItems"),
        ({"prefixItems": [{}], "items": [{}]}, "#/items: a list beside"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: options that may hold"),
        ({"oneOf": [{"type": "object"}, {"properties": {"a": {"const": 1}}}]}, "#/oneOf"),
        ({"$ref": "#"}, "#: refers to itself without"),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"},
         "refers to itself without"),
        ({"items": {"type": "array", "minItems": 1, "items": {"$ref": "#/items"}}},
         "#/items: holds itself"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "#/[$]ref: '#/[$]defs/b': there is no such"),
        ({"$ref": "https://example.org/x"}, "#/[$]ref: .* only references like"),
        ({"items": {"$id": "https://example.org/x"}}, "#/items/[$]id"),
        ({"type": "string", "minLength": -1}, "#/minLength: -1 is not a count"),
        ({"properties": {"a": {"type": "int"}}}, "#/properties/a/type: 'int' is not one"),
        ({"items": 3}, "#/items: 3 is not a schema"), ({"enum": 3}, "#/enum"),
        ([1], "is not a JSON schema"), (False, "false admits no answer"),
        ({"const": float("nan")}, "not a JSON schema"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no answer can satisfy it"),
        # what was made to hurt
        (DEEP, "nested more than 64 deep"),
        ({"$ref": "#/$defs/d0", "$defs": {**CHAIN, "d3000": {}}}, "references nested up to"),
        ({"patternProperties": {f"^a{i}": {} for i in range(300)}}, "#/patternProperties: more"),
        ({"properties": {f"p{i}": {} for i in range(2000)}}, "#/properties: more than 1000"),
        ({"enum": [{"a": i} for i in range(5000)]}, "#/enum: more than"),
        ({"anyOf": [{"const": i} for i in range(5000)]}, "#/anyOf: more than 1000"),
        ({"allOf": [{"anyOf": [{"pattern": f"a{{{i}}}b{j}"} for j in range(9)]} for i in range(9)]},
         "schema too large"),
        ({"minItems": 10**9}, "#/minItems: no answer is that long"),
        ({"title": "x" * 2_000_000}, "a schema of 2000013 characters"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_its_place(schema: Any, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        Grammar.of_json_schema(schema, "response_format")
    assert re.fullmatch(r"response_format: .{1,350}", str(caught.value))


@pytest.mark.parametrize(
    "pattern",
    [
        r"a(?=b)", r"(?<!a)b", r"(a)\1", r"^[a&&b]$", r"^[^a&&b]$", r"^[[a]]$", r"^[[:alpha:]]$",
        r"^[a-z--b]$", r"^a{,3}$", r"^[]a]$", r"^[^]$", r"\bfoo\b", "a^b", r"^\Aa\z$", "\\",
        r"^\cA$", r"^\ud83d\ude00$", r"^\u00g0$", r"(?m)^a$", r"(?x) a b", "[", "(", r"\a",
        "a" * 10 + "^" + "$^",
    ],
)  # fmt: skip
def test_patterns_of_several_meanings_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=r"^schema: "):
        Grammar.of_json_schema({"type": "string", "pattern": pattern})


def rules(n: int, form: str) -> str:
    """Rules that lead from one to the next."""
    names = ["root" if "::=" in form else "start"] + [f"r{i}" for i in range(n + 1)]
    lines = [form.format(*pair) for pair in pairwise(names)]
    return "\n".join([*lines, form.format(names[-1], '"a"')]) + "\n"


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        (rules(8000, "{}: {}"), "8002 rules; at most 500"),
        (rules(900, "{} ::= {}"), "902 rules; at most 500"),
        (rules(400, "{}: " + "(" * 25 + "{}" + ")" * 25), "402 rules with brackets nested 25 deep"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested too deep"),
        ('start: %json {"uniqueItems": true}\n', "%json is not supported"),
        ("start: /" + "a" * 300_000 + "/", "300009 characters"),
    ],
    ids=range(6),
)  # fmt: skip
def test_hostile_grammars_are_refused(grammar: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Grammar.of_ebnf(grammar)
