"""Which models there are, loading and unloading them and their adapters; and whether the server is
alive and ready, and what its routes are."""

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from pronk import __version__
from pronk.server.anthropic_models import Cursor, VersionHeader, model_info
from pronk.server.anthropic_types import ModelInfo, ModelInfoList
from pronk.server.auth import Caller, caller
from pronk.server.errors import ApiError
from pronk.server.models import Entry, Models
from pronk.server.schema import Answer, Body
from pronk.server.service import Service

router = APIRouter(tags=["models"])

Inference = Annotated[Caller, Depends(caller("inference"))]
Admin = Annotated[Caller, Depends(caller("admin"))]


class Model(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str | None = Field(default=None, description="The model that an adapter belongs to.")
    max_model_len: int | None = Field(
        default=None, description="Most tokens of a prompt and its answer, as it is loaded."
    )
    loaded: bool
    aliases: list[str]


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(Answer):
    status: Literal["ok"] = "ok"


class Ready(Answer):
    status: Literal["ready"] = "ready"


class Version(Answer):
    version: str


class LoadedModel(Answer):
    id: str
    loaded: bool


class ModelName(Body):
    model: str


class AdapterToLoad(Body):
    lora_name: str = Field(max_length=200)
    lora_path: str = Field(description="A PEFT folder on the server.")
    base_model_name: str | None = None


class AdapterName(Body):
    lora_name: str


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def model_of(entry: Entry) -> Model:
    known = entry.catalog.context if entry.catalog else None
    owner = (entry.ref.repo or "").split("/")[0]
    return Model(
        id=entry.name,
        created=entry.created,
        owned_by=owner or "local",
        max_model_len=entry.loaded.llm.context if entry.loaded else known,
        loaded=entry.loaded is not None,
        aliases=list(entry.aliases),
    )


def _models_of(models: Models, who: Caller) -> list[Model]:
    found = []
    for entry in models:
        if who.may_use(entry.name, *entry.aliases):
            found.append(model_of(entry))
        for name in entry.adapters:
            if who.may_use(name, entry.name):
                base = model_of(entry)
                update = {"id": name, "root": entry.name, "aliases": []}
                found.append(base.model_copy(update=update))
    return found


def _info_of(model: Model, models: Models) -> ModelInfo:
    """The same for Anthropic's clients."""
    known = models.find(model.id)[0].catalog
    title = known.title if known and model.root is None else model.id
    return model_info(model.id, title, model.created, model.max_model_len)


@router.get(
    "/v1/models",
    response_model=ModelList | ModelInfoList,
    summary="The models that may be asked for",
)
async def list_models(
    request: Request,
    who: Inference,
    cursor: Annotated[Cursor, Depends()],
    anthropic_version: VersionHeader = None,
) -> ModelList | ModelInfoList:
    """With the header anthropic-version in Anthropic's shape, else in OpenAI's, which has all."""
    models = _service(request).models
    found = _models_of(models, who)
    if anthropic_version is not None:
        return cursor.page([_info_of(model, models) for model in found])
    return ModelList(data=found)


@router.get("/v1/models/{model:path}", response_model=Model | ModelInfo, summary="One model")
async def get_model(
    request: Request, model: str, who: Inference, anthropic_version: VersionHeader = None
) -> Model | ModelInfo:
    models = _service(request).models
    entry, adapter = models.find(model)
    wanted = adapter or entry.name
    for found in _models_of(models, who):
        if found.id == wanted:
            return found if anthropic_version is None else _info_of(found, models)
    raise ApiError(404, f"model: {model!r:.200} is not served here", param="model",
                   code="model_not_found")  # fmt: skip


# Control.


@router.post("/v1/load_model", response_model=LoadedModel, summary="Load a model now")
async def load_model(request: Request, body: ModelName, who: Admin) -> LoadedModel:
    lease = await _service(request).models.acquire(body.model)
    lease.release()
    return LoadedModel(id=lease.model, loaded=True)


@router.post("/v1/unload_model", response_model=LoadedModel, summary="Free a model's memory")
async def unload_model(request: Request, body: ModelName, who: Admin) -> LoadedModel:
    """409 while the model is in use. The next request that names it loads it again."""
    models = _service(request).models
    await models.unload(body.model)
    return LoadedModel(id=models.find(body.model)[0].name, loaded=False)


@router.post("/v1/load_lora_adapter", response_model=Model, summary="Load a LoRA adapter")
async def load_adapter(request: Request, body: AdapterToLoad, who: Admin) -> Model:
    """From now on requests may name it as their model."""
    models = _service(request).models
    entry = await models.load_adapter(body.lora_name, Path(body.lora_path), body.base_model_name)
    return model_of(entry).model_copy(
        update={"id": body.lora_name, "root": entry.name, "aliases": []}
    )


@router.post("/v1/unload_lora_adapter", response_model=LoadedModel, summary="Drop an adapter")
async def unload_adapter(request: Request, body: AdapterName, who: Admin) -> LoadedModel:
    await _service(request).models.unload_adapter(body.lora_name)
    return LoadedModel(id=body.lora_name, loaded=False)


# Health and documentation.


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Health, tags=["service"], summary="Is it alive?")
async def health() -> Health:
    return Health()


@router.get(
    "/ready",
    response_model=Ready,
    tags=["service"],
    summary="Does it take requests?",
    responses={503: {"description": "Not yet, or not any more."}},
)
async def ready(request: Request) -> Ready:
    service = getattr(request.app.state, "service", None)
    if service is None or not service.ready:
        raise ApiError(503, "the server is starting or stopping", headers={"Retry-After": "1"})
    return Ready()


@router.get("/version", response_model=Version, tags=["service"], summary="Which version it is")
async def version(who: Inference) -> Version:
    return Version(version=__version__)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, who: Inference) -> JSONResponse:
    document: dict[str, Any] = request.app.openapi()
    return JSONResponse(document)
