"""What reading an assistant's output yields: pieces of text, calls as they grow, and the whole.

Plain values without any reading in them; parse.py makes them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pronk.text.messages import ToolCall


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A special token in the output, by its text (`<|python_tag|>`, `<|eom_id|>`, ...)."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; `index` counts the calls of this answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArgumentsDelta:
    """More of the arguments' JSON text; the deltas of a call join to one JSON object."""

    index: int
    json: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is complete."""

    index: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class ToolCallAbort:
    """A call that had begun was no call after all; its source follows as text."""

    index: int
    at_end: bool = False
    """The answer ended within it."""


Event = TextDelta | ToolCallStart | ToolCallArgumentsDelta | ToolCallEnd | ToolCallAbort


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its text without the calls, and the calls in the order they were written."""

    text: str
    tool_calls: tuple[ToolCall, ...]

    @staticmethod
    def of(events: Iterable[Event]) -> "Reply":
        """What a stream of events amounts to."""
        events = list(events)
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        calls = tuple(event.call for event in events if isinstance(event, ToolCallEnd))
        return Reply(text, calls)
