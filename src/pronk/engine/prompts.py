"""From chats and texts to requests of one model: the prompt's tokens, how the answer is sampled,
what it must look like, and how its text is read. Pure, and safe to use from any thread."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date as Date
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from pronk.core.errors import UserError
from pronk.core.files import is_unicode
from pronk.engine.replies import ReplyText
from pronk.engine.request import Constraint, Request, SamplingParams
from pronk.engine.sampling import Pooler, TextOut

if TYPE_CHECKING:
    from pronk.text.calling import AnswerForm
    from pronk.text.chat import ChatFormat
    from pronk.text.grammar import Grammar, Matchers
    from pronk.text.messages import Message
    from pronk.text.tokenizer import Tokenizer
    from pronk.text.tools import Tool

CHAT_DEFAULTS: Mapping[str, float] = {"temperature": 0.6, "top_p": 0.9}
"""Meta's own (llama-models, generation.py); what comes with a model goes before them."""
GENERATE_DEFAULTS: Mapping[str, float] = {"max_tokens": 16}
"""Greedy: a raw completion shows what the model finds most likely."""

_KEPT = 64
"""Grammars of answers that were asked for lately."""

Prompt: TypeAlias = str | list[int]


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat to be answered, checked."""

    messages: "Sequence[Message]"
    tools: "Sequence[Tool]" = ()
    builtin_tools: Sequence[str] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    strict_tools: Sequence[str] = ()
    """Names of tools whose schemas must be enforced, or refused."""
    answer: "AnswerShape | None" = None
    date: Date | str | None = None
    prefill: str = ""
    """What the answer has already begun with; it goes on behind that."""
    unenforced: set[str] = field(default_factory=set)
    """Filled by `Prompter.chat`: tools whose arguments may be any JSON object, because their
    schemas have keywords that cannot be enforced."""


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What the text of an answer must be: one of these."""

    schema: Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def compile(self, where: str = "response_format") -> "Grammar":
        """Raises UserError for what is wrong or cannot be enforced."""
        from pronk.text.grammar import Grammar

        if self.regex is not None:
            return Grammar.of_regex(self.regex, where)
        if self.choice is not None:
            return Grammar.of_choice(self.choice, where)
        if self.grammar is not None:
            return Grammar.of_ebnf(self.grammar, where)
        assert self.schema is not None, "an answer of no shape"
        return Grammar.of_json_schema(self.schema, where)


def answer_shape(response_format: Mapping[str, Any] | None) -> AnswerShape | None:
    """What OpenAI's `response_format` asks for ("text", "json_object", "json_schema"), or one of
    our own: {"type": "regex", "regex": ...}, {"type": "choice", "choice": [...]} and {"type":
    "grammar", "grammar": ...}. Raises UserError for anything else."""
    where = "response_format"
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise UserError(f"{where}: {response_format!r:.80} is not an object")
    kind = response_format.get("type")
    known = {"json_schema": ["json_schema"], "regex": ["regex"], "choice": ["choice"],
             "grammar": ["grammar"], "text": [], "json_object": []}  # fmt: skip
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"{where}.type: {kind!r:.80} is not one of {', '.join(known)}")
    if extra := sorted(response_format.keys() - {"type", *known[kind]}):
        raise UserError(f"{where}.{extra[0]}: unknown key of a {kind} format")
    if kind == "text":
        return None
    if kind == "json_object":
        return AnswerShape(schema={"type": "object"})
    value = response_format.get(kind)
    if kind == "json_schema":
        return AnswerShape(schema=_schema_of(value, f"{where}.json_schema"))
    if kind == "choice":
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(f"{where}.choice: {value!r:.80} is not a list of texts")
        return AnswerShape(choice=list(value))
    if not isinstance(value, str):
        raise UserError(f"{where}.{kind}: {value!r:.80} is not a text")
    return AnswerShape(regex=value) if kind == "regex" else AnswerShape(grammar=value)


def _schema_of(value: Any, where: str) -> Mapping[str, Any] | bool:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r:.80} is not an object")
    if extra := sorted(value.keys() - {"name", "description", "schema", "strict"}):
        raise UserError(f"{where}.{extra[0]}: unknown key")
    schema = value.get("schema", {})
    if not isinstance(schema, Mapping | bool):
        raise UserError(f"{where}.schema: {schema!r:.80} is not a JSON schema")
    return schema


class Prompter:
    """Makes the requests of one model."""

    def __init__(
        self, tokenizer: "Tokenizer", name: str, recommended: Mapping[str, float | int]
    ) -> None:
        self.tokenizer = tokenizer
        self._name = name
        self._recommended = recommended
        self._grammars: OrderedDict[bytes, tuple[Grammar | None, frozenset[str]]] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def chat_format(self) -> "ChatFormat | None":
        """How this model's chats are written; None for a base model."""
        from pronk.text.chat import chat_format_for

        return chat_format_for(self.tokenizer)

    @cached_property
    def matchers(self) -> "Matchers":
        from pronk.text.grammar import Matchers

        return Matchers(self.tokenizer)

    def chat(self, chat: Chat, options: Mapping[str, Any], **who: Any) -> Request:
        """A request whose text is a `ReplyText`. `options` are fields of SamplingParams, `who` the
        further arguments of `Request`. Raises UserError for what cannot be asked of this model."""
        params = SamplingParams.of(options, {**CHAT_DEFAULTS, **self._recommended})
        offered = chat.tool_choice != "none"
        own = [tool.name for tool in chat.tools] if offered else []
        known = chat.builtin_tools if offered else ()
        constraint = self._constraint(chat)
        if chat.tool_choice == "none":
            params = self._without_calls(params)
        judge = None
        if own:
            from pronk.text.calling import CallJudge

            judge = CallJudge(chat.tools, self.matchers)
        text = ReplyText(self.tokenizer, params.stop, own, known, judge)
        return self._request(self.chat_ids(chat), params, text, constraint, who)

    def chat_ids(self, chat: Chat) -> list[int]:
        """The tokens of a chat up to its answer, with what that begins with. Raises UserError for
        a model that cannot chat."""
        if self.chat_format is None:
            raise UserError(
                f"MODEL: {self._name} is a base model without a chat format; use generate"
            )
        rendered = self.chat_format.render(
            chat.messages, tools=chat.tools, builtin_tools=chat.builtin_tools,
            tool_choice=chat.tool_choice, date=chat.date,
        )  # fmt: skip
        return rendered.ids + (self.tokenizer.encode(chat.prefill) if chat.prefill else [])

    def completion(
        self,
        prompt: Prompt,
        options: Mapping[str, Any],
        answer: AnswerShape | None = None,
        defaults: Mapping[str, Any] = GENERATE_DEFAULTS,
        **who: Any,
    ) -> Request:
        """A request whose text is a `TextOut`."""
        params = SamplingParams.of(options, defaults)
        constraint = None if answer is None else self.matchers.matcher(answer.compile())
        return self._request(self.ids(prompt), params, self.text_out(params), constraint, who)

    def embedding(self, prompt: Prompt, pooler: Pooler, **who: Any) -> Request:
        """A request that only computes its prompt, whose states `pooler` gathers."""
        return Request(self.ids(prompt), None, observer=pooler, watches="hidden", **who)

    def ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            if not is_unicode(prompt):
                raise UserError(f"prompt: {prompt!r:.60} has half of a surrogate pair")
            return self.tokenizer.encode(prompt, bos=self.tokenizer.add_bos)
        return prompt

    def text_out(self, params: SamplingParams) -> TextOut:
        return TextOut(self.tokenizer.stream(), params.stop)

    def _constraint(self, chat: Chat) -> Constraint | None:
        shape = chat.answer
        offers = (chat.tools or chat.builtin_tools) and chat.tool_choice != "none"
        if not offers:
            return None if shape is None else self.matchers.matcher(shape.compile())
        if shape is not None and shape.schema is None:
            raise UserError(
                "response_format: with tools an answer is text or JSON of a schema; leave the tools"
                " or the grammar out"
            )
        from pronk.text.calling import AnswerForm

        form = AnswerForm(
            chat.tools, chat.builtin_tools, chat.tool_choice, chat.parallel_tool_calls,
            None if shape is None else shape.schema,
            python_tag="<|python_tag|>" in self.tokenizer.special_ids,
        )  # fmt: skip
        grammar, loose = self._grammar(form, chat.strict_tools)
        chat.unenforced.update(loose)
        return None if grammar is None else self.matchers.matcher(grammar)

    def _grammar(
        self, form: "AnswerForm", strict: Sequence[str]
    ) -> "tuple[Grammar | None, frozenset[str]]":
        """The grammar of an answer, and the tools that it does not enforce. Agents send the same
        tools with every request; they are checked once."""
        from pronk.text.calling import answer_grammar

        key = hashlib.blake2b(repr((form, *strict)).encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            found = self._grammars.pop(key, None)
        if found is None:
            found = answer_grammar(form, strict), frozenset(form.loose)
        with self._lock:
            self._grammars[key] = found
            while len(self._grammars) > _KEPT:
                self._grammars.popitem(last=False)
        return found

    def _without_calls(self, params: SamplingParams) -> SamplingParams:
        """Nothing was offered, and the token that begins a call is not drawn either."""
        tag = self.tokenizer.special_ids.get("<|python_tag|>")
        if tag is None:
            return params
        return replace(params, logit_bias=(*params.logit_bias, (tag, -100.0)))

    def _request(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        text: TextOut | ReplyText,
        constraint: Constraint | None,
        who: Mapping[str, Any],
    ) -> Request:
        return Request(
            ids, params, eos_ids=self.tokenizer.stop_ids, text=text, constraint=constraint, **who
        )
