"""POST /api/chat and /api/generate: Ollama's API, which streams unless `stream` is false. What a
body asks for is read in ollama_chat.py; lists of models are in ollama_models.py."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from pronk.engine.replies import ReplyText
from pronk.engine.sampling import TokenLogprob
from pronk.server import ollama_types as t
from pronk.server.auth import Caller, caller
from pronk.server.errors import ApiError
from pronk.server.generation import Answer, Generation, Update
from pronk.server.ollama_chat import check, request_of
from pronk.server.ollama_route import AnyTypeRoute, LineStream, failure, line, timestamp
from pronk.server.service import Call
from pronk.text.events import TextDelta, ToolCallAbort, ToolCallEnd
from pronk.text.messages import ToolCall
from pronk.text.tokenizer import Tokenizer

router = APIRouter(tags=["ollama"], route_class=AnyTypeRoute)

Inference = Annotated[Caller, Depends(caller("inference"))]
_LINES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}
}


@router.post(
    "/api/chat",
    response_model=t.OllamaChatAnswer,
    response_model_exclude_none=True,
    responses=_LINES,
    summary="Answer a chat (Ollama)",
)
async def chat(request: Request, body: t.OllamaChatRequest, who: Inference) -> Response:
    """The assistant's next message, as lines of JSON or, with `stream` false, whole."""
    return await _answer(Call.of(request, who), body, bool(body.messages))


@router.post(
    "/api/generate",
    response_model=t.OllamaGenerateAnswer,
    response_model_exclude_none=True,
    responses=_LINES,
    summary="Answer a prompt (Ollama)",
)
async def generate(request: Request, body: t.OllamaGenerateRequest, who: Inference) -> Response:
    """The answer to a prompt, as lines of JSON or, with `stream` false, whole."""
    return await _answer(Call.of(request, who), body, bool(body.prompt))


@dataclass(frozen=True, slots=True)
class Job:
    """A chat or a prompt that is being answered."""

    body: t.OllamaChatRequest | t.OllamaGenerateRequest
    generation: Generation
    started: float
    loaded: float
    """When the request came and when its model was there, on the clock of time.perf_counter."""

    @property
    def answer(self) -> Answer:
        return self.generation.answers[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.generation.lease.llm.tokenizer


async def _answer(
    call: Call, body: t.OllamaChatRequest | t.OllamaGenerateRequest, asked: bool
) -> Response:
    check_keep_alive(call, body)
    if not asked:
        return JSONResponse(await _load(call, body))
    job = await begin(call, body)
    if body.wants_stream:
        return LineStream(job.generation, lines(job), on_error=failure)
    return JSONResponse(await whole(job))


async def begin(call: Call, body: t.OllamaChatRequest | t.OllamaGenerateRequest) -> Job:
    """Starts answering. Whatever is wrong with the request is raised here."""
    started = time.perf_counter()
    check(call, body)
    lease = await call.model(body.model)
    loaded = time.perf_counter()
    try:
        request = await asyncio.to_thread(request_of, call, lease, body)
    except BaseException:
        lease.release()
        raise
    generation = Generation(call, lease, [request])
    set_keep_alive(call, body)
    return Job(body, generation, started, loaded)


# How long models stay.


def _may_unload(call: Call) -> bool:
    """Unloading is control of the server, where callers are told apart."""
    return call.caller.admin or call.service.keys is None


def check_keep_alive(call: Call, body: t.OllamaBody | t.OllamaEmbedBody) -> None:
    if body.keep_alive == 0 and not _may_unload(call):
        raise ApiError(
            403, "keep_alive: 0 unloads the model, which needs a key with the scope 'admin'",
            param="keep_alive", code="missing_scope",
        )  # fmt: skip


def set_keep_alive(call: Call, body: t.OllamaBody | t.OllamaEmbedBody) -> None:
    """Once nobody has used it for so long, the model is unloaded. For those who may not unload it,
    it stays as long as the server's settings say."""
    if body.keep_alive is not None and _may_unload(call):
        call.service.models.find(body.model)[0].keep_alive = body.keep_alive


async def _load(call: Call, body: t.OllamaChatRequest | t.OllamaGenerateRequest) -> dict[str, Any]:
    """A request that asks nothing: it loads the model, or unloads it as soon as nobody uses it."""
    started = time.perf_counter()
    models = call.service.models
    reason: Literal["load", "unload"] = "load"
    if body.keep_alive == 0:
        reason = "unload"
        entry, _ = models.find(body.model)
        call.caller.check_model(entry.name, *entry.aliases)
        if entry.users:
            entry.keep_alive = 0.0
        else:
            await models.unload(body.model)
    else:
        (await call.model(body.model)).release()
        set_keep_alive(call, body)
    spent = nanoseconds(time.perf_counter() - started)
    times = {"done_reason": reason, "total_duration": spent, "load_duration": spent}
    return _shown(body, _part(body, "", []), done=True, **times)


# The answer as a whole.


async def whole(job: Job) -> dict[str, Any]:
    """Waits for the answer. The client that goes away ends it."""
    try:
        await job.generation.finish()
    finally:
        job.generation.close()
    answer = job.answer
    part = _part(job.body, answer.text + _cut_source(answer), _calls(answer))
    found = _logprobs(answer.request.logprobs, job.tokenizer) if job.body.logprobs else None
    return _shown(job.body, part, done=True, logprobs=found, **_times(job))


def _calls(answer: Answer) -> list[tuple[int, ToolCall]]:
    text = answer.request.answer_text
    if not isinstance(text, ReplyText):
        return []
    return [(item.index, item.call) for item in text.events if isinstance(item, ToolCallEnd)]


def _cut_source(answer: Answer) -> str:
    """What was written of a call that the end of the answer has cut. Clients of this API read whole
    calls, so it is text."""
    if not answer.cut:
        return ""
    found, texts = False, []
    for item in cast(ReplyText, answer.request.answer_text).events:
        if isinstance(item, ToolCallAbort) and item.at_end:
            found = True
        elif found and isinstance(item, TextDelta):
            texts.append(item.text)
    return "".join(texts)


def _times(job: Job) -> dict[str, Any]:
    request = job.answer.request
    began = request.started_at if request.started_at is not None else request.added_at
    return {
        "done_reason": "length" if job.answer.finish_reason == "length" else "stop",
        "total_duration": nanoseconds(time.perf_counter() - job.started),
        "load_duration": nanoseconds(job.loaded - job.started),
        "prompt_eval_count": request.n_prompt,
        "prompt_eval_duration": nanoseconds(request.first_token_at - began),
        "eval_count": request.n_output,
        "eval_duration": nanoseconds(request.last_token_at - request.first_token_at),
    }


def nanoseconds(seconds: float) -> int:
    """At least 1: clients divide by durations."""
    return max(1, round(seconds * 1e9))


def _logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return [
        {**entry(item.token, item.logprob), "top_logprobs": [entry(*top) for top in item.top]}
        for item in logprobs
    ]


# The answer in pieces.


async def lines(job: Job) -> AsyncGenerator[str, None]:
    async for update in job.generation.updates():
        parts = list(_parts(job.body, update))
        rest = _cut_source(job.answer) if job.answer.finish_reason is not None else ""
        if rest:
            parts.append(_part(job.body, rest, []))
        if update.logprobs and not parts:
            parts.append(_part(job.body, "", []))
        for i, part in enumerate(parts):
            first = _logprobs(update.logprobs, job.tokenizer) if i == 0 else []
            yield line(_shown(job.body, part, done=False, logprobs=first or None))
    yield line(_shown(job.body, _part(job.body, "", []), done=True, **_times(job)))


def _parts(body: t.OllamaBody, update: Update) -> Iterator[dict[str, Any]]:
    """The texts of an update, and its calls, each whole."""
    for item in update.events:
        if isinstance(item, TextDelta) and item.text:
            yield _part(body, item.text, [])
        elif isinstance(item, ToolCallEnd):
            yield _part(body, "", [(item.index, item.call)])


def _part(body: t.OllamaBody, text: str, calls: Sequence[tuple[int, ToolCall]]) -> dict[str, Any]:
    if isinstance(body, t.OllamaGenerateRequest):
        return {"response": text}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "function": {"index": index, "name": call.name, "arguments": call.arguments},
            }
            for index, call in calls
        ]
    return {"message": message}


def _shown(
    body: t.OllamaBody, part: Mapping[str, Any], *, done: bool, logprobs: Any = None, **times: Any
) -> dict[str, Any]:
    shown = {"model": body.model, "created_at": timestamp(), **part, "done": done, **times}
    return shown if logprobs is None else {**shown, "logprobs": logprobs}
