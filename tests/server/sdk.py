"""OpenAI's client against our servers: streams put together, and what every event must be."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from live import Live
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from pronk.engine.llm import LLM
from pronk.engine.sampling import TokenLogprob
from pronk.server import openai_types

HI: Any = [{"role": "user", "content": "hi"}]


def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def async_client(server: Live) -> openai.AsyncOpenAI:
    url = f"{server.url}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


@contextmanager
def llm_of(server: Live) -> Iterator[LLM]:
    """The server's first model, a second time in memory."""
    llm = LLM(server.service.models.default.ref.path or "", ctx=2048)
    try:
        yield llm
    finally:
        llm.close()


def refusal(server: Live, path: str, body: Any) -> tuple[int, str, str, str]:
    """Status, `param`, `code` and message of the error that a body is answered with."""
    as_json = {"Content-Type": "application/json"}
    reply = httpx.post(server.url + path, content=json.dumps(body), headers=as_json, timeout=120)
    assert reply.status_code >= 400, f"accepted: {body}"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return reply.status_code, error["param"], error["code"], error["message"]


@dataclass
class Choice:
    """One answer of a chat, whole or put together of chunks."""

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Names and arguments."""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None


def choices_of(answer: ChatCompletion) -> list[Choice]:
    return [
        Choice(
            choice.message.content or "",
            [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()],  # type: ignore[union-attr]
            [item.model_dump() for item in choice.logprobs.content] if choice.logprobs else [],
            choice.finish_reason,
            choice.stop_reason,  # type: ignore[attr-defined]
        )
        for choice in answer.choices
    ]


def joined(chunks: Iterable[ChatCompletionChunk]) -> list[Choice]:
    """The answers that a stream's chunks make. Checks that ids stay the same, that each choice
    begins with its role and that nothing follows its end."""
    found: dict[int, Choice] = defaultdict(Choice)
    heads = set()
    for chunk in chunks:
        heads.add((chunk.id, chunk.created, chunk.model, chunk.system_fingerprint))
        for choice in chunk.choices:
            known = choice.index in found
            one = found[choice.index]
            assert known or choice.delta.role == "assistant"
            assert one.finish_reason is None
            one.text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                arguments = call.function.arguments or ""
                if call.index == len(one.calls):
                    assert call.id
                    assert call.type == "function"
                    one.calls.append((call.function.name or "", arguments))
                else:
                    name, before = one.calls[call.index]
                    one.calls[call.index] = (name, before + arguments)
            if choice.logprobs:
                one.logprobs += [item.model_dump() for item in choice.logprobs.content or ()]
            one.finish_reason = choice.finish_reason
            one.stop_reason = getattr(choice, "stop_reason", None)
    assert len(heads) == 1
    return [found[index] for index in sorted(found)]


def shown(logprobs: Iterable[TokenLogprob], llm: LLM) -> list[Any]:
    """Log probabilities of a chat in OpenAI's words."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = llm.tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    return [
        {**entry(item.token, item.logprob), "top_logprobs": [entry(*top) for top in item.top]}
        for item in logprobs
    ]


def check_chunk(chunk: dict[str, Any]) -> None:
    """Both our types and the client's know everything in an event, and lack nothing."""
    for kind in (openai_types.ChatCompletionChunk, ChatCompletionChunk):
        kind.model_validate(chunk)
    ours = openai_types.ChatCompletionChunk.model_validate(chunk)
    assert ours.model_dump(exclude_unset=True) == chunk
