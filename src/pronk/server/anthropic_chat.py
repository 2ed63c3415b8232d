"""From a body of Anthropic's Messages API to a chat.

An answer that a trailing message of the assistant begins (a prefill) goes on behind it. A result
with `is_error` is told to the model as "Error: ...", as Llama's format has no place for the flag.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pronk.core.errors import UserError
from pronk.engine.prompts import AnswerShape, Chat
from pronk.server import anthropic_types as t
from pronk.server.errors import NO_THREADS, ApiError
from pronk.server.limits import check_schema
from pronk.server.service import Call, refuse
from pronk.text.messages import Message, ToolCall, check_json, check_text
from pronk.text.tools import Tool, tools_from_dicts

_WORDS = ("auto", "none", "required")
"""Choices, so no tool may be called that."""


def chat_of(call: Call, body: t.CountTokensRequest) -> Chat:
    """The chat that a body asks to be answered."""
    if body.thread is not None:
        raise ApiError(
            400, "thread: no conversations are kept for this API; send the whole chat",
            param="thread", code=NO_THREADS,
        )  # fmt: skip
    choice, parallel = _choice(body.tool_choice)
    shape = _shape(call, body)
    messages, prefill = split_prefill(messages_of(body))
    forced = choice not in ("auto", "none")
    refuse(
        bool(prefill) and (forced or shape is not None), "messages",
        "an answer that the last message begins can have neither a forced tool nor a format",
    )  # fmt: skip
    return Chat(
        messages,
        tools_of(call, body.tools or ()),
        tool_choice=choice,
        parallel_tool_calls=parallel,
        strict_tools=[tool.name for tool in body.tools or () if tool.strict],
        answer=shape,
        prefill=prefill,
    )


def _choice(choice: t.MessagesToolChoice | None) -> tuple[str, bool]:
    """The choice in the engine's words, and whether there may be several calls."""
    if choice is None or isinstance(choice, t.NoToolChoice):
        return "none" if choice else "auto", True
    parallel = not choice.disable_parallel_tool_use
    if isinstance(choice, t.OneToolChoice):
        refuse(choice.name in _WORDS, "tool_choice.name", f"no tool is called {choice.name!r}")
        return choice.name, parallel
    return "required" if isinstance(choice, t.AnyToolChoice) else "auto", parallel


def _shape(call: Call, body: t.CountTokensRequest) -> AnswerShape | None:
    config = body.output_config.format if body.output_config else None
    refuse(
        config is not None and body.output_format is not None,
        "output_format", "output_config.format says it already; give one of them",
    )  # fmt: skip
    wanted = config or body.output_format
    if wanted is None:
        return None
    most = call.service.settings.max_schema_bytes
    check_schema("output_config.format.schema", wanted.schema_, max_bytes=most)
    return AnswerShape(schema=wanted.schema_)


def tools_of(call: Call, tools: Sequence[t.CustomTool]) -> list[Tool]:
    dicts = []
    for i, tool in enumerate(tools):
        most = call.service.settings.max_schema_bytes
        check_schema(f"tools[{i}].input_schema", tool.input_schema, max_bytes=most)
        refuse(tool.name in _WORDS, f"tools[{i}].name", f"{tool.name!r} means something else")
        described = {"description": tool.description} if tool.description is not None else {}
        function = {"name": tool.name, **described, "parameters": tool.input_schema}
        dicts.append({"type": "function", "function": function})
    try:
        return tools_from_dicts(dicts)
    except UserError as error:
        words = str(error).replace(".function.parameters", ".input_schema")
        raise UserError(words.replace(".function.", ".")) from None


def messages_of(body: t.CountTokensRequest) -> list[Message]:
    """The chat with its system text; messages of one role that follow each other are one."""
    found: list[Message] = []
    if body.system:
        found.append(Message("system", _joined(body.system, "system")))
    called: dict[str, str] = {}
    for i, message in enumerate(body.messages):
        for new in _turns(message, f"messages[{i}].content", called):
            if found and found[-1].role == new.role != "tool":
                found[-1] = _merged(found[-1], new)
            else:
                found.append(new)
    return found


def _turns(message: t.InputMessage, where: str, called: dict[str, str]) -> list[Message]:
    """A message as the turns that it is made of. `called`: names of calls so far, by their ids."""
    if isinstance(message, t.InputSystemMessage):
        return [Message("system", _joined(message.content, where))]
    if isinstance(message, t.InputAssistantMessage):
        return [_assistant(message, where, called)]
    turns: list[Message] = []
    for j, block in enumerate(message.content):
        at = f"{where}[{j}]"
        if isinstance(block, t.InputToolResult):
            turns.append(_result(block, at, called))
            continue
        text = check_text(block.text, f"{at}.text")
        if turns and turns[-1].role == "user":
            text = turns.pop().content + text
        turns.append(Message("user", text))
    return turns


def _assistant(message: t.InputAssistantMessage, where: str, called: dict[str, str]) -> Message:
    text, calls = "", []
    for j, block in enumerate(message.content):
        at = f"{where}[{j}]"
        if isinstance(block, t.InputTextBlock):
            text += check_text(block.text, f"{at}.text")
            continue
        check_json(block.input, f"{at}.input")
        refuse(block.id in called, f"{at}.id", f"{block.id!r:.80} is another call's already")
        called[block.id] = check_text(block.name, f"{at}.name")
        calls.append(ToolCall(block.name, block.input, block.id))
    return Message("assistant", text, tuple(calls))


def _result(block: t.InputToolResult, where: str, called: Mapping[str, str]) -> Message:
    name = called.get(block.tool_use_id)
    if name is None:
        raise UserError(f"{where}.tool_use_id: no call before it has the id {block.tool_use_id!r}")
    text = _joined(block.content or (), f"{where}.content")
    if block.is_error:
        text = f"Error: {text}" if text else "Error"
    return Message("tool", text, tool_call_id=block.tool_use_id, name=name)


def _joined(blocks: Sequence[t.InputTextBlock], where: str) -> str:
    return "".join(check_text(block.text, f"{where}[{i}].text") for i, block in enumerate(blocks))


def _merged(first: Message, second: Message) -> Message:
    texts = [text for text in (first.content, second.content) if text]
    calls = first.tool_calls + second.tool_calls
    return replace(first, content="\n\n".join(texts), tool_calls=calls)


def split_prefill(messages: list[Message]) -> tuple[list[Message], str]:
    """The messages before the answer, and how the answer begins."""
    last = messages[-1]
    if last.role != "assistant":
        return messages, ""
    refuse(bool(last.tool_calls), "messages", "the last one has tool_use blocks without results")
    refuse(len(messages) == 1, "messages", "there is none before the one that begins the answer")
    refuse(
        last.content != last.content.rstrip(), "messages",
        "the last one begins the answer, so it cannot end in white space",
    )  # fmt: skip
    return messages[:-1], last.content
