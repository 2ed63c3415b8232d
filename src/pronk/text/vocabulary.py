"""Text <-> token ids: what every vocabulary offers, and text streamed out of ids.

The kinds of vocabulary are in tokenizer_meta.py (Meta's tokenizer.model) and tokenizer_bpe.py
(byte-level BPE out of a GGUF or a Hugging Face folder). All of them are byte-level: an ordinary
token is a string of bytes, and only the bytes of several tokens together need be valid UTF-8.
Special tokens are never bytes here: they are found, shown and skipped by their id, so that text
which merely looks like one stays text. No chat formats (chat.py), no arrays.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from types import MappingProxyType

from pronk.core.errors import UserError

STOP_TEXTS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>")
"""Special tokens that end a generation in whatever vocabulary has them: those of Llama 3 and of
ChatML. A vocabulary's own eos, eot and eom come on top."""

SLICE_CHARS = 400_000
RUN_CHARS = 25_000
"""Meta's limits, in characters; see `meta_slices`."""
_RUN = {True: re.compile(r"\s+"), False: re.compile(r"\S+")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What single ids of a vocabulary mean."""

    special_ids: Mapping[str, int]
    """The text of each special token and its id."""
    unused: Mapping[int, str] = field(default_factory=dict)
    """Ids that stand for no text (padding of the vocabulary). They are special and shown as the
    given text, but no text becomes them."""
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: Set[int] = frozenset()
    """On top of `eos_id` and of STOP_TEXTS."""
    add_bos: bool = False
    chat_template: str | None = None


class Tokenizer(ABC):
    """A vocabulary: ids 0 to `vocab_size` - 1, each an ordinary or a special token.

    Immutable once made, so threads may share one.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    """What `encode(eos=True)` appends."""
    stop_ids: frozenset[int]
    """Any of these ends a generation (end of text, of turn, of message)."""
    add_bos: bool
    """A raw prompt, without a chat format, starts with BOS."""
    special_ids: Mapping[str, int]
    """The text of each special token and its id."""
    chat_template: str | None
    """Jinja source that came with the vocabulary."""

    def __init__(self, vocab_size: int, roles: Roles, *, meta_slices: bool = False) -> None:
        """`meta_slices`: cut long input where Meta's tokenizer does."""
        self.vocab_size = vocab_size
        self.special_ids = MappingProxyType(dict(roles.special_ids))
        self._special_texts = {id: text for text, id in self.special_ids.items()}
        self._special_texts |= roles.unused
        self.bos_id, self.eos_id = roles.bos_id, roles.eos_id
        self.stop_ids = _stop_ids(roles)
        self.add_bos = roles.add_bos and roles.bos_id is not None
        self.chat_template = roles.chat_template
        self._meta_slices = meta_slices

    @abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of valid text without looking for special tokens."""

    @abstractmethod
    def _ordinary_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ordinary tokens, one after another."""

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        With `special` the text of a special token becomes that token (the leftmost, then the
        longest one); without it, which is right for everything a user typed, it never does.
        Text with lone surrogates (which is how Python shows invalid UTF-8) is a `UserError`;
        Meta's tokenizer would read such text as U+FFFD and not say so.
        """
        _check_unicode(text)
        ids = [self._needed(self.bos_id, "beginning")] if bos else []
        for piece in meta_slices(text) if self._meta_slices else (text,):
            ids += self._encode_special(piece) if special else self._encode_ordinary(piece)
        if eos:
            ids.append(self._needed(self.eos_id, "end"))
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of all `ids` together; bytes that are no valid UTF-8 become U+FFFD.

        A special token ends an unfinished character before it, also where it is skipped. An id
        outside the vocabulary is a `UserError`.
        """
        texts: list[str] = []
        for is_special, run in groupby(self._known(ids), self._special_texts.__contains__):
            if not is_special:
                texts.append(self._ordinary_bytes(run).decode("utf-8", "replace"))
            elif not skip_special:
                texts.extend(map(self._special_texts.__getitem__, run))
        return "".join(texts)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of an ordinary token, which may be part of a character; the UTF-8 of a special
        token's text. An id outside the vocabulary is a `UserError`."""
        self._known((id,))
        text = self._special_texts.get(id)
        return self._ordinary_bytes((id,)) if text is None else text.encode()

    def is_special(self, id: int) -> bool:
        return id in self._special_texts

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """Decodes ids as they come; see `TextStream`."""
        return TextStream(self, skip_special)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for found in self._special_pattern.finditer(text) if self._special_pattern else ():
            ids += self._encode_ordinary(text[at : found.start()])
            ids.append(self.special_ids[found[0]])
            at = found.end()
        return ids + self._encode_ordinary(text[at:])

    def _known(self, ids: Iterable[int]) -> list[int]:
        known = list(ids)
        if known and not (min(known) >= 0 and max(known) < self.vocab_size):
            wrong = next(id for id in known if not 0 <= id < self.vocab_size)
            raise UserError(f"token id {wrong}: the vocabulary has ids 0 to {self.vocab_size - 1}")
        return known

    @staticmethod
    def _needed(id: int | None, which: str) -> int:
        if id is None:
            raise UserError(f"the vocabulary has no {which}-of-text token; encode without it")
        return id


class TextStream:
    """Text out of one id at a time, never half a character.

    The texts of all `push` calls and of the `flush` that must follow, joined, are what
    `Tokenizer.decode` gives for the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` completes; empty while a character is unfinished."""
        raw = self._tokenizer.token_bytes(id)
        if not self._tokenizer.is_special(id):
            return self._decoder.decode(raw)
        return self.flush() + ("" if self._skip_special else raw.decode())

    def flush(self) -> str:
        """What is left: U+FFFD for a character that never became complete, else nothing."""
        return self._decoder.decode(b"", final=True)


def _stop_ids(roles: Roles) -> frozenset[int]:
    named = {roles.special_ids[text] for text in STOP_TEXTS if text in roles.special_ids}
    own = set() if roles.eos_id is None else {roles.eos_id}
    return frozenset(named | own | roles.stop_ids)


def meta_slices(text: str) -> Iterator[str]:
    """Cuts long text where Meta's tokenizer does, before it looks for tokens.

    Slices of 400,000 characters; in each, a run of only whitespace or of only other characters is
    cut after every 25,000. A token across a cut is lost, in Meta's code as here: ids stay equal.
    Source: `encode` in llama-models, models/llama3/tokenizer.py.
    """
    for at in range(0, len(text), SLICE_CHARS):
        piece = text[at : at + SLICE_CHARS]
        begin = 0
        for start, end in _long_runs(piece):
            for cut in range(start + RUN_CHARS, end, RUN_CHARS):
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each run longer than RUN_CHARS, and of some shorter ones.

    A long run covers a multiple of RUN_CHARS, so it is enough to look at the runs there; one that
    began before the multiple before that has been seen already.
    """
    seen = 0
    for at in range(0, len(text), RUN_CHARS):
        if at < seen:
            continue
        is_space = text[at].isspace()
        before = text[max(0, at - RUN_CHARS) : at]
        start = at - (len(before) - len(_without_tail(before, is_space)))
        run = _RUN[is_space].match(text, at)
        assert run is not None, (at, text[at])
        seen = run.end()
        yield start, seen


def _without_tail(text: str, is_space: bool) -> str:
    """`text` without the run of whitespace, or of other characters, at its end."""
    if is_space:
        return text.rstrip()
    if not text or text[-1].isspace():
        return text
    return text[: -len(text.rsplit(None, 1)[-1])]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text: character {error.start} (counted from 0) is not Unicode but the lone surrogate"
            f" U+{ord(text[error.start]):04X}; the text must come from valid UTF-8"
        ) from None
