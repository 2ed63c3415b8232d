"""What the models of request and response bodies have in common.

Requests are strict: an unknown field, a number in quotes or a field that is not supported is a 400
that names it. Responses are models, too, so that the OpenAPI document says what is really sent.
"""

import secrets
import time
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from pronk.core.files import is_unicode


class Body(BaseModel):
    """A request's body, or a part of it."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


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
