"""Grammars on a model with random weights: whatever it would write, what it writes is admitted."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.tiny_models import write_gguf
from pronk import LLM
from pronk.core.errors import PronkError, UserError
from pronk.engine.request import Request, SamplingParams
from pronk.text.grammar import Grammar, Matchers

SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 10, "maximum": 99},
    {"enum": ["red", 3, None, {"a": [1]}]},
    {"type": "string", "pattern": "^[a-f]{2,4}$"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": 0, "maximum": 9},
            "ok": {"const": True},
        },
        "required": ["id", "ok"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with LLM(path, backend="reference") as llm:
        yield llm


def answer(llm: LLM, grammar: Grammar, seed: int, max_tokens: int = 120) -> Request:
    params = SamplingParams(temperature=5.0, seed=seed, max_tokens=max_tokens)
    request = Request(
        [seed, 2, 3], params, eos_ids=llm.tokenizer.stop_ids, text=llm.prompter.text_out(params),
        constraint=Matchers(llm.tokenizer).matcher(grammar),
    )  # fmt: skip
    llm.engine.run([request])
    return request


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_answers_satisfy_their_schema(llm: LLM, schema: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for seed in range(5):
        request = answer(llm, Grammar.of_json_schema(schema), seed)
        assert request.finish_reason == "stop", request.text
        jsonschema.validate(json.loads(request.text), schema)


def test_choices_and_regular_expressions(llm: LLM) -> None:
    choices = ["yes", 'no "x"\n', "maybe\\"]
    texts = {answer(llm, Grammar.of_choice(choices), seed).text for seed in range(12)}
    assert texts <= set(choices)
    assert len(texts) > 1
    for seed in range(5):
        text = answer(llm, Grammar.of_regex("[0-9]{3}-(ab|cd)+x"), seed).text
        assert re.fullmatch("[0-9]{3}-(ab|cd)+x", text)


def test_a_grammar_ends_where_it_may(llm: LLM) -> None:
    request = answer(llm, Grammar.of_lark('start: "(" start ")" | "1"'), 0)
    assert request.finish_reason in ("stop", "length")
    text = request.text
    depth = text.count("(")
    assert text == "(" * depth + "1" + ")" * (len(text) - depth - 1)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Grammar.of_json_schema({"not": {"type": "string"}}, "tools[0]"), "tools[0].*not"),
        (lambda: Grammar.of_json_schema({"uniqueItems": True, "type": "array"}), "uniqueItems"),
        (lambda: Grammar.of_json_schema({"type": "string", "format": "nose"}), "#/format: .nose"),
        (lambda: Grammar.of_json_schema({"type": "foo"}), "foo"),
        (lambda: Grammar.of_regex("(?=a)b"), "look-around"),
        (lambda: Grammar.of_regex("("), "unclosed group"),
        (lambda: Grammar.of_lark("start: nobody"), "nobody"),
        (lambda: Grammar.of_choice([]), "not a list of texts"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(UserError, match=named.replace("[0]", r"\[0\]")):
        make()


def test_masks_behind_a_draft(llm: LLM) -> None:
    """The masks that come when the tokens are written; looking ahead leaves no trace."""
    grammar = Grammar.of_regex("(ab|ac)+")
    a, b, c = (llm.tokenizer.encode(letter)[0] for letter in "abc")
    matchers = Matchers(llm.tokenizer)
    ahead, step = matchers.matcher(grammar), matchers.matcher(grammar)
    masks = ahead.masks([a, b, a])
    assert ahead.masks([]) == masks[:1]
    for token, mask in zip([a, b, a, c], masks, strict=True):
        assert step.masks([]) == [mask]
        step.advance(token)
    assert ahead.allowed([a, b, b]) == 2
    assert ahead.allowed([b]) == 0
    assert step.complete
    with pytest.raises(PronkError, match="grammar"):
        step.advance(b)


def test_masks_from_the_middle_of_a_draft(llm: LLM) -> None:
    a, b = (llm.tokenizer.encode(letter)[0] for letter in "ab")
    matcher = Matchers(llm.tokenizer).matcher(Grammar.of_regex("(ab|ac)+"))
    masks = matcher.masks([a, b, a])
    for first in range(4):
        assert matcher.masks([a, b, a], first) == masks[first:]
    assert matcher.masks([], 0) == masks[:1]


def test_what_a_grammar_forces(llm: LLM) -> None:
    """Up to where there is a choice, of texts or of tokens that go on beyond that."""
    matcher = Matchers(llm.tokenizer).matcher(Grammar.of_regex("name: (anna|otto), age: [0-9]+"))
    text = ""
    while not text.endswith("age: 7"):
        forced = matcher.forced()
        assert matcher.allowed(forced) == len(forced)
        token = forced[0] if forced else llm.tokenizer.encode("a7"["age" in text])[0]
        matcher.advance(token)
        text += llm.tokenizer.decode([token])
    assert text == "name: anna, age: 7"
    assert matcher.forced() == []
    assert matcher.complete


def test_speculation_within_a_grammar(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    grammar = Grammar.of_regex("(abcabd){20}")
    texts = []
    for speculate in (False, True):
        with LLM(path, backend="reference", speculate=speculate) as llm:
            request = answer(llm, grammar, 1, max_tokens=200)
            texts.append((request.output, request.finish_reason))
            speculator = llm.engine._speculator
            if speculator is not None:
                assert speculator.accepted > 20
    assert texts[0] == texts[1]
    assert texts[0][1] == "stop"


class Broken:
    """A constraint that cannot say what may come."""

    def masks(self, draft: Sequence[int], first: int = 0) -> Sequence[bytes | None]:
        raise PronkError("grammar: broken")

    def allowed(self, draft: Sequence[int]) -> int:
        return 0

    def forced(self) -> Sequence[int]:
        raise PronkError("grammar: broken")

    def advance(self, token: int) -> None:
        raise AssertionError("nothing can have been drawn")


def test_a_broken_constraint_ends_its_own_request_only(llm: LLM) -> None:
    engine = llm.engine
    params = SamplingParams(max_tokens=6)
    alone = Request([5, 6, 7], params)
    engine.run([alone])
    broken, other = Request([8, 9], params, constraint=Broken()), Request([5, 6, 7], params)
    for request in (broken, other):
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert broken.finish_reason == "error"
    assert str(broken.error) == "grammar: broken"
    assert other.output == alone.output


def test_a_grammar_beyond_all_limits_is_a_mistake_of_one_line(llm: LLM) -> None:
    matcher = Matchers(llm.tokenizer).matcher(Grammar.of_regex("(a{1000}){1000}"))

    def write() -> None:
        for token in llm.tokenizer.encode("a" * 50):
            matcher.masks([])
            matcher.advance(token)
        matcher.masks([])

    with pytest.raises(UserError, match=r"^grammar: [^\n]*; a smaller grammar would work$"):
        write()


def test_thousands_of_choices(llm: LLM) -> None:
    choices = [f"ab{i}" for i in range(3000)]
    assert answer(llm, Grammar.of_choice(choices), 0).text in choices
