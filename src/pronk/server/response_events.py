"""A response as it grows, and the events that tell of it.

The events of a response follow from the response as it is in the end and from where its texts were
cut into deltas (`Draft.cuts`). So a stream can be had again, event by event, without its events
being stored: `replay`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pronk.core.errors import UserError
from pronk.server.errors import ApiError, api_error_of
from pronk.server.generation import Update
from pronk.server.response_items import output_text
from pronk.server.streams import event
from pronk.text.events import (
    TextDelta,
    ToolCallAbort,
    ToolCallArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
)

Json = dict[str, Any]
EndStatus = Literal["completed", "incomplete", "failed", "cancelled"]

TERMINAL = frozenset({"completed", "incomplete", "failed", "cancelled"})
"""States of a response that it does not leave any more."""


class Draft:
    """A response while it is being made: `body` is the object that clients get, `events` what was
    told of it and not `taken`. An item is told of when it opens, and enters the body when it
    closes."""

    def __init__(self, body: Json, make_id: Callable[[str], str]) -> None:
        """`body`: the response before there is any output, which the draft takes over; `make_id`:
        the id of the next item, by its type."""
        self.body = body
        self.events: list[Json] = []
        self.cuts: list[list[list[int]]] = []
        """Of each item: how much text, and how many log probabilities, each delta had."""
        self.running = False
        self.n_events = 0
        self._make_id = make_id
        self._item: Json | None = None
        self._pieces: list[str] = []
        self._logprobs: list[Json] = []
        self._held: list[Json] = []
        """Log probabilities of tokens whose text has not come yet."""

    # The beginning.

    def begin(self) -> None:
        """It was accepted; in the background it waits now, otherwise it is on its way."""
        self._tell_whole("response.created")
        if self.body["status"] == "queued":
            self._tell_whole("response.queued")
        else:
            self.run()

    def run(self) -> None:
        self.running = True
        self.body["status"] = "in_progress"
        self._tell_whole("response.in_progress")

    # Items.

    def open_text(self) -> None:
        """A message begins."""
        self._open({"id": self._make_id("message"), "type": "message", "status": "in_progress",
                    "role": "assistant", "content": []})  # fmt: skip
        self._tell("response.content_part.added", self._place(content_index=0),
                   part=output_text(""))  # fmt: skip

    def text(self, delta: str) -> None:
        """More of the message, which begins if there is none. Log probabilities go with it."""
        if self._item is None or self._item["type"] != "message":
            self.close()
            self.open_text()
        logprobs, self._held = self._held, []
        self._pieces.append(delta)
        self._logprobs += logprobs
        self.cuts[-1].append([len(delta), len(logprobs)])
        place = self._place(content_index=0)
        self._tell("response.output_text.delta", place, delta=delta, logprobs=logprobs)

    def open_call(self, call_id: str, name: str) -> None:
        """A function call begins."""
        self.close()
        self._open({"id": self._make_id("function_call"), "type": "function_call",
                    "status": "in_progress", "call_id": call_id, "name": name,
                    "arguments": ""})  # fmt: skip

    def arguments(self, delta: str) -> None:
        """More of the call's arguments."""
        self._pieces.append(delta)
        self.cuts[-1].append([len(delta), 0])
        self._tell("response.function_call_arguments.delta", self._place(), delta=delta)

    def hold(self, logprobs: Sequence[Json]) -> None:
        """Log probabilities that belong to the text that comes next."""
        self._held += logprobs

    def drop_held(self) -> None:
        """They were those of a call, which has none."""
        self._held.clear()

    def close(self, status: str = "completed") -> None:
        """Ends the open item, if there is one."""
        item = self._item
        if item is None:
            return
        whole = "".join(self._pieces)
        if item["type"] == "message":
            place, part = self._place(content_index=0), output_text(whole, self._logprobs)
            self._tell("response.output_text.done", place, text=whole, logprobs=self._logprobs)
            self._tell("response.content_part.done", place, part=part)
            item = {**item, "status": status, "content": [part]}
        else:
            self._tell("response.function_call_arguments.done", self._place(), arguments=whole)
            item = {**item, "status": status, "arguments": whole}
        self._tell("response.output_item.done", output_index=self._index, item=item)
        self.body["output"] = [*self.body["output"], item]
        self._item, self._pieces, self._logprobs = None, [], []

    def _open(self, item: Json) -> None:
        self._item = item
        self.cuts.append([])
        self._tell("response.output_item.added", output_index=self._index, item=item)

    # The end.

    def finish(self, status: EndStatus, **more: Any) -> None:
        """Ends the response; `more` are further fields of it that are known now. An answer without
        any output is an empty message."""
        if status == "completed" and self._item is None and not self.body["output"]:
            self.open_text()
        if self._held and self._item is not None and self._item["type"] == "message":
            self.text("")
        self.close("completed" if status == "completed" else "incomplete")
        self.body |= {"status": status, **more}
        kind = "incomplete" if status == "cancelled" else status  # it has no event of its own
        self._tell_whole(f"response.{kind}")

    def fail(self, error: Exception, **more: Any) -> None:
        """Ends it with an error, in the place of the end that it had, if it had one."""
        if self.body["status"] in TERMINAL:
            self.events.pop()
            self.n_events -= 1
        self.finish("failed", error=error_object(error), **more)

    # Telling.

    def taken(self) -> list[Json]:
        """The events since the last call; whoever never calls it keeps them all."""
        events, self.events = self.events, []
        return events

    @property
    def _index(self) -> int:
        return len(self.body["output"])

    def _place(self, **more: int) -> Json:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": self._index, **more}

    def _tell(self, kind: str, place: Json | None = None, **data: Any) -> None:
        numbered = {"type": kind, "sequence_number": self.n_events}
        self.events.append({**numbered, **(place or {}), **data})
        self.n_events += 1

    def _tell_whole(self, kind: str) -> None:
        self._tell(kind, response=dict(self.body))


def feed(draft: Draft, update: Update, logprobs: Sequence[Json]) -> None:
    """Adds to a draft what a generation has come to."""
    draft.hold(logprobs)
    for item in update.events:
        if isinstance(item, TextDelta):
            draft.text(item.text)
            continue
        draft.drop_held()
        if isinstance(item, ToolCallStart):
            draft.open_call(item.id, item.name)
        elif isinstance(item, ToolCallArgumentsDelta):
            draft.arguments(item.json)
        elif isinstance(item, ToolCallEnd):
            draft.close()
        elif isinstance(item, ToolCallAbort):
            draft.close("incomplete")


def replay(body: Json, cuts: Sequence[Sequence[Sequence[int]]], ran: bool) -> list[Json]:
    """All events of a response that has ended. `ran`: whether it had left the queue."""
    ids = iter([item["id"] for item in body["output"]])
    end = {name: body[name] for name in ("completed_at", "error", "incomplete_details", "usage")}
    status = "queued" if body["background"] else "in_progress"
    start = {**body, **dict.fromkeys(end), "status": status, "output": []}
    draft = Draft(start, lambda kind: next(ids))
    draft.begin()
    if ran and body["background"]:
        draft.run()
    for item, lengths in zip(body["output"], cuts, strict=True):
        _replay_item(draft, item, lengths)
    draft.finish(body["status"], **end)
    return draft.events


def _replay_item(draft: Draft, item: Json, lengths: Sequence[Sequence[int]]) -> None:
    is_text = item["type"] == "message"
    if is_text:
        draft.open_text()
        whole, logprobs = item["content"][0]["text"], item["content"][0]["logprobs"]
    else:
        draft.open_call(item["call_id"], item["name"])
        whole, logprobs = item["arguments"], []
    at = n_logprobs = 0
    for length, more in lengths:
        piece = whole[at : at + length]
        at += length
        if is_text:
            draft.hold(logprobs[n_logprobs : n_logprobs + more])
            n_logprobs += more
            draft.text(piece)
        else:
            draft.arguments(piece)
    draft.close(item["status"])


def error_object(error: Exception) -> Json:
    """The `error` of a response that failed."""
    found = api_error_of(error)
    code = "server_error"
    if isinstance(error, UserError) or found.status in (400, 404):
        code = "invalid_prompt"
    elif found.status == 429:
        code = "rate_limit_exceeded"
    return {"code": code, "message": found.message}


# As server-sent events.


def sse(data: Json) -> str:
    return event(data, data["type"])


def error_event(error: Exception, sequence_number: int) -> str:
    """The event that ends a stream which cannot go on and is no failure of the response itself. Its
    fields stand where OpenAI has them, and where the Open Responses specification has them."""
    found: ApiError = api_error_of(error)
    plain = {"code": found.code, "message": found.message, "param": found.param}
    nested = {"type": found.type, **plain}
    return sse({"type": "error", "sequence_number": sequence_number, **plain, "error": nested})
