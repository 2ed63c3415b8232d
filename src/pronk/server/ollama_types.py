"""Bodies of Ollama's API, as its reference and its clients have them. What is declared
`Unsupported` is refused unless it says nothing; of the options, those that only say how a model is
run are accepted, and those that would change an answer in a way that is not offered here are
refused unless they are switched off."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from pronk.server.openai_types import FunctionDefinition
from pronk.server.schema import Accepted, Answer, Body, Unsupported

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def seconds_of(value: Any) -> Any:
    """Seconds from a number of them or from a text such as "1h30m"; infinite where it is negative.
    ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError("must be seconds or a duration such as '5m'")
    return math.inf if value < 0 else float(value)


def _parsed(text: str) -> float:
    digits = text.removeprefix("-")
    parts = _PART.findall(digits)
    if digits and "".join(number + unit for number, unit in parts) == digits:
        found = sum(float(number) * _UNITS[unit] for number, unit in parts)
    else:
        try:
            found = float(digits)
        except ValueError:
            raise ValueError("must be seconds or a duration such as '5m'") from None
    return -found if text.startswith("-") else found


KeepAlive = Annotated[
    float | None,
    BeforeValidator(seconds_of, json_schema_input_type=float | str | None),
    Field(description='How long the model stays in memory: seconds or "5m"; negative: for good.'),
]


def _empty(value: Any) -> Any:
    return None if value == "" else value


Never = Annotated[Unsupported, BeforeValidator(_empty)]
"""Not supported; clients send empty texts for what they do not ask for."""


def _neutral(*neutral: Any) -> Any:
    """A field whose only good values are those that change nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            raise PydanticCustomError("unsupported_parameter", "is not supported by this server")
        return value

    return AfterValidator(check)


def _tokens(value: int | None) -> int | None:
    if value is not None and value != -1 and value != -2 and value < 1:
        raise ValueError("must be at least 1, or -1 or -2: as many as the context has room for")
    return value


class OllamaOptions(Body):
    """`options` of a request."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    num_predict: Annotated[int | None, AfterValidator(_tokens)] = None
    num_ctx: int | None = Field(
        default=None, ge=1, description="Most tokens of the prompt and the answer."
    )
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    repeat_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repeat_last_n: int | None = Field(
        default=None, ge=-1, description="Penalties are for all tokens (-1) here."
    )
    penalize_newline: bool | None = None

    mirostat: Annotated[int | None, _neutral(0)] = None
    mirostat_tau: float | None = Accepted("Says nothing without mirostat.")
    mirostat_eta: float | None = Accepted("Says nothing without mirostat.")
    tfs_z: Annotated[float | None, _neutral(1)] = None
    typical_p: Annotated[float | None, _neutral(1)] = None
    vocab_only: Annotated[bool | None, _neutral(False)] = None
    embedding_only: Annotated[bool | None, _neutral(False)] = None
    f16_kv: Annotated[bool | None, _neutral(True)] = None

    num_keep: int | None = Accepted("Nothing is ever cut from a prompt.")
    num_batch: int | None = Accepted("Does not change an answer.")
    num_gpu: int | None = Accepted("Does not change an answer.")
    main_gpu: int | None = Accepted("Does not change an answer.")
    num_thread: int | None = Accepted("Does not change an answer.")
    numa: bool | None = Accepted("Does not change an answer.")
    low_vram: bool | None = Accepted("Does not change an answer.")
    logits_all: bool | None = Accepted("Does not change an answer.")
    use_mmap: bool | None = Accepted("Does not change an answer.")
    use_mlock: bool | None = Accepted("Does not change an answer.")


class OllamaBody(Body):
    """What chats and completions share."""

    model: str = Field(min_length=1)
    stream: bool | None = Field(default=None, description="True unless it is false.")
    format: Annotated[Literal["json"] | dict[str, Any] | None, BeforeValidator(_empty)] = Field(
        default=None, description='"json", or a JSON schema.'
    )
    options: OllamaOptions | None = None
    keep_alive: KeepAlive = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    think: Never = None
    truncate: Unsupported = None
    shift: Unsupported = None

    @property
    def wants_stream(self) -> bool:
        return self.stream is not False


class OllamaCalledFunction(Body):
    index: int | None = None
    name: str = Field(min_length=1)
    arguments: dict[str, Any]


class OllamaMessageCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaCalledFunction


class OllamaMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: Never = None
    images: Unsupported = None
    tool_calls: list[OllamaMessageCall] | None = None
    tool_name: str | None = Field(default=None, description="Of the tool that gave a result.")
    tool_call_id: str | None = None


class OllamaTool(Body):
    type: Literal["function"] | None = None
    function: FunctionDefinition


class OllamaChatRequest(OllamaBody):
    """POST /api/chat. Without messages the model is loaded, or unloaded (`keep_alive` 0)."""

    messages: list[OllamaMessage] | None = None
    tools: list[OllamaTool] | None = None


class OllamaGenerateRequest(OllamaBody):
    """POST /api/generate. Without a prompt the model is loaded, or unloaded (`keep_alive` 0)."""

    prompt: str | None = None
    system: Annotated[str | None, BeforeValidator(_empty)] = None
    raw: bool | None = Field(
        default=None,
        description="The prompt is not put into the chat format; texts of special tokens in it "
        "are these tokens.",
    )
    suffix: Never = None
    template: Never = None
    context: Unsupported = Field(default=None, description="Deprecated: use /api/chat.")
    images: Unsupported = None
    width: Unsupported = None
    height: Unsupported = None
    steps: Unsupported = None


class OllamaEmbedBody(Body):
    model: str = Field(min_length=1)
    options: OllamaOptions | None = None
    keep_alive: KeepAlive = None


class OllamaEmbedRequest(OllamaEmbedBody):
    """POST /api/embed"""

    input: str | list[str]
    truncate: bool | None = Field(
        default=None, description="True: the ends of texts that do not fit are left out."
    )
    dimensions: int | None = Field(default=None, ge=1, description="Only the model's own number.")


class OllamaEmbeddingsRequest(OllamaEmbedBody):
    """POST /api/embeddings, the older route for one text"""

    prompt: str | None = None


class OllamaShowRequest(Body):
    model: str | None = None
    name: str | None = Field(default=None, description="The older name of `model`.")
    verbose: Unsupported = None
    system: Never = None
    template: Never = None
    options: Unsupported = None


# Responses.


class OllamaTimes(Answer):
    """How an answer ended. Durations are in nanoseconds."""

    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaTopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class OllamaLogprob(OllamaTopLogprob):
    top_logprobs: list[OllamaTopLogprob] | None = None


class OllamaAnsweredFunction(Answer):
    index: int
    name: str
    arguments: dict[str, Any]


class OllamaAnsweredCall(Answer):
    id: str
    function: OllamaAnsweredFunction


class OllamaAnsweredMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str
    tool_calls: list[OllamaAnsweredCall] | None = None


class OllamaChatAnswer(OllamaTimes):
    """The whole, or one line of a stream."""

    model: str
    created_at: str
    message: OllamaAnsweredMessage
    done: bool
    logprobs: list[OllamaLogprob] | None = None


class OllamaGenerateAnswer(OllamaTimes):
    """The whole, or one line of a stream."""

    model: str
    created_at: str
    response: str
    done: bool
    logprobs: list[OllamaLogprob] | None = None


class OllamaEmbedAnswer(Answer):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsAnswer(Answer):
    embedding: list[float]


class OllamaDetails(Answer):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(Answer):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaModels(Answer):
    models: list[OllamaModel]


class OllamaRunningModel(Answer):
    name: str
    model: str
    size: int
    size_vram: int
    digest: str
    details: OllamaDetails
    expires_at: str
    context_length: int


class OllamaRunningModels(Answer):
    models: list[OllamaRunningModel]


class OllamaShown(Answer):
    modelfile: str
    parameters: str
    template: str
    license: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(Answer):
    version: str
