"""Query parameters and bodies of lists by pages."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pronk.server.storage.pages import Cursor, Order


class PageQuery(BaseModel):
    """Parameters that say which page is wanted; one that is not declared is refused."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100, description="Most objects of the page.")
    after: str | None = Field(None, description="Id of the object that the page follows.")


class OrderedQuery(PageQuery):
    order: Order = Field("desc", description="By time of creation.")


class FileQuery(OrderedQuery):
    limit: int = Field(10_000, ge=1, le=10_000, description="Most objects of the page.")
    purpose: str | None = Field(None, description="Only files of this purpose.")


def cursor_of(query: PageQuery, order: Order | None = None) -> Cursor:
    """The cursor that a query asks for, in `order` where it does not say."""
    chosen = query.order if isinstance(query, OrderedQuery) else order or "desc"
    return Cursor(query.limit, chosen, query.after)


def list_body(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


ListName = Literal["list"]
