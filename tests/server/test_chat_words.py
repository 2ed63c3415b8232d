"""The chat API with a model that can speak, SmolLM2-135M-Instruct: what it says is what `LLM` says,
and tools and formats bring out answers that make sense."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live import Live
from pydantic import BaseModel
from sdk import Choice, choices_of, client, joined, llm_of
from sdk import shown as in_words

from pronk.engine.llm import LLM

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
        },
    },
}


@pytest.fixture(scope="module")
def sdk(smollm2_server: Live) -> Iterator[openai.OpenAI]:
    with client(smollm2_server) as one:
        yield one


@pytest.fixture(scope="module")
def llm(smollm2_server: Live) -> Iterator[LLM]:
    with llm_of(smollm2_server) as one:
        yield one


def ask(sdk: openai.OpenAI, messages: Any, **body: Any) -> Choice:
    """The answer, which is the same as a stream."""
    call: Any = {"model": "smollm2", "messages": messages, "temperature": 0, **body}
    [whole] = choices_of(sdk.chat.completions.create(**call))
    assert joined(sdk.chat.completions.create(**call, stream=True)) == [whole]
    return whole


def test_an_answer_and_its_probabilities(sdk: openai.OpenAI, llm: LLM) -> None:
    expected = llm.chat(QUESTION, temperature=0, logprobs=3, max_tokens=40)
    found = ask(sdk, QUESTION, logprobs=True, top_logprobs=3, max_tokens=40)
    assert "Paris" in found.text
    assert found.text == expected.text
    assert found.logprobs == in_words(expected.logprobs or (), llm)
    assert found.finish_reason == expected.finish_reason == "stop"


def test_defaults_are_those_of_llm(sdk: openai.OpenAI, llm: LLM) -> None:
    call: Any = {"model": "smollm2", "messages": QUESTION, "seed": 5, "max_tokens": 20}
    [found] = choices_of(sdk.chat.completions.create(**call))
    assert found.text == llm.chat(QUESTION, seed=5, max_tokens=20).text


def test_a_stop_string(sdk: openai.OpenAI) -> None:
    found = ask(sdk, QUESTION, stop=["Paris"])
    assert "capital" in found.text
    assert "Paris" not in found.text
    assert found.stop_reason == "Paris"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_tool(sdk: openai.OpenAI, choice: Any) -> None:
    messages = [{"role": "user", "content": "What is the weather in Paris, in Celsius?"}]
    found = ask(sdk, messages, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    [(name, arguments)] = found.calls
    values = json.loads(arguments)
    assert name == "get_weather"
    assert "Paris" in values["city"]
    assert values["unit"] in ("C", "F")
    assert found.text == ""
    assert found.finish_reason == ("tool_calls" if choice == "required" else "stop")


def test_no_tool(sdk: openai.OpenAI) -> None:
    found = ask(sdk, QUESTION, tools=[WEATHER], tool_choice="none", max_tokens=40)
    assert "Paris" in found.text
    assert found.calls == []


class Capital(BaseModel):
    country: str
    city: str


def test_a_pydantic_model(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(
        model="smollm2", messages=QUESTION, response_format=Capital, temperature=0, max_tokens=60
    )
    parsed = answer.choices[0].message.parsed
    assert parsed
    assert "Paris" in parsed.city + parsed.country


def test_a_long_talk_uses_what_was_computed(sdk: openai.OpenAI) -> None:
    """The second turn computes only what is new."""
    messages = list(QUESTION)
    cached = []
    for question in ("And of Italy?", "And of Spain?"):
        answer = sdk.chat.completions.create(
            model="smollm2",
            messages=messages,
            temperature=0,
            max_tokens=40,
            extra_body={"cache_salt": "a long talk"},
        )
        assert answer.usage
        assert answer.usage.prompt_tokens_details
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": question},
        ]
    assert cached[0] == 0
    assert cached[1] > 0
