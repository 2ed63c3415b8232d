"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API. How a chat is made of
a body is in anthropic_chat.py."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import from_json

from pronk.engine import request as engine_request
from pronk.engine.prompts import Chat
from pronk.engine.replies import ReplyText
from pronk.server import anthropic_types as t
from pronk.server.anthropic_chat import chat_of
from pronk.server.auth import Caller, caller
from pronk.server.chat import UNENFORCED, seed_of
from pronk.server.errors import ApiError, anthropic_error, api_error_of
from pronk.server.generation import Answer, Generation, Update
from pronk.server.logs import request_id
from pronk.server.models import Lease
from pronk.server.schema import new_id
from pronk.server.service import Call, called
from pronk.server.streams import EventStream, event
from pronk.text.events import (
    Event,
    TextDelta,
    ToolCallAbort,
    ToolCallArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
)

log = logging.getLogger(__name__)
router = APIRouter(tags=["messages"])

_PING_SECONDS = 10.0
"""How long a client waits for the first token without hearing anything."""


@router.post(
    "/v1/messages",
    response_model=t.MessagesAnswer,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    summary="Answer a chat (Anthropic)",
)
async def create_message(
    request: Request,
    body: t.MessagesRequest,
    who: Annotated[Caller, Depends(caller("inference"))],
) -> Response:
    """The assistant's next message; with `stream`, as server-sent events."""
    job = await begin(Call.of(request, who), body)
    if body.stream:
        return EventStream(job.generation, events(job), on_error=_failure, headers=job.headers)
    return JSONResponse(await whole(job), headers=job.headers)


@router.post(
    "/v1/messages/count_tokens",
    response_model=t.TokenCount,
    summary="Tokens of a chat's prompt (Anthropic)",
)
async def count_tokens(
    request: Request,
    body: t.CountTokensRequest,
    who: Annotated[Caller, Depends(caller("inference", limited=False))],
) -> t.TokenCount:
    """As many as `usage` of the same message would tell, cached ones included."""
    call = Call.of(request, who)
    chat = chat_of(call, body)
    lease = await call.model(body.model)
    try:
        ids = await asyncio.to_thread(lease.llm.prompter.chat_ids, chat)
    finally:
        lease.release()
    return t.TokenCount(input_tokens=len(ids))


@dataclass(frozen=True, slots=True)
class Job:
    """A message that is being answered."""

    id: str
    generation: Generation
    max_tokens: int
    headers: Mapping[str, str]

    @property
    def answer(self) -> Answer:
        return self.generation.answers[0]


async def begin(call: Call, body: t.MessagesRequest) -> Job:
    """Starts answering. Whatever is wrong with the request is raised here."""
    chat = chat_of(call, body)
    lease = await call.model(body.model)
    try:
        request = await asyncio.to_thread(_request, call, lease, body, chat)
    except BaseException:
        lease.release()
        raise
    headers = {UNENFORCED: ", ".join(sorted(chat.unenforced))} if chat.unenforced else {}
    return Job(new_id("msg_"), Generation(call, lease, [request]), body.max_tokens, headers)


def _request(
    call: Call, lease: Lease, body: t.MessagesRequest, chat: Chat
) -> engine_request.Request:
    options = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences or None,
        "max_tokens": body.max_tokens,
        "seed": seed_of(body.seed, 0),
    }
    with called("response_format", "output_config.format.schema"):
        return lease.llm.prompter.chat(chat, options, **call.who(lease))


# The answer as a whole.


async def whole(job: Job) -> dict[str, Any]:
    """Waits for the answer. The client that goes away ends it."""
    try:
        await job.generation.finish()
    finally:
        job.generation.close()
    written = cast(ReplyText, job.answer.request.answer_text)
    return _message(job, content_of(written.events), stop_of(job)).model_dump(mode="json")


def content_of(events: Sequence[Event]) -> list[t.OutputText | t.OutputToolUse]:
    """Blocks in the order in which they were written. Of a call that the end of the answer has cut
    there is as much as was written, as clients read it from a stream."""
    content: list[t.OutputText | t.OutputToolUse] = []
    arguments = ""
    for item in events:
        last = content[-1] if content else None
        if isinstance(item, TextDelta):
            if isinstance(last, t.OutputText):
                last.text += item.text
            elif item.text:
                content.append(t.OutputText(text=item.text))
        elif isinstance(item, ToolCallStart):
            content.append(t.OutputToolUse(id=item.id, name=item.name, input={}))
            arguments = ""
        elif isinstance(item, ToolCallArgumentsDelta):
            arguments += item.json
        elif isinstance(item, ToolCallEnd):
            assert isinstance(last, t.OutputToolUse)
            last.input = json.loads(arguments or "{}")
        elif item.at_end:
            assert isinstance(last, t.OutputToolUse)
            last.input = from_json(arguments or "{}", allow_partial=True)
            break  # what follows is the source of the call
        else:
            content.pop()
    return content


def stop_of(job: Job) -> tuple[t.StopReason, str | None]:
    """Why the answer ended, and the stop sequence that ended it."""
    request = job.answer.request
    found = cast(ReplyText, request.answer_text).stop_found
    if found is not None:
        return "stop_sequence", found
    if job.answer.finish_reason == "length":
        full = request.n_output < job.max_tokens
        return "model_context_window_exceeded" if full else "max_tokens", None
    return "tool_use" if job.answer.finish_reason == "tool_calls" else "end_turn", None


def usage_of(job: Job) -> t.MessagesUsage:
    generation = job.generation
    return t.MessagesUsage(
        input_tokens=generation.prompt_tokens - generation.cached_tokens,
        cache_read_input_tokens=generation.cached_tokens,
        output_tokens=generation.completion_tokens,
    )


def _message(
    job: Job,
    content: list[t.OutputText | t.OutputToolUse],
    stop: tuple[t.StopReason | None, str | None],
) -> t.MessagesAnswer:
    return t.MessagesAnswer(
        id=job.id,
        model=job.generation.lease.name,
        content=content,
        stop_reason=stop[0],
        stop_sequence=stop[1],
        usage=usage_of(job),
    )


# The answer in pieces: plain dictionaries, as there may be many; tested against the client's types.


async def events(job: Job) -> AsyncGenerator[str, None]:
    blocks = _Blocks()
    begun = False
    async for update in with_pings(job.generation.updates()):
        if update is None:
            yield _named({"type": "ping"})
            continue
        if not begun:  # only now it is known how much of the prompt was cached
            begun = True
            message = _message(job, [], (None, None)).model_dump(mode="json")
            yield _named({"type": "message_start", "message": message})
        for item in update.events:
            for part in blocks.take(item):
                yield _named(part)
    for part in blocks.close():
        yield _named(part)
    reason, sequence = stop_of(job)
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    usage = usage_of(job).model_dump(exclude={"service_tier"})
    yield _named({"type": "message_delta", "delta": delta, "usage": usage})
    yield _named({"type": "message_stop"})


def _named(data: Mapping[str, Any]) -> str:
    return event(data, data["type"])


def _failure(error: Exception) -> str:
    log.warning("a stream failed", exc_info=error)
    return event(anthropic_error(api_error_of(error), request_id()), "error")


async def with_pings(
    updates: AsyncIterator[Update], seconds: float = _PING_SECONDS
) -> AsyncGenerator[Update | None, None]:
    """The updates, and None for every so many seconds in which the first of them did not come."""
    first: asyncio.Future[Update] = asyncio.ensure_future(anext(updates))
    try:
        while not (await asyncio.wait({first}, timeout=seconds))[0]:
            yield None
        yield first.result()
    finally:
        first.cancel()
    async for update in updates:
        yield update


class _Blocks:
    """Events of content blocks from what is written."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None

    def take(self, item: Event) -> Iterator[dict[str, Any]]:
        if isinstance(item, TextDelta):
            if item.text and self._open != "text":
                yield from self._begin({"type": "text", "text": "", "citations": None})
            if item.text:
                yield self._delta({"type": "text_delta", "text": item.text})
        elif isinstance(item, ToolCallStart):
            block = {"type": "tool_use", "id": item.id, "name": item.name, "input": {}}
            yield from self._begin(block)
        elif isinstance(item, ToolCallArgumentsDelta):
            yield self._delta({"type": "input_json_delta", "partial_json": item.json})
        elif isinstance(item, ToolCallEnd):
            yield from self.close()
        elif isinstance(item, ToolCallAbort) and not item.at_end:
            raise ApiError(500, "what had begun as a tool call was none; ask without stream")

    def close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._index += 1
        self._open = block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
