"""What the Responses and Conversations APIs answer, as their documentation has it. The objects are
made as plain dictionaries elsewhere, because they are stored as they are."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from pronk.engine.request import SamplingParams
from pronk.engine.sampling import TokenLogprob
from pronk.server import response_types as t
from pronk.server.generation import Generation
from pronk.server.response_types import ItemStatus
from pronk.server.schema import Answer, now
from pronk.text.tokenizer import Tokenizer

Json = dict[str, Any]

# Items.


class TokenProb(Answer):
    token: str
    logprob: float
    bytes: list[int]


class OutputLogprob(TokenProb):
    top_logprobs: list[TokenProb]


class OutputTextPart(Answer):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[OutputLogprob]


class RefusalPart(Answer):
    type: Literal["refusal"] = "refusal"
    refusal: str


class InputTextPart(Answer):
    type: Literal["input_text"] = "input_text"
    text: str


class MessageObject(Answer):
    id: str
    type: Literal["message"] = "message"
    status: ItemStatus
    role: Literal["user", "assistant", "system", "developer"]
    content: list[OutputTextPart | RefusalPart | InputTextPart]


class OutputMessage(Answer):
    id: str
    type: Literal["message"] = "message"
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputTextPart]


class FunctionCallObject(Answer):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class FunctionOutputObject(Answer):
    id: str
    type: Literal["function_call_output"] = "function_call_output"
    status: ItemStatus
    call_id: str
    output: str | list[InputTextPart]


ItemObject = MessageObject | FunctionCallObject | FunctionOutputObject


class ItemList(Answer):
    object: Literal["list"] = "list"
    data: list[ItemObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


# Responses.


class InputTokensDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int = Field(description="Always 0: what is cached is not counted.")


class OutputTokensDetails(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Answer):
    code: Literal["server_error", "invalid_prompt", "rate_limit_exceeded"]
    message: str


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"] | None = None


class ResponseConversation(Answer):
    id: str


Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseObject(Answer):
    """The object "response"."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Status
    background: bool
    model: str
    output: list[OutputMessage | FunctionCallObject]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    previous_response_id: str | None
    conversation: ResponseConversation | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any] | None
    truncation: Literal["auto", "disabled"]
    truncated_items: int | None = Field(
        description="Items that truncation=auto left out of the prompt; null where it was not asked"
        " for."
    )
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    max_output_tokens: int | None
    max_tool_calls: None = None
    usage: ResponseUsage | None
    store: bool
    metadata: dict[str, str]
    service_tier: str
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None


class ResponseDeleted(Answer):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(Answer):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class ResponseEvent(Answer):
    """An event of a stream; what else it has depends on its type."""

    type: str
    sequence_number: int


# Conversations.


class ConversationObject(Answer):
    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(Answer):
    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True


# Making them.


def response_object(
    body: t.ResponseRequest, params: SamplingParams, *, id: str, model: str, dropped: int
) -> Json:
    """A `ResponseObject` before there is any output. `params`: what the request's parameters and
    the model's defaults came to; `dropped`: items that were left out of the prompt."""
    form = body.text.format if body.text else None
    conversation = body.conversation_id
    return {
        "id": id,
        "object": "response",
        "created_at": now(),
        "completed_at": None,
        "status": "queued" if body.background else "in_progress",
        "background": bool(body.background),
        "model": model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "conversation": None if conversation is None else {"id": conversation},
        "tools": [_shown_tool(tool) for tool in body.tools or ()],
        "tool_choice": _shown_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": _shown_format(form)},
        "reasoning": {"effort": "none", "summary": None} if body.reasoning else None,
        "truncation": body.truncation or "disabled",
        "truncated_items": dropped if body.truncation == "auto" else None,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "top_logprobs": body.top_logprobs or 0,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "usage": None,
        "store": body.store is not False,
        "metadata": body.metadata or {},
        "service_tier": "flex" if body.service_tier == "flex" else "default",
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": body.prompt_cache_retention,
    }


def _shown_tool(tool: t.ResponseTool) -> Json:
    shown = ("type", "name", "description", "parameters", "strict")
    return {name: getattr(tool, name) for name in shown}


def _shown_choice(choice: t.ToolChoice | None) -> str | Json:
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    return choice.model_dump()


def _shown_format(form: t.Format | None) -> Json:
    if form is None:
        return {"type": "text"}
    shown = form.model_dump(by_alias=True)
    if isinstance(form, t.TextJsonSchema):
        shown["strict"] = True  # whatever was asked for: the schema is enforced
    return shown


def response_usage(generation: Generation) -> Json:
    """A `ResponseUsage`."""
    prompt, output = generation.prompt_tokens, generation.completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": generation.cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }


def token_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[Json]:
    """`OutputLogprob`s."""

    def entry(token: int, logprob: float) -> Json:
        raw = tokenizer.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return [
        {**entry(item.token, item.logprob), "top_logprobs": [entry(*top) for top in item.top]}
        for item in logprobs
    ]
