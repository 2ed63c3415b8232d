"""Chat completions that were made with `store: true`, by id and in lists."""

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from pronk.server.auth import Caller, caller
from pronk.server.errors import ApiError, not_found, validation_error
from pronk.server.openai_types import AnsweredToolCall, ChatCompletion, ChatRequest
from pronk.server.paging import ListName, OrderedQuery, cursor_of, list_body
from pronk.server.schema import Answer, Body, Metadata
from pronk.server.service import Call
from pronk.server.storage.chats import StoredChat
from pronk.server.storage.pages import Order, slice_page
from pronk.server.store import Store

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])
FilesCaller = Annotated[Caller, Depends(caller("files"))]

_METADATA_NAME = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_METADATA: TypeAdapter[dict[str, str]] = TypeAdapter(Metadata)
_METADATA_PARAMETER = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "required": False,
            "description": "Only those with all of these texts, as `metadata[name]=text`.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


class MetadataChange(Body):
    metadata: Metadata | None = Field(description="Replaces what was there; null removes it.")


class ChatList(Answer):
    object: ListName
    data: list[ChatCompletion]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ChatDeleted(Answer):
    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: Literal[True] = True


class StoredTextPart(Answer):
    type: Literal["text"]
    text: str


class StoredMessage(Answer):
    id: str
    role: str
    content: str | None = Field(description="null where there are `content_parts`.")
    content_parts: list[StoredTextPart] | None
    name: str | None = None
    refusal: None = None
    tool_calls: list[AnsweredToolCall] | None = None
    tool_call_id: str | None = None


class MessageList(Answer):
    object: ListName
    data: list[StoredMessage]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MessageQuery(OrderedQuery):
    order: Order = Field("asc", description="From the first message on, or the last.")


class ChatQuery(BaseModel):
    """Which chats. Names like `metadata[a]` cannot be declared; `_metadata_of` looks at them."""

    limit: int = Field(20, ge=1, le=100, description="Most objects of the page.")
    after: str | None = Field(None, description="Id of the object that the page follows.")
    order: Order = Field("asc", description="By time of creation.")
    model: str | None = Field(None, description="Only those of a model, by its name in answers.")


async def keep(call: Call, completion: Mapping[str, Any], body: ChatRequest) -> None:
    """Stores an answer and what it answers."""
    chat = StoredChat(
        id=completion["id"],
        owner=call.caller.id,
        created_at=completion["created"],
        model=completion["model"],
        metadata=body.metadata or {},
        body=dict(completion),
        messages=[message.model_dump(mode="json") for message in body.messages],
    )
    await asyncio.to_thread(call.service.store.chats.add, chat)


@router.get("", response_model=ChatList, openapi_extra=_METADATA_PARAMETER)
async def list_chat_completions(
    request: Request, who: FilesCaller, query: Annotated[ChatQuery, Query()]
) -> dict[str, Any]:
    """Stored chat completions, the oldest first unless told otherwise."""
    page = await asyncio.to_thread(
        _store(request).chats.list,
        who.id,
        cursor_of(OrderedQuery(limit=query.limit, after=query.after, order=query.order)),
        model=query.model,
        metadata=_metadata_of(request),
    )
    return list_body([_object(chat) for chat in page.data], page.has_more)


@router.get("/{id}", response_model=ChatCompletion)
async def get_chat_completion(request: Request, who: FilesCaller, id: str) -> dict[str, Any]:
    """A stored chat completion."""
    return _object(await _chat(request, who, id))


@router.post("/{id}", response_model=ChatCompletion)
async def update_chat_completion(
    request: Request, who: FilesCaller, id: str, body: MetadataChange
) -> dict[str, Any]:
    """Changes the metadata of a stored chat completion."""
    update = _store(request).chats.update
    chat = await asyncio.to_thread(update, who.id, id, body.metadata or {})
    if chat is None:
        raise not_found("chat completion", id)
    return _object(chat)


@router.delete("/{id}", response_model=ChatDeleted)
async def delete_chat_completion(request: Request, who: FilesCaller, id: str) -> dict[str, Any]:
    """Forgets a stored chat completion."""
    if not await asyncio.to_thread(_store(request).chats.delete, who.id, id):
        raise not_found("chat completion", id)
    return {"id": id}


@router.get("/{id}/messages", response_model=MessageList)
async def list_chat_messages(
    request: Request, who: FilesCaller, id: str, query: Annotated[MessageQuery, Query()]
) -> dict[str, Any]:
    """The messages that a stored chat completion answers."""
    chat = await _chat(request, who, id)
    messages = [_message(f"{chat.id}-{i}", message) for i, message in enumerate(chat.messages)]
    page = slice_page(messages, cursor_of(query))
    return list_body(list(page.data), page.has_more)


def _store(request: Request) -> Store:
    store: Store = request.app.state.service.store
    return store


async def _chat(request: Request, who: Caller, id: str) -> StoredChat:
    chat = await asyncio.to_thread(_store(request).chats.get, who.id, id)
    if chat is None:
        raise not_found("chat completion", id)
    return chat


def _object(chat: StoredChat) -> dict[str, Any]:
    return {**chat.body, "metadata": chat.metadata}


def _message(id: str, message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    return {
        "id": id,
        "role": message["role"],
        "content": None if parts is not None else content,
        "content_parts": parts,
        **{name: message.get(name) for name in ("name", "tool_calls", "tool_call_id")},
    }


def _metadata_of(request: Request) -> dict[str, str]:
    """The texts of `metadata[name]=text`; a parameter that is neither this nor known is refused."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if named := _METADATA_NAME.fullmatch(name):
            if wanted.setdefault(named[1], value) != value:
                raise ApiError(400, f"{name[:80]}: is there twice", param="metadata")
        elif name not in ChatQuery.model_fields:
            problem = {"type": "extra_forbidden", "loc": ("query", name[:80]), "msg": ""}
            raise validation_error([problem])
    try:
        return _METADATA.validate_python(wanted)
    except ValidationError as error:
        first = error.errors()[0]
        raise validation_error([{**first, "loc": ("query", "metadata", *first["loc"])}]) from None
