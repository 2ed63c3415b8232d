"""What a finished request gives to its caller: completions, chat replies, counts and times."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from pronk.engine.request import Request
from pronk.engine.sampling import TextOut, TokenLogprob
from pronk.text.messages import Message, ToolCall

if TYPE_CHECKING:
    from pronk.text.events import Event
    from pronk.text.parse import Judge
    from pronk.text.tokenizer import Tokenizer

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    """The end token included."""
    cached_tokens: int
    """Of the prompt's, those that had been computed for an earlier request."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds; a request that waits for others counts that too."""

    prompt_seconds: float
    """Until the first token."""
    decode_seconds: float
    """From the first token to the last."""
    prompt_tokens: int
    """Computed, not found stored."""
    decode_tokens: int
    """All but the first."""

    @property
    def prompt_speed(self) -> float:
        """Tokens per second; 0 where nothing was timed."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens per second; 0 where nothing was timed."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A continued text."""

    text: str
    token_ids: list[int]
    """As generated, with the end token if there was one."""
    finish_reason: FinishReason
    """"stop": an end token or a stop string; "length": max_tokens or the context; "tool_calls":
    the model waits for the results of calls; "abort": ended from outside."""
    usage: Usage
    timings: Timings
    seed: int
    """Gives the same answer again."""
    logprobs: list[TokenLogprob] | None
    """One for each token, if they were asked for."""


@dataclass(frozen=True, slots=True)
class Reply(Completion):
    """An assistant's message. `text` is without the calls; `token_ids` has all that was written."""

    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> Message:
        """The turn to append to the chat."""
        return Message("assistant", self.text, self.tool_calls)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a streamed reply; the last one carries the whole."""

    text: str
    reply: Reply | None = field(default=None, repr=False)


class ReplyText:
    """The text of a chat's answer as it grows, without the tool calls in it, which are gathered in
    `calls`. Stop strings are looked for in what the model writes, calls included."""

    def __init__(
        self,
        tokenizer: "Tokenizer",
        stop: tuple[str, ...],
        tools: Collection[str],
        builtins: Collection[str] = (),
        judge: "Judge | None" = None,
    ) -> None:
        """`tools` and `builtins`: names that may be called, the caller's own and the built-in ones;
        without any, all that the model writes is text. `judge`: see ReplyParser."""
        from pronk.text.parse import ReplyParser

        self.events: list[Event] = []
        """All that has been read so far. Grows at its end only."""
        self.calls: list[ToolCall] = []
        self._written = TextOut(tokenizer.stream(), stop)
        specials = {id: text for text, id in tokenizer.special_ids.items()}
        self._specials = specials if tools or builtins else {}
        self._parser = ReplyParser(tools, builtins, judge=judge)

    @property
    def stopped(self) -> bool:
        return self._written.stopped

    @property
    def stop_found(self) -> str | None:
        """The stop string that ended the answer."""
        return self._written.stop_found

    def feed(self, token: int) -> str:
        from pronk.text.events import SpecialToken

        special = self._specials.get(token)
        if special is None:
            return self._take(self._parser.push(self._written.feed(token)))
        events = self._parser.push(self._written.finish())
        if not self.stopped:
            events += self._parser.push(SpecialToken(special))
        return self._take(events)

    def finish(self) -> str:
        from pronk.text.events import ToolCallAbort

        events = self._parser.push(self._written.finish())
        for event in self._parser.finish():
            if isinstance(event, ToolCallAbort):
                event = replace(event, at_end=True)
            events.append(event)
        return self._take(events)

    def _take(self, events: "Sequence[Event]") -> str:
        from pronk.text.events import TextDelta, ToolCallEnd

        self.events += events
        self.calls += [event.call for event in events if isinstance(event, ToolCallEnd)]
        return "".join(event.text for event in events if isinstance(event, TextDelta))


def completion_of(request: Request) -> Completion:
    """What a finished request, one that did not fail, amounts to."""
    reason = request.finish_reason
    assert reason is not None
    assert reason != "error"
    cached = request.cached or 0
    return Completion(
        text=request.text,
        token_ids=request.output,
        finish_reason=reason,
        usage=Usage(request.n_prompt, request.n_output, cached),
        timings=Timings(
            prompt_seconds=request.first_token_at - request.added_at,
            decode_seconds=request.last_token_at - request.first_token_at,
            prompt_tokens=request.n_prompt - cached,
            decode_tokens=max(0, request.n_output - 1),
        ),
        seed=request.seed,
        logprobs=request.logprobs if request.wants_logprobs else None,
    )


def reply_of(request: Request, text: ReplyText) -> Reply:
    """What a finished request of a chat amounts to."""
    whole = completion_of(request)
    called = text.calls and whole.finish_reason == "stop"
    return Reply(
        whole.text, whole.token_ids, "tool_calls" if called else whole.finish_reason, whole.usage,
        whole.timings, whole.seed, whole.logprobs, tuple(text.calls),
    )  # fmt: skip
