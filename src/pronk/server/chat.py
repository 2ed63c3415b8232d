"""POST /v1/chat/completions: OpenAI's chat API."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from pronk.engine import request as engine_request
from pronk.engine.prompts import Chat, Prompter, answer_shape
from pronk.engine.request import MAX_SEED
from pronk.engine.sampling import TokenLogprob
from pronk.server import openai_types as t
from pronk.server.auth import Caller, caller
from pronk.server.errors import ApiError
from pronk.server.generation import Answer, Generation, Update
from pronk.server.limits import check_schema
from pronk.server.models import Lease
from pronk.server.schema import new_id, now
from pronk.server.service import BATCH_PRIORITY, Call, refuse
from pronk.server.streams import DONE, EventStream, event
from pronk.text.events import TextDelta, ToolCallArgumentsDelta, ToolCallStart
from pronk.text.messages import messages_from_dicts
from pronk.text.tokenizer import Tokenizer
from pronk.text.tools import tools_from_dicts

router = APIRouter(tags=["chat"])

UNENFORCED = "x-pronk-unenforced-tools"
"""Header: tools whose schemas have keywords that cannot be enforced."""


@router.post(
    "/v1/chat/completions",
    response_model=t.ChatCompletion,
    responses={
        200: {
            "content": {
                "text/event-stream": {
                    "schema": {"$ref": "#/components/schemas/ChatCompletionChunk"}
                }
            }
        }
    },
    summary="Answer a chat",
)
async def chat_completions(
    request: Request, body: t.ChatRequest, who: Annotated[Caller, Depends(caller("inference"))]
) -> Response:
    """The assistant's next message; with `stream`, as server-sent events."""
    call = Call.of(request, who)
    job = await begin(call, body)
    if body.stream:
        return EventStream(job.generation, chunks(job), headers=job.headers)
    return JSONResponse(await whole(job), headers=job.headers)


@dataclass(frozen=True, slots=True)
class Job:
    """A chat that is being answered."""

    body: t.ChatRequest
    generation: Generation
    id: str
    created: int
    headers: Mapping[str, str]

    @property
    def lease(self) -> Lease:
        return self.generation.lease


async def execute(call: Call, body: t.ChatRequest) -> dict[str, Any]:
    """The answer as a whole: for a line of a batch."""
    if body.stream:
        raise ApiError(400, "stream: a batch has no streams", param="stream")
    return await whole(await begin(call, body))


async def begin(call: Call, body: t.ChatRequest) -> Job:
    """Starts answering. Whatever is wrong with the request is raised here."""
    check(call, body)
    lease = await call.model(body.model)
    try:
        chat = chat_of(body)
        requests = await asyncio.to_thread(_requests, call, lease, body, chat)
    except BaseException:
        lease.release()
        raise
    headers = {UNENFORCED: ", ".join(sorted(chat.unenforced))} if chat.unenforced else {}
    generation = Generation(call, lease, requests, body.n or 1)
    return Job(body, generation, new_id("chatcmpl-"), now(), headers)


def check(call: Call, body: t.ChatRequest) -> None:
    """What the types of the body cannot say."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs=true", param="top_logprobs")
    check_stream_options(body)
    if None not in (body.max_tokens, body.max_completion_tokens):
        refuse(
            body.max_tokens != body.max_completion_tokens, "max_tokens",
            f"is the old name of max_completion_tokens, and {body.max_tokens} is not"
            f" {body.max_completion_tokens}",
        )  # fmt: skip
    most = call.service.settings.max_schema_bytes
    if body.response_format is not None:
        check_schema("response_format", body.response_format.model_dump(), max_bytes=most)
    for i, tool in enumerate(body.tools or ()):
        check_schema(f"tools[{i}]", tool.model_dump(), max_bytes=most)


def check_stream_options(body: t.SamplingBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream=true", param="stream_options")


def chat_of(body: t.ChatRequest) -> Chat:
    """The chat that a body asks to be answered."""
    messages = messages_from_dicts([m.model_dump(exclude_none=True) for m in body.messages])
    dicts = [_tool_dict(tool) for tool in body.tools or ()]
    choice, allowed = tool_choice(body.tool_choice)
    if allowed is not None:
        unknown = allowed - {tool["function"]["name"] for tool in dicts}
        refuse(
            bool(unknown), "tool_choice.allowed_tools.tools",
            f"{', '.join(sorted(unknown)):.80} is not among the tools",
        )  # fmt: skip
        dicts = [tool for tool in dicts if tool["function"]["name"] in allowed]
    return Chat(
        messages,
        tools_from_dicts(dicts),
        body.builtin_tools or (),
        choice,
        body.parallel_tool_calls is not False,
        strict_tools=[tool.function.name for tool in body.tools or () if tool.function.strict],
        answer=shape_of(body.response_format),
    )


def shape_of(form: t.ResponseFormat | None) -> Any:
    return answer_shape(None if form is None else form.model_dump(by_alias=True, exclude_none=True))


def _tool_dict(tool: t.FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "function": tool.function.model_dump(exclude_none=True, exclude={"strict"}),
    }


def tool_choice(choice: t.ToolChoice | None) -> tuple[str, set[str] | None]:
    """ "auto", "none", "required" or a name; and the names of the tools that are allowed, if not
    all of them."""
    if isinstance(choice, t.NamedToolChoice):
        return choice.function.name, None
    if isinstance(choice, t.AllowedToolsChoice):
        names = {tool.function.name for tool in choice.allowed_tools.tools}
        return choice.allowed_tools.mode, names
    return choice or "auto", None


def options_of(body: t.SamplingBody, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a body says of sampling, by the names of SamplingParams."""
    same = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "ignore_eos")  # fmt: skip
    options: dict[str, Any] = {name: getattr(body, name) for name in same}
    options["stop"] = None if body.stop == [] else body.stop
    options["stop_ids"] = body.stop_token_ids
    options["logit_bias"] = _bias(body.logit_bias)
    return options


def _bias(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    for token in bias:
        if not token.isdecimal():
            raise ApiError(
                400, f"logit_bias: {token!r:.80} is no token id", param="logit_bias"
            )  # fmt: skip
    return {int(token): amount for token, amount in bias.items()}


def seed_of(seed: int | None, index: int) -> int | None:
    """The seed of each of several answers; negative ones are good, too."""
    return None if seed is None else (seed + index) % (MAX_SEED + 1)


def who_of(call: Call, body: t.SamplingBody, lease: Lease, priority: int) -> dict[str, Any]:
    """Arguments of `Request` that say whose it is."""
    salt = body.cache_salt or ""
    return call.who(lease, timeout=body.timeout, salt=salt, priority=priority)


def _requests(
    call: Call, lease: Lease, body: t.ChatRequest, chat: Chat
) -> list[engine_request.Request]:
    prompter: Prompter = lease.llm.prompter
    options = options_of(body, lease.llm.tokenizer)
    options["max_tokens"] = body.max_completion_tokens or body.max_tokens
    options["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    priority = BATCH_PRIORITY if body.service_tier == "flex" else 0
    who = who_of(call, body, lease, priority)
    return [
        prompter.chat(chat, {**options, "seed": seed_of(body.seed, i)}, **who)
        for i in range(body.n or 1)
    ]


# The answer as a whole.


async def whole(job: Job) -> dict[str, Any]:
    """Waits for the answer. The client that goes away ends it."""
    try:
        await job.generation.finish()
    finally:
        job.generation.close()
    content = await made(_completion_of, job, many=bool(job.body.logprobs))
    if job.body.store:
        await store(job, content)
    return content


async def made(make: Callable[[Any], dict[str, Any]], job: Any, *, many: bool) -> dict[str, Any]:
    """The body of an answer. Log probabilities are `many` objects, which take up to seconds, so
    they are made in a thread."""
    return await asyncio.to_thread(make, job) if many else make(job)


def _completion_of(job: Job) -> dict[str, Any]:
    """The answer, also what a stream amounts to."""
    body, generation = job.body, job.generation
    return t.ChatCompletion(
        id=job.id,
        created=job.created,
        model=job.lease.name,
        choices=[choice_of(answer, body, job.lease) for answer in generation.answers],
        usage=usage_of(generation),
        service_tier=body.service_tier,
        system_fingerprint=job.lease.fingerprint,
        metadata=body.metadata,
        timings=timings_of(generation),
    ).model_dump(mode="json")


async def store(job: Job, completion: Mapping[str, Any]) -> None:
    """Keeps an answer for GET /v1/chat/completions/{id}."""
    from pronk.server.stored_chats import keep

    await keep(job.generation.call, completion, job.body)


def choice_of(answer: Answer, body: t.ChatRequest, lease: Lease) -> t.ChatChoice:
    calls = [
        t.AnsweredToolCall(id=c.id, function=t.AnsweredFunction(name=c.name, arguments=c.json))
        for c in answer.calls.values()
    ]
    return t.ChatChoice(
        index=answer.index,
        message=t.AnsweredMessage(
            content=answer.text if answer.text or not calls else None, tool_calls=calls or None
        ),
        logprobs=_logprobs(answer.request.logprobs, lease.llm.tokenizer) if body.logprobs else None,
        finish_reason=finish_reason(answer, body),
        stop_reason=answer.stop_reason,
        seed=answer.request.seed,
    )


def finish_reason(answer: Answer, body: t.ChatRequest) -> t.ChatFinishReason:
    """OpenAI says "stop" where the caller had chosen the function."""
    reason = answer.finish_reason
    if reason == "tool_calls" and isinstance(body.tool_choice, t.NamedToolChoice):
        return "stop"
    assert reason is not None
    return "stop" if reason == "abort" else reason


def usage_of(generation: Generation) -> t.CompletionUsage:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return t.CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=t.PromptTokensDetails(cached_tokens=generation.cached_tokens),
        completion_tokens_details=t.CompletionTokensDetails(),
    )


def timings_of(generation: Generation) -> t.Timings:
    request = generation.requests[0]
    started = request.started_at
    return t.Timings(
        queue_seconds=None if started is None else started - request.added_at,
        prompt_seconds=None if started is None else request.first_token_at - started,
        decode_seconds=request.last_token_at - request.first_token_at,
    )


def _logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> t.ChatLogprobs:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return t.ChatLogprobs(
        content=[
            t.ChatTokenLogprob(
                **entry(item.token, item.logprob),
                top_logprobs=[t.TopLogprob(**entry(*top)) for top in item.top],
            )
            for item in logprobs
        ]
    )


# The answer in pieces. A server may send thousands of these a second, so they are plain
# dictionaries; that they are what the types say is tested.


async def chunks(job: Job) -> AsyncGenerator[str, None]:
    body, generation = job.body, job.generation
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head: dict[str, Any] = {
        "id": job.id,
        "object": "chat.completion.chunk",
        "created": job.created,
        "model": job.lease.name,
        "system_fingerprint": job.lease.fingerprint,
    }
    if body.service_tier:
        head["service_tier"] = body.service_tier
    if with_usage:
        head["usage"] = None

    def chunk(index: int, delta: Mapping[str, Any], **more: Any) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**head, "choices": [choice]})

    begun = {"role": "assistant", "content": ""}
    yield "".join(chunk(answer.index, begun) for answer in generation.answers)
    async for update in generation.updates():
        if deltas := _deltas(update, body, job.lease, chunk):
            yield "".join(deltas)  # one write for all of them
    if with_usage:
        yield event({**head, "choices": [], "usage": usage_of(generation).model_dump()})
    if body.store:
        await store(job, await made(_completion_of, job, many=bool(body.logprobs)))
    yield DONE


def _deltas(update: Update, body: t.ChatRequest, lease: Lease, chunk: Any) -> list[str]:
    """The chunks of one update. Log probabilities go with the first of them."""
    answer = update.answer
    deltas: list[dict[str, Any]] = []
    for item in update.events:
        if isinstance(item, TextDelta):
            deltas.append({"content": item.text})
        elif isinstance(item, ToolCallStart):
            function = {"name": item.name, "arguments": ""}
            start = {"index": item.index, "id": item.id, "type": "function", "function": function}
            deltas.append({"tool_calls": [start]})
        elif isinstance(item, ToolCallArgumentsDelta):
            more = {"index": item.index, "function": {"arguments": item.json}}
            deltas.append({"tool_calls": [more]})
    if update.logprobs and not deltas:
        deltas.append({"content": ""})
    texts = [chunk(answer.index, delta) for delta in deltas]
    if update.logprobs:
        found = _logprobs(update.logprobs, lease.llm.tokenizer).model_dump()
        texts[0] = chunk(answer.index, deltas[0], logprobs=found)
    if answer.finish_reason is not None:
        reason = finish_reason(answer, body)
        texts.append(chunk(answer.index, {}, finish_reason=reason, stop_reason=answer.stop_reason))
    return texts


def arguments_of(call_json: str) -> dict[str, Any]:
    """The arguments of a finished call."""
    value: dict[str, Any] = json.loads(call_json)
    return value
