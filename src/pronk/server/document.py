"""The OpenAPI document: FastAPI's own, with what it cannot know. Mistakes are answered with 400,
not 422, in the shape of the API that was called; keys are asked for before any route; and streams
have events of their own types."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from pronk.server.auth import OPEN_PATHS
from pronk.server.openai_types import ChatCompletionChunk

_REF = "#/components/schemas/{model}"


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Of OpenAI's shape, and of all routes that are nobody else's."""

    error: ErrorDetails


class AnthropicErrorDetails(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: str
    error: AnthropicErrorDetails
    request_id: str | None = None


class OllamaError(BaseModel):
    error: str


_STATUSES = {
    400: "The request is wrong; the message names the parameter.",
    401: "No key, or one that is not known.",
    403: "The key is not for this.",
    404: "There is no such thing here.",
    409: "Not in this state.",
    413: "The body is too large.",
    429: "The key is at one of its limits; see Retry-After.",
    500: "A mistake of the server.",
    501: "This server does not offer it.",
    503: "The server is busy, starting or stopping, or short of memory; see Retry-After.",
    504: "The deadline of the request has passed.",
}


def describe(app: FastAPI, *, keys: bool) -> None:
    """Lets `app.openapi()` give the whole document; `keys`: requests must have one."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, keys: bool) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        routes=app.routes,
        separate_input_output_schemas=True,
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in (Error, AnthropicError, OllamaError, ChatCompletionChunk):
        _add(schemas, model)
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    optional: list[dict[str, list[str]]] = [] if keys else [{}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _describe(path, operation)
            if path not in OPEN_PATHS:
                operation["security"] = [*optional, {"bearer": []}, {"header": []}]
    return document


def _add(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template=_REF, mode="serialization")
    for name, part in {**schema.pop("$defs", {}), model.__name__: schema}.items():
        schemas.setdefault(name, part)


def _describe(path: str, operation: dict[str, Any]) -> None:
    """What an operation may fail with."""
    responses = operation["responses"]
    responses.pop("422", None)
    if path in OPEN_PATHS:
        statuses = [status for status in _STATUSES if str(status) in responses]
    else:
        never = {413} if "requestBody" not in operation else set()
        never |= {501} if "501" not in responses else set()
        statuses = [status for status in _STATUSES if status not in never]
    error = {"schema": {"$ref": _REF.format(model=_error_of(path))}}
    for status in statuses:
        known: Mapping[str, Any] = responses.get(str(status), {})
        content = {"application/json": error}
        responses[str(status)] = {"description": _STATUSES[status], "content": content, **known}


def _error_of(path: str) -> str:
    """The shape of errors; errors.py says the same."""
    if path.startswith("/v1/messages"):
        return "AnthropicError"
    return "OllamaError" if path.startswith("/api/") else "Error"
