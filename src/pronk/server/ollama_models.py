"""Ollama's routes about models: which there are, which are loaded and what is known of one. Those
that would fetch or make models are refused: `pronk pull` does that, where somebody can read what it
costs and agree to the licence."""

import asyncio
import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pronk import __version__
from pronk.checkpoints.catalog import licence_of, licence_terms
from pronk.checkpoints.open import open_checkpoint
from pronk.checkpoints.pull import find
from pronk.core.config import ModelConfig
from pronk.engine.load import load_tokenizer
from pronk.engine.prompts import Prompter
from pronk.server import ollama_types as t
from pronk.server.auth import Caller, caller
from pronk.server.errors import ApiError
from pronk.server.models import Entry, Models
from pronk.server.ollama_route import AnyTypeRoute, timestamp
from pronk.server.service import Service, refuse
from pronk.text.tokenizer import Tokenizer

router = APIRouter(tags=["ollama"], route_class=AnyTypeRoute)

Inference = Annotated[Caller, Depends(caller("inference", limited=False))]
Admin = Annotated[Caller, Depends(caller("admin"))]

_FOR_GOOD = "2318-01-01T00:00:00Z"
"""When a model goes that stays: Ollama's longest duration from now."""
_FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1",
               10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M",
               16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16"}  # fmt: skip
"""`general.file_type` of a GGUF."""
_TORCH_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SHOWN = (str, int, float, bool)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/api/version", response_model=t.OllamaVersion, summary="Pronk's version (Ollama)")
async def version(who: Inference) -> t.OllamaVersion:
    return t.OllamaVersion(version=__version__)


@router.get("/api/tags", response_model=t.OllamaModels, summary="The models (Ollama)")
async def tags(request: Request, who: Inference) -> t.OllamaModels:
    models = _service(request).models
    found = []
    for name, entry in _visible(models, who):
        size, changed = await asyncio.to_thread(_on_disk, entry)
        found.append(
            t.OllamaModel(
                name=name,
                model=name,
                modified_at=timestamp(changed),
                size=size,
                digest=_digest(name, size),
                details=_details(entry, name, _loaded_facts(entry)),
            )
        )
    return t.OllamaModels(models=found)


@router.get("/api/ps", response_model=t.OllamaRunningModels, summary="Loaded models (Ollama)")
async def running(request: Request, who: Inference) -> t.OllamaRunningModels:
    service = _service(request)
    found = []
    for name, entry in _visible(service.models, who):
        loaded, facts = entry.loaded, _loaded_facts(entry)  # it may go while the disk is read
        if loaded is None or name in entry.adapters:
            continue
        size, _ = await asyncio.to_thread(_on_disk, entry)
        found.append(
            t.OllamaRunningModel(
                name=name,
                model=name,
                size=size,
                size_vram=0,
                digest=_digest(name, size),
                details=_details(entry, name, facts),
                expires_at=_expiry(entry, service.settings.idle_unload),
                context_length=loaded.llm.context,
            )
        )
    return t.OllamaRunningModels(models=found)


@router.post("/api/show", response_model=t.OllamaShown, summary="About one model (Ollama)")
async def show(request: Request, body: t.OllamaShowRequest, who: Inference) -> t.OllamaShown:
    """Loads nothing: of a model that is not in memory the head of its file is read."""
    name = body.model or body.name
    refuse(name is None, "model", "is missing")
    entry, adapter = _service(request).models.find(str(name))
    who.check_model(*filter(None, [adapter]), entry.name, *entry.aliases)
    facts = _loaded_facts(entry)
    if facts is None:
        facts = await asyncio.to_thread(_read, entry)
    _, changed = await asyncio.to_thread(_on_disk, entry)
    shown = adapter or entry.name
    licence = licence_of(entry.ref, facts.metadata)
    terms = [str(facts.metadata.get("general.license", ""))]
    if licence is not None:
        terms = [licence.name, licence.url, *licence_terms(licence)]
    chats = Prompter(facts.tokenizer, entry.name, {}).chat_format is not None
    return t.OllamaShown(
        modelfile=f"# Served by Pronk {__version__}, which has no Modelfiles.\nFROM {shown}\n",
        parameters="",
        template=facts.tokenizer.chat_template or "",
        license="\n".join(terms),
        details=_details(entry, shown, facts),
        model_info=_info(facts),
        capabilities=["completion", "tools"] if chats else ["completion"],
        modified_at=timestamp(changed),
    )


# What would change which models there are.


_NOT_OFFERED: dict[int | str, dict[str, Any]] = {501: {"description": "Not offered."}}


@router.post("/api/pull", summary="Refused: see `pronk pull` (Ollama)", responses=_NOT_OFFERED)
@router.post("/api/push", summary="Refused (Ollama)", responses=_NOT_OFFERED)
@router.post("/api/create", summary="Refused (Ollama)", responses=_NOT_OFFERED)
@router.post("/api/copy", summary="Refused (Ollama)", responses=_NOT_OFFERED)
@router.delete("/api/delete", summary="Refused: see `pronk rm` (Ollama)", responses=_NOT_OFFERED)
async def refused(request: Request, who: Admin) -> None:
    raise ApiError(
        501,
        f"{request.url.path} is not offered: models are fetched by `pronk pull` and removed by"
        " `pronk rm` on the server's machine, and served by `pronk serve MODEL`",
        code="not_implemented",
    )


# Facts about models.


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a model's files say."""

    config: ModelConfig
    metadata: Mapping[str, Any]
    tokenizer: Tokenizer
    is_gguf: bool


def _visible(models: Models, who: Caller) -> list[tuple[str, Entry]]:
    """Models and their adapters by name."""
    found = []
    for entry in models:
        if who.may_use(entry.name, *entry.aliases):
            found.append((entry.name, entry))
        found += [(name, entry) for name in entry.adapters if who.may_use(name, entry.name)]
    return found


def _loaded_facts(entry: Entry) -> _Facts | None:
    if entry.loaded is None:
        return None
    llm = entry.loaded.llm
    is_gguf = "general.architecture" in llm.metadata
    return _Facts(llm.config, llm.metadata, llm.tokenizer, is_gguf)


def _read(entry: Entry) -> _Facts:
    """From the disk. ApiError 404 where the model was not fetched yet."""
    path = _path(entry)
    if path is None:
        raise ApiError(404, f"model: {entry.name} is not on disk; fetch it with `pronk pull`",
                       param="model", code="model_not_found")  # fmt: skip
    with open_checkpoint(path) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        is_gguf = checkpoint.format == "gguf"
        return _Facts(checkpoint.config, dict(checkpoint.metadata), tokenizer, is_gguf)


def _path(entry: Entry) -> Path | None:
    if entry.ref.path is not None:
        return entry.ref.path
    installed = find(entry.ref)
    return None if installed is None else installed.path


def _on_disk(entry: Entry) -> tuple[int, float]:
    """Bytes of a model's files and when they were changed; what the catalog says, and when the
    server was started, where they are not there."""
    path = _path(entry)
    if path is None or not path.exists():
        return entry.catalog.nbytes if entry.catalog else 0, float(entry.created)
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    stats = [file.stat() for file in files]
    changed = max((stat.st_mtime for stat in stats), default=float(entry.created))
    return sum(stat.st_size for stat in stats), changed


def _digest(name: str, size: int) -> str:
    """An id in the form of Ollama's digests. Of the name and the size: to hash the files takes
    minutes."""
    return hashlib.sha256(f"{name} {size}".encode()).hexdigest()


def _details(entry: Entry, name: str, facts: _Facts | None) -> t.OllamaDetails:
    catalog = entry.catalog
    n_params = facts.config.n_params if facts else catalog.parameters if catalog else None
    kind = (catalog.format if catalog else "") if facts is None else "gguf" if facts.is_gguf else ""
    return t.OllamaDetails(
        parent_model="" if name == entry.name else entry.name,
        format=kind or "safetensors",
        family="llama",
        families=["llama"],
        parameter_size="" if n_params is None else _short(n_params),
        quantization_level="unknown" if facts is None else _quantization(facts),
    )


def _short(n_params: int) -> str:
    """As Ollama writes it: 8.0B, 134.52M."""
    return f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.2f}M"


def _quantization(facts: _Facts) -> str:
    if facts.is_gguf:
        return _FILE_TYPES.get(facts.metadata.get("general.file_type", -1), "unknown")
    told = facts.metadata.get("torch_dtype") or facts.metadata.get("dtype")
    return _TORCH_TYPES.get(str(told), "unknown")


def _info(facts: _Facts) -> dict[str, Any]:
    """`model_info`: a GGUF's general keys, and those of its shape for every format."""
    config = facts.config
    general = {
        key: value
        for key, value in facts.metadata.items()
        if key.startswith("general.") and isinstance(value, _SHOWN)
    }
    return {
        **general,
        "general.architecture": "llama",
        "general.parameter_count": config.n_params,
        "llama.context_length": config.context,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
    }


def _expiry(entry: Entry, idle_unload: float | None) -> str:
    """When a model will be unloaded if nobody uses it until then."""
    seconds = idle_unload if entry.keep_alive is None else entry.keep_alive
    if seconds is None or math.isinf(seconds):
        return _FOR_GOOD
    idle = 0.0 if entry.users else time.monotonic() - entry.last_used
    try:
        return timestamp(time.time() + max(0.0, seconds - idle))
    except (OverflowError, ValueError, OSError):  # beyond the calendar
        return _FOR_GOOD
