"""POST /v1/embeddings: vectors of texts, as OpenAI has it."""

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field

from pronk.backends.protocol import F32
from pronk.engine import request as engine_request
from pronk.engine.sampling import Pooler, Pooling
from pronk.server.auth import Caller, caller
from pronk.server.completions import prompts_of
from pronk.server.generation import Generation
from pronk.server.models import Lease
from pronk.server.schema import Accepted, Answer, Body
from pronk.server.service import Call, refuse

router = APIRouter(tags=["embeddings"])


class EmbeddingRequest(Body):
    """POST /v1/embeddings"""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(default=None, ge=1, description="Only the model's own number.")
    user: str | None = Accepted("An opaque name of the end user.")
    pooling: Pooling = Field(
        default="mean", description="The mean of all tokens' states, or the last token's."
    )
    timeout: float | None = Field(default=None, gt=0, description="Seconds until it is given up.")


class Embedding(Answer):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="base64: of little-endian float32.")


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList, summary="Vectors of texts")
async def create_embeddings(
    request: Request, body: EmbeddingRequest, who: Annotated[Caller, Depends(caller("inference"))]
) -> Response:
    """Vectors of length 1. A model that was not tuned for it compares texts only roughly."""
    answer = await execute(Call.of(request, who), body)
    return Response(await asyncio.to_thread(_encoded, answer), media_type="application/json")


async def execute(call: Call, body: EmbeddingRequest) -> dict[str, Any]:
    """The answer, also for a line of a batch."""
    texts = prompts_of(body.input, "input")
    found = await embed(
        call, body.model, texts, body.pooling, dimensions=body.dimensions, timeout=body.timeout
    )
    return {
        "object": "list",
        "data": await asyncio.to_thread(_data, found.vectors, body.encoding_format == "base64"),
        "model": found.model,
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }


@dataclass(frozen=True, slots=True)
class Embedded:
    vectors: Sequence[F32]
    tokens: int
    """Of all texts."""
    model: str


async def embed(
    call: Call,
    model: str,
    texts: Sequence[str | list[int]],
    pooling: Pooling = "mean",
    *,
    dimensions: int | None = None,
    timeout: float | None = None,
) -> Embedded:
    """Vectors of texts or token ids. The client that goes away ends it."""
    lease = await call.model(model)
    try:
        D = lease.llm.config.dim
        refuse(dimensions not in (None, D), "dimensions", f"vectors of {lease.name} have {D}")
        poolers = [Pooler(pooling) for _ in texts]
        who = call.who(lease, timeout=timeout)
        requests = await asyncio.to_thread(_requests, lease, texts, poolers, who)
    except BaseException:
        lease.release()
        raise
    generation = Generation(call, lease, requests)
    try:
        await generation.finish()
    finally:
        generation.close()
    tokens = sum(request.n_prompt for request in requests)
    return Embedded([pooler.vector for pooler in poolers], tokens, lease.name)


def _requests(
    lease: Lease,
    texts: Sequence[str | list[int]],
    poolers: Sequence[Pooler],
    who: Mapping[str, Any],
) -> list[engine_request.Request]:
    prompter = lease.llm.prompter
    return [prompter.embedding(text, p, **who) for text, p in zip(texts, poolers, strict=True)]


def _data(vectors: Sequence[F32], as_text: bool) -> list[dict[str, Any]]:
    return [
        {"object": "embedding", "index": i, "embedding": _shown(vector, as_text)}
        for i, vector in enumerate(vectors)
    ]


def _encoded(answer: Mapping[str, Any]) -> bytes:
    """JSON, made a vector at a time: the encoder lets no other thread run until it is done, and
    2048 vectors of 4096 numbers take it many seconds."""
    head = json.dumps({name: value for name, value in answer.items() if name != "data"})
    data = ",".join(json.dumps(item, separators=(",", ":")) for item in answer["data"])
    return f'{head[:-1]}, "data": [{data}]}}'.encode()


def _shown(vector: F32, as_text: bool) -> list[float] | str:
    if as_text:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
