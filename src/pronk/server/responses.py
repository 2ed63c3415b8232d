"""OpenAI's Responses API: /v1/responses and what belongs to it."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from pronk.server import response_objects as o
from pronk.server import response_types as t
from pronk.server.auth import Caller, caller
from pronk.server.errors import ApiError, not_found
from pronk.server.paging import cursor_of, list_body
from pronk.server.response_background import Responses
from pronk.server.response_events import error_event
from pronk.server.response_items import ItemQuery, ItemsQuery, shown
from pronk.server.response_prompt import check, context_of, count_tokens
from pronk.server.response_run import Job, begin, events, whole
from pronk.server.schema import new_id
from pronk.server.service import Call, refuse
from pronk.server.streams import EventStream
from pronk.server.tokenize import model_of

router = APIRouter(prefix="/v1/responses", tags=["responses"])

Inference = Annotated[Caller, Depends(caller("inference"))]
Unlimited = Annotated[Caller, Depends(caller("inference", limited=False))]

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": o.ResponseEvent.model_json_schema()}}}
}


class ResponseQuery(ItemQuery):
    stream: bool = Field(False, description="The events of the response, also those to come.")
    starting_after: int | None = Field(None, ge=0, description="Number of the last event seen.")
    include_obfuscation: bool | None = Field(None, description="Nothing obscures lengths.")


async def execute(call: Call, body: t.ResponseRequest) -> dict[str, Any]:
    """The response as a whole: for a line of a batch."""
    for name in ("stream", "background"):
        refuse(bool(getattr(body, name)), name, "a batch has none")
    return await whole(await begin(call, body))


@router.post("", response_model=o.ResponseObject, responses=_EVENTS, summary="Make a response")
async def create_response(request: Request, body: t.ResponseRequest, who: Inference) -> Response:
    """The response to an input; with `stream`, as server-sent events; with `background`, at once,
    while it is being made."""
    responses: Responses = request.app.state.service.responses
    job = await begin(Call.of(request, who), body)
    if body.background:
        run = await responses.run(job)
        if body.stream:
            return EventStream(None, run.follow(-1), _on_error(job), job.headers)
        return JSONResponse(job.draft.body, headers=job.headers)
    if body.stream:
        return EventStream(
            job.generation, events(job, responses.later), _on_error(job), job.headers
        )
    return JSONResponse(await whole(job), headers=job.headers)


@router.post("/input_tokens", response_model=o.InputTokens, summary="Count the tokens of an input")
async def input_tokens(
    request: Request, body: t.InputTokensRequest, who: Unlimited
) -> dict[str, Any]:
    call = Call.of(request, who)
    check(body, max_schema_bytes=call.service.settings.max_schema_bytes)
    context = await asyncio.to_thread(
        context_of, call.service.store, who.id, body, new_id("resp_")
    )  # fmt: skip
    lease = await model_of(call, body.model)
    try:
        n = await asyncio.to_thread(count_tokens, lease, body, context.items)
    finally:
        lease.release()
    return {"object": "response.input_tokens", "input_tokens": n}


@router.get("/{id}", response_model=o.ResponseObject, responses=_EVENTS, summary="Get a response")
async def get_response(
    request: Request, who: Inference, id: str, query: Annotated[ResponseQuery, Query()]
) -> Response:
    """A stored response; with `stream`, its events from the first one, or from behind
    `starting_after`."""
    responses: Responses = request.app.state.service.responses
    found = await responses.get(who.id, id)
    if query.stream:
        after = -1 if query.starting_after is None else query.starting_after
        following = responses.follow(found, after)
        return EventStream(None, following, lambda error: error_event(error, after + 1))
    if query.starting_after is not None:
        raise ApiError(400, "starting_after: needs stream=true", param="starting_after")
    output = [shown(item, query.included) for item in found.body["output"]]
    return JSONResponse({**found.body, "output": output})


@router.delete("/{id}", response_model=o.ResponseDeleted, summary="Forget a response")
async def delete_response(request: Request, who: Inference, id: str) -> dict[str, Any]:
    """One that is being made in the background is ended first."""
    await request.app.state.service.responses.delete(who.id, id)
    return {"id": id}


@router.post("/{id}/cancel", response_model=o.ResponseObject, summary="Cancel a response")
async def cancel_response(request: Request, who: Unlimited, id: str) -> Response:
    """Ends a response that is made in the background; one that has ended stays as it is."""
    found = await request.app.state.service.responses.cancel(who.id, id)
    return JSONResponse(found.body)


@router.get("/{id}/input_items", response_model=o.ItemList, summary="What a response answers")
async def list_input_items(
    request: Request, who: Inference, id: str, query: Annotated[ItemsQuery, Query()]
) -> dict[str, Any]:
    """The items of the request's input, the last first unless told otherwise."""
    rows = request.app.state.service.store.responses
    page = await asyncio.to_thread(rows.input_items, who.id, id, cursor_of(query))
    if page is None:
        raise not_found("response", id)
    return list_body([shown(item, query.included) for item in page.data], page.has_more)


def _on_error(job: Job) -> Callable[[Exception], str]:
    return lambda error: error_event(error, job.draft.n_events)
