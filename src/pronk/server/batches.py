"""/v1/batches: requests in a file, answered when there is time, into a file."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field

from pronk.server.auth import Caller, caller
from pronk.server.batch_runner import Batches, check_generates
from pronk.server.errors import not_found
from pronk.server.files import LIFETIMES
from pronk.server.paging import ListName, PageQuery, cursor_of, list_body
from pronk.server.schema import Answer, Body, Metadata, new_id
from pronk.server.storage.batches import StoredBatch
from pronk.server.storage.files import FINAL
from pronk.server.store import Store

__all__ = ["Batches", "router"]

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
_WINDOW_SECONDS = 86_400
_TIMES = ("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at",
          "failed_at", "expired_at", "cancelling_at", "cancelled_at")  # fmt: skip

router = APIRouter(prefix="/v1/batches", tags=["batches"])
FilesCaller = Annotated[Caller, Depends(caller("files"))]


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=LIFETIMES[0], le=LIFETIMES[-1])


class BatchRequest(Body):
    input_file_id: str = Field(description="A file of purpose `batch`.")
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = Field(
        None, description="When the output files expire; never, if left out."
    )


class BatchError(Answer):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(Answer):
    object: ListName
    data: list[BatchError]


class RequestCounts(Answer):
    total: int
    completed: int
    failed: int


class InputDetails(Answer):
    cached_tokens: int


class OutputDetails(Answer):
    reasoning_tokens: int


class BatchUsage(Answer):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Batch(Answer):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired",
                    "cancelling", "cancelled"]  # fmt: skip
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(Answer):
    object: ListName
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def _object(batch: StoredBatch) -> dict[str, Any]:
    ended = batch.status in FINAL  # before that the ids of the files are reserved, no more
    errors = None if batch.errors is None else {"object": "list", "data": batch.errors}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id if ended else None,
        "error_file_id": batch.error_file_id if ended else None,
        **{name: getattr(batch, name) for name in _TIMES},
        "request_counts": {
            "total": batch.total, "completed": batch.completed, "failed": batch.failed,
        },
        "usage": {
            "input_tokens": batch.input_tokens,
            "input_tokens_details": {"cached_tokens": batch.cached_tokens},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.input_tokens + batch.output_tokens,
        },
        "metadata": batch.metadata,
    }  # fmt: skip


@router.post("", response_model=Batch)
async def create_batch(request: Request, who: FilesCaller, body: BatchRequest) -> dict[str, Any]:
    """Answers the requests of a file, within 24 hours, when there is time."""
    check_generates(who)
    service = request.app.state.service
    store: Store = service.store
    now = store.database.now()
    expiry = body.output_expires_after
    batch = StoredBatch(
        id=new_id("batch_"),
        owner=who.id,
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + _WINDOW_SECONDS,
        metadata=body.metadata,
        output_expires_after=None if expiry is None else expiry.seconds,
    )
    await asyncio.to_thread(store.batches.create, batch)
    service.batches.wake()
    return _object(batch)


@router.get("", response_model=BatchList)
async def list_batches(
    request: Request, who: FilesCaller, query: Annotated[PageQuery, Query()]
) -> dict[str, Any]:
    """Batches, the newest first."""
    store: Store = request.app.state.service.store
    page = await asyncio.to_thread(store.batches.list, who.id, cursor_of(query))
    return list_body([_object(batch) for batch in page.data], page.has_more)


@router.get("/{id}", response_model=Batch)
async def get_batch(request: Request, who: FilesCaller, id: str) -> dict[str, Any]:
    """How a batch is getting on."""
    store: Store = request.app.state.service.store
    batch = await asyncio.to_thread(store.batches.get, who.id, id)
    if batch is None:
        raise not_found("batch", id)
    return _object(batch)


@router.post("/{id}/cancel", response_model=Batch)
async def cancel_batch(request: Request, who: FilesCaller, id: str) -> dict[str, Any]:
    """Ends a batch early; answers that are finished are kept, in its files."""
    service = request.app.state.service
    batch = await asyncio.to_thread(service.store.batches.cancel, who.id, id)
    if batch is None:
        raise not_found("batch", id)
    service.batches.wake()
    return _object(batch)
