"""Bodies of OpenAI's chat completions and completions, as its API reference has them, with the
fields that this server adds. What is declared `Unsupported` is refused unless it says nothing."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pronk.server.schema import Accepted, Answer, Body, Metadata, Unsupported

# Requests: messages.


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str
    """JSON of an object."""


class MessageToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: Unsupported = None
    function_call: Unsupported = None


class ToolMessage(Body):
    role: Literal["tool", "ipython"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]

# Requests: tools and formats.


class FunctionDefinition(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        default=None, description="True: refused if the schema cannot be enforced in full."
    )


class FunctionTool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice]


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["auto", "none", "required"]
    | Annotated[NamedToolChoice | AllowedToolsChoice, Field(discriminator="type")]
)


class JsonSchemaFormat(Body):
    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = Accepted("The schema is enforced either way.")


class TextResponseFormat(Body):
    type: Literal["text"]


class JsonObjectResponseFormat(Body):
    type: Literal["json_object"]


class JsonSchemaResponseFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


class RegexResponseFormat(Body):
    type: Literal["regex"]
    regex: str


class ChoiceResponseFormat(Body):
    type: Literal["choice"]
    choice: list[str]


class GrammarResponseFormat(Body):
    type: Literal["grammar"]
    grammar: str = Field(description="In llama.cpp's notation (root ::= ...) or Lark's.")


ResponseFormat = Annotated[
    TextResponseFormat
    | JsonObjectResponseFormat
    | JsonSchemaResponseFormat
    | RegexResponseFormat
    | ChoiceResponseFormat
    | GrammarResponseFormat,
    Field(discriminator="type"),
]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Accepted("Nothing is added to obscure lengths.")


Stop = str | Annotated[list[str], Field(max_length=16)]


class SamplingBody(Body):
    """Parameters that all ways of generating text share."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(
        default=None,
        max_length=1024,  # each is added at every token, while all other answers wait
        description="From token ids to what is added to their logits, -100 to 100.",
    )
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=1, ge=1, le=128)
    user: str | None = Accepted("An opaque name of the end user.")
    timeout: float | None = Field(default=None, gt=0, description="Seconds until it is given up.")
    cache_salt: str | None = Field(
        default=None, max_length=256, description="Only requests of one salt share cached prompts."
    )


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[FunctionTool] | None = None
    builtin_tools: list[str] | None = Field(
        default=None, description="Llama 3.1's own: brave_search, wolfram_alpha, code_interpreter."
    )
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = True
    response_format: ResponseFormat | None = None
    store: bool | None = False
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default", "flex"] | None = Field(
        default=None, description="flex: with the priority of batches."
    )
    safety_identifier: str | None = Accepted("An opaque name of the end user.")
    prompt_cache_key: str | None = Accepted("Prompts that begin alike always share a cache.")
    prompt_cache_retention: str | None = Accepted("What is cached is kept while there is room.")
    modalities: list[Literal["text"]] | None = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
    prompt_cache_options: Unsupported = None
    reasoning_effort: Literal["none"] | None = Accepted("Llama 3.1 does not reason in secret.")
    verbosity: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None


class CompletionRequest(SamplingBody):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = False
    best_of: int | None = Field(default=None, ge=1, le=128)
    suffix: Unsupported = None
    response_format: ResponseFormat | None = None


# Responses.


class PromptTokensDetails(Answer):
    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(Answer):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class CompletionUsage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob] | None
    refusal: list[ChatTokenLogprob] | None = None


class AnsweredFunction(Answer):
    name: str
    arguments: str


class AnsweredToolCall(Answer):
    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AnsweredMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    annotations: list[Any] = Field(default_factory=list)
    tool_calls: list[AnsweredToolCall] | None = None


ChatFinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class ChatChoice(Answer):
    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None = Field(
        default=None,
        description="The stop string or token id that was found; eom: the model waits for results.",
    )
    seed: int | None = Field(default=None, description="Gives the same answer again.")


class Timings(Answer):
    """Seconds of the first answer."""

    queue_seconds: float | None
    prompt_seconds: float | None
    decode_seconds: float | None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    service_tier: str | None = None
    system_fingerprint: str | None = None
    metadata: dict[str, str] | None = None
    timings: Timings | None = None


class DeltaFunction(Answer):
    name: str | None = None
    arguments: str | None = None


class DeltaToolCall(Answer):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None
    stop_reason: str | int | None = None


class ChatCompletionChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None


class CompletionLogprobs(Answer):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"] | None
    stop_reason: str | int | None = None
    seed: int | None = None


class Completion(Answer):
    """Also each event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None = None
