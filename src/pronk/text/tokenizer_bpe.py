"""Byte-level BPE through the `tokenizers` library: what GGUF and Hugging Face vocabularies share.

Tokens are strings in GPT-2's byte alphabet: each of the 256 bytes is written as one printable
character ("Ġ" is the space). tokenizer_gguf.py and tokenizer_hf.py read their files and end here.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pronk.core.errors import CheckpointError, UserError
from pronk.text.tokenizer_meta import LLAMA3_PATTERN
from pronk.text.vocabulary import Roles, Tokenizer

if TYPE_CHECKING:
    import tokenizers

    PreTokenizer = tokenizers.pre_tokenizers.PreTokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = ("llama-bpe", "smollm", "gpt-2", "default")

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_CHAR_OF = {byte: byte for byte in _PRINTABLE} | {byte: 256 + n for n, byte in enumerate(_OTHERS)}
_BYTE_OF = {char: byte for byte, char in _CHAR_OF.items()}
BYTE_ALPHABET = frozenset(map(chr, _BYTE_OF))

_CHUNK_CHARS = 20_000
"""At least this many go to `tokenizers` at once; above it, memory grows and speed does not."""
_CUT = re.compile(r"\S( )")


def in_byte_alphabet(raw: bytes) -> str:
    """`raw` as a token of the vocabulary would be written."""
    return raw.decode("latin-1").translate(_CHAR_OF)


class BpeTokenizer(Tokenizer):
    """A vocabulary over a `tokenizers.Tokenizer` that knows no special tokens.

    A vocabulary may lack some single bytes (SmolLM2's has none for six control characters and for
    bytes that valid text hardly has); such a byte is dropped, as `tokenizers` and llama.cpp do.
    """

    def __init__(
        self,
        core: "tokenizers.Tokenizer",
        tokens: Sequence[str],
        roles: Roles,
        *,
        cut_at_spaces: bool,
        meta_slices: bool,
    ) -> None:
        """`tokens` by id, ordinary ones in the byte alphabet. `cut_at_spaces`: no token has a
        space behind another character, so that long text may be encoded in parts."""
        super().__init__(len(tokens), roles, meta_slices=meta_slices)
        self._core = core
        self._tokens = tokens
        self._cut_at_spaces = cut_at_spaces

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        with Guarded(UserError, "text: this vocabulary cannot encode it"):
            for part in _parts(text) if self._cut_at_spaces else (text,):
                if len(part) > 2 * _CHUNK_CHARS:  # one that has no spaces: `encode` keeps the GIL
                    ids += self._core.encode_batch_fast([part], add_special_tokens=False)[0].ids
                else:
                    ids += self._core.encode(part, add_special_tokens=False).ids
        return ids

    def _ordinary_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(map(self._tokens.__getitem__, ids)).translate(_BYTE_OF).encode("latin-1")


def _parts(text: str) -> Iterator[str]:
    """Long text cut before spaces that follow something else: every known pre-tokenizer cuts there
    anyway, and `tokenizers` needs half the time and a tenth of the memory for short texts."""
    begin = 0
    while cut := _CUT.search(text, begin + _CHUNK_CHARS):
        yield text[begin : cut.start(1)]
        begin = cut.start(1)
    yield text[begin:]


def pre_tokenizer(name: str) -> "PreTokenizer":
    """The pre-tokenizer that GGUF files call `name`, one of PRE_TOKENIZERS.

    'llama-bpe' is Meta's own expression, 'smollm' splits each digit off and then does what 'gpt-2'
    does. 'default' is what llama.cpp does when a file names none: four expressions one after
    another, each on the pieces that the one before left: runs of punctuation and of $+<=>^~|,
    GPT-2's expression, runs of digits, and threes of ASCII digits (src/llama-vocab.cpp).
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return gpt2
    if name == "smollm":
        return Sequence([Digits(individual_digits=True), gpt2])
    default = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")
    patterns = {"llama-bpe": (LLAMA3_PATTERN,), "default": default}[name]
    splits = [Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer_name(given: "PreTokenizer") -> str | None:
    """Which of PRE_TOKENIZERS `given` is, if any."""
    shape = _shape(given)
    return next((name for name in PRE_TOKENIZERS if _shape(pre_tokenizer(name)) == shape), None)


def _shape(given: "PreTokenizer") -> Any:
    """What it does to text: its settings without `trim_offsets`, which changes no ids."""

    def without_offsets(fields: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in fields.items() if key != "trim_offsets"}

    return json.loads(given.__getstate__(), object_hook=without_offsets)


def make_core(
    source: str,
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    ignore_merges: bool,
) -> "tokenizers.Tokenizer":
    """BPE over `vocab`, which must hold no special token. `ignore_merges`: a piece that is a token
    becomes it without merging (Llama 3). Merges that name unknown tokens are a `CheckpointError`;
    `source` says where they came from."""
    from tokenizers import Tokenizer as Core
    from tokenizers.models import BPE

    try:
        with Guarded(CheckpointError, source):
            return Core(BPE(vocab, merges, ignore_merges=ignore_merges))
    except CheckpointError:
        if wrong := _wrong_merge(vocab, merges):  # slow, and the library's words are few
            raise CheckpointError(f"{source}: {wrong}") from None
        raise


def _wrong_merge(vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]]) -> str | None:
    for n, merge in enumerate(merges):
        if len(merge) != 2:
            return f"merge {n} must name two tokens, got {short(' '.join(merge))}"
        for token in (*merge, "".join(merge)):
            if token not in vocab:
                return f"merge {n} needs {short(token)}, which is no ordinary token"
    return None


def check_tokens(source: str, tokens: Collection[str]) -> None:
    """Ordinary tokens must be written in the byte alphabet and not be empty."""
    if BYTE_ALPHABET.issuperset("".join(tokens)) and "" not in tokens:
        return
    wrong = next(token for token in tokens if not token or not BYTE_ALPHABET.issuperset(token))
    raise CheckpointError(
        f"{source}: token {short(wrong)} is not written in GPT-2's byte alphabet;"
        " only byte-level BPE vocabularies (Llama 3, SmolLM, GPT-2) are supported"
    )


def looks_special(text: str) -> bool:
    """Files that forget to mark control tokens as such still write them like this, DeepSeek's with
    full-width bars."""
    return len(text) > 4 and text[:2] in ("<|", "<\uff5c") and text[-2:] in ("|>", "\uff5c>")


def marks_turns(text: str, template: str | None) -> bool:
    """Whether a token that is not marked as special has to be so: the chat template writes it, as
    in `[INST]`, `</s>` or `<user>`, and a user who could write it too would speak for others. White
    space, plain words and bare punctuation are text wherever they stand."""
    is_text = text.isspace() or not (re.search(r"\w", text) and re.search(r"[^\w\s]", text))
    return not is_text and template is not None and text in template


class Guarded:
    """Turns whatever `tokenizers` and `tiktoken` raise into one `kind` of error, in one line.

    Both are written in Rust, whose panics arrive as exceptions that are no `Exception`.
    """

    def __init__(self, kind: type[UserError], what: str) -> None:
        self._kind, self._what = kind, what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            return
        if not isinstance(error, UserError):
            raise self._kind(f"{self._what}: {short(' '.join(str(error).split()))}") from None


def short(text: str) -> str:
    """For one line of an error."""
    return repr(text if len(text) <= 40 else text[:39] + "…")
