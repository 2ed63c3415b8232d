"""What the models of request and response bodies have in common.

Requests are strict: an unknown field, a number in quotes or a field that is not supported is a 400
that names it. Responses are models, too, so that the OpenAPI document says what is really sent.
"""

import secrets
import time
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Body(BaseModel):
    """A request's body, or a part of it."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Answer(BaseModel):
    """A response's body, or a part of it."""

    model_config = ConfigDict(protected_namespaces=(), serialize_by_alias=True)


def _nothing(value: Any) -> None:
    if value not in (None, [], {}, False):
        raise ValueError("is not supported by this server")


Unsupported = Annotated[None, BeforeValidator(_nothing), Field(description="Not supported.")]
"""A field that the API has and this server cannot honour: null is the same as leaving it out, and
anything else is refused."""


def Accepted(description: str) -> Any:
    """A field that asks for nothing that changes the answer."""
    return Field(default=None, description=description)


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="At most 16 texts by name."),
]


def new_id(prefix: str) -> str:
    """`prefix` and 24 random hexadecimal digits."""
    return prefix + secrets.token_hex(12)


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())
