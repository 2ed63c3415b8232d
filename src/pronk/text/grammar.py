"""What an answer must look like: JSON of a schema, a choice, a regular expression, a grammar.

llguidance (Microsoft, MIT) does the work: a grammar becomes a `Matcher` that says which tokens may
come next. Its masks are over the whole vocabulary, tokens of the answer's end included, so an
answer ends exactly where the grammar lets it. No arrays here: masks are bytes, a bit a token.
"""

import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from pronk.core.errors import PronkError, UserError
from pronk.core.files import is_unicode
from pronk.text.json_schema import enforceable

if TYPE_CHECKING:
    from pronk.text.tokenizer import Tokenizer

JSON_OPTIONS: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"( |\n {0,16})?",  # bounded: a model may like white space for ever
    "lenient": False,
    "json_allowed_escapes": 'nrbtf\\"',  # no \\u: a second way to write the name of a property
}
"""How JSON is written."""

_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=20_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=200_000,
    max_lexer_states=50_000,  # of 1 to 2 kB
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""A few seconds and a few hundred MB at most for a grammar, some tenths of a second for a step."""

_MAX_TEXT = 200_000
_MAX_RULES = 500
_MAX_LEVELS = 2000  # llguidance recurses through rules and brackets, on a stack of 8 MB
_MAX_CHOICES = 10_000
_RULE = re.compile(r"^[^\S\n]*[?!]?[A-Za-z_]\w*[^:\n/\"]*:", re.MULTILINE)
_KEPT = 64
"""Compiled grammars."""
_NOT_ADMITTED = "doesn't satisfy the grammar"
"""What llguidance says of such a token."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A checked grammar, good for any number of answers."""

    source: str
    """As llguidance takes it."""

    @staticmethod
    def of_json_schema(schema: Mapping[str, Any] | bool, where: str = "schema") -> "Grammar":
        """Any JSON value that a schema admits, on one line or indented. Raises UserError for a
        schema that is wrong or has keywords that cannot be enforced, by name and place."""
        text = json.dumps(enforceable(schema, where))
        try:
            source = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
        except ValueError as error:
            raise UserError(f"{where}: {_one_line(str(error))}") from None
        return _checked(source, where)

    @staticmethod
    def of_json_object() -> "Grammar":
        """Any JSON object."""
        return Grammar.of_json_schema({"type": "object"})

    @staticmethod
    def of_regex(pattern: str, where: str = "regex") -> "Grammar":
        """Text that a regular expression matches as a whole (Rust's syntax, no look-around)."""
        _check_size(pattern, where)
        _check_text(pattern, where)
        return _checked(llguidance.LLMatcher.grammar_from_regex(pattern), where)

    @staticmethod
    def of_choice(choices: Sequence[str], where: str = "choice") -> "Grammar":
        """One of a few texts."""
        if not choices or not all(isinstance(text, str) and text for text in choices):
            raise UserError(f"{where}: {choices!r:.80} is not a list of texts")
        if len(choices) > _MAX_CHOICES:
            raise UserError(f"{where}: {len(choices)} choices; at most {_MAX_CHOICES}")
        _check_text("".join(choices), where)
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)
        return _checked(llguidance.LLMatcher.grammar_from_lark(f"start: {alternatives}"), where)

    @staticmethod
    def of_ebnf(text: str, where: str = "grammar") -> "Grammar":
        """Text of a context-free grammar: in llama.cpp's notation (`root ::= ...`) or in Lark's."""
        _check_text(text, where)
        _check_size(text, where)
        try:
            lark = any_to_lark(text)
        except RecursionError:
            raise UserError(f"{where}: nested too deep") from None
        except Exception as error:  # bare ones, too
            raise UserError(f"{where}: {_one_line(str(error))}") from None
        return Grammar.of_lark(lark, where)

    @staticmethod
    def of_lark(text: str, where: str = "grammar") -> "Grammar":
        """Text of a context-free grammar in Lark's notation, from its rule `start`."""
        _check_size(text, where)
        if "%json" in text:
            raise UserError(f"{where}: %json is not supported; ask for a JSON schema instead")
        if (n_rules := len(_RULE.findall(text))) > _MAX_RULES:
            raise UserError(f"{where}: {n_rules} rules; at most {_MAX_RULES}")
        if n_rules * (1 + (depth := _bracket_depth(text))) > _MAX_LEVELS:
            raise UserError(
                f"{where}: {n_rules} rules with brackets nested {depth} deep; write less"
            )
        return _checked(llguidance.LLMatcher.grammar_from_lark(text), where)

    @staticmethod
    def of_our_own(text: str) -> "Grammar":
        """A Lark grammar that needs no check, so that it may name special tokens."""
        return Grammar(llguidance.LLMatcher.grammar_from_lark(text))


def _check_text(text: str, where: str) -> None:
    """Half of a character cannot be written, nor handed to llguidance."""
    if not is_unicode(text):
        raise UserError(f"{where}: {text!r:.80} has half of a surrogate pair")


def _checked(source: str, where: str) -> Grammar:
    wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(source, limits=_LIMITS)
    if wrong or messages:  # a warning is a keyword that would be ignored
        raise UserError(f"{where}: {_one_line(messages[0])}")
    return Grammar(source)


def _check_size(text: str, where: str) -> None:
    if len(text) > _MAX_TEXT:
        raise UserError(f"{where}: {len(text)} characters; at most {_MAX_TEXT}")


def _bracket_depth(text: str) -> int:
    """Those within texts and regular expressions are counted, too."""
    depth = most = 0
    for bracket in re.findall(r"[()\[\]]", text):
        depth = max(0, depth + (1 if bracket in "([" else -1))
        most = max(most, depth)
    return most


def _one_line(message: str) -> str:
    """Without the lines that point at a place in the source, and cut where it gets long."""
    message = message.replace("Unsatisfiable schema: ", "no answer can satisfy it: ")
    message = message.replace("<non-verbose/>", "")
    if "lexer" in message:  # whose settings nobody can reach from here
        return "the regular expressions in it, numbers included, are too large together"
    lines = [line.strip() for line in message.splitlines()]
    text = " ".join(line for line in lines if not re.match(r"\^|\d+ \|", line))
    return text if len(text) <= 300 else text[:300] + "..."


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        specials = set(tokenizer.special_ids.values())
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(specials)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class Matchers:
    """Makes matchers for one vocabulary. Grammars that were used lately stay compiled."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        self._stop_ids = tokenizer.stop_ids
        self._encode = tokenizer.encode
        self._tokenizer = llguidance.LLTokenizer(
            vocabulary, n_vocab=tokenizer.vocab_size, eos_token=sorted(tokenizer.stop_ids)
        )

        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> "Matcher":
        """A matcher at the beginning of an answer. Raises UserError where the grammar is too large
        to be compiled, or admits nothing."""
        with self._lock:
            compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            compiled = llguidance.LLMatcher(
                self._tokenizer, grammar.source, log_level=0, limits=_LIMITS
            )
            compiled.compute_bitmask()  # what can never begin shows now
        matcher = Matcher(compiled.deep_copy(), self._stop_ids)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def admits(self, grammar: Grammar, text: str) -> bool:
        """Whether a text is a whole answer of a grammar."""
        matcher = self.matcher(grammar)
        try:
            for token in self._encode(text):
                matcher.advance(token)
        except PronkError:
            return False
        return matcher.complete


class Matcher:
    """How far one answer has come in its grammar (a `Constraint` of engine/request.py)."""

    def __init__(self, matcher: llguidance.LLMatcher, stop_ids: Set[int]) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._raise_error()

    @property
    def complete(self) -> bool:
        """What is written is a whole answer."""
        return bool(self._matcher.is_accepting())

    def masks(self, draft: Sequence[int], first: int = 0) -> Sequence[bytes | None]:
        """The tokens that may come next, and those behind each token of a draft; without the first
        `first` of these."""
        masks: list[bytes | None] = [] if first else [self._mask()]
        for n, token in enumerate(draft, 1):
            self.advance(token)
            if n >= first:
                masks.append(self._mask())
        if draft:
            self._matcher.rollback(len(draft))
            self._raise_error()
        return masks

    def allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft the grammar admits, one after another, before the end of the
        answer: there is no way back from that (`rollback` does not count it as a token)."""
        tokens = list(itertools.takewhile(lambda token: token not in self._stop_ids, draft))
        return int(self._matcher.validate_tokens(tokens)) if tokens else 0

    def forced(self) -> Sequence[int]:
        """The tokens of text that must come next, as far as they do not depend on what follows it,
        and without the end of the answer."""
        tokens = self._matcher.compute_ff_tokens()
        self._raise_error()
        return list(itertools.takewhile(lambda token: token not in self._stop_ids, tokens))

    def advance(self, token: int) -> None:
        """A token has been written. Raises PronkError if the grammar does not admit it."""
        self._matcher.consume_token(token)
        self._raise_error()

    def _mask(self) -> bytes:
        mask: bytes = self._matcher.compute_bitmask()
        self._raise_error()
        return mask

    def _raise_error(self) -> None:
        """A token that the grammar does not admit is our mistake. All else are llguidance's limits,
        which only large or ambiguous grammars reach."""
        if not self._matcher.is_error():
            return
        words, _, _ = self._matcher.get_error().partition("\n<state>")  # its own inside follows
        if _NOT_ADMITTED in words:
            raise PronkError(f"grammar: {_one_line(words)}")
        raise UserError(f"grammar: {_one_line(words)}; a smaller grammar would work")
