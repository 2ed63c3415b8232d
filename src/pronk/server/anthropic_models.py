"""Lists of models as Anthropic's clients want them: they tell themselves by their version header,
as the path is OpenAI's as well."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Header, Query

from pronk.server.anthropic_types import ModelInfo, ModelInfoList
from pronk.server.errors import not_found

VersionHeader = Annotated[
    str | None, Header(alias="anthropic-version", description="Sent by Anthropic's clients.")
]


class Cursor:
    """The part of a list that is asked for, in Anthropic's parameters."""

    def __init__(
        self,
        limit: Annotated[int, Query(ge=1, le=1000, description="Anthropic's page size.")] = 20,
        after_id: Annotated[str | None, Query(description="Anthropic's: what follows it.")] = None,
        before_id: Annotated[str | None, Query(description="Anthropic's: what is before.")] = None,
    ) -> None:
        self.limit, self.after_id, self.before_id = limit, after_id, before_id

    def page(self, infos: Sequence[ModelInfo]) -> ModelInfoList:
        """ApiError 404 for an id that is not in the list."""
        ids = [info.id for info in infos]
        for id in (self.after_id, self.before_id):
            if id is not None and id not in ids:
                raise not_found("model", id)
        start = ids.index(self.after_id) + 1 if self.after_id is not None else 0
        end = ids.index(self.before_id) if self.before_id is not None else len(ids)
        wanted = infos[start:end]
        backwards = self.before_id is not None and self.after_id is None
        page = wanted[-self.limit :] if backwards else wanted[: self.limit]
        return ModelInfoList(
            data=list(page),
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(page) < len(wanted),
        )


def model_info(id: str, title: str, created: int, context: int | None) -> ModelInfo:
    """`created`: Unix time in seconds; `context`: most tokens of a prompt and its answer."""
    at = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ModelInfo(
        id=id, display_name=title, created_at=at, max_input_tokens=context, max_tokens=context
    )
