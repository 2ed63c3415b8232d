"""Answers on their way: requests in an engine, watched from the event loop. What every API makes
its own shapes of."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from pronk.engine.replies import FinishReason, ReplyText
from pronk.engine.request import Request
from pronk.engine.sampling import TextOut, TokenLogprob
from pronk.server.models import Lease
from pronk.server.service import Call
from pronk.text.events import (
    Event,
    TextDelta,
    ToolCallAbort,
    ToolCallArgumentsDelta,
    ToolCallStart,
)


@dataclass(slots=True)
class CallSoFar:
    """A tool call as it grows."""

    id: str
    name: str
    json: str = ""


@dataclass(slots=True)
class Answer:
    """What one request has answered so far; whole once `finish_reason` is set."""

    index: int
    request: Request
    text: str = ""
    calls: dict[int, CallSoFar] = field(default_factory=dict)
    """By the number of the call in the answer."""
    finish_reason: FinishReason | None = None
    cut: bool = False
    """The answer ended within its last call, whose arguments are no whole JSON."""
    n_logprobs: int = 0
    eom_id: int | None = None

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or the token of the caller's that ended the answer; "eom" where the model
        ended its message, but not its turn; None for the model's usual end."""
        text = cast(ReplyText | TextOut | None, self.request.answer_text)
        if text is not None and text.stop_found is not None:
            return text.stop_found
        params, output = self.request.params, self.request.output
        if params is not None and output and output[-1] in params.stop_ids:
            return output[-1]
        return "eom" if output and output[-1] == self.eom_id else None

    def take(self, event: Event) -> Event | None:
        """Adds an event; returns it if whoever reads the answer should hear of it."""
        if self.cut:
            return None  # the source of the call, which the reader has had as a call
        if isinstance(event, TextDelta):
            self.text += event.text
        elif isinstance(event, ToolCallStart):
            self.calls[event.index] = CallSoFar(event.id, event.name)
        elif isinstance(event, ToolCallArgumentsDelta):
            self.calls[event.index].json += event.json
        elif isinstance(event, ToolCallAbort):
            self.cut = event.at_end
            if not event.at_end:
                self.calls.pop(event.index, None)
        return event


@dataclass(frozen=True, slots=True)
class Update:
    """One answer moved on."""

    answer: Answer
    events: Sequence[Event]
    logprobs: Sequence[TokenLogprob]
    """Of the tokens since the last update."""

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))


class Generation:
    """Requests to one model, from their start to their end. Whoever makes one closes it: that ends
    what still runs, counts what was taken and lets the model go."""

    def __init__(
        self, call: Call, lease: Lease, requests: Sequence[Request], each: int = 1
    ) -> None:
        """`each` answers of every prompt, one prompt after another. Takes over the lease. Raises
        ApiError where the caller's limits do not allow the requests, UserError for one that can
        never run; the lease is released then."""
        self.call, self.lease, self.requests = call, lease, requests
        self._prompts = requests[::each]
        eom_id = lease.llm.tokenizer.special_ids.get("<|eom_id|>")
        self.answers = [Answer(i, r, eom_id=eom_id) for i, r in enumerate(requests)]
        self._changed = asyncio.Event()
        self._closed = False
        self._seen = [_Seen(request.added_at) for request in requests]
        try:
            for request in requests:
                lease.llm.engine.check(request)
            call.reserve(sum(map(_most_tokens, requests)))
        except BaseException:
            self._closed = True
            lease.release()
            raise
        lease.worker.submit(requests, self._changed.set)

    @property
    def prompt_tokens(self) -> int:
        return sum(request.n_prompt for request in self._prompts)

    @property
    def cached_tokens(self) -> int:
        return sum(request.cached or 0 for request in self._prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(request.n_output for request in self.requests)

    async def updates(self) -> AsyncIterator[Update]:
        """Updates of all answers as they come, to their ends. Raises what one failed with."""
        waiting = list(self.answers)
        while waiting:
            await self._changed.wait()
            self._changed.clear()
            for answer in list(waiting):
                finished = answer.request.finished  # before the rest is read: then that is all
                update = self._look(answer, finished)
                if update is not None:
                    yield update
                if finished:
                    waiting.remove(answer)

    async def finish(self) -> None:
        """Waits until all answers have ended; the client that goes away ends them."""
        await self.call.unless_gone(self._drain())

    async def _drain(self) -> None:
        async for _ in self.updates():
            pass

    def _look(self, answer: Answer, finished: bool) -> Update | None:
        request, seen = answer.request, self._seen[answer.index]
        if finished:
            request.raise_error()
        self._time(request, seen)
        events = self._new_events(request, seen)
        logprobs = request.logprobs[answer.n_logprobs :]
        answer.n_logprobs += len(logprobs)
        shown = [event for event in events if answer.take(event) is not None]
        if finished:
            answer.finish_reason = _finish_reason(answer)
        return Update(answer, shown, logprobs) if shown or logprobs or finished else None

    def _new_events(self, request: Request, seen: "_Seen") -> Sequence[Event]:
        if isinstance(request.answer_text, ReplyText):
            events = request.answer_text.events[seen.events :]
            seen.events += len(events)
            return events
        pieces = request.pieces[seen.events :]
        seen.events += len(pieces)
        return [TextDelta("".join(pieces))] if pieces else []

    def _time(self, request: Request, seen: "_Seen") -> None:
        """Latencies, for the metrics."""
        n, at = request.n_output, request.last_token_at
        if n == seen.tokens:
            return
        metrics, name = self.call.service.metrics, self.lease.model
        if not seen.tokens:
            metrics.first_token(name, request.first_token_at - request.added_at)
            seen.tokens, seen.at = 1, request.first_token_at
        for _ in range(n - seen.tokens):
            metrics.next_token(name, (at - seen.at) / (n - seen.tokens))
        seen.tokens, seen.at = n, at

    def close(self) -> None:
        """May be called again."""
        if self._closed:
            return
        self._closed = True
        running = [request for request in self.requests if not request.finished]
        if running:
            self.lease.worker.cancel(running)
        for request in self.requests:
            self._book(request)
        self.call.book(
            self.lease.name,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            reason=self.requests[0].finish_reason or "abort",
        )
        self.lease.release()

    def _book(self, request: Request) -> None:
        now, started = time.perf_counter(), request.started_at
        ended = request.last_token_at if request.finished and request.n_output else now
        self.call.service.metrics.finished(
            self.lease.model,
            request.finish_reason or "abort",
            prompt_tokens=request.n_prompt,
            output_tokens=request.n_output,
            started=None if started is None else started - request.added_at,
            first_token=request.first_token_at - request.added_at if request.n_output else None,
            ended=ended - request.added_at,
            max_tokens=request.params.max_tokens if request.params else None,
        )


@dataclass(slots=True)
class _Seen:
    """How much of a request has been looked at."""

    at: float
    events: int = 0
    tokens: int = 0


def _most_tokens(request: Request) -> int:
    """What a request may take as far as is known: its prompt and its max_tokens."""
    most = request.params.max_tokens if request.params else 0
    return request.n_prompt + (most or 0)


def _finish_reason(answer: Answer) -> FinishReason:
    reason = answer.request.finish_reason
    assert reason is not None
    assert reason != "error"
    return "tool_calls" if answer.calls and reason == "stop" and not answer.cut else reason
