"""Items of the Responses and Conversations APIs: as they are stored, as clients get them, and what
they say to a model.

A stored item is whole: it has an id, a type and a status, and its content is a list of parts. Ids
of the items of a stored response have the response's in them, so that a later request can refer to
one without naming the response ("item_reference").
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from pronk.core.errors import UserError
from pronk.server import response_types as t
from pronk.server.errors import ApiError
from pronk.server.schema import new_id
from pronk.server.storage.pages import is_id

Json = dict[str, Any]

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
_OF_RESPONSE = re.compile(r"(?:msg|fc|fco)_([0-9a-f]{24})_[0-9]+")


def item_id(kind: str, response: str, number: int) -> str:
    """The id of the item `number` of a response, of its input and output together."""
    return f"{_PREFIXES[kind]}_{response.removeprefix('resp_')}_{number}"


def response_of_item(id: str) -> str | None:
    """The id of the response that an item belongs to, as far as its id tells."""
    found = _OF_RESPONSE.fullmatch(id)
    return f"resp_{found[1]}" if found else None


def text_of(content: Any) -> str:
    """The text of a content or of a function's output, as they come or as they are stored."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or part.get("refusal") or "" for part in content)


# From what clients send to what is stored.


def stored_items(
    given: str | Sequence[t.Item] | None,
    taken: Collection[str],
    find: Callable[[str], Json | None],
    make_id: Callable[[str, int], str],
    where: str = "input",
) -> list[Json]:
    """The items of an input. `taken`: ids that there are already; an item that brings one of them
    gets a new one. `find`: the item that a reference means, if there is such. `make_id`: from the
    type and the number of an item to its id. ApiError names `where` for a reference to nothing."""
    if isinstance(given, str):
        given = [t.MessageItem(role="user", content=given)]
    used = set(taken)
    items: list[Json] = []
    for i, item in enumerate(given or ()):
        if isinstance(item, t.ReasoningItem):
            continue
        made = (
            _referred(item.id, f"{where}[{i}].id", find)
            if isinstance(item, t.ItemReference)
            else _stored(item)
        )
        if made["id"] in used or not is_id(made["id"] or ""):
            made["id"] = make_id(made["type"], len(items))
        used.add(made["id"])
        items.append(made)
    return items


def _referred(id: str, where: str, find: Callable[[str], Json | None]) -> Json:
    found = find(id)
    if found is None:
        raise ApiError(
            400, f"{where}: no item {id!r:.100} in the conversation or a stored response",
            param=where, code="item_not_found",
        )  # fmt: skip
    return dict(found)


def _stored(item: t.MessageItem | t.FunctionCallItem | t.FunctionOutputItem) -> Json:
    status = item.status or "completed"
    if isinstance(item, t.MessageItem):
        parts = [_part(part, item.role) for part in _parts(item.content)]
        return {"id": item.id, "type": "message", "status": status, "role": item.role,
                "content": parts}  # fmt: skip
    if isinstance(item, t.FunctionCallItem):
        return {"id": item.id, "type": "function_call", "status": status, "call_id": item.call_id,
                "name": item.name, "arguments": item.arguments}  # fmt: skip
    output = item.output
    told = output if isinstance(output, str) else [_part(part, "tool") for part in output]
    return {"id": item.id, "type": "function_call_output", "status": status,
            "call_id": item.call_id, "output": told}  # fmt: skip


def _parts(content: t.Content) -> Sequence[Any]:
    if isinstance(content, str):
        return [t.PlainText(type="text", text=content)]
    return content


def _part(part: Any, role: str) -> Json:
    """A part as it stands in what a role says: the model's own are `output_text`."""
    if isinstance(part, t.Refusal):
        if role == "assistant":
            return {"type": "refusal", "refusal": part.refusal}
        return {"type": "input_text", "text": part.refusal}
    if role == "assistant":
        return output_text(part.text)
    return {"type": "input_text", "text": part.text}


def output_text(text: str, logprobs: Sequence[Json] = ()) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def conversation_item_id(kind: str, number: int) -> str:
    """An id for an item that came on its own, not with a response."""
    return new_id(_PREFIXES[kind] + "_")


def shown(item: Json, include: Collection[str] | None) -> Json:
    """An item without the log probabilities that nobody asked for."""
    if t.LOGPROBS in (include or ()) or not isinstance(item.get("content"), list):
        return item
    content = [{**part, "logprobs": []} if "logprobs" in part else part for part in item["content"]]
    return {**item, "content": content}


# From what is stored to what a model reads.


def messages_of(items: Iterable[Json], instructions: str | None = None) -> list[Json]:
    """The chat that items make, in OpenAI's dictionaries. Calls that follow one another, and the
    text before them, are one message of the assistant. A call that was cut off is left out: what
    there is of its arguments is no JSON. UserError for an output without its call."""
    messages: list[Json] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    names: dict[str, str] = {}
    for item in items:
        if item["type"] == "message":
            messages.append({"role": item["role"], "content": text_of(item["content"])})
        elif item["type"] == "function_call":
            if item["status"] == "incomplete" and not _is_json(item["arguments"]):
                continue
            names[item["call_id"]] = item["name"]
            _add_call(messages, item)
        else:
            messages.append(_result(item, names))
    return messages


def _add_call(messages: list[Json], item: Json) -> None:
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), call]}


def _result(item: Json, names: Mapping[str, str]) -> Json:
    call_id = item["call_id"]
    if call_id not in names:
        raise UserError(
            f"input: the function_call_output of {call_id!r:.100} has no function_call of that"
            " call_id before it"
        )
    content = text_of(item["output"])
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": names[call_id]}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


# Turns, of which the oldest may be left out.


def split_turns(items: Sequence[Json]) -> tuple[list[Json], list[list[Json]]]:
    """What a system says, which stays, and the turns: what a user says with all that follows."""
    kept: list[Json] = []
    turns: list[list[Json]] = []
    for item in items:
        role = item.get("role")
        if role in ("system", "developer"):
            kept.append(item)
        elif role == "user" or not turns:
            turns.append([item])
        else:
            turns[-1].append(item)
    return kept, turns


def without_oldest(items: Sequence[Json], n: int) -> list[Json]:
    """Items, in their order, without the `n` oldest turns."""
    dropped = {id(item) for turn in split_turns(items)[1][:n] for item in turn}
    return [item for item in items if id(item) not in dropped]
