"""What becomes of a mistake over HTTP: one exception with a status, told in the words of the API
that was called.

OpenAI     {"error": {"message", "type", "param", "code"}}
Anthropic  {"type": "error", "error": {"type", "message"}, "request_id"}     under /v1/messages
Ollama     {"error": "message"}                                             under /api/
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from pronk.core.errors import ContextLengthError, MemoryLimitError, PronkError, UserError

_PARAM = re.compile(r"([\w.\[\]'-]+): ")


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

NO_THREADS = "thread_unsupported_request"
"""By this code Anthropic's clients know that they must send whole chats."""


DATABASE_GONE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
"""What SQLAlchemy raises where the database, or the way to it, is at fault."""


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
        return context_error(error, "messages")
    if isinstance(error, MemoryLimitError):  # of a model that is loaded when it is asked for
        return ApiError(503, str(error), code="model_capacity")
    if isinstance(error, UserError):
        named = _PARAM.match(str(error))
        return ApiError(400, str(error), param=named[1] if named else None)
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error) or "the deadline has passed", code="deadline_exceeded")
    if isinstance(error, PronkError):
        return ApiError(500, str(error))
    if isinstance(error, DATABASE_GONE):
        if _is_full(error):
            return ApiError(507, "no space is left on the disk of the server's database")
        return ApiError(
            503, "the server's database is out of reach; try again in a moment",
            code="database_unavailable", headers={"Retry-After": "5"},
        )  # fmt: skip
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log says more")


def _is_full(error: Exception) -> bool:
    """Whether the disk of a database is, by the codes of SQLite and of PostgreSQL."""
    cause = getattr(error, "orig", None)
    full = {"SQLITE_FULL", "53100"}
    return not full.isdisjoint({getattr(cause, n, None) for n in ("sqlite_errorname", "sqlstate")})


def context_error(error: ContextLengthError, param: str) -> ApiError:
    """A prompt that is too long, which came as `param`."""
    message = (
        f"{error} (n_prompt_tokens={error.n_prompt}, n_ctx={error.n_context}); nothing was cut"
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


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
    told: dict[str, Any] = {"type": kind, "message": error.message}
    if error.code == NO_THREADS:
        told["details"] = {"error_code": error.code}
    body: dict[str, Any] = {"type": "error", "error": told}
    return body if request_id is None else {**body, "request_id": request_id}


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any = None) -> ApiError:
    """What pydantic found wrong with a body, a query or a path: the first of it, by name. `body` is
    what was checked, as far as it could be read."""
    first, param = _first_of(errors, body)
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
    if first["type"] in _MISSING:
        return ApiError(
            400, f"{param or 'body'}: is missing", param=param or "body",
            code="missing_required_parameter",
        )  # fmt: skip
    if first["type"] == "union_tag_invalid":
        tag, known = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        return ApiError(400, f"{param}: {tag!r:.80} is not one of {known}", param=param)
    if isinstance(first.get("input"), bytes):
        words = "body: is not told to be JSON; send the header Content-Type: application/json"
        return ApiError(400, words, param="body")
    words = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = _shown(first.get("input"))
    code = "unsupported_parameter" if first["type"] == "unsupported_parameter" else None
    return ApiError(
        400, f"{param or 'body'}: {words}; got {shown}", param=param or "body", code=code
    )


def _shown(value: Any) -> str:
    if isinstance(value, str | bytes):
        value = value[:80]
    elif isinstance(value, Mapping | list) and len(value) > _MANY:
        return f"{len(value)} entries"
    return f"{value!r:.80}"


_MANY = 100
"""Entries whose words would take long to put together."""


def _first_of(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[Mapping[str, Any], str]:
    """The first mistake and where it is. Of a value that fits no member of a union pydantic tells
    what each member finds wrong: the member that finds it deepest inside came closest, and among
    equals one that did not mind the type of the value."""
    placed = [(_place(error, body), error) for error in errors]
    outer = placed[0][0]
    inside = [one for one in placed if one[0][: len(outer)] == outer]
    place, error = max(inside, key=lambda one: (len(one[0]), not one[1]["type"].endswith("_type")))
    return error, _dotted(place)


def _place(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where in the body, the query or the path a mistake is: pydantic's location without the tags
    that it adds for the members of unions, which are no part of what was sent."""
    source, *loc = error["loc"] if error["loc"][:1] in _SOURCES else ("body", *error["loc"])
    if error["type"].startswith("union_tag"):
        loc.append(error["ctx"]["discriminator"].strip("'"))
    if source == "body" and isinstance(body, Mapping):
        return _place_in_body(loc, error["type"], body)
    return tuple(p for i, p in enumerate(loc) if not i or isinstance(p, int) or not _is_tag(p))


_MISSING = ("missing", "union_tag_not_found")
_SOURCES = (("body",), ("query",), ("path",), ("header",), ("cookie",))


def _place_in_body(loc: Sequence[str | int], kind: str, body: Any) -> tuple[str | int, ...]:
    """The parts of a location that are really in the body, as many as can be; the last one of what
    is missing, or ought not to be there, is a name for certain."""
    if not loc:
        return ()
    part, rest = loc[0], loc[1:]
    if not rest and kind in _MISSING:
        return (part,)
    try:
        inside: tuple[str | int, ...] = (part, *_place_in_body(rest, kind, body[part]))
    except (LookupError, TypeError):
        inside = ()
    if isinstance(part, int) or (not rest and inside):
        return inside
    if kind == "extra_forbidden" and inside[-1:] == tuple(loc[-1:]):
        return inside
    skipped = _place_in_body(rest, kind, body)
    return skipped if kind == "extra_forbidden" or len(skipped) > len(inside) else inside


def _dotted(parts: Sequence[str | int]) -> str:
    """`messages[0].content`"""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else f"{part:.100}"
    return text


def _is_tag(part: str) -> bool:
    """Names of types that stand in pydantic's locations."""
    return re.fullmatch(r"[\w$-]+", part) is None or part[:1].isupper() or part in _TYPE_NAMES


_TYPE_NAMES = ("str", "int", "float", "bool", "list", "dict", "none")
