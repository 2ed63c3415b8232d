"""OpenAI's own types, taken at their word: a field that they do not have is a mistake, too, unless
it is one that this server adds on purpose."""

from collections.abc import Iterator
from typing import Any, get_args

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from pronk.server.streams import DONE

ADDED = {
    # of the Open Responses specification, and our own
    "Response": {"store", "presence_penalty", "frequency_penalty", "truncated_items"},
    "ResponseErrorEvent": {"error"},
    # as in the response itself, where OpenAI's types have them
    "Logprob": {"bytes"},
    "LogprobTopLogprob": {"bytes"},
}


def strict(kind: Any, data: Any) -> Any:
    """`data` as a value of that type."""
    value = TypeAdapter(kind).validate_python(data)
    unknown = list(_unknown(value, ""))
    assert not unknown, f"{kind}: unknown fields {unknown}"
    return value


def _unknown(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, list | dict):
        pairs = enumerate(value) if isinstance(value, list) else value.items()
        for key, part in pairs:
            yield from _unknown(part, f"{where}[{key}]")
    elif isinstance(value, BaseModel):
        extra = set(value.model_extra or ()) - ADDED.get(type(value).__name__, set())
        yield from (f"{where}.{name}" for name in extra)
        for name in value.model_fields_set - set(value.model_extra or ()):
            yield from _unknown(getattr(value, name), f"{where}.{name}")


def _event_types() -> dict[str, Any]:
    union = get_args(ResponseStreamEvent)[0]
    return {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(union)}


_EVENTS = _event_types()


def response(data: Any) -> Response:
    found: Response = strict(Response, data)
    return found


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each checked, and the order of their numbers."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return checked_events(answer.text)


def checked_events(text: str) -> list[dict[str, Any]]:
    assert text.endswith(DONE)
    events = []
    for block in text.removesuffix(DONE).removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = TypeAdapter(dict[str, Any]).validate_json(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        strict(_EVENTS[event["type"]], event)
        events.append(event)
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(events)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The types of events, those that repeat once."""
    short = [event["type"].removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(short) if i == 0 or kind != short[i - 1]]
