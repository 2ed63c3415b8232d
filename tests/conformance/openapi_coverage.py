"""Compares our OpenAPI document with the types of OpenAI's client, field by field, and writes
docs/results/openapi.md.

    PYTHONPATH=src python tests/conformance/openapi_coverage.py

The client is made from OpenAI's published document, so its types say what that document says.
"""

import importlib.metadata
import types
import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import types as o
from openai.types import (
    chat,
    completion_create_params,
    conversations,
    responses,
)
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat import completions as stored_chats
from openai.types.responses import response_create_params, response_retrieve_params
from pydantic import BaseModel

from pronk.server.app import create_app
from pronk.server.settings import ServerSettings

PAGE = Path(__file__).parents[2] / "docs" / "results" / "openapi.md"

HEAD = """# OpenAI's API and ours

Written by `tests/conformance/openapi_coverage.py`: our OpenAPI document beside the types of
OpenAI's Python client {version}, which are made from OpenAI's published document. *Supported*: the
field does here what it does there, or asks for nothing that would change the answer
(docs/parameters.md tells which). *Refused by name*: declared, and 400 unless it says nothing. *Not
known*: 400, as any field that does not exist. Nothing is ever ignored;
`tests/conformance/test_openapi_coverage.py` sends each field to see. Fields of answers are compared
as deep as their objects are there and of one kind; what is not in an answer is optional in the
client's types.

"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A call of the client: what it may send, and what it reads."""

    name: str
    method: str
    path: str
    params: Any = None
    """TypedDict of the client, None where a call has no fields."""
    answer: type[BaseModel] | None = None


ENDPOINTS = [
    Endpoint("chat.completions.create", "post", "/v1/chat/completions",
             chat_params.CompletionCreateParamsNonStreaming, chat.ChatCompletion),
    Endpoint("chat.completions.list", "get", "/v1/chat/completions", chat.CompletionListParams),
    Endpoint("chat.completions.retrieve", "get", "/v1/chat/completions/{id}", None,
             chat.ChatCompletion),
    Endpoint("chat.completions.update", "post", "/v1/chat/completions/{id}",
             chat.CompletionUpdateParams, chat.ChatCompletion),
    Endpoint("chat.completions.delete", "delete", "/v1/chat/completions/{id}", None,
             chat.ChatCompletionDeleted),
    Endpoint("chat.completions.messages.list", "get", "/v1/chat/completions/{id}/messages",
             stored_chats.MessageListParams),
    Endpoint("completions.create", "post", "/v1/completions",
             completion_create_params.CompletionCreateParamsNonStreaming, o.Completion),
    Endpoint("embeddings.create", "post", "/v1/embeddings", o.EmbeddingCreateParams,
             o.CreateEmbeddingResponse),
    Endpoint("models.list", "get", "/v1/models"),
    Endpoint("models.retrieve", "get", "/v1/models/{model}", None, o.Model),
    Endpoint("files.create", "post", "/v1/files", o.FileCreateParams, o.FileObject),
    Endpoint("files.list", "get", "/v1/files", o.FileListParams),
    Endpoint("files.retrieve", "get", "/v1/files/{id}", None, o.FileObject),
    Endpoint("files.delete", "delete", "/v1/files/{id}", None, o.FileDeleted),
    Endpoint("batches.create", "post", "/v1/batches", o.BatchCreateParams, o.Batch),
    Endpoint("batches.list", "get", "/v1/batches", o.BatchListParams),
    Endpoint("batches.retrieve", "get", "/v1/batches/{id}", None, o.Batch),
    Endpoint("batches.cancel", "post", "/v1/batches/{id}/cancel", None, o.Batch),
    Endpoint("responses.create", "post", "/v1/responses",
             response_create_params.ResponseCreateParamsNonStreaming, responses.Response),
    Endpoint("responses.retrieve", "get", "/v1/responses/{id}",
             response_retrieve_params.ResponseRetrieveParamsNonStreaming, responses.Response),
    Endpoint("responses.cancel", "post", "/v1/responses/{id}/cancel", None, responses.Response),
    Endpoint("responses.input_items.list", "get", "/v1/responses/{id}/input_items",
             responses.InputItemListParams),
    Endpoint("responses.input_tokens.count", "post", "/v1/responses/input_tokens",
             responses.InputTokenCountParams),
    Endpoint("conversations.create", "post", "/v1/conversations",
             conversations.ConversationCreateParams, conversations.Conversation),
    Endpoint("conversations.retrieve", "get", "/v1/conversations/{id}", None,
             conversations.Conversation),
    Endpoint("conversations.update", "post", "/v1/conversations/{id}",
             conversations.ConversationUpdateParams, conversations.Conversation),
    Endpoint("conversations.items.create", "post", "/v1/conversations/{id}/items",
             conversations.ItemCreateParams),
    Endpoint("conversations.items.list", "get", "/v1/conversations/{id}/items",
             conversations.ItemListParams),
    Endpoint("conversations.items.retrieve", "get", "/v1/conversations/{id}/items/{item_id}",
             conversations.ItemRetrieveParams),
]  # fmt: skip


class Document:
    """Our OpenAPI document."""

    def __init__(self) -> None:
        self.raw = create_app(ServerSettings(), ["smollm2-135m"]).openapi()

    def serves(self, endpoint: Endpoint) -> bool:
        return endpoint.method in self.raw["paths"].get(endpoint.path, {})

    def resolve(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in schema:
            schema = self.raw["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        return schema

    def request_fields(self, endpoint: Endpoint) -> dict[str, Mapping[str, Any]]:
        """Schemas of the fields of body and query; `include[]` and `expires_after[anchor]` are ways
        to write fields of forms."""
        operation = self.raw["paths"][endpoint.path][endpoint.method]
        query = [p for p in operation.get("parameters", ()) if p["in"] == "query"]
        fields = {parameter["name"]: parameter["schema"] for parameter in query}
        if "requestBody" in operation:
            [content] = operation["requestBody"]["content"].values()
            fields |= self.resolve(content["schema"])["properties"]
        return {name.split("[")[0]: schema for name, schema in fields.items()}

    def answer_fields(self, endpoint: Endpoint) -> set[str]:
        """Dotted names of all fields of the answer, through objects and lists of one kind."""
        operation = self.raw["paths"][endpoint.path][endpoint.method]
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        return set(self._walk(self._first_object(schema), ""))

    def _objects(self, schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        schema = self.resolve(schema)
        for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            yield from self._objects(part)
        if "items" in schema:
            yield from self._objects(schema["items"])
        if "properties" in schema:
            yield schema

    def _first_object(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        return next(self._objects(schema))

    def _walk(self, schema: Mapping[str, Any], prefix: str, depth: int = 0) -> Iterator[str]:
        for name, part in schema["properties"].items():
            yield prefix + name
            if depth < 6:
                for inside in self._objects(part):
                    yield from self._walk(inside, f"{prefix}{name}.", depth + 1)


def sent_by_client(endpoint: Endpoint) -> list[str]:
    params = endpoint.params
    kinds = typing.get_args(params) or (params,)  # a union of streaming and not
    names: set[str] = set()
    for kind in kinds if params is not None else ():
        names |= kind.__required_keys__ | kind.__optional_keys__
    return sorted(names - {"conversation_id"})  # which is a part of the path


def read_by_client(
    kind: type[BaseModel], known: Set[str], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, bool]]:
    """Dotted names of the fields that the client's type has, as far as their objects are `known`,
    and whether the client relies on them."""
    for name, field in kind.model_fields.items():
        dotted = prefix + (field.alias or name)
        yield dotted, field.is_required() and type(None) not in typing.get_args(field.annotation)
        inside = list(_models_in(field.annotation))
        described = any(one.startswith(f"{dotted}.") for one in known)
        if len(inside) == 1 and described and depth < 6:
            yield from read_by_client(inside[0], known, f"{dotted}.", depth + 1)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, list, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _models_in(part)


def state_of(name: str, fields: Mapping[str, Mapping[str, Any]]) -> str:
    if name not in fields:
        return "not known"
    return "refused by name" if fields[name].get("x-unsupported") else "supported"


@dataclass(frozen=True, slots=True)
class Compared:
    """One endpoint: what is sent by name and state, and what of the answer is missing."""

    endpoint: Endpoint
    sent: Mapping[str, str]
    read: Mapping[str, bool]
    """Fields of the answer, and whether the client relies on them."""
    missing: Sequence[str]
    ours: Sequence[str]
    """Fields of requests that OpenAI has not."""


def compare(document: Document, endpoint: Endpoint) -> Compared:
    fields = document.request_fields(endpoint)
    sent = {name: state_of(name, fields) for name in sent_by_client(endpoint)}
    known = document.answer_fields(endpoint) if endpoint.answer else set()
    read = dict(read_by_client(endpoint.answer, known)) if endpoint.answer else {}
    ours = sorted(fields.keys() - sent.keys()) if endpoint.params else []
    return Compared(endpoint, sent, read, [name for name in read if name not in known], ours)


def page() -> str:
    document = Document()
    served = [compare(document, e) for e in ENDPOINTS if document.serves(e)]
    text = HEAD.format(version=importlib.metadata.version("openai"))
    text += (
        "| call | fields sent | supported | refused by name | not known | fields of the answer |\n"
    )
    text += "|---|---|---|---|---|---|\n"
    for one in served:
        text += f"| {one.endpoint.name} | {_score(one)}\n"
    text += _totals(served)
    shown: set[Any] = set()
    for one in served:
        text += _section(one, one.endpoint.answer not in shown)
        shown.add(one.endpoint.answer)
    absent = [e.name for e in ENDPOINTS if not document.serves(e)]
    return text + (f"\nNot served: {', '.join(absent)}.\n" if absent else "")


def _score(one: Compared) -> str:
    states = list(one.sent.values())
    counts = [str(states.count(s)) for s in ("supported", "refused by name", "not known")]
    answer = f"{len(one.read) - len(one.missing)} of {len(one.read)}" if one.read else ""
    return f"{len(states)} | {' | '.join(counts)} | {answer} |"


def _totals(compared: Sequence[Compared]) -> str:
    states = [state for one in compared for state in one.sent.values()]
    kinds = {one.endpoint.answer: one for one in compared}.values()
    read = sum(len(one.read) for one in kinds)
    found = read - sum(len(one.missing) for one in kinds)
    good = states.count("supported")
    return (
        f"\n{good} of {len(states)} fields of requests are supported"
        f" ({100 * good / len(states):.1f} %), and {found} of {read} fields of answers are there"
        f" ({100 * found / read:.1f} %). None is ignored.\n"
    )


def _section(one: Compared, with_answer: bool) -> str:
    lines = []
    for state in ("refused by name", "not known"):
        names = [name for name, found in one.sent.items() if found == state]
        if names:
            lines.append(f"- {state}: {_code(names)}")
    if one.missing and with_answer:
        lines.append(f"- not in the answer: {_code(one.missing)}")
    if one.ours:
        lines.append(f"- of our own: {_code(one.ours)}")
    return f"\n## {one.endpoint.name}\n\n" + "\n".join(lines) + "\n" if lines else ""


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
