"""What becomes of a mistake over HTTP: one exception with a status, told in the words of the API
that was called.

OpenAI     {"error": {"message", "type", "param", "code"}}
Anthropic  {"type": "error", "error": {"type", "message"}, "request_id"}     under /v1/messages
Ollama     {"error": "message"}                                             under /api/
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pronk.core.errors import ContextLengthError, PronkError, UserError

_PARAM = re.compile(r"([\w.\[\]]+): ")


class ApiError(PronkError):
    """An answer that is an error. `type` and `code` are OpenAI's; by default they follow from the
    status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
          503: "overloaded_error"}  # fmt: skip
_ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error",
                    403: "permission_error", 404: "not_found_error", 413: "request_too_large",
                    429: "rate_limit_error", 503: "overloaded_error",
                    529: "overloaded_error"}  # fmt: skip


def not_found(kind: str, id: str) -> ApiError:
    """An object that is not there, or that somebody else owns."""
    return ApiError(404, f"no {kind} {id!r:.100}", param="id", code="not_found")


def unsupported(param: str, why: str) -> ApiError:
    """A parameter that exists, but not here."""
    return ApiError(400, f"{param}: {why}", param=param, code="unsupported_parameter")


def api_error_of(error: Exception) -> ApiError:
    """Any exception as an answer. Those that nobody expected tell their kind only; their text may
    hold what is none of the client's business."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        message = (
            f"{error} (n_prompt_tokens={error.n_prompt}, n_ctx={error.n_context}); nothing was cut"
        )
        return ApiError(400, message, param="messages", code="context_length_exceeded")
    if isinstance(error, UserError):
        named = _PARAM.match(str(error))
        return ApiError(400, str(error), param=named[1] if named else None)
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error) or "the deadline has passed", code="deadline_exceeded")
    if isinstance(error, PronkError):
        return ApiError(500, str(error))
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log says more")


def error_body(path: str, error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    """The body of an error in the shape of the API that `path` belongs to."""
    if path.startswith("/v1/messages"):
        return anthropic_error(error, request_id)
    if path.startswith("/api/"):
        return {"error": error.message}
    return openai_error(error)


def openai_error(error: ApiError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else error.type)
    body = {"type": "error", "error": {"type": kind, "message": error.message}}
    return body if request_id is None else {**body, "request_id": request_id}


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong with a body, a query or a path: the first of it, by name."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = _dotted(where)
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(400, f"body: not JSON: {reason}", param="body")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"{param}: this server does not know this parameter; nothing is ever ignored",
            param=param,
            code="unknown_parameter",
        )
    if first["type"] == "missing":
        return ApiError(
            400, f"{param or 'body'}: is missing", param=param or "body",
            code="missing_required_parameter",
        )  # fmt: skip
    words = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = f"{first.get('input')!r:.80}"
    return ApiError(400, f"{param or 'body'}: {words}; got {shown}", param=param or "body")


def _dotted(parts: Sequence[str]) -> str:
    """`messages[0].content`, without the tags that pydantic adds for the members of a union."""
    text = ""
    for part in parts:
        if part.isdecimal():
            text += f"[{part}]"
        elif re.fullmatch(r"[\w$-]+", part) and not _is_tag(part):
            text += f".{part}" if text else part
    return text


def _is_tag(part: str) -> bool:
    """Names of types that stand in pydantic's locations, not in the body."""
    return part[:1].isupper() or part in ("str", "int", "float", "bool", "list", "dict")
