"""From a body of Ollama's API to a request of the engine.

`options.num_ctx` is a limit of this request: a prompt that does not fit it is refused, and nothing
is ever cut. As in Ollama, an assistant's message at the end begins the answer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pronk.core.errors import ContextLengthError
from pronk.engine import request as engine_request
from pronk.engine.prompts import CHAT_DEFAULTS, AnswerShape, Chat
from pronk.server import ollama_types as t
from pronk.server.chat import seed_of
from pronk.server.errors import ApiError
from pronk.server.limits import check_schema
from pronk.server.models import Lease
from pronk.server.service import Call, called, refuse
from pronk.text.messages import Message, ToolCall, check_json, check_text
from pronk.text.tools import Tool, tools_from_dicts


def check(call: Call, body: t.OllamaBody) -> None:
    """What the types of the body cannot say."""
    refuse(body.top_logprobs is not None and not body.logprobs, "top_logprobs", "needs logprobs")
    options = body.options or t.OllamaOptions()
    penalties = options.presence_penalty or options.frequency_penalty
    if penalties or options.repeat_penalty not in (None, 1):
        refuse(
            options.repeat_last_n not in (None, -1),
            "options.repeat_last_n",
            f"{options.repeat_last_n} is not supported; penalties are for all tokens (-1)",
        )
        refuse(
            options.penalize_newline is False,
            "options.penalize_newline", "false is not supported; penalties are for all tokens",
        )  # fmt: skip
    if isinstance(body.format, dict):
        most = call.service.settings.max_schema_bytes
        check_schema("format", body.format, max_bytes=most)


def sampling_of(body: t.OllamaBody) -> dict[str, Any]:
    """By the names of SamplingParams."""
    options = body.options or t.OllamaOptions()
    most = options.num_predict
    seed = options.seed
    return {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "stop": options.stop or None,
        "max_tokens": None if most is None or most < 0 else most,
        "seed": None if seed == -1 else seed_of(seed, 0),
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }


def request_of(
    call: Call, lease: Lease, body: t.OllamaChatRequest | t.OllamaGenerateRequest
) -> engine_request.Request:
    """Raises UserError for what cannot be asked of the model."""
    who = call.who(lease)
    prompter, options = lease.llm.prompter, sampling_of(body)
    with called("response_format", "format"):
        if isinstance(body, t.OllamaChatRequest):
            request = prompter.chat(chat_of(call, body), options, **who)
        elif body.raw or prompter.chat_format is None:
            ids = _raw(lease, body)
            request = prompter.completion(ids, options, _shape(body), CHAT_DEFAULTS, **who)
        else:
            request = prompter.chat(_one_turn(body), options, **who)
    _limit(request, lease, body.options)
    return request


def context_of(lease: Lease, options: t.OllamaOptions | None) -> int:
    """Most tokens of a request: `num_ctx`, or what the model is served with."""
    served = lease.llm.context
    wanted = options.num_ctx if options else None
    if wanted is not None and wanted > served:
        raise ApiError(
            400,
            f"options.num_ctx: {wanted} tokens are more than the {served} that {lease.model} is"
            " served with; ask for fewer or start the server with a larger --ctx",
            param="options.num_ctx",
        )
    return served if wanted is None else wanted


def _limit(request: engine_request.Request, lease: Lease, options: t.OllamaOptions | None) -> None:
    """Holds a request to its `num_ctx`."""
    n_context = context_of(lease, options)
    if n_context == lease.llm.context:
        return  # the engine sees to it
    room = n_context - request.n_prompt
    if room < 1:
        raise ContextLengthError(request.n_prompt, n_context)
    assert request.params is not None
    most = request.params.max_tokens
    request.params = replace(request.params, max_tokens=min(room, most or room))


def _raw(lease: Lease, body: t.OllamaGenerateRequest) -> list[int]:
    """A prompt as it stands, behind exactly one BOS where the model wants one. With `raw` it may
    hold special tokens."""
    refuse(body.system is not None, "system", "a prompt without a chat format has no place for it")
    tokenizer = lease.llm.tokenizer
    text = check_text(body.prompt, "prompt")
    ids = tokenizer.encode(text, special=bool(body.raw))
    bos = tokenizer.bos_id
    if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids


def _one_turn(body: t.OllamaGenerateRequest) -> Chat:
    messages = [Message("user", check_text(body.prompt, "prompt"))]
    if body.system is not None:
        messages.insert(0, Message("system", check_text(body.system, "system")))
    return Chat(messages, answer=_shape(body))


def chat_of(call: Call, body: t.OllamaChatRequest) -> Chat:
    """The chat that a body asks to be answered."""
    given = body.messages or []
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(given)]
    prefill = ""
    if messages[-1].role == "assistant" and not messages[-1].tool_calls:
        prefill = messages.pop().content
        refuse(not messages, "messages", "there is none before the one that begins the answer")
    shape = _shape(body)
    refuse(
        bool(prefill) and shape is not None,
        "messages", "an answer that the last message begins cannot have a format",
    )  # fmt: skip
    return Chat(messages, tools_of(call, body.tools or ()), answer=shape, prefill=prefill)


def _shape(body: t.OllamaBody) -> AnswerShape | None:
    if body.format is None:
        return None
    return AnswerShape(schema={"type": "object"} if body.format == "json" else body.format)


def tools_of(call: Call, tools: Sequence[t.OllamaTool]) -> list[Tool]:
    dicts = []
    for i, tool in enumerate(tools):
        most = call.service.settings.max_schema_bytes
        function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
        check_schema(f"tools[{i}]", function, max_bytes=most)
        dicts.append({"type": "function", "function": function})
    return tools_from_dicts(dicts)


def _message(message: t.OllamaMessage, where: str) -> Message:
    role = message.role
    refuse(bool(message.tool_calls) and role != "assistant", f"{where}.tool_calls",
           f"a {role} calls nothing")  # fmt: skip
    refuse(message.tool_name is not None and role != "tool", f"{where}.tool_name",
           f"a {role} is no tool")  # fmt: skip
    calls = []
    for i, call in enumerate(message.tool_calls or ()):
        arguments = call.function.arguments
        check_json(arguments, f"{where}.tool_calls[{i}].function.arguments")
        name = check_text(call.function.name, f"{where}.tool_calls[{i}].function.name")
        calls.append(ToolCall(name, arguments, call.id))
    text = check_text(message.content or "", f"{where}.content")
    return Message(role, text, tuple(calls), message.tool_call_id, message.tool_name)
