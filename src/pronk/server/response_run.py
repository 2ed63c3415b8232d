"""Responses on their way: answered as a whole, as a stream, or in the background.

What is stored, and when. A whole answer is stored when it is there; a client that goes away before
gets none, and nothing is stored. A stream tells its id at once, so it is stored from its beginning;
where its client goes away it ends there, as "cancelled", with what there is of it. In the
background a response goes on without a client, until it ends or is cancelled. A response that a
server left unfinished, by its stop or its death, is "failed". Input and output are appended to the
conversation when a response has ended as "completed" or "incomplete", all together.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pronk.core.errors import PronkError
from pronk.server.chat import UNENFORCED
from pronk.server.generation import Generation
from pronk.server.response_events import TERMINAL, Draft, EndStatus, feed, sse
from pronk.server.response_items import item_id
from pronk.server.response_objects import response_object, response_usage, token_logprobs
from pronk.server.response_prompt import check, context_of, own_words, prompt_of
from pronk.server.response_types import ResponseRequest
from pronk.server.schema import new_id, now
from pronk.server.service import Call, refuse
from pronk.server.store import StoredResponse
from pronk.server.streams import DONE

log = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(slots=True)
class Job:
    """A response that is being made."""

    body: ResponseRequest
    generation: Generation
    draft: Draft
    input: Sequence[Json]
    headers: Mapping[str, str]
    creating: asyncio.Future[None] | None = None
    """Puts its row into the store; None where it gets one in the end, or none."""

    @property
    def id(self) -> str:
        return str(self.draft.body["id"])

    @property
    def call(self) -> Call:
        return self.generation.call

    @property
    def stored(self) -> bool:
        return self.body.store is not False


async def begin(call: Call, body: ResponseRequest) -> Job:
    """Starts answering. Whatever is wrong with the request is raised here."""
    _check(call, body)
    id = new_id("resp_")
    context = await asyncio.to_thread(context_of, call.service.store, call.caller.id, body, id)
    lease = await call.model(body.model)
    try:
        prompt = await asyncio.to_thread(prompt_of, call, lease, body, context.items)
    except BaseException:
        lease.release()
        raise
    assert prompt.request.params is not None
    with own_words():
        generation = Generation(call, lease, [prompt.request])
    made = response_object(
        body, prompt.request.params, id=id, model=lease.name, dropped=prompt.dropped
    )
    numbers = iter(range(len(context.new), 1 << 30))
    draft = Draft(made, lambda kind: item_id(kind, id, next(numbers)))
    headers = {UNENFORCED: ", ".join(sorted(prompt.unenforced))} if prompt.unenforced else {}
    return Job(body, generation, draft, context.new, headers)


def _check(call: Call, body: ResponseRequest) -> None:
    check(body, max_schema_bytes=call.service.settings.max_schema_bytes)
    refuse(bool(body.stream_options) and not body.stream, "stream_options", "needs stream=true")
    refuse(bool(body.background) and body.store is False, "background", "needs store=true")
    refuse(bool(body.top_logprobs) and not body.wants_logprobs, "top_logprobs",
           "needs include=['message.output_text.logprobs']")  # fmt: skip


async def drive(job: Job) -> AsyncIterator[None]:
    """Makes the response, a step at a time. Raises what it fails with."""
    draft, generation = job.draft, job.generation
    draft.begin()
    yield
    tokenizer = generation.lease.llm.tokenizer
    async for update in generation.updates():
        reason = update.answer.finish_reason
        if not draft.running and (update.events or reason != "abort"):
            draft.run()
        feed(draft, update, token_logprobs(update.logprobs, tokenizer))
        if reason == "length":
            _finish(job, "incomplete", incomplete_details={"reason": "max_output_tokens"})
        elif reason is not None:
            _finish(job, "cancelled" if reason == "abort" else "completed")
        else:
            yield


def _finish(job: Job, status: EndStatus, **more: Any) -> None:
    completed_at = now() if status == "completed" else None
    usage = response_usage(job.generation)
    job.draft.finish(status, completed_at=completed_at, usage=usage, **more)


def fail(job: Job, error: Exception) -> None:
    log.warning("response %s failed", job.id, exc_info=error)
    job.draft.fail(error, completed_at=None, usage=response_usage(job.generation))


# Storing.


async def create(job: Job) -> None:
    """Stores a response that is on its way. Whoever is cancelled meanwhile leaves it to go on."""
    rows = job.call.service.store.responses
    job.creating = asyncio.ensure_future(asyncio.to_thread(rows.create, _row(job), running=True))
    await asyncio.shield(job.creating)


async def save(job: Job) -> PronkError | None:
    """Stores a response that has ended. One whose conversation is gone has failed, then."""
    try:
        await asyncio.to_thread(_save_now, job)
    except PronkError as error:
        fail(job, error)
        if job.creating:
            await asyncio.to_thread(_save_now, job)
        return error
    return None


def _save_now(job: Job) -> None:
    store, owner, body = job.call.service.store, job.call.caller.id, job.draft.body
    conversation = job.body.conversation_id
    appended = conversation is not None and body["status"] in ("completed", "incomplete")
    items = [*job.input, *body["output"]] if appended else []
    if not job.stored:
        if conversation is not None and items:
            store.conversations.add_items(owner, conversation, items)
    elif job.creating is None:
        store.responses.create(_row(job), items=items)
    else:
        store.responses.update(
            owner, job.id, status=body["status"], body=body, state=_state(job), items=items,
            unless=TERMINAL,
        )  # fmt: skip


def _row(job: Job) -> StoredResponse:
    body = job.draft.body
    return StoredResponse(
        id=job.id,
        owner=job.call.caller.id,
        created_at=body["created_at"],
        model=body["model"],
        status=body["status"],
        body=body,
        input=job.input,
        previous_response_id=job.body.previous_response_id,
        conversation_id=job.body.conversation_id,
        state=_state(job),
    )


def _state(job: Job) -> Json:
    return {"cuts": job.draft.cuts, "ran": job.draft.running}


# As a whole.


async def whole(job: Job) -> Json:
    """Waits for the response. The client that goes away ends it."""

    async def make() -> None:
        async for _ in drive(job):
            job.draft.taken()  # nobody asks for them

    try:
        await job.call.unless_gone(make())
    finally:
        job.generation.close()
    if error := await save(job):
        raise error
    return job.draft.body


# As a stream.


async def events(
    job: Job, later: Callable[[Coroutine[Any, Any, None]], None]
) -> AsyncGenerator[str, None]:
    """The events of a response that ends with its client. `later` does what nobody waits for."""
    draft = job.draft
    try:
        if job.stored:
            await create(job)
        try:
            async for _ in drive(job):
                for data in draft.taken():
                    yield sse(data)
        except Exception as error:
            fail(job, error)
        await save(job)
    except (asyncio.CancelledError, GeneratorExit):
        later(_cancelled(job))
        raise
    for data in draft.taken():  # the end, which is told when it is stored
        yield sse(data)
    yield DONE


async def _cancelled(job: Job) -> None:
    """The client went away in the middle of a stream."""
    job.generation.close()
    if job.creating is None:
        return
    await job.creating
    if job.draft.body["status"] not in TERMINAL:
        _finish(job, "cancelled")
    await save(job)
