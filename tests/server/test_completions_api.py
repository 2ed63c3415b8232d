"""/v1/completions by OpenAI's own client: continuations, and log probabilities of prompts in the
shape that lm-eval reads."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from live import Live
from openai.types import Completion
from sdk import async_client, client, llm_of, refusal

from pronk.engine.llm import LLM
from pronk.server import openai_types

PATH = "/v1/completions"
SEEDED: dict[str, Any] = {"model": "tiny", "prompt": "hello world", "max_tokens": 12, "seed": 3}
TEXTS = ["hello world", "naïve 🙂🙂 日本", "the the the", "x"]


@pytest.fixture(scope="module")
def sdk(tiny_server: Live) -> Iterator[openai.OpenAI]:
    with client(tiny_server) as one:
        yield one


@pytest.fixture(scope="module")
def llm(tiny_server: Live) -> Iterator[LLM]:
    with llm_of(tiny_server) as one:
        yield one


def joined(stream: Any) -> list[dict[str, Any]]:
    """Choices of a stream put together."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            new = {"text": "", "logprobs": None, "finish_reason": None, "stop_reason": None}
            one = found.setdefault(choice.index, new)
            assert one["finish_reason"] is None
            one["text"] += choice.text
            one["finish_reason"] = choice.finish_reason
            one["stop_reason"] = getattr(choice, "stop_reason", None)
            if choice.logprobs:
                more = choice.logprobs.model_dump()
                before = one["logprobs"] or {name: [] for name in more}
                one["logprobs"] = {name: before[name] + more[name] for name in more}
    return [found[index] for index in sorted(found)]


def whole(answer: Completion) -> list[dict[str, Any]]:
    names = ("text", "finish_reason", "stop_reason", "logprobs")
    return [{name: choice.model_dump()[name] for name in names} for choice in answer.choices]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1},
        {"temperature": 1, "top_p": 0.3},
        {"temperature": 2, "top_k": 2},
        {"temperature": 2, "min_p": 0.3},
        {"repetition_penalty": 2},
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"logit_bias": {"5": 10}},
    ],
    ids=str,
)
def test_sampling_is_that_of_llm(sdk: openai.OpenAI, llm: LLM, options: dict[str, Any]) -> None:
    own = {**options, "logit_bias": {int(t): b for t, b in options.get("logit_bias", {}).items()}}
    expected = llm.generate("hello world", max_tokens=12, seed=3, logprobs=2, **own)  # type: ignore[arg-type]
    extra = {k: v for k, v in options.items() if k in ("top_k", "min_p", "repetition_penalty")}
    known = {k: v for k, v in options.items() if k not in extra}
    [found] = sdk.completions.create(**SEEDED, **known, logprobs=2, extra_body=extra).choices
    assert found.text == expected.text
    assert found.logprobs
    assert found.logprobs.token_logprobs == [item.logprob for item in expected.logprobs or ()]
    assert found.finish_reason == expected.finish_reason
    plain = llm.generate("hello world", max_tokens=12, seed=3)
    assert (expected.token_ids != plain.token_ids) == bool(options)


def test_16_tokens_unless_told_otherwise(sdk: openai.OpenAI) -> None:
    end = {"264": -100, "265": -100}
    answer = sdk.completions.create(model="tiny", prompt="a", logit_bias=end, temperature=0)
    assert answer.usage
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_prompts_as_texts_and_as_tokens(sdk: openai.OpenAI, llm: LLM) -> None:
    ids = [llm.tokenizer.encode(text, bos=True) for text in TEXTS]
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "seed": 1, "temperature": 1, "n": 2}
    of_texts = sdk.completions.create(**body, prompt=TEXTS)
    assert whole(sdk.completions.create(**body, prompt=ids)) == whole(of_texts)
    assert [choice.index for choice in of_texts.choices] == list(range(8))
    for i, text in enumerate(TEXTS):
        one = sdk.completions.create(**body, prompt=text)
        assert whole(one) == whole(of_texts)[2 * i : 2 * i + 2]
        assert whole(sdk.completions.create(**body, prompt=ids[i])) == whole(one)
    assert of_texts.usage
    assert of_texts.usage.prompt_tokens == sum(map(len, ids))
    assert of_texts.usage.completion_tokens <= 8 * 6
    assert of_texts.usage.total_tokens == (
        of_texts.usage.prompt_tokens + of_texts.usage.completion_tokens
    )


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
@pytest.mark.parametrize("n_top", [0, 1, 5])
def test_scores_of_prompts(sdk: openai.OpenAI, llm: LLM, max_tokens: int, n_top: int) -> None:
    """As lm-eval asks for them, and reads them: tokens of the context are skipped, and a
    continuation is greedy if each of its tokens is the likeliest one."""
    ids = [llm.tokenizer.encode(text, bos=True) for text in TEXTS]
    answer = sdk.completions.create(
        model="tiny", prompt=ids, echo=True, max_tokens=max_tokens, logprobs=n_top, seed=1234,
        temperature=0,
    )  # fmt: skip
    for prompt, choice in zip(ids, answer.choices, strict=True):
        found = choice.logprobs
        assert found
        assert found.tokens
        assert found.token_logprobs
        assert found.top_logprobs
        assert found.text_offset
        n = len(prompt)
        ended = choice.finish_reason == "stop"
        assert len(found.tokens) == n + max_tokens or ended
        assert found.token_logprobs[0] is None  # type: ignore[comparison-overlap]
        expected = llm.score(prompt)
        assert found.token_logprobs[1:n] == pytest.approx(expected.tolist(), rel=1e-6)
        for token, logprob, top in list(
            zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
        )[1:]:
            assert top[token] == logprob
            assert len(top) in (n_top, n_top + 1)
        if n_top:
            greedy = [max(top.values()) for top in found.top_logprobs[n:]]
            assert found.token_logprobs[n:] == greedy
    assert answer.usage
    assert answer.usage.completion_tokens == sum(
        len(c.logprobs.tokens or ()) for c in answer.choices if c.logprobs
    ) - sum(map(len, ids))


def test_echo(sdk: openai.OpenAI, llm: LLM) -> None:
    for text in TEXTS:
        for n in (0, 5):
            answer = sdk.completions.create(
                model="tiny", prompt=text, echo=True, max_tokens=n, logprobs=1, temperature=0
            )
            [choice] = answer.choices
            own = llm.generate(text, max_tokens=n).text if n else ""
            assert choice.text == text + own, "BOS is no part of the caller's text"
            assert choice.logprobs
            assert choice.logprobs.tokens
            assert choice.logprobs.text_offset
            assert choice.logprobs.tokens[0] == "<|begin_of_text|>"
            for token, at in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
                if not token.startswith(("bytes:", "<|")):
                    assert choice.text[at:].startswith(token)
    ids = [5, 200, 201]
    [choice] = sdk.completions.create(
        model="tiny", prompt=ids, echo=True, max_tokens=0, logprobs=3
    ).choices
    assert choice.text == llm.tokenizer.decode(ids)
    assert choice.logprobs
    assert choice.logprobs.tokens == ["\x05", "bytes:\\xc8", "bytes:\\xc9"]
    assert choice.logprobs.text_offset == [0, 1, 1]


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_is_the_whole_in_pieces(sdk: openai.OpenAI, seed: int) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "prompt": TEXTS, "seed": 50 * seed, "n": 2, "temperature": 1.2,
        "max_tokens": 30 if seed else 0, "echo": seed % 2 == 0, "logprobs": [None, 0, 2][seed % 3],
        "stop": ["e", "ab"] if seed % 4 == 1 else None,
    }  # fmt: skip
    expected = whole(sdk.completions.create(**body))
    assert joined(sdk.completions.create(**body, stream=True)) == expected


def test_events_are_what_the_types_say(tiny_server: Live) -> None:
    body = {**SEEDED, "stream": True, "logprobs": 1, "echo": True}
    with_usage = {**body, "stream_options": {"include_usage": True}}
    for sent in (body, with_usage):
        reply = httpx.post(tiny_server.url + PATH, json=sent, timeout=60)
        *events, done, end = reply.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        for event in events:
            text = event.removeprefix("data: ")
            ours = openai_types.Completion.model_validate_json(text)
            assert ours.model_dump(exclude_unset=True) == json.loads(text)
        last = openai_types.Completion.model_validate_json(events[-1].removeprefix("data: "))
        assert (last.usage is not None) == ("stream_options" in sent)
        if last.usage:
            assert last.choices == []
            assert last.usage.completion_tokens == 12


def test_async(tiny_server: Live, sdk: openai.OpenAI) -> None:
    async def run() -> list[Any]:
        async with async_client(tiny_server) as api:
            stream, answer = await asyncio.gather(
                api.completions.create(**SEEDED, stream=True), api.completions.create(**SEEDED)
            )
            return [joined([chunk async for chunk in stream]), whole(answer)]

    assert asyncio.run(run()) == 2 * [whole(sdk.completions.create(**SEEDED))]


def test_formats(sdk: openai.OpenAI) -> None:
    form = {"response_format": {"type": "choice", "choice": ["yes", "no"]}}
    body = {**SEEDED, "temperature": 1}
    answer = sdk.completions.create(**body, n=8, logprobs=20, extra_body=form)
    assert {choice.text for choice in answer.choices} == {"yes", "no"}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": None}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": ["a", "\ud800"]}, "prompt", None),
        ({"prompt": [[1], []]}, "prompt", None),
        ({"prompt": [[]]}, "prompt", None),
        ({"prompt": ["a", 1]}, "prompt[1]", None),
        ({"prompt": [1, 10**9]}, "prompt", None),
        ({"prompt": [1, -1]}, "prompt", None),
        ({"prompt": [1, 2**40], "echo": True}, "prompt[1]", None),
        ({"prompt": [1, 10**6], "echo": True}, "prompt", None),
        ({"prompt": "word " * 3000}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a"] * 17, "n": 121}, "n", None),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"logprobs": 21}, "logprobs", None),
        ({"logprobs": True}, "logprobs", None),
        ({"max_completion_tokens": 3}, "max_completion_tokens", "unknown_parameter"),
        ({"stream_options": {}}, "stream_options", None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_named(
    tiny_server: Live, body: dict[str, Any], param: str, code: str | None
) -> None:
    status, *found, message = refusal(tiny_server, PATH, {**SEEDED, **body})
    assert (status, *found) == (400, param, code)
    assert message.startswith(param.split("[")[0])
