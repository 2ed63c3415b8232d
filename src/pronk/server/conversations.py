"""OpenAI's Conversations API: what was said, kept under an id, to go on from."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from pronk.server import response_objects as o
from pronk.server import response_types as t
from pronk.server.auth import Caller, caller
from pronk.server.errors import ApiError, not_found
from pronk.server.paging import cursor_of, list_body
from pronk.server.response_items import conversation_item_id, shown, stored_items
from pronk.server.response_prompt import item_of_response
from pronk.server.schema import new_id, now
from pronk.server.store import Store, StoredConversation

router = APIRouter(prefix="/v1/conversations", tags=["conversations"])

Inference = Annotated[Caller, Depends(caller("inference", limited=False))]
ItemQuery = Annotated[t.ItemQuery, Query()]


@router.post("", response_model=o.ConversationObject, summary="Begin a conversation")
async def create_conversation(
    request: Request, body: t.ConversationRequest, who: Inference
) -> dict[str, Any]:
    store: Store = request.app.state.service.store
    made = StoredConversation(new_id("conv_"), who.id, now(), body.metadata or {})

    def create() -> None:
        store.conversations.create(made, _new_items(store, who.id, body.items, {}))

    await asyncio.to_thread(create)
    return _object(made)


@router.get("/{id}", response_model=o.ConversationObject, summary="Get a conversation")
async def get_conversation(request: Request, who: Inference, id: str) -> dict[str, Any]:
    return _object(await _get(request, who, id))


@router.post("/{id}", response_model=o.ConversationObject, summary="Change a conversation")
async def update_conversation(
    request: Request, who: Inference, id: str, body: t.ConversationUpdate
) -> dict[str, Any]:
    """Replaces the metadata."""
    store: Store = request.app.state.service.store
    await asyncio.to_thread(store.conversations.update, who.id, id, body.metadata or {})
    return _object(await _get(request, who, id))


@router.delete("/{id}", response_model=o.ConversationDeleted, summary="Forget a conversation")
async def delete_conversation(request: Request, who: Inference, id: str) -> dict[str, Any]:
    """With its items."""
    store: Store = request.app.state.service.store
    if not await asyncio.to_thread(store.conversations.delete, who.id, id):
        raise not_found("conversation", id)
    return {"id": id}


@router.post("/{id}/items", response_model=o.ItemList, summary="Add items")
async def create_items(
    request: Request, who: Inference, id: str, body: t.ItemsRequest, query: ItemQuery
) -> dict[str, Any]:
    """Appends items to a conversation, all or none of them."""
    store: Store = request.app.state.service.store

    def add() -> list[dict[str, Any]]:
        there = store.conversations.all_items(who.id, id)
        if there is None:
            raise not_found("conversation", id)
        items = _new_items(store, who.id, body.items, {item["id"]: item for item in there})
        store.conversations.add_items(who.id, id, items)
        return items

    items = await asyncio.to_thread(add)
    return list_body([shown(item, query.included) for item in items], has_more=False)


@router.get("/{id}/items", response_model=o.ItemList, summary="List the items")
async def list_items(
    request: Request, who: Inference, id: str, query: Annotated[t.ItemsQuery, Query()]
) -> dict[str, Any]:
    """The items of a conversation, the last first unless told otherwise."""
    store: Store = request.app.state.service.store
    page = await asyncio.to_thread(store.conversations.list_items, who.id, id, cursor_of(query))
    if page is None:
        raise not_found("conversation", id)
    return list_body([shown(item, query.included) for item in page.data], page.has_more)


@router.get("/{id}/items/{item_id}", response_model=o.ItemObject, summary="Get an item")
async def get_item(
    request: Request, who: Inference, id: str, item_id: str, query: ItemQuery
) -> dict[str, Any]:
    store: Store = request.app.state.service.store
    item = await asyncio.to_thread(store.conversations.get_item, who.id, id, item_id)
    if item is None:
        raise not_found("conversation item", item_id)
    return shown(item, query.included)


@router.delete(
    "/{id}/items/{item_id}", response_model=o.ConversationObject, summary="Forget an item"
)
async def delete_item(request: Request, who: Inference, id: str, item_id: str) -> dict[str, Any]:
    """Answers with the conversation that is left."""
    store: Store = request.app.state.service.store
    if not await asyncio.to_thread(store.conversations.delete_item, who.id, id, item_id):
        raise not_found("conversation item", item_id)
    return _object(await _get(request, who, id))


def _new_items(
    store: Store, owner: str, given: list[t.Item] | None, there: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Items to add to those that are there. An id that is taken is refused by the store."""

    def find(id: str) -> dict[str, Any] | None:
        return there.get(id) or item_of_response(store, owner, id)

    items = stored_items(given, (), find, conversation_item_id, "items")
    if given and not items:
        raise ApiError(400, "items: only empty reasoning, nothing to add", param="items")
    return items


async def _get(request: Request, who: Caller, id: str) -> StoredConversation:
    store: Store = request.app.state.service.store
    found = await asyncio.to_thread(store.conversations.get, who.id, id)
    if found is None:
        raise not_found("conversation", id)
    return found


def _object(conversation: StoredConversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created_at,
        "metadata": conversation.metadata,
    }
