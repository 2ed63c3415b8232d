"""Tools for models whose chat template has no place for them: offered in the system message, their
calls as the assistant's text and their results as the user's. The words are those that Llama 3.1
was trained on (tools.py), and answers are read by the same parser."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pronk.text.messages import Message
from pronk.text.tools import hf_json_call, json_prompt

if TYPE_CHECKING:
    from pronk.text.chat import Offer


def described(messages: Sequence[Message], offer: "Offer") -> list[Message]:
    """The same chat without tools, calls and roles that a plain template would not know."""
    names = {call.id: call.name for m in messages for call in m.tool_calls if call.id is not None}
    plain = [_plain(message, names) for message in messages]
    words = [json_prompt(offer.tools)] if offer.tools else []
    if offer.sentence:
        words.append(offer.sentence)
    if not words:
        return plain
    if plain and plain[0].role == "system":
        return [replace(plain[0], content="\n\n".join([plain[0].content, *words])), *plain[1:]]
    return [Message("system", "\n\n".join(words)), *plain]


def _plain(message: Message, names: dict[str, str]) -> Message:
    if message.role == "tool":
        name = message.name or names.get(message.tool_call_id or "", "the function")
        return Message("user", f"The result of {name}:\n{message.content}")
    if message.tool_calls:
        calls = "; ".join(map(hf_json_call, message.tool_calls))
        text = f"{message.content}\n{calls}" if message.content else calls
        return replace(message, content=text, tool_calls=())
    return message
