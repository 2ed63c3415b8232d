"""Log probabilities in the shape of OpenAI's completions, those of the prompt among them: lists of
equal length, a token each. lm-eval and others who score texts read these.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from pronk.backends.protocol import F32
from pronk.backends.reference import log_softmax
from pronk.engine.sampling import TokenLogprob
from pronk.server.openai_types import CompletionLogprobs
from pronk.text.tokenizer import Tokenizer

BYTES = "bytes:"
LOWEST = -9999.0
"""What is told of a token that cannot come: JSON has no infinity."""


class EchoedPrompt:
    """A prompt that is a part of the answer: its tokens, and their log probabilities, which are
    gathered while it is computed (`observe` is an observer of engine/request.py; it is called in
    the engine's thread)."""

    def __init__(
        self, ids: Sequence[int], tokenizer: Tokenizer, *, n_hidden: int, n_top: int
    ) -> None:
        """`n_hidden`: tokens at the beginning that the caller's text has not (BOS)."""
        self.ids = ids
        self.n_hidden = n_hidden
        self._tokenizer = tokenizer
        self._n_top = n_top
        self._found: dict[int, TokenLogprob] = {}

    @cached_property
    def text(self) -> str:
        return self._tokenizer.decode(self.ids[self.n_hidden :])

    def observe(self, start: int, logits_NV: F32) -> None:
        for i, logits_V in enumerate(logits_NV, start + 1):
            if i < len(self.ids):
                self._found[i] = self._score(logits_V[: self._tokenizer.vocab_size], self.ids[i])

    def _score(self, logits_V: F32, token: int) -> TokenLogprob:
        logprobs_V = log_softmax(logits_V)
        top: list[tuple[int, float]] = []
        n_top = min(self._n_top, len(logprobs_V))
        if n_top:
            likeliest = np.argpartition(-logprobs_V, n_top - 1)[:n_top]
            order = sorted(likeliest.tolist(), key=lambda id: (-logprobs_V[id], id))
            top = [(id, float(logprobs_V[id])) for id in order]
        return TokenLogprob(token, float(logprobs_V[token]), tuple(top))

    @cached_property
    def logprobs(self) -> CompletionLogprobs:
        """To be read once the prompt is computed. Nothing comes before the first token, so it has
        no probability."""
        scored = [self._found.get(i) for i in range(len(self.ids))]
        hidden = [0] * self.n_hidden
        offsets = hidden + Offsets(self._tokenizer).of(self.ids[self.n_hidden :])
        return logprobs_of(self._tokenizer, self.ids, scored, offsets)


class Offsets:
    """Where tokens begin in the text that they make, one after the other; tokens that share a
    character begin where it does."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._at = start

    def of(self, ids: Sequence[int]) -> list[int]:
        """Of the tokens that come next."""
        found = []
        for id in ids:
            begin, self._at = self._at, self._at + len(self._stream.push(id))
            own = word(self._tokenizer, id)
            whole = own and not own.startswith(BYTES)  # U+FFFD of what came before is not its own
            found.append(self._at - len(own) if whole else begin)
        return found


def logprobs_of(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    scored: Sequence[TokenLogprob | None],
    offsets: list[int],
) -> CompletionLogprobs:
    """`top_logprobs` has the token that came besides the likeliest ones, as OpenAI's has."""

    def top(score: TokenLogprob) -> dict[str, float]:
        words: dict[str, float] = {}
        for id, logprob in (*score.top, (score.token, score.logprob)):
            words.setdefault(word(tokenizer, id), max(logprob, LOWEST))
        return words

    return CompletionLogprobs(
        text_offset=offsets,
        tokens=[word(tokenizer, id) for id in ids],
        token_logprobs=[None if s is None else max(s.logprob, LOWEST) for s in scored],
        top_logprobs=[None if s is None else top(s) for s in scored],
    )


def word(tokenizer: Tokenizer, id: int) -> str:
    """The text of a token. Bytes that are no text by themselves are told as OpenAI tells them, so
    that two tokens never look the same."""
    raw = tokenizer.token_bytes(id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return BYTES + "".join(f"\\x{byte:02x}" for byte in raw)


def joined(*parts: CompletionLogprobs) -> CompletionLogprobs:
    """Those of a text and of what follows it."""
    return CompletionLogprobs(
        text_offset=[x for part in parts for x in part.text_offset],
        tokens=[x for part in parts for x in part.tokens],
        token_logprobs=[x for part in parts for x in part.token_logprobs],
        top_logprobs=[x for part in parts for x in part.top_logprobs or ()],
    )
