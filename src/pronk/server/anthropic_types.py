"""Bodies of Anthropic's Messages API, as its reference has them. What is declared `Unsupported` is
refused unless it says nothing."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pronk.server.schema import Accepted, Answer, Body, Unsupported

# Requests: blocks of messages.


class CacheControl(Body):
    """Says what to cache. Prompts that begin alike always share a cache here, so it asks for
    nothing that is not done anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class DirectCaller(Body):
    type: Literal["direct"]


class InputTextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Unsupported = None


class InputToolUse(Body):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None
    toolset_name: Unsupported = None


def _blocks(value: Any) -> Any:
    """A text stands for one block of text."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[
    list[InputTextBlock],
    BeforeValidator(_blocks, json_schema_input_type=str | list[InputTextBlock]),
]


class InputToolResult(Body):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: Unsupported = None


_UserBlock = Annotated[InputTextBlock | InputToolResult, Field(discriminator="type")]
_AssistantBlock = Annotated[InputTextBlock | InputToolUse, Field(discriminator="type")]


class InputUserMessage(Body):
    role: Literal["user"]
    content: Annotated[
        list[_UserBlock],
        Field(min_length=1),
        BeforeValidator(_blocks, json_schema_input_type=str | list[_UserBlock]),
    ]


class InputAssistantMessage(Body):
    role: Literal["assistant"]
    content: Annotated[
        list[_AssistantBlock],
        BeforeValidator(_blocks, json_schema_input_type=str | list[_AssistantBlock]),
    ]


class InputSystemMessage(Body):
    role: Literal["system"]
    content: Texts


InputMessage = Annotated[
    InputUserMessage | InputAssistantMessage | InputSystemMessage, Field(discriminator="role")
]

# Requests: tools and formats.


def _custom(value: Any) -> Any:
    if value not in (None, "custom"):
        raise ValueError("only tools of type 'custom' can be offered here")
    return value


class CustomTool(Body):
    type: Annotated[Literal["custom"] | None, BeforeValidator(_custom)] = None
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(
        default=None, description="True: refused if the schema cannot be enforced in full."
    )
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = Accepted("Arguments are always sent as they grow.")
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Unsupported = None
    input_examples: Unsupported = None


class AutoToolChoice(Body):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyToolChoice(Body):
    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class OneToolChoice(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class NoToolChoice(Body):
    type: Literal["none"]


MessagesToolChoice = Annotated[
    AutoToolChoice | AnyToolChoice | OneToolChoice | NoToolChoice, Field(discriminator="type")
]


class JsonOutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: JsonOutputFormat | None = None
    effort: Unsupported = None


class MessagesMetadata(Body):
    user_id: str | None = Accepted("An opaque name of the end user.")


def _no_thinking(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "disabled":
        raise ValueError("these models do not think before they answer; leave it out or disable it")
    return value


class NoThinking(Body):
    type: Literal["disabled"]


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens"""

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=100_000)]
    system: Texts | None = None
    tools: list[CustomTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutputFormat | None = Field(
        default=None, description="The older place of `output_config.format`."
    )
    thinking: Annotated[NoThinking | None, BeforeValidator(_no_thinking)] = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None
    thread: dict[str, Any] | None = Field(
        default=None, description="Not supported: clients are told to send the whole chat."
    )
    context_management: Unsupported = None
    mcp_servers: Unsupported = None
    user_profile_id: Unsupported = None


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages"""

    max_tokens: int = Field(ge=1)
    stream: bool | None = False
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, description="Gives the same answer again."
    )
    metadata: MessagesMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Unsupported = None
    diagnostics: Unsupported = None
    inference_geo: Unsupported = None


# Responses.


class OutputText(Answer):
    type: Literal["text"] = "text"
    text: str
    citations: None = None


class OutputToolUse(Answer):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class MessagesUsage(Answer):
    input_tokens: int = Field(description="Of the prompt, those that had to be computed.")
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = Field(
        description="Of the prompt, those computed for an earlier one."
    )
    output_tokens: int
    service_tier: Literal["standard"] = "standard"


StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class MessagesAnswer(Answer):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Annotated[OutputText | OutputToolUse, Field(discriminator="type")]]
    stop_reason: StopReason | None
    stop_sequence: str | None = None
    usage: MessagesUsage


class TokenCount(Answer):
    input_tokens: int


class ModelInfo(Answer):
    """A model, as Anthropic's list of models has it."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class ModelInfoList(Answer):
    data: list[ModelInfo]
    first_id: str | None
    last_id: str | None
    has_more: bool
