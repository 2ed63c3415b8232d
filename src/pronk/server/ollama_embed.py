"""POST /api/embed and /api/embeddings: Ollama's routes for vectors of texts."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pronk.core.errors import ContextLengthError
from pronk.server import ollama_types as t
from pronk.server.auth import Caller, caller
from pronk.server.embeddings import Embedded, embed
from pronk.server.models import Lease
from pronk.server.ollama import check_keep_alive, nanoseconds, set_keep_alive
from pronk.server.ollama_chat import context_of
from pronk.server.ollama_route import AnyTypeRoute
from pronk.server.service import Call
from pronk.text.messages import check_text

router = APIRouter(tags=["ollama"], route_class=AnyTypeRoute)

Inference = Annotated[Caller, Depends(caller("inference"))]


@router.post("/api/embed", response_model=t.OllamaEmbedAnswer, summary="Vectors of texts (Ollama)")
async def embed_texts(
    request: Request, body: t.OllamaEmbedRequest, who: Inference
) -> dict[str, Any]:
    """Vectors of length 1. A text that does not fit is refused unless `truncate` is true."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    started = time.perf_counter()
    found, loaded = await _vectors(
        Call.of(request, who), body, texts, cut=bool(body.truncate), dimensions=body.dimensions
    )
    return {
        "model": body.model,
        "embeddings": [vector.tolist() for vector in found.vectors],
        "total_duration": nanoseconds(time.perf_counter() - started),
        "load_duration": nanoseconds(loaded - started),
        "prompt_eval_count": found.tokens,
    }


@router.post(
    "/api/embeddings",
    response_model=t.OllamaEmbeddingsAnswer,
    summary="The vector of a text (Ollama, deprecated)",
)
async def embed_one(
    request: Request, body: t.OllamaEmbeddingsRequest, who: Inference
) -> dict[str, Any]:
    """The same for one text. Without one the model is loaded."""
    texts = [body.prompt] if body.prompt else []
    found, _ = await _vectors(Call.of(request, who), body, texts)
    return {"embedding": found.vectors[0].tolist() if texts else []}


async def _vectors(
    call: Call,
    body: t.OllamaEmbedBody,
    texts: Sequence[str],
    *,
    cut: bool = False,
    dimensions: int | None = None,
) -> tuple[Embedded, float]:
    """The vectors, and when the model was there."""
    check_keep_alive(call, body)
    lease = await call.model(body.model)
    loaded = time.perf_counter()
    try:
        ids = await asyncio.to_thread(_ids, lease, body, texts, cut)
        found = Embedded([], 0, lease.name)
        if ids:
            found = await embed(call, body.model, ids, dimensions=dimensions)
        set_keep_alive(call, body)
    finally:
        lease.release()
    return found, loaded


def _ids(
    lease: Lease, body: t.OllamaEmbedBody, texts: Sequence[str], cut: bool
) -> list[str | list[int]]:
    """Tokens of the texts, which fit `num_ctx`."""
    n_context = context_of(lease, body.options)
    found: list[str | list[int]] = []
    for i, text in enumerate(texts):
        ids = list(lease.llm.prompter.ids(check_text(text, f"input[{i}]")))
        if len(ids) > n_context and not cut:
            raise ContextLengthError(len(ids), n_context)
        found.append(ids[:n_context])
    return found
