"""`response_format` and `.parse()` through OpenAI's client: what a random model says has the shape
that was asked for."""

import asyncio
import json
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Literal

import jsonschema
import openai
import pytest
from live import Live
from pydantic import BaseModel, Field
from sdk import HI, async_client, choices_of, client, joined

from engine.tiny_models import CONFIG

SCHEMA: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
        "tags": {"type": "array", "items": {"enum": ["x", "y", 3]}, "minItems": 1, "maxItems": 3},
        "size": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 1, "maximum": 99}]},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def sdk(tiny_server: Live) -> Iterator[openai.OpenAI]:
    with client(tiny_server) as one:
        yield one


def texts(sdk: openai.OpenAI, form: Any, *, seeds: int = 3, **more: Any) -> list[str]:
    """Answers that ended of themselves, which are the same in streams."""
    found = []
    for seed in range(seeds):
        body: dict[str, Any] = {
            "model": "tiny", "messages": HI, "response_format": form, "seed": 10 * seed, "n": 4,
            "max_tokens": 250, "temperature": 1, **more,
        }  # fmt: skip
        whole = choices_of(sdk.chat.completions.create(**body))
        assert joined(sdk.chat.completions.create(**body, stream=True)) == whole
        found += [choice.text for choice in whole if choice.finish_reason == "stop"]
    assert found
    return found


def test_json_of_a_schema(sdk: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    for text in texts(sdk, form):
        jsonschema.validate(json.loads(text), SCHEMA)


def test_any_json_object(sdk: openai.OpenAI) -> None:
    ends = {str(ord(c)): 6 for c in '"}'}  # a random model would go on for ever
    for text in texts(sdk, {"type": "json_object"}, logit_bias=ends):
        assert isinstance(json.loads(text), dict)
    anything = {"type": "json_schema", "json_schema": {"name": "any"}}
    for text in texts(sdk, anything, logit_bias=ends):
        json.loads(text)


def test_regex_choice_and_grammar(sdk: openai.OpenAI) -> None:
    for text in texts(sdk, {"type": "regex", "regex": r"[ab]{2,4}-\d\d"}):
        assert re.fullmatch(r"[ab]{2,4}-\d\d", text)
    words = ["yes", "no", "Straße 🙂"]
    found = set(texts(sdk, {"type": "choice", "choice": words}, temperature=9))
    assert found <= set(words)
    assert len(found) > 1
    for grammar in (
        'root ::= pair ("," pair)?\npair ::= [a-c] "=" [0-9]',
        'start: pair ("," pair)?\npair: /[a-c]/ "=" /[0-9]/',
    ):
        for text in texts(sdk, {"type": "grammar", "grammar": grammar}):
            assert re.fullmatch(r"[a-c]=[0-9](,[a-c]=[0-9])?", text)


def test_text_is_free(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": HI, "seed": 1, "max_tokens": 20}
    plain = choices_of(sdk.chat.completions.create(**body))
    told = sdk.chat.completions.create(**body, response_format={"type": "text"})
    assert choices_of(told) == plain


NO_CALLS = {str(CONFIG.vocab_size - 1): -100, str(ord("f")): -100}
"""Neither the token that Llama 3.1 begins calls with, nor the name of the function."""


def test_json_or_a_call(sdk: openai.OpenAI) -> None:
    tool: Any = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    kinds = set()
    for seed in range(6):
        answer = sdk.chat.completions.create(
            model="tiny", messages=HI, tools=[tool], response_format=form, seed=10 * seed, n=4,
            max_tokens=600, temperature=1.5, logit_bias=NO_CALLS if seed % 2 else {},
        )  # type: ignore[call-overload]  # fmt: skip
        for choice in choices_of(answer):
            if choice.finish_reason == "stop":
                jsonschema.validate(json.loads(choice.text), SCHEMA)
                assert not choice.calls
            elif choice.finish_reason == "tool_calls":
                assert choice.calls[0] == ("f", "{}")
            kinds.add(choice.finish_reason)
    assert kinds >= {"stop", "tool_calls"}


class Kind(StrEnum):
    CAT = "cat"
    DOG = "dog"


class Owner(BaseModel):
    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=120)


class Pet(BaseModel):
    kind: Kind
    owner: Owner
    former: list[Owner] = Field(max_length=1)
    chip: str | None = Field(max_length=4)
    size: Literal["s", "m"] | Literal[1, 2]
    alive: bool


def test_parse(tiny_server: Live, sdk: openai.OpenAI) -> None:
    for seed in range(4):
        body: dict[str, Any] = {
            "model": "tiny", "messages": HI, "response_format": Pet, "seed": seed,
            "max_tokens": 600, "temperature": 1,
        }  # fmt: skip
        found = sdk.chat.completions.parse(**body).choices[0].message
        assert isinstance(found.parsed, Pet)
        assert found.content
        assert found.parsed == Pet.model_validate_json(found.content)
        with sdk.chat.completions.stream(**body) as stream:
            kinds = {event.type for event in stream}
            assert kinds >= {"chunk", "content.delta", "content.done"}
            assert stream.get_final_completion().choices[0].message.parsed == found.parsed

    async def later() -> Any:
        async with async_client(tiny_server) as api:
            return (await api.chat.completions.parse(**body)).choices[0].message.parsed

    assert asyncio.run(later()) == found.parsed


def test_parsed_arguments(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "messages": HI, "tools": [openai.pydantic_function_tool(Owner)],
        "tool_choice": "required", "parallel_tool_calls": False, "seed": 2, "max_tokens": 600,
    }  # fmt: skip
    [call] = sdk.chat.completions.parse(**body).choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Owner)
    with sdk.chat.completions.stream(**body) as stream:
        for event in stream:
            assert event.type != "error"
        final = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert final[0].function.parsed_arguments == call.function.parsed_arguments


def test_a_cut_answer_is_told(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        sdk.chat.completions.parse(
            model="tiny", messages=HI, response_format=Pet, max_tokens=5, seed=1
        )
