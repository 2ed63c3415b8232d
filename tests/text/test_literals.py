"""The incremental reader of JSON and Python literals."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronk.text.literals import MAX_DEPTH, Mismatch, Source, read_value


def read(text: str, ends: str = "") -> tuple[str, str]:
    """The JSON of the value at the start of `text` fed by single characters, and what is left."""
    source = Source()
    out: list[str] = []
    steps = read_value(source, out, ends)
    try:
        for c in text:
            source.push(c)
            next(steps)
        source.ended = True
        next(steps)
    except StopIteration:
        return "".join(out), text[source.pos :]
    raise AssertionError("it waits for text after the end")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.sampled_from([None, 2]))
def test_json(value: Any, indent: int | None) -> None:
    expected = json.dumps(value, ensure_ascii=False)
    assert read(json.dumps(value, indent=indent)) == (expected, "")
    assert read(json.dumps(value, ensure_ascii=False) + "}", "}")[0] == expected


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_python(value: Any) -> None:
    assert read(repr(value)) == (json.dumps(value, ensure_ascii=False), "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'it\\'s'", "it's"),
        ('"a "b" c"', 'a "b" c'),
        ("['a', 'it's']", ["a", "it's"]),
        ('"""a "b"\nc"""', 'a "b"\nc'),
        (r'"\x41\u00e9\U0001F600\0\a\/\d"', "Aé😀\0\a/\\d"),
        (r'"\ud83d\ude00 \ud83d \ude00 \ud83dx \ud83d\u0041"', "😀 � � �x �A"),
        (r'"\uZZ \x"', "\\uZZ \\x"),
        ("{a: 1, 'b': (1, 2,), c = [True,],}", {"a": 1, "b": [1, 2], "c": [True]}),
        ("+5", 5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0", 0),
        ("1" * 300, int("1" * 300)),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, eval("[" * MAX_DEPTH + "]" * MAX_DEPTH)),
    ],
)
def test_what_models_write(text: str, value: Any) -> None:
    assert read(text) == (json.dumps(value, ensure_ascii=False), "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "[1",
        "[1 2]",
        "[,]",
        '{"a"}',
        '{"a": }',
        '{"a": 1',
        '"abc',
        "'",
        '"\\',
        "oops",
        "NaN",
        "Infinity",
        "1e999",
        "1.2.3",
        "007",
        "0x1f",
        "1_000",
        "--1",
        "9" * 500,
        "{1.5: 2}",
        "[" * (MAX_DEPTH + 2),
        "{,}",
        "*",
        "undefined",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(Mismatch):
        read(text)


def test_reads_no_further_than_the_value() -> None:
    assert read('{"a": 1} tail') == ('{"a": 1}', " tail")
    assert read("12, 3", ",") == ("12", ", 3")
