"""/v1/chat/completions by OpenAI's own client: every parameter does what `LLM` does with it, and a
stream is the same answer in pieces."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from live import Live
from sdk import HI, Choice, async_client, check_chunk, choices_of, client, joined, llm_of, refusal
from sdk import shown as in_words

from pronk.engine.llm import LLM

PATH = "/v1/chat/completions"
SEEDED: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 24, "seed": 3}


@pytest.fixture(scope="module")
def sdk(tiny_server: Live) -> Iterator[openai.OpenAI]:
    with client(tiny_server) as one:
        yield one


@pytest.fixture(scope="module")
def llm(tiny_server: Live) -> Iterator[LLM]:
    with llm_of(tiny_server) as one:
        yield one


def ask(sdk: openai.OpenAI, **body: Any) -> Choice:
    extra = {k: body.pop(k) for k in list(body) if k in EXTRA}
    [choice] = choices_of(sdk.chat.completions.create(**{**SEEDED, **body}, extra_body=extra))
    return choice


EXTRA = ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "cache_salt")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 0.1},
        {"temperature": 2, "top_k": 2},
        {"temperature": 2, "min_p": 0.2},
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2, "temperature": 0},
        {"frequency_penalty": 2, "temperature": 0},
        {"frequency_penalty": -2, "temperature": 0},
        {"seed": 4},
        {"max_tokens": 3},
    ],
    ids=str,
)
def test_sampling_is_that_of_llm(sdk: openai.OpenAI, llm: LLM, options: dict[str, Any]) -> None:
    expected = llm.chat(HI, **{"max_tokens": 24, "seed": 3, "logprobs": 2, **options})
    found = ask(sdk, **options, logprobs=True, top_logprobs=2)
    assert found.logprobs == in_words(expected.logprobs or (), llm)
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    plain = ask(sdk, logprobs=True, top_logprobs=2)
    assert (found.logprobs != plain.logprobs) == bool(options), "it changes the answer"


def test_bias_and_stops(sdk: openai.OpenAI, llm: LLM) -> None:
    plain = llm.chat(HI, temperature=0, max_tokens=24)
    first, stop = plain.token_ids[0], plain.text[4:6]
    never = ask(sdk, temperature=0, logit_bias={str(first): -100}, logprobs=True)
    assert never.logprobs[0]["bytes"] != list(llm.tokenizer.token_bytes(first))
    always = ask(sdk, temperature=1, logit_bias={str(first): 100}, max_tokens=4)
    assert always.text == 4 * llm.tokenizer.decode([first])
    cut = ask(sdk, temperature=0, stop=[stop, "nothing like this"])
    assert plain.text.startswith(cut.text)
    assert stop not in cut.text
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert ask(sdk, temperature=0, stop=stop) == cut
    assert ask(sdk, temperature=0, stop=[]).text == plain.text
    token = plain.token_ids[5]
    ended = ask(sdk, temperature=0, stop_token_ids=[token])
    at = plain.token_ids.index(token)
    assert ended.text == llm.tokenizer.decode(plain.token_ids[:at])
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)


def test_the_end_token_may_be_ignored(sdk: openai.OpenAI, llm: LLM) -> None:
    end = {str(llm.tokenizer.special_ids["<|eot_id|>"]): 100}
    assert ask(sdk, logit_bias=end) == Choice(finish_reason="stop")
    on = ask(sdk, logit_bias=end, ignore_eos=True, logprobs=True)
    assert (len(on.logprobs), on.finish_reason) == (24, "length")


def test_both_names_of_max_tokens(sdk: openai.OpenAI, tiny_server: Live) -> None:
    new = sdk.chat.completions.create(
        model="tiny", messages=HI, seed=3, max_completion_tokens=5, max_tokens=5
    )
    assert new.usage
    assert new.usage.completion_tokens == 5
    body = {**SEEDED, "max_tokens": 5, "max_completion_tokens": 6}
    assert refusal(tiny_server, PATH, body)[:2] == (400, "max_tokens")


def test_several_answers(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {**SEEDED, "temperature": 1}
    several = sdk.chat.completions.create(**body, n=4)
    found = choices_of(several)
    assert len({choice.text for choice in found}) == 4
    for i, choice in enumerate(several.choices):
        again = sdk.chat.completions.create(**{**body, "seed": 3 + i})
        assert choices_of(again) == [found[i]]
        assert choice.seed == 3 + i  # type: ignore[attr-defined]
    assert several.usage
    assert several.usage.completion_tokens == 4 * 24
    unseeded = sdk.chat.completions.create(model="tiny", messages=HI, max_tokens=24, temperature=1)
    again = sdk.chat.completions.create(**{**body, "seed": unseeded.choices[0].seed})  # type: ignore[attr-defined]
    assert choices_of(again) == choices_of(unseeded)
    for seed in (-1, -(2**63), 2**63 - 1):
        one, two = (sdk.chat.completions.create(**{**body, "seed": seed}) for _ in range(2))
        assert choices_of(one) == choices_of(two)


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_is_the_whole_in_pieces(sdk: openai.OpenAI, seed: int) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "messages": HI, "seed": 100 * seed, "n": 4, "temperature": 1.2,
        "max_tokens": 40, "logprobs": seed % 2 == 0, "stop": ["ab", "e"] if seed % 3 else None,
    }  # fmt: skip
    if body["logprobs"]:
        body["top_logprobs"] = seed // 2
    whole = choices_of(sdk.chat.completions.create(**body))
    assert joined(sdk.chat.completions.create(**body, stream=True)) == whole


def test_usage(sdk: openai.OpenAI, llm: LLM) -> None:
    messages: Any = [{"role": "user", "content": "count these " * 20}]
    n_prompt = len(llm.prompter.chat_ids(chat_of(messages)))
    body: dict[str, Any] = {**SEEDED, "messages": messages, "max_tokens": 4}

    def usage(**more: Any) -> tuple[int, int, int, int]:
        found = sdk.chat.completions.create(**body, **more).usage
        assert found
        assert found.prompt_tokens_details
        cached = found.prompt_tokens_details.cached_tokens
        assert cached is not None
        return found.prompt_tokens, found.completion_tokens, found.total_tokens, cached

    salt = {"extra_body": {"cache_salt": "of test_usage"}}
    assert usage(**salt) == (n_prompt, 4, n_prompt + 4, 0)
    assert usage(**salt)[3] == (n_prompt - 1) // 16 * 16
    assert usage(extra_body={"cache_salt": "another"})[3] == 0


def chat_of(messages: Any) -> Any:
    from pronk.engine.prompts import Chat
    from pronk.text.messages import messages_from_dicts

    return Chat(messages_from_dicts(messages))


def lines_of(server: Live, **body: Any) -> list[str]:
    """The events of a stream, as they are sent."""
    reply = httpx.post(server.url + PATH, json={**SEEDED, "stream": True, **body}, timeout=120)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, end = reply.text.split("\n\n")
    assert end == ""
    return events


def test_every_event_is_what_the_types_say(tiny_server: Live, sdk: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for more in (
        {"n": 2},
        {"logprobs": True, "top_logprobs": 1},
        {"service_tier": "flex", "stream_options": {"include_usage": True}},
        {"tools": [tool], "tool_choice": "required", "max_tokens": 200},
    ):
        *events, done = lines_of(tiny_server, **more)
        assert done == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        for chunk in chunks:
            check_chunk(chunk)
        with_usage = "stream_options" in more
        assert all(("usage" in chunk) == with_usage for chunk in chunks)
        if with_usage:
            *before, last = chunks
            assert all(chunk["usage"] is None for chunk in before)
            assert last["choices"] == []
            whole = sdk.chat.completions.create(**SEEDED, service_tier="flex")
            assert whole.usage
            for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
                assert last["usage"][name] == getattr(whole.usage, name)
            assert {chunk["service_tier"] for chunk in chunks} == {"flex"}


def test_what_asks_for_nothing_changes_nothing(sdk: openai.OpenAI) -> None:
    plain = ask(sdk)
    for more in (
        {"user": "u"}, {"safety_identifier": "s"}, {"prompt_cache_key": "k"}, {"store": False},
        {"modalities": ["text"]}, {"audio": None}, {"functions": []}, {"service_tier": "auto"},
        {"stop": None}, {"tools": []}, {"logit_bias": {}}, {"parallel_tool_calls": True},
        {"reasoning_effort": "none"}, {"prompt_cache_retention": "24h"}, {"n": 1},
    ):  # fmt: skip
        assert ask(sdk, **more) == plain
    found = sdk.chat.completions.create(**SEEDED, metadata={"a": "b"})
    assert found.metadata == {"a": "b"}  # type: ignore[attr-defined]


def test_async(tiny_server: Live, sdk: openai.OpenAI) -> None:
    seeds = range(6)
    expected = [ask(sdk, seed=seed, temperature=1) for seed in seeds]

    async def whole(api: openai.AsyncOpenAI, seed: int) -> Choice:
        body = {**SEEDED, "seed": seed, "temperature": 1}
        return choices_of(await api.chat.completions.create(**body))[0]

    async def streamed(api: openai.AsyncOpenAI, seed: int) -> Choice:
        body = {**SEEDED, "seed": seed, "temperature": 1}
        stream = await api.chat.completions.create(**body, stream=True)
        return joined([chunk async for chunk in stream])[0]

    async def all_at_once() -> list[Choice]:
        async with async_client(tiny_server) as api:
            work = [whole(api, seed) for seed in seeds] + [streamed(api, seed) for seed in seeds]
            return list(await asyncio.gather(*work))

    assert asyncio.run(all_at_once()) == [*expected, *expected]


def test_a_deadline(tiny_server: Live) -> None:
    status, _, code, _ = refusal(tiny_server, PATH, {**SEEDED, "timeout": 1e-6})
    assert (status, code) == (504, "deadline_exceeded")
    assert "deadline_exceeded" in lines_of(tiny_server, timeout=1e-6)[-1]


def test_the_chat_is_too_long(tiny_server: Live) -> None:
    for stream in (False, True):
        messages = [{"role": "user", "content": "word " * 2000}]
        body = {**SEEDED, "messages": messages, "stream": stream}
        status, param, code, message = refusal(tiny_server, PATH, body)
        assert (status, param, code) == (400, "messages", "context_length_exceeded")
        assert "n_ctx=2048" in message
        assert "n_prompt_tokens=" in message


TOOL = {"type": "function", "function": {"name": "f"}}
UNSUPPORTED = {"type": "array", "uniqueItems": True}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", None),
        ({"temperature": -1}, "temperature", None),
        ({"top_p": 0}, "top_p", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"n": 129}, "n", None),
        ({"seed": 2**64}, "seed", None),
        ({"stop": ""}, "stop", None),
        ({"stop": ["a", 1]}, "stop[1]", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ({"logit_bias": {"a": 1}}, "logit_bias", None),
        ({"logit_bias": {"99999": 1}}, "logit_bias", None),
        ({"logit_bias": {"1": 101}}, "logit_bias[1]", None),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role", None),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].type", None),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", None),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", None),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name", None),
        ({"tools": [TOOL], "tool_choice": "g"}, "tool_choice", None),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice", None),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]}}},
         "tool_choice.allowed_tools.tools", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type", None),
        ({"builtin_tools": ["paint"]}, "builtin_tools", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", None),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format", None),
        ({"response_format": {"type": "choice", "choice": []}}, "response_format", None),
        ({"response_format": {"type": "grammar", "grammar": "root ::= x"}}, "response_format",
         None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}, "a": 1}},
         "response_format.a", "unknown_parameter"),
        ({"response_format": {"type": "json_schema",
                              "json_schema": {"name": "x", "schema": UNSUPPORTED}}},
         "response_format", None),
        ({"response_format": {"type": "regex", "regex": "\ud800"}}, "response_format", None),
        ({"response_format": {"type": "choice", "choice": ["\ud800"]}}, "response_format", None),
        ({"response_format": {"type": "grammar", "grammar": 'root ::= "\ud800"'}},
         "response_format", None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", None),
        ({"web_search_options": {"x": 1}}, "web_search_options", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", None),
        ({"verbosity": "low"}, "verbosity", "unsupported_parameter"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction",
         "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"metadata": {"a": 1}}, "metadata.a", None),
        ({"service_tier": "scale"}, "service_tier", None),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named(
    tiny_server: Live, body: dict[str, Any], param: str, code: str | None
) -> None:
    status, *found, message = refusal(tiny_server, PATH, {**SEEDED, **body})
    assert (status, *found) == (400, param, code)
    assert message.startswith(param.split("[")[0])
    assert "\n" not in message


def test_broken_json_and_unknown_models(tiny_server: Live, sdk: openai.OpenAI) -> None:
    as_json = {"Content-Type": "application/json"}
    for raw in (b"{", b"[1", b"\xff", b'{"model": NaN}', b"null", b"[]", b'"x"', b""):
        reply = httpx.post(tiny_server.url + PATH, content=raw, headers=as_json)
        assert reply.status_code == 400, raw
        assert reply.json()["error"]["param"]
    unnamed = httpx.post(tiny_server.url + PATH, content=b"{}").json()["error"]
    assert "Content-Type: application/json" in unnamed["message"]
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here") as refused:
        sdk.chat.completions.create(model="gpt-4", messages=HI)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="no such route"):
        sdk.post("/nothing", cast_to=object, body={})
    with pytest.raises(openai.APIStatusError) as method:
        sdk.get("/completions", cast_to=object)
    assert method.value.status_code == 405
    assert method.value.response.headers["allow"] == "POST"
