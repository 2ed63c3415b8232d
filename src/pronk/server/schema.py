"""What the models of request and response bodies have in common.

Requests are strict: an unknown field, a number in quotes or a field that is not supported is a 400
that names it. Responses are models, too, so that the OpenAPI document says what is really sent.
"""

import secrets
import time
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from pronk.core.files import is_unicode

_MOST_NAMES = 256
"""Of the members of an object that is described by a model."""


def _failing_fast(schema: Any) -> Any:
    """The same schema, with lists and dictionaries refused at their first wrong item."""
    if isinstance(schema, list | tuple):
        return type(schema)(_failing_fast(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    parts = {key: _failing_fast(part) for key, part in schema.items() if key not in _NO_SCHEMAS}
    fast = {"fail_fast": True} if schema.get("type") in ("list", "dict") else {}
    return {**schema, **parts, **fast}


_NO_SCHEMAS = ("metadata", "default", "expected", "serialization")


class Body(BaseModel):
    """A request's body, or a part of it. A check ends soon after the first mistake: telling all of
    a body that is made of nothing else takes minutes and gigabytes."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema: CoreSchema = _failing_fast(handler(source))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_NAMES:
            raise PydanticCustomError("too_many_names", "has too many names")
        return value


class Answer(BaseModel):
    """A response's body, or a part of it."""

    model_config = ConfigDict(protected_namespaces=(), serialize_by_alias=True)


def _nothing(value: Any) -> None:
    if value not in (None, [], {}, False):
        raise PydanticCustomError("unsupported_parameter", "is not supported by this server")


_REFUSED = Field(description="Not supported.", json_schema_extra={"x-unsupported": True})
Unsupported = Annotated[None, BeforeValidator(_nothing), _REFUSED]
"""A field that the API has and this server cannot honour: null is the same as leaving it out, and
anything else is refused."""


def Accepted(description: str) -> Any:
    """A field that asks for nothing that changes the answer."""
    return Field(default=None, description=description, json_schema_extra={"x-neutral": True})


def _whole(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("has half of a surrogate pair, which no answer could hold")
    return text


_Whole = AfterValidator(_whole)

Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64), _Whole],
        Annotated[str, Field(max_length=512), _Whole],
    ],
    Field(max_length=16, description="At most 16 texts by name."),
]


def new_id(prefix: str) -> str:
    """`prefix` and 24 random hexadecimal digits."""
    return prefix + secrets.token_hex(12)


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())
