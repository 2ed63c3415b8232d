"""POST /v1/completions: OpenAI's older API of raw texts, with echo and log probabilities of the
prompt, which is how others score texts (lm-eval's local-completions)."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from pronk.backends.protocol import F32
from pronk.backends.reference import log_softmax
from pronk.core.errors import UserError
from pronk.engine import request as engine_request
from pronk.engine.sampling import TokenLogprob
from pronk.server import openai_types as t
from pronk.server.auth import Caller, caller
from pronk.server.chat import (
    check_stream_options,
    options_of,
    seed_of,
    shape_of,
    usage_of,
    who_of,
)
from pronk.server.errors import ApiError
from pronk.server.generation import Answer, Generation
from pronk.server.limits import check_schema
from pronk.server.models import Lease
from pronk.server.schema import new_id, now
from pronk.server.service import Call
from pronk.server.streams import DONE, EventStream, event
from pronk.text.tokenizer import Tokenizer

router = APIRouter(tags=["completions"])

_MOST_PROMPTS = 2048


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
    prompts: Sequence["PromptScores"]
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
    generation = Generation(call, lease, requests)
    return Job(body, generation, scores, new_id("cmpl-"), now())


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or many, texts or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise UserError("prompt: the list is empty")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > _MOST_PROMPTS:
        raise UserError(f"prompt: {len(prompt)} prompts are more than {_MOST_PROMPTS}")
    return list(prompt)


def _requests(
    call: Call, lease: Lease, body: t.CompletionRequest
) -> tuple[list[engine_request.Request], list["PromptScores"]]:
    prompter, tokenizer = lease.llm.prompter, lease.llm.tokenizer
    options = options_of(body, tokenizer)
    options["max_tokens"] = 1 if body.max_tokens == 0 else body.max_tokens
    options["logprobs"] = body.logprobs
    shape, who = shape_of(body.response_format), who_of(call, body, lease, 0)
    requests, scores = [], []
    for prompt in prompts_of(body.prompt):
        ids = list(prompter.ids(prompt))
        scored = PromptScores(ids, tokenizer.vocab_size, body.logprobs or 0)
        for i in range(body.n or 1):
            seeded = {**options, "seed": seed_of(body.seed, i)}
            request = prompter.completion(ids, seeded, shape, defaults={}, **who)
            if body.echo and body.logprobs is not None:
                request.observer = scored.observe
            requests.append(request)
            scores.append(scored)
    return requests, scores


class PromptScores:
    """Log probabilities of a prompt's tokens, gathered while it is computed (an observer of
    engine/request.py; called in the engine's thread)."""

    def __init__(self, ids: Sequence[int], vocab_size: int, n_top: int) -> None:
        self.ids = ids
        self._vocab_size = vocab_size
        self._n_top = n_top
        self._found: dict[int, TokenLogprob] = {}

    def observe(self, start: int, logits_NV: F32) -> None:
        for i, logits_V in enumerate(logits_NV, start + 1):
            if i < len(self.ids):
                self._found[i] = self._score(logits_V[: self._vocab_size], self.ids[i])

    def _score(self, logits_V: F32, token: int) -> TokenLogprob:
        logprobs_V = log_softmax(logits_V)
        top: list[tuple[int, float]] = []
        if self._n_top:
            likeliest = np.argpartition(-logprobs_V, self._n_top - 1)[: self._n_top]
            order = sorted(likeliest.tolist(), key=lambda id: (-logprobs_V[id], id))
            top = [(id, float(logprobs_V[id])) for id in order]
        return TokenLogprob(token, float(logprobs_V[token]), tuple(top))

    @property
    def tokens(self) -> list[TokenLogprob | None]:
        """One for each token of the prompt; nothing comes before the first."""
        return [self._found.get(i) for i in range(len(self.ids))]


# The answer as a whole.


async def whole(job: Job) -> dict[str, Any]:
    """Waits for the answer. The client that goes away ends it."""
    try:
        await job.generation.finish()
    finally:
        job.generation.close()
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
    n = job.body.n or 1
    found.prompt_tokens = sum(r.n_prompt for r in job.generation.requests[::n])
    if job.body.max_tokens == 0:
        found.completion_tokens = 0
    found.total_tokens = found.prompt_tokens + found.completion_tokens
    return found


def choice_of(job: Job, answer: Answer) -> t.CompletionChoice:
    body, tokenizer = job.body, job.lease.llm.tokenizer
    scored: list[TokenLogprob | None] = []
    ids: list[int] = []
    text = ""
    if body.echo:
        prompt = job.prompts[answer.index]
        text += tokenizer.decode(prompt.ids)
        ids += prompt.ids
        scored += prompt.tokens
    if body.max_tokens != 0:
        text += answer.text
        ids += answer.request.output
        scored += answer.request.logprobs
    return t.CompletionChoice(
        index=answer.index,
        text=text,
        logprobs=None if body.logprobs is None else _logprobs(tokenizer, ids, scored, 0),
        finish_reason=_reason(answer),
        stop_reason=answer.stop_reason,
        seed=answer.request.seed,
    )


def _reason(answer: Answer) -> Any:
    return "length" if answer.finish_reason == "length" else "stop"


def _logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], scored: Sequence[TokenLogprob | None], start: int
) -> t.CompletionLogprobs:
    """`start`: characters of the text before the first of these tokens."""

    def word(id: int) -> str:
        return tokenizer.token_bytes(id).decode("utf-8", "replace")

    tokens = [word(id) for id in ids]
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token)
    return t.CompletionLogprobs(
        text_offset=offsets,
        tokens=tokens,
        token_logprobs=[None if s is None else s.logprob for s in scored],
        top_logprobs=[
            None if s is None else {word(id): logprob for id, logprob in s.top} for s in scored
        ],
    )


# The answer in pieces.


class _Chunk(Protocol):
    def __call__(self, index: int, text: str, **more: Any) -> str: ...


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
    tokenizer = job.lease.llm.tokenizer
    offsets: dict[int, int] = {}
    begun: set[int] = set()

    def chunk(index: int, text: str, **more: Any) -> str:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **more}
        return event({**head, "choices": [choice]})

    async for update in generation.updates():
        answer = update.answer
        if body.echo and answer.index not in begun:
            begun.add(answer.index)
            yield _echo(job, answer, chunk)
            prompt = job.prompts[answer.index]
            offsets[answer.index] = len(tokenizer.decode(prompt.ids))
        if body.max_tokens != 0 and (update.text or update.logprobs):
            more: dict[str, Any] = {}
            if update.logprobs:
                at = offsets.get(answer.index, 0)
                ids = [item.token for item in update.logprobs]
                found = _logprobs(tokenizer, ids, update.logprobs, at)
                offsets[answer.index] = at + sum(map(len, found.tokens))
                more["logprobs"] = found.model_dump()
            yield chunk(answer.index, update.text, **more)
        if answer.finish_reason is not None:
            end: Mapping[str, Any] = {"finish_reason": _reason(answer)}
            yield chunk(answer.index, "", stop_reason=answer.stop_reason, **end)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(job).model_dump()})
    yield DONE


def _echo(job: Job, answer: Answer, chunk: _Chunk) -> str:
    prompt, tokenizer = job.prompts[answer.index], job.lease.llm.tokenizer
    text = tokenizer.decode(prompt.ids)
    if job.body.logprobs is None:
        return chunk(answer.index, text)
    found = _logprobs(tokenizer, prompt.ids, prompt.tokens, 0)
    return chunk(answer.index, text, logprobs=found.model_dump())
