"""Bodies of requests to OpenAI's Responses and Conversations APIs, with the fields that this server
adds. What is declared `Unsupported` is refused unless it says nothing.

Members of unions are told apart by one field, so that what is wrong is named where it is, and not
once for each of the members.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from pronk.server import openai_types as t
from pronk.server.paging import OrderedQuery
from pronk.server.schema import Accepted, Body, Metadata, Unsupported

# Items.

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = Accepted("What can be cached always is.")


class OutputText(Body):
    type: Literal["output_text"]
    text: str
    annotations: Unsupported = None
    logprobs: list[Any] | None = Accepted("Of an earlier answer; they say nothing to the model.")


class PlainText(Body):
    type: Literal["text"]
    text: str


class Refusal(Body):
    type: Literal["refusal"]
    refusal: str


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _kinds(kinds: dict[str, str], words: str, default: str = "") -> tuple[Any, ...]:
    """Annotations of a union whose members are told apart by `type`. `kinds`: from its values to
    tags; `words`: what is said of any other; `default`: the kind of a value without a type."""

    def kind_of(value: Any) -> Any:
        kind = _field(value, "type")
        return default if kind is None and default else kind

    def check(value: Any) -> Any:
        kind = kind_of(value)
        if isinstance(value, dict) and (not isinstance(kind, str) or kind not in kinds):
            raise PydanticCustomError(
                "unsupported_parameter", "{kind} is no {words}; there are {known}",
                {"kind": repr(kind)[:80], "words": words, "known": ", ".join(kinds)},
            )  # fmt: skip
        return value

    first = next(iter(kinds.values()))
    return Discriminator(lambda value: kinds.get(kind_of(value), first)), BeforeValidator(check)


def _text_or_list(value: Any) -> str:
    return "Text" if isinstance(value, str) else "Parts"


_PARTS = {
    "input_text": "InputText",
    "output_text": "OutputText",
    "text": "PlainText",
    "refusal": "Refusal",
}

Part = Annotated[
    Annotated[InputText, Tag("InputText")]
    | Annotated[OutputText, Tag("OutputText")]
    | Annotated[PlainText, Tag("PlainText")]
    | Annotated[Refusal, Tag("Refusal")],
    *_kinds(_PARTS, "kind of content that these models read (text only)"),
]

Content = Annotated[
    Annotated[str, Tag("Text")] | Annotated[list[Part], Tag("Parts")], Discriminator(_text_or_list)
]


class MessageItem(Body):
    """Also the short form, without a type."""

    type: Literal["message"] | None = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = Accepted("Which answer of a turn it is.")


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    arguments: str
    """JSON of an object."""
    id: str | None = None
    status: ItemStatus | None = None
    namespace: Unsupported = None
    caller: Unsupported = None
    created_by: str | None = Accepted("Who made the item.")


class FunctionOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: Content
    id: str | None = None
    status: ItemStatus | None = None
    name: str | None = Accepted("The call has it.")
    namespace: Unsupported = None
    caller: Unsupported = None
    created_by: str | None = Accepted("Who made the item.")


class ItemReference(Body):
    """An item of the conversation, or of a stored response."""

    type: Literal["item_reference"]
    id: str


class ReasoningItem(Body):
    """Accepted where it is empty: these models have no reasoning to go on with."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Unsupported = None
    content: Unsupported = None
    encrypted_content: Unsupported = None
    status: ItemStatus | None = None


_ITEMS = {
    "message": "MessageItem",
    "function_call": "FunctionCallItem",
    "function_call_output": "FunctionOutputItem",
    "item_reference": "ItemReference",
    "reasoning": "ReasoningItem",
}


def _with_type(value: Any) -> Any:
    """A reference may come without a type, and so may a message."""
    if isinstance(value, dict) and value.get("type") is None and value.keys() <= {"id", "type"}:
        return {**value, "type": "item_reference"} if value.get("id") is not None else value
    return value


Item = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[FunctionCallItem, Tag("FunctionCallItem")]
    | Annotated[FunctionOutputItem, Tag("FunctionOutputItem")]
    | Annotated[ItemReference, Tag("ItemReference")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")],
    *_kinds(_ITEMS, "type of item that this server supports", "message"),
    BeforeValidator(_with_type),
]

Input = Annotated[
    Annotated[str, Tag("Text")] | Annotated[list[Item], Tag("Parts")], Discriminator(_text_or_list)
]

# Tools.


class ResponseTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        default=None, description="True: refused if the schema cannot be enforced in full."
    )
    defer_loading: Unsupported = None
    output_schema: Unsupported = None
    async_: Unsupported = Field(default=None, alias="async")
    allowed_callers: list[Literal["direct"]] | None = None


def _only_functions(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "function":
        raise PydanticCustomError(
            "unsupported_parameter",
            "tools of type {kind} are not supported by this server; function tools are",
            {"kind": repr(value.get("type"))[:80]},
        )
    return value


Tool = Annotated[ResponseTool, BeforeValidator(_only_functions)]


class FunctionChoice(Body):
    type: Literal["function"]
    name: str


class AllowedChoice(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]


_CHOICES = {"function": "FunctionChoice", "allowed_tools": "AllowedChoice"}

_ObjectChoice = Annotated[
    Annotated[FunctionChoice, Tag("FunctionChoice")]
    | Annotated[AllowedChoice, Tag("AllowedChoice")],
    *_kinds(_CHOICES, "choice that this server supports"),
]

ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("Text")]
    | Annotated[_ObjectChoice, Tag("Parts")],
    Discriminator(_text_or_list),
]

# Formats.


class TextJsonSchema(Body):
    type: Literal["json_schema"]
    name: str = Field(max_length=64)
    schema_: dict[str, Any] | bool = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Accepted("The schema is enforced either way.")


Format = Annotated[
    t.TextResponseFormat
    | t.JsonObjectResponseFormat
    | TextJsonSchema
    | t.RegexResponseFormat
    | t.ChoiceResponseFormat
    | t.GrammarResponseFormat,
    Field(discriminator="type"),
]


class TextConfig(Body):
    format: Format | None = None
    verbosity: Literal["medium"] | None = Accepted("These models have one.")


class ReasoningConfig(Body):
    effort: Literal["none"] | None = None
    summary: Unsupported = None
    generate_summary: Unsupported = None


# Requests.


class ConversationRef(Body):
    id: str


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = Accepted("Nothing is added to obscure lengths.")


LOGPROBS = "message.output_text.logprobs"

Includable = Literal[
    "message.output_text.logprobs",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]
"""All but the first are of items that there are none of here."""


class PromptBody(Body):
    """What a prompt is made of."""

    input: Input | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationRef | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="auto: the oldest turns are left out until the rest fits."
    )

    @property
    def conversation_id(self) -> str | None:
        ref = self.conversation
        return ref.id if isinstance(ref, ConversationRef) else ref


class InputTokensRequest(PromptBody):
    """POST /v1/responses/input_tokens"""

    model: str | None = None
    personality: Unsupported = None


class ResponseRequest(PromptBody, t.SamplingBody):
    """POST /v1/responses"""

    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]
    n: Literal[1] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[Includable] | None = None
    store: bool | None = True
    background: bool | None = False
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default", "flex"] | None = Field(
        default=None, description="flex: with the priority of batches."
    )
    safety_identifier: str | None = Accepted("An opaque name of the end user.")
    prompt_cache_key: str | None = Accepted("Prompts that begin alike always share a cache.")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Accepted(
        "What is cached is kept while there is room."
    )
    prompt_cache_options: Unsupported = None
    max_tool_calls: Unsupported = None
    prompt: Unsupported = None
    moderation: Unsupported = None
    context_management: Unsupported = None
    background_options: Unsupported = None
    access_programs: Unsupported = None
    image: Unsupported = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


class ConversationRequest(Body):
    """POST /v1/conversations"""

    items: list[Item] | None = Field(default=None, max_length=20)
    metadata: Metadata | None = None


class ConversationUpdate(Body):
    """POST /v1/conversations/{id}"""

    metadata: Metadata | None


class ItemsRequest(Body):
    """POST /v1/conversations/{id}/items"""

    items: Annotated[list[Item], Field(min_length=1, max_length=20)]


# Queries.


class ItemQuery(BaseModel):
    """Parameters of one item, or one response. Some clients send lists as `include[]`."""

    model_config = ConfigDict(extra="forbid")

    include: list[Includable] = Field([], description="What is shown beside the rest.")
    include_too: list[Includable] = Field([], alias="include[]", description="The same.")

    @property
    def included(self) -> list[Includable]:
        return self.include + self.include_too


class ItemsQuery(ItemQuery, OrderedQuery):
    """Parameters of a list of items."""
