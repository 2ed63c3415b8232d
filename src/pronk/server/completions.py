"""POST /v1/completions: OpenAI's older API of raw texts, with echo and log probabilities of the
prompt, which is how others score texts (lm-eval's local-completions)."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from pronk.core.errors import ContextLengthError, UserError
from pronk.engine import request as engine_request
from pronk.server import openai_types as t
from pronk.server.auth import Caller, caller
from pronk.server.chat import (
    check_stream_options,
    made,
    options_of,
    seed_of,
    shape_of,
    usage_of,
    who_of,
)
from pronk.server.completion_logprobs import EchoedPrompt, Offsets, joined, logprobs_of
from pronk.server.errors import ApiError, context_error
from pronk.server.generation import Answer, Generation, Update
from pronk.server.limits import check_schema
from pronk.server.models import Lease
from pronk.server.schema import new_id, now
from pronk.server.service import Call
from pronk.server.streams import DONE, EventStream, event

router = APIRouter(tags=["completions"])

_MOST_PROMPTS = 2048
"""And answers, of one call."""


@router.post(
    "/v1/completions",
    response_model=t.Completion,
    responses={
        200: {
            "content": {
                "text/event-stream": {"schema": {"$ref": "#/components/schemas/Completion"}}
            }
        }
    },
    summary="Continue texts",
)
async def create_completion(
    request: Request,
    body: t.CompletionRequest,
    who: Annotated[Caller, Depends(caller("inference"))],
) -> Response:
    """Continuations of one text or more; with `stream`, as server-sent events. With `echo` the
    prompt comes first, and `logprobs` tells its log probabilities, too."""
    job = await begin(Call.of(request, who), body)
    if body.stream:
        return EventStream(job.generation, chunks(job))
    return JSONResponse(await whole(job))


@dataclass(frozen=True, slots=True)
class Job:
    body: t.CompletionRequest
    generation: Generation
    prompts: Sequence[EchoedPrompt]
    """One for each answer."""
    id: str
    created: int

    @property
    def lease(self) -> Lease:
        return self.generation.lease


async def execute(call: Call, body: t.CompletionRequest) -> dict[str, Any]:
    """The answer as a whole: for a line of a batch."""
    if body.stream:
        raise ApiError(400, "stream: a batch has no streams", param="stream")
    return await whole(await begin(call, body))


async def begin(call: Call, body: t.CompletionRequest) -> Job:
    """Starts answering. Whatever is wrong with the request is raised here."""
    check_stream_options(body)
    if body.best_of not in (None, 1, body.n or 1):
        raise ApiError(
            400, f"best_of: {body.best_of} is not n; choosing among answers is not supported",
            param="best_of", code="unsupported_parameter",
        )  # fmt: skip
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 needs echo=true", param="max_tokens")
    if body.response_format is not None:
        most = call.service.settings.max_schema_bytes
        check_schema("response_format", body.response_format.model_dump(), max_bytes=most)
    lease = await call.model(body.model)
    try:
        requests, scores = await asyncio.to_thread(_requests, call, lease, body)
    except BaseException:
        lease.release()
        raise
    try:
        generation = Generation(call, lease, requests, body.n or 1)
    except ContextLengthError as error:
        raise context_error(error, "prompt") from None
    return Job(body, generation, scores, new_id("cmpl-"), now())


def prompts_of(
    prompt: str | list[str] | list[int] | list[list[int]], name: str = "prompt"
) -> list[str | list[int]]:
    """One prompt or many, texts or token ids; errors call it `name`."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise UserError(f"{name}: the list is empty")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > _MOST_PROMPTS:
        raise UserError(f"{name}: {len(prompt)} texts are more than {_MOST_PROMPTS}")
    return list(prompt)


def _requests(
    call: Call, lease: Lease, body: t.CompletionRequest
) -> tuple[list[engine_request.Request], list[EchoedPrompt]]:
    prompter, tokenizer = lease.llm.prompter, lease.llm.tokenizer
    options = options_of(body, tokenizer)
    options["max_tokens"] = 1 if body.max_tokens == 0 else body.max_tokens
    options["logprobs"] = body.logprobs
    shape, who = shape_of(body.response_format), who_of(call, body, lease, 0)
    requests, scores = [], []
    prompts, n = prompts_of(body.prompt), body.n or 1
    if len(prompts) * n > _MOST_PROMPTS:
        raise UserError(f"n: {n} answers to {len(prompts)} prompts; at most {_MOST_PROMPTS} in all")
    for prompt in prompts:
        ids = list(prompter.ids(prompt))
        n_hidden = 1 if isinstance(prompt, str) and tokenizer.add_bos else 0
        scored = EchoedPrompt(ids, tokenizer, n_hidden=n_hidden, n_top=body.logprobs or 0)
        for i in range(n):
            seeded = {**options, "seed": seed_of(body.seed, i)}
            request = prompter.completion(ids, seeded, shape, defaults={}, **who)
            if body.echo and body.logprobs is not None:
                request.observer = scored.observe
            requests.append(request)
            scores.append(scored)
    return requests, scores


# The answer as a whole.


async def whole(job: Job) -> dict[str, Any]:
    """Waits for the answer. The client that goes away ends it."""
    try:
        await job.generation.finish()
    finally:
        job.generation.close()
    return await made(_completion_of, job, many=job.body.logprobs is not None)


def _completion_of(job: Job) -> dict[str, Any]:
    return t.Completion(
        id=job.id,
        created=job.created,
        model=job.lease.name,
        choices=[choice_of(job, answer) for answer in job.generation.answers],
        usage=usage(job),
        system_fingerprint=job.lease.fingerprint,
    ).model_dump(mode="json")


def usage(job: Job) -> t.CompletionUsage:
    """Each prompt counts once, however many answers it has."""
    found = usage_of(job.generation)
    if job.body.max_tokens == 0:
        found.completion_tokens = 0
    found.total_tokens = found.prompt_tokens + found.completion_tokens
    return found


def choice_of(job: Job, answer: Answer) -> t.CompletionChoice:
    tokenizer = job.lease.llm.tokenizer
    text = ""
    parts: list[t.CompletionLogprobs] = []
    if job.body.echo:
        prompt = job.prompts[answer.index]
        text = prompt.text
        if job.body.logprobs is not None:
            parts.append(prompt.logprobs)
    if job.body.max_tokens != 0:
        ids = answer.request.output
        offsets = Offsets(tokenizer, len(text)).of(ids)
        text += answer.text
        if job.body.logprobs is not None:
            parts.append(logprobs_of(tokenizer, ids, answer.request.logprobs, offsets))
    return t.CompletionChoice(
        index=answer.index,
        text=text,
        logprobs=None if job.body.logprobs is None else joined(*parts),
        finish_reason=_reason(answer),
        stop_reason=answer.stop_reason,
        seed=answer.request.seed,
    )


def _reason(answer: Answer) -> Any:
    return "length" if answer.finish_reason == "length" else "stop"


# The answer in pieces.


async def chunks(job: Job) -> AsyncGenerator[str, None]:
    body, generation = job.body, job.generation
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head: dict[str, Any] = {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.lease.name,
        "system_fingerprint": job.lease.fingerprint,
    }
    if with_usage:
        head["usage"] = None
    choices = [_Choice(job, prompt) for prompt in job.prompts]
    async for update in generation.updates():
        if pieces := choices[update.answer.index].of(update):
            yield "".join(event({**head, "choices": [piece]}) for piece in pieces)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(job).model_dump()})
    yield DONE


class _Choice:
    """One answer in pieces."""

    def __init__(self, job: Job, prompt: EchoedPrompt) -> None:
        self._job, self._prompt = job, prompt
        self._tokenizer = job.lease.llm.tokenizer
        start = len(prompt.text) if job.body.echo else 0
        self._offsets = Offsets(self._tokenizer, start)
        self._begun = False

    def of(self, update: Update) -> list[dict[str, Any]]:
        """What is to be sent of an update."""
        answer, body = update.answer, self._job.body
        found = []
        if body.echo and not self._begun:
            scores = None if body.logprobs is None else self._prompt.logprobs
            found.append(_piece(answer, self._prompt.text, scores))
        self._begun = True
        if body.max_tokens != 0 and (update.text or update.logprobs):
            found.append(_piece(answer, update.text, self._logprobs(update)))
        if answer.finish_reason is not None:
            end = {"finish_reason": _reason(answer), "stop_reason": answer.stop_reason}
            found.append({**_piece(answer, ""), **end})
        return found

    def _logprobs(self, update: Update) -> t.CompletionLogprobs | None:
        if not update.logprobs:
            return None
        ids = [item.token for item in update.logprobs]
        return logprobs_of(self._tokenizer, ids, update.logprobs, self._offsets.of(ids))


def _piece(
    answer: Answer, text: str, logprobs: t.CompletionLogprobs | None = None
) -> dict[str, Any]:
    scores = None if logprobs is None else logprobs.model_dump()
    return {"index": answer.index, "text": text, "logprobs": scores, "finish_reason": None}
