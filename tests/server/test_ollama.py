"""Ollama's own client against a live server."""

import asyncio
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from live import Live, live_server
from pydantic import BaseModel, ValidationError
from service_app import add_key, bearer

from engine.tiny_models import write_gguf, write_hf
from pronk.server.ollama_types import OllamaChatRequest, seconds_of

HI = [{"role": "user", "content": "Hi"}]
FEW = {"seed": 5, "num_predict": 16}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}
NO = {"type": "string", "const": "no"}
"""A format that leaves a model two answers: this word, or a call."""


@pytest.fixture(scope="module")
def tiny(tiny_server: Live) -> Iterator[ollama.Client]:
    with ollama.Client(host=tiny_server.url) as one:
        yield one


@pytest.fixture(scope="module")
def smollm2(smollm2_server: Live) -> Iterator[ollama.Client]:
    with ollama.Client(host=smollm2_server.url) as one:
        yield one


def post(server: Live, path: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, **more)


def chat_lines(server: Live, **body: Any) -> list[dict[str, Any]]:
    """The lines as they are sent."""
    answer = post(server, "/api/chat", {"model": "tiny", "messages": HI, "options": FEW} | body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(text) for text in answer.text.splitlines()]


def joined(parts: list[Any]) -> dict[str, Any]:
    """What a stream of the client's objects amounts to."""
    message = [part.message for part in parts]
    calls = [call for one in message for call in one.tool_calls or ()]
    logprobs = [item for part in parts for item in part.logprobs or ()]
    return {
        "content": "".join(one.content or "" for one in message),
        "calls": [call.function.model_dump() for call in calls],
        "logprobs": [item.model_dump() for item in logprobs],
        **{name: parts[-1][name] for name in ("done", "done_reason", "eval_count", "model")},
        "prompt_eval_count": parts[-1].prompt_eval_count,
    }


# Answers.


def test_lines_are_what_the_client_expects(tiny_server: Live) -> None:
    lines = chat_lines(tiny_server, logprobs=True, top_logprobs=2)
    for line in lines:
        ollama.ChatResponse.model_validate(line)
        assert line.keys() <= ollama.ChatResponse.model_fields.keys()
        assert datetime.fromisoformat(line["created_at"]).tzinfo is not None
    *parts, last = lines
    assert all(not part["done"] and "done_reason" not in part for part in parts)
    assert last["done"] is True
    assert last["done_reason"] == "length"
    assert last["eval_count"] == 16
    times = [last[f"{name}_duration"] for name in ("load", "prompt_eval", "eval", "total")]
    assert all(isinstance(time, int) and time >= 1 for time in times)
    assert times[3] >= times[1] + times[2]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"options": {**FEW, "stop": ["a", "e"]}},
        {"options": {**FEW, "num_predict": 60}, "format": "json"},
        {"options": {**FEW, "num_predict": 60}, "tools": [WEATHER]},
        {"logprobs": True, "top_logprobs": 3},
        {"messages": [*HI, {"role": "assistant", "content": "Well, "}]},
    ],
    ids=["text", "stop", "json", "tools", "logprobs", "prefill"],
)
def test_streamed_is_the_same_as_whole(tiny: ollama.Client, body: dict[str, Any]) -> None:
    settings: Any = {"model": "tiny", "messages": HI, "options": FEW} | body
    whole = tiny.chat(**settings)
    parts = list(tiny.chat(stream=True, **settings))
    assert joined(parts) == joined([whole])
    if "logprobs" in body:
        assert len(whole.logprobs or ()) == whole.eval_count
        assert all(len(item.top_logprobs or ()) == 3 for item in whole.logprobs or ())


def test_generate_streams_the_same(tiny: ollama.Client) -> None:
    more: Any
    for more in ({}, {"raw": True}, {"system": "Be brief."}, {"format": {"enum": ["a", "b"]}}):
        settings = {"model": "tiny", "prompt": "hello", "options": FEW} | more
        whole = tiny.generate(**settings)
        parts = list(tiny.generate(stream=True, **settings))
        assert "".join(part.response or "" for part in parts) == whole.response
        assert parts[-1].eval_count == whole.eval_count
        assert parts[-1].prompt_eval_count == whole.prompt_eval_count
        assert parts[-1].done_reason == whole.done_reason
    assert json.loads(whole.response or "") in ("a", "b")


def test_the_async_client(tiny_server: Live) -> None:
    async def both() -> tuple[Any, Any]:
        async with ollama.AsyncClient(host=tiny_server.url) as one:
            whole = await one.chat("tiny", HI, options=FEW)
            parts = [part async for part in await one.chat("tiny", HI, options=FEW, stream=True)]
            return joined([whole]), joined(parts)

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_calls_arrive_whole(tiny_server: Live, tiny: ollama.Client) -> None:
    settings: Any = {"model": "tiny", "messages": HI, "tools": [WEATHER], "format": NO}
    for seed in range(200):
        options = {"seed": seed, "num_predict": 400, "temperature": 3}
        whole = tiny.chat(**settings, options=options)
        if whole.message.tool_calls and whole.done_reason == "stop":
            break
    else:
        raise AssertionError("no seed made a call")
    call = whole.message.tool_calls[0].function
    assert call.name == "get_weather"
    assert call.arguments["city"] in ("Paris", "Rome")
    assert joined(list(tiny.chat(**settings, options=options, stream=True))) == joined([whole])
    cut = {**options, "num_predict": 30}
    short = tiny.chat(**settings, options=cut)
    assert short.message.tool_calls is None
    assert (short.message.content or "").lstrip().startswith("{")
    assert joined(list(tiny.chat(**settings, options=cut, stream=True))) == joined([short])


def test_the_form_of_calls(tiny_server: Live) -> None:
    for seed in range(200):
        options = {"seed": seed, "num_predict": 400, "temperature": 3}
        lines = chat_lines(tiny_server, tools=[WEATHER], format=NO, options=options)
        called = [line["message"] for line in lines if "tool_calls" in line["message"]]
        if called:
            break
    for index, message in enumerate(called):
        assert (message["role"], message["content"]) == ("assistant", "")
        (call,) = message["tool_calls"]
        assert call["id"].startswith("call_")
        city = call["function"]["arguments"]["city"]
        expected = {"index": index, "name": "get_weather", "arguments": {"city": city}}
        assert call["function"] == expected
    assert called


def test_stop_and_lengths(tiny: ollama.Client) -> None:
    text = tiny.generate("tiny", "Hi", options={"seed": 2, "num_predict": 40}).response
    stop = text[3:5]
    answer = tiny.generate("tiny", "Hi", options={"seed": 2, "num_predict": 40, "stop": [stop]})
    assert answer.response == text[: text.index(stop)]
    assert answer.done_reason == "stop"
    for most in (-1, -2, None):
        options = {"seed": 2, "num_predict": most, "num_ctx": 60}
        answer = tiny.generate("tiny", "Hi", options=options)
        if answer.done_reason == "length":
            assert (answer.prompt_eval_count or 0) + (answer.eval_count or 0) == 60


def test_a_random_seed_is_random(tiny: ollama.Client) -> None:
    options = {"seed": -1, "num_predict": 20, "temperature": 2}
    texts = {tiny.generate("tiny", "Hi", options=options).response for _ in range(4)}
    assert len(texts) > 1


# What the model is told.


def prompt_of(server: Live, path: str = "/api/chat", **body: Any) -> int:
    body = {"model": "tiny", "stream": False, "options": {"num_predict": 1}} | body
    answer = post(server, path, body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["prompt_eval_count"])


def openai_prompt(server: Live, messages: list[dict[str, Any]], **body: Any) -> int:
    answer = post(server, "/tokenize", {"messages": messages, **body})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["count"])


def test_a_chat_with_calls_and_results(tiny_server: Live) -> None:
    function = {"name": "get_weather", "arguments": {"city": "Rome"}}
    ours = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {"role": "assistant", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "warm", "tool_name": "get_weather"},
    ]
    call = {**function, "arguments": json.dumps(function["arguments"])}
    theirs = [
        *ours[:2],
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "content": "warm"},
    ]
    assert prompt_of(tiny_server, messages=ours) == openai_prompt(tiny_server, theirs)
    told = prompt_of(tiny_server, messages=ours, tools=[WEATHER])
    assert told == openai_prompt(tiny_server, theirs, tools=[WEATHER])


def test_a_prompt_is_a_turn_unless_it_is_raw(tiny_server: Live) -> None:
    def of(**body: Any) -> int:
        return prompt_of(tiny_server, "/api/generate", **body)

    assert of(prompt="Hi") == openai_prompt(tiny_server, HI)
    system = [{"role": "system", "content": "Be brief."}, *HI]
    assert of(prompt="Hi", system="Be brief.") == openai_prompt(tiny_server, system)
    assert of(prompt="Hi", raw=True) == 3  # BOS and two bytes
    assert of(prompt="<|begin_of_text|>Hi", raw=True) == 3
    assert of(prompt="Hi<|eot_id|>", raw=True) == 4
    written = (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert of(prompt=written, raw=True) == openai_prompt(tiny_server, HI)
    assert of(prompt=written) > of(prompt=written, raw=True)  # which is no place for tokens


def test_a_prefill_is_continued(tiny_server: Live) -> None:
    begun = prompt_of(tiny_server, messages=[*HI, {"role": "assistant", "content": "Well, "}])
    llm = next(iter(tiny_server.service.models)).loaded.llm  # type: ignore[union-attr]
    words = len(llm.tokenizer.encode("Well, "))
    assert begun == openai_prompt(tiny_server, HI) + words


def test_a_base_model_continues_texts(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "base.gguf", chat=False)
    with (
        live_server([model], tmp_path / "data") as server,
        ollama.Client(host=server.url) as one,
    ):
        assert one.generate("base", "Hi", options=FEW).prompt_eval_count == 3
        assert one.show("base").capabilities == ["completion"]
        for ask in (
            lambda: one.chat("base", HI),
            lambda: one.generate("base", "Hi", system="Be brief."),
        ):
            with pytest.raises(ollama.ResponseError) as error:
                ask()
            assert error.value.status_code == 400


# Refusals.


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"options": {"num_ctx": 4096}}, "4096 tokens are more than the 2048"),
        ({"options": {"num_ctx": 10}}, "n_ctx=10"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"tfs_z": 0.5}}, "options.tfs_z"),
        ({"options": {"typical_p": 0.7}}, "options.typical_p"),
        ({"options": {"vocab_only": True}}, "options.vocab_only"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "options.repeat_last_n"),
        ({"options": {"frequency_penalty": 1, "penalize_newline": False}}, "penalize_newline"),
        ({"options": {"xtc_threshold": 1}}, "options.xtc_threshold: this server does not know"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"top_p": 1.5}}, "options.top_p"),
        ({"think": True}, "think"),
        ({"think": "high"}, "think"),
        ({"truncate": True}, "truncate"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs"),
        ({"format": {"type": "nothing"}}, "format: "),
        ({"messages": [{"role": "assistant", "content": "Well"}]}, "none before"),
        ({"format": "yaml"}, "format"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"n": 2}, "n: this server does not know"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": "x", "tool_name": "y"}]}, "tool_name"),
        ({"messages": [{"role": "user", "tool_calls": [{"function": {
            "name": "f", "arguments": {}}}]}]}, "calls nothing"),
        ({"messages": [*HI, {"role": "assistant", "content": "W"}], "format": "json"}, "format"),
        ({"messages": [{"role": "user", "content": "a " * 1100}]}, "n_ctx=2048"),
        ({"tools": [WEATHER, WEATHER]}, "twice"),
        ({"tools": [{"type": "web"}]}, "tools[0]"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(
    tiny_server: Live, body: dict[str, Any], words: str
) -> None:
    answer = post(tiny_server, "/api/chat", {"model": "tiny", "messages": HI} | body)
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"error"}
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [{"suffix": "x"}, {"template": "{{ .Prompt }}"}, {"context": [1, 2]}, {"images": ["aGk="]},
     {"width": 4}, {"raw": True, "system": "x"}],
)  # fmt: skip
def test_what_generate_cannot_do(tiny_server: Live, body: dict[str, Any]) -> None:
    answer = post(tiny_server, "/api/generate", {"model": "tiny", "prompt": "Hi"} | body)
    assert answer.status_code == 400
    assert next(iter(body if "raw" not in body else ["system"])) in answer.json()["error"]


def test_what_changes_no_answer_is_accepted(tiny: ollama.Client) -> None:
    neutral = {
        "num_gpu": 99, "main_gpu": 0, "num_thread": 4, "num_batch": 512, "numa": False,
        "low_vram": True, "use_mmap": True, "use_mlock": False, "logits_all": False,
        "vocab_only": False, "embedding_only": False, "f16_kv": True, "num_keep": 5,
        "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "tfs_z": 1.0, "typical_p": 1,
        "repeat_last_n": 64, "penalize_newline": True, "repeat_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": None, "num_ctx": 2048,
    }  # fmt: skip
    plain = tiny.chat("tiny", HI, options=FEW)
    other = tiny.chat(
        "tiny:latest", HI, options={**FEW, **neutral}, think=False, format="", keep_alive=-1
    )
    assert other.message.content == plain.message.content
    assert other.model == "tiny:latest"


def test_options_have_effects(tiny: ollama.Client) -> None:
    def text(**options: Any) -> str:
        return tiny.chat("tiny", HI, options={**FEW, **options}).message.content or ""

    plain = text(temperature=1.5)
    assert text(temperature=0) == text(temperature=1.5, top_k=1) == text(top_p=1e-9)
    changed = [{"min_p": 1.0}, {"repeat_penalty": 20.0}, {"presence_penalty": 2.0},
               {"frequency_penalty": 2.0}, {"seed": 6}]  # fmt: skip
    assert all(text(temperature=1.5, **one) != plain for one in changed)


def test_errors_of_the_client(tiny: ollama.Client) -> None:
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match="not served here") as error:
            list(tiny.chat("gpt-4", HI, stream=stream))  # type: ignore[call-overload]
        assert error.value.status_code == 404


def test_bodies_as_curl_sends_them(tiny_server: Live) -> None:
    body = json.dumps({"model": "tiny", "prompt": "Hi", "stream": False, "options": FEW})
    url = f"{tiny_server.url}/api/generate"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for headers in (form, {}, {"Content-Type": "text/plain"}):
        answer = httpx.post(url, content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["eval_count"] == 16
    for browser in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert httpx.post(url, content=body, headers={**form, **browser}).status_code == 403
    assert "not JSON" in httpx.post(url, content="{").json()["error"]


def test_a_client_that_goes_away_ends_the_answer(
    smollm2_server: Live, smollm2: ollama.Client
) -> None:
    before = smollm2_server.aborted()
    novel = [{"role": "user", "content": "Write a novel."}]
    parts: Any = smollm2.chat("smollm2", novel, stream=True)
    next(parts)
    parts.close()
    smollm2_server.until(lambda: smollm2_server.aborted() == before + 1)
    for stream in (True, False):
        body = {"model": "smollm2", "messages": novel, "stream": stream}
        smollm2_server.leave("/api/chat", body)
        smollm2_server.until(lambda: smollm2_server.busy == 0)
    smollm2_server.until(lambda: smollm2_server.aborted() == before + 3)
    assert smollm2_server.service.models.default.users == 0


# Vectors.


def test_vectors(tiny_server: Live, tiny: ollama.Client) -> None:
    found = tiny.embed("tiny:latest", ["hello", "hello world"])
    assert found.model == "tiny:latest"
    assert len(found.embeddings) == 2
    assert all(sum(x * x for x in one) == pytest.approx(1, abs=1e-4) for one in found.embeddings)
    assert (found.prompt_eval_count, found.total_duration or 0) >= (4, 1)
    openai = post(tiny_server, "/v1/embeddings", {"model": "tiny", "input": "hello world"}).json()
    assert found.embeddings[1] == pytest.approx(openai["data"][0]["embedding"], abs=1e-5)
    one = tiny.embed("tiny", "hello", dimensions=len(found.embeddings[0]), keep_alive="5m")
    assert one.embeddings[0] == pytest.approx(found.embeddings[0], abs=1e-5)
    old = tiny.embeddings("tiny", "hello")
    assert old.embedding == pytest.approx(found.embeddings[0], abs=1e-5)
    assert tiny.embed("tiny", []).embeddings == []
    assert list(tiny.embeddings("tiny").embedding) == []


def test_vectors_of_texts_that_do_not_fit(tiny: ollama.Client) -> None:
    for options in ({"num_ctx": 100}, {}):
        text = "a " * 2000
        with pytest.raises(ollama.ResponseError, match="do not fit the context") as error:
            tiny.embed("tiny", [text], options=options, truncate=False)
        assert error.value.status_code == 400
        cut = tiny.embed("tiny", [text], options=options, truncate=True)
        assert cut.prompt_eval_count == options.get("num_ctx", 2048)
    with pytest.raises(ollama.ResponseError, match="dimensions"):
        tiny.embed("tiny", "x", dimensions=7)
    with pytest.raises(ollama.ResponseError, match="4096 tokens are more"):
        tiny.embed("tiny", "x", options={"num_ctx": 4096})


# Models.


def test_lists_of_models(tiny_server: Live, tiny: ollama.Client) -> None:
    (model,) = tiny.list().models
    assert model.model == "tiny"
    assert model.size == tiny_server.service.models.default.ref.path.stat().st_size  # type: ignore[union-attr]
    assert len(model.digest or "") == 64
    assert model.details is not None
    assert (model.details.format, model.details.family) == ("gguf", "llama")
    (running,) = tiny.ps().models
    assert (running.name, running.context_length, running.digest) == ("tiny", 2048, model.digest)
    shown = tiny.show("tiny")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 2048
    assert shown.modelinfo["general.parameter_count"] == model_size(tiny_server)
    with pytest.raises(ollama.ResponseError, match="not served"):
        tiny.show("other")
    answer = post(tiny_server, "/api/show", {"name": "tiny"})
    assert answer.json()["template"] == ""
    assert post(tiny_server, "/api/show", {}).status_code == 400


def model_size(server: Live) -> int:
    loaded = server.service.models.default.loaded
    assert loaded is not None
    return loaded.llm.config.n_params


def test_the_version_and_the_root(tiny_server: Live) -> None:
    answer = httpx.get(f"{tiny_server.url}/api/version")
    assert answer.json().keys() == {"version"}
    assert httpx.head(tiny_server.url).status_code == 200


def test_models_come_and_go(tmp_path: Path) -> None:
    models = [write_gguf(tmp_path / "a.gguf"), write_hf(tmp_path / "b")]
    with live_server(models, tmp_path / "data") as server, ollama.Client(host=server.url) as one:

        def loaded() -> set[str | None]:
            return {model.name for model in one.ps().models}

        assert loaded() == {"a"}
        assert {model.model for model in one.list().models} == {"a", "b"}
        assert one.show("b").details.format == "safetensors"  # type: ignore[union-attr]
        assert one.show("b").details.parent_model == ""  # type: ignore[union-attr]
        assert loaded() == {"a"}  # showing one does not load it
        answer = one.chat("b", [], keep_alive="10m")
        assert (answer.done, answer.done_reason) == (True, "load")
        running = {model.name: model.expires_at for model in one.ps().models}
        soon = datetime.now(UTC) + timedelta(minutes=10, seconds=1)
        assert running["b"] is not None
        assert running["b"] <= soon
        assert running["a"] is not None
        assert running["a"] > soon + timedelta(days=36500)
        assert one.generate("b", keep_alive=0).done_reason == "unload"
        assert loaded() == {"a"}
        assert one.generate("b", keep_alive=0).done_reason == "unload"  # again: it is all the same
        assert one.generate("a", "Hi", options=FEW, keep_alive=0).done_reason == "length"
        server.until(lambda: not loaded())
        assert one.generate("a", "Hi", options=FEW).done_reason == "length"  # loaded again
        assert server.service.models.default.keep_alive is None


def test_a_model_in_use_is_unloaded_afterwards(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "a.gguf", **{"llama.context_length": 2048})
    with live_server([model], tmp_path / "data") as server, ollama.Client(host=server.url) as one:
        parts = one.chat("a", HI, stream=True, options={"num_predict": 1900, "seed": 1})
        got = [next(iter(parts))]
        assert one.generate("a", keep_alive=0).done_reason == "unload"
        got += list(parts)
        assert got[-1].done
        assert got[-1].done_reason in ("stop", "length")
        server.until(lambda: not one.ps().models)


def test_keys_and_control(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    user = add_key(file, "user", scopes=frozenset({"inference"}))
    admin = add_key(file, "admin", scopes=frozenset({"inference", "admin"}))
    model = write_gguf(tmp_path / "tiny.gguf")
    with live_server([model], tmp_path / "data", api_key_file=file) as server:
        for method, path in (("GET", "tags"), ("GET", "ps"), ("GET", "version"), ("POST", "chat"),
                             ("POST", "generate"), ("POST", "show"), ("POST", "pull")):  # fmt: skip
            answer = httpx.request(method, f"{server.url}/api/{path}", json={"model": "tiny"})
            assert answer.status_code == 401
            assert "API key" in answer.json()["error"]
        with ollama.Client(host=server.url, headers=bearer(user)) as one:
            assert one.chat("tiny", HI, options=FEW, keep_alive="5m").done
            assert server.service.models.default.keep_alive is None  # it has no say in that
            for ask in (lambda: one.chat("tiny", HI, keep_alive=0), lambda: one.pull("x")):
                with pytest.raises(ollama.ResponseError) as error:
                    ask()
                assert error.value.status_code == 403
            assert len(one.ps().models) == 1
        with ollama.Client(host=server.url, headers=bearer(admin)) as one:
            for ask in (lambda: one.pull("x"), lambda: one.delete("x"), lambda: one.copy("x", "y"),
                        lambda: one.push("x"), lambda: one.create("x", from_="y")):  # fmt: skip
                with pytest.raises(ollama.ResponseError, match="pronk pull") as error:
                    ask()
                assert error.value.status_code == 501
            assert one.generate("tiny", keep_alive=0).done_reason == "unload"
            assert one.ps().models == []


def test_control_without_keys_wants_the_token(tiny_server: Live) -> None:
    assert post(tiny_server, "/api/pull", {"model": "x"}).status_code == 401


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(5, 5), (0.5, 0.5), ("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("1.5h", 5400), ("0s", 0),
     (0, 0), (-1, math.inf), ("-1m", math.inf), ("-1", math.inf), ("10", 10), (None, None)],
)  # fmt: skip
def test_durations(value: Any, seconds: float | None) -> None:
    assert seconds_of(value) == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("value", ["", "m", "5 m", "5x", "nan", "1h-2m", True, [], float("nan")])
def test_what_is_no_duration(value: Any) -> None:
    with pytest.raises(ValidationError, match="duration"):
        OllamaChatRequest(model="x", keep_alive=value)


# With a model that means what it says.


def test_turns_and_a_system_text(smollm2: ollama.Client) -> None:
    def answer(messages: list[Any]) -> Any:
        return smollm2.chat("smollm2", messages, options={"temperature": 0, "num_predict": 60})

    messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    first = answer(messages)
    assert "Paris" in first.message.content
    assert first.done_reason == "stop"
    second = answer([*messages, first.message, {"role": "user", "content": "And of Italy?"}])
    assert "Rome" in second.message.content
    pirate = {"role": "system", "content": "You are a pirate called Captain Hook."}
    assert "Hook" in answer([pirate, {"role": "user", "content": "Who are you?"}]).message.content


def test_a_format_of_pydantic(smollm2: ollama.Client) -> None:
    class City(BaseModel, extra="forbid"):
        name: str
        capital: bool

    asked = [{"role": "user", "content": "Tell me of Paris in JSON"}]
    form = City.model_json_schema()
    answer = smollm2.chat("smollm2", asked, format=form, options={"temperature": 0})
    City.model_validate_json(answer.message.content or "")


def test_a_function_of_python_as_a_tool(smollm2: ollama.Client) -> None:
    def add_two_numbers(a: int, b: int) -> int:
        """
        Add two numbers

        Args:
          a: The first number
          b: The second number

        Returns:
          int: The sum
        """
        return a + b

    def called(a: int, b: int) -> list[Any]:
        function = {"name": "add_two_numbers", "arguments": {"a": a, "b": b}}
        asked = {"role": "user", "content": f"Add {a} and {b}"}
        return [asked, {"role": "assistant", "tool_calls": [{"function": function}]}]

    messages = [*called(1, 2), *called(5, 2), {"role": "user", "content": "Add 3 and 4"}]
    settings: Any = {"tools": [add_two_numbers], "options": {"temperature": 0, "num_predict": 100}}
    first = smollm2.chat("smollm2", messages, **settings)
    (call,) = first.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("add_two_numbers", {"a": 3, "b": 4})
    total = add_two_numbers(**call.function.arguments)
    result = {"role": "tool", "content": f"The sum is {total}.", "tool_name": "add_two_numbers"}
    asked = {"role": "user", "content": "What is the sum?"}
    second = smollm2.chat("smollm2", [*messages, first.message, result, asked], **settings)
    assert "sum" in (second.message.content or "")
    assert (second.prompt_eval_count or 0) > (first.prompt_eval_count or 0)
