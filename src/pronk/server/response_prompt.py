"""From the body of a response's request to the request of a model: what was said before, the items
that are new, tools and formats, and leaving out old turns where that was asked for."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pronk.core.errors import ContextLengthError, UserError
from pronk.engine import request as engine_request
from pronk.engine.prompts import AnswerShape, Chat, Prompter, answer_shape
from pronk.server import response_types as t
from pronk.server.chat import options_of, seed_of, who_of
from pronk.server.errors import ApiError, api_error_of, not_found
from pronk.server.limits import check_schema
from pronk.server.models import Lease
from pronk.server.response_events import TERMINAL
from pronk.server.response_items import (
    item_id,
    messages_of,
    response_of_item,
    split_turns,
    stored_items,
    without_oldest,
)
from pronk.server.service import BATCH_PRIORITY, Call, refuse
from pronk.server.store import Store, StoredResponse
from pronk.text.messages import messages_from_dicts
from pronk.text.tools import tools_from_dicts

Json = dict[str, Any]

_ROOM = 1024
"""Tokens that an answer of unknown length is left when turns are dropped for it."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a response answers."""

    before: Sequence[Json]
    """Items of the conversation, or of the responses that came before."""
    new: Sequence[Json]
    """Items of the request."""

    @property
    def items(self) -> list[Json]:
        return [*self.before, *self.new]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request for a model, and what came of making it."""

    request: engine_request.Request
    unenforced: set[str]
    dropped: int
    """Items that were left out."""


def check(body: t.PromptBody, *, max_schema_bytes: int) -> None:
    """What the types of a body cannot say of what a prompt is made of."""
    both = body.conversation is not None and body.previous_response_id is not None
    refuse(both, "previous_response_id", "goes not together with conversation; give one of them")
    if body.text and body.text.format:
        shape = body.text.format.model_dump(by_alias=True)
        check_schema("text.format", shape, max_bytes=max_schema_bytes)
    for i, tool in enumerate(body.tools or ()):
        check_schema(f"tools[{i}]", tool.model_dump(), max_bytes=max_schema_bytes)


# What was said.


def context_of(store: Store, owner: str, body: t.PromptBody, response: str) -> Context:
    """Reads what came before from the store. ApiError where that is not there."""
    before = _before(store, owner, body)
    known = {item["id"]: item for item in before}

    def find(id: str) -> Json | None:
        return known.get(id) or item_of_response(store, owner, id)

    # Ids of a chain repeat where a client sends back items that are in it. Only those of one
    # conversation must differ.
    taken = known.keys() if body.conversation_id is not None else ()
    new = stored_items(body.input, taken, find, lambda kind, i: item_id(kind, response, i))
    if not before and not new:
        raise ApiError(
            400, "input: is missing", param="input", code="missing_required_parameter"
        )  # fmt: skip
    return Context(before, new)


def _before(store: Store, owner: str, body: t.PromptBody) -> Sequence[Json]:
    if (conversation := body.conversation_id) is not None:
        items = store.conversations.all_items(owner, conversation)
        if items is None:
            raise not_found("conversation", conversation)
        return items
    if body.previous_response_id is None:
        return []
    chain = store.responses.chain(owner, body.previous_response_id)
    if chain is None:
        raise ApiError(
            400,
            f"previous_response_id: no response {body.previous_response_id!r:.100}, or one before"
            " it was deleted",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    _check_chain(chain)
    return [item for one in chain for item in (*one.input, *one.body["output"])]


def _check_chain(chain: Sequence[StoredResponse]) -> None:
    last = chain[-1]
    refuse(last.status not in TERMINAL, "previous_response_id",
           f"{last.id} is {last.status}; wait for its end")  # fmt: skip
    for one in chain:
        refuse(one.conversation_id is not None, "previous_response_id",
               f"{one.id} is of {one.conversation_id}; go on with that conversation")  # fmt: skip


def item_of_response(store: Store, owner: str, id: str) -> Json | None:
    response = response_of_item(id)
    found = store.responses.get(owner, response) if response else None
    if found is None:
        return None
    return next((item for item in (*found.input, *found.body["output"]) if item["id"] == id), None)


# The request.


def prompt_of(call: Call, lease: Lease, body: t.ResponseRequest, items: Sequence[Json]) -> Prompt:
    """UserError or ApiError for what cannot be asked of the model."""
    prompter: Prompter = lease.llm.prompter
    with own_words():
        items, dropped = fitted(prompter, body, items, lease.llm.context, body.max_output_tokens)
        chat = chat_of(body, items)
        options = options_of(body, lease.llm.tokenizer)
        options["max_tokens"] = body.max_output_tokens
        options["logprobs"] = (body.top_logprobs or 0) if body.wants_logprobs else None
        options["seed"] = seed_of(body.seed, 0)
        priority = BATCH_PRIORITY if body.service_tier == "flex" else 0
        request = prompter.chat(chat, options, **who_of(call, body, lease, priority))
    return Prompt(request, chat.unenforced, dropped)


def count_tokens(lease: Lease, body: t.PromptBody, items: Sequence[Json]) -> int:
    """The tokens of the prompt that a body makes."""
    prompter: Prompter = lease.llm.prompter
    with own_words():
        items, _ = fitted(prompter, body, items, lease.llm.context, None)
        return len(prompter.chat_ids(chat_of(body, items)))


def fitted(
    prompter: Prompter, body: t.PromptBody, items: Sequence[Json], context: int, wanted: int | None
) -> tuple[Sequence[Json], int]:
    """The items without as few of the oldest turns as makes the prompt and the answer fit, and how
    many items that leaves out. Instructions, what a system says and the last turn always stay."""
    if body.truncation != "auto":
        return items, 0
    room = context - min(wanted or _ROOM, context // 2)
    fewest, most = 0, max(0, len(split_turns(items)[1]) - 1)
    while fewest < most:
        middle = (fewest + most) // 2 if fewest else 0  # first of all: does it fit as it is?
        chat = chat_of(body, without_oldest(items, middle))
        if len(prompter.chat_ids(chat)) <= room:
            most = middle
        else:
            fewest = middle + 1
    kept = without_oldest(items, fewest)
    return kept, len(items) - len(kept)


def chat_of(body: t.PromptBody, items: Sequence[Json]) -> Chat:
    """The chat that a body asks to be answered, with these items."""
    choice, allowed = _tool_choice(body.tool_choice)
    tools = [tool for tool in body.tools or () if allowed is None or tool.name in allowed]
    return Chat(
        messages_from_dicts(messages_of(items, body.instructions)),
        tools_from_dicts([_tool_dict(tool) for tool in tools]),
        (),
        choice,
        body.parallel_tool_calls is not False,
        strict_tools=[tool.name for tool in tools if tool.strict],
        answer=_shape_of(body.text),
    )


def _tool_dict(tool: t.ResponseTool) -> Json:
    function = tool.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
    return {"type": "function", "function": function}


def _tool_choice(choice: t.ToolChoice | None) -> tuple[str, set[str] | None]:
    """ "auto", "none", "required" or a name; and the names of the tools that are allowed, if not
    all of them."""
    if isinstance(choice, t.FunctionChoice):
        return choice.name, None
    if isinstance(choice, t.AllowedChoice):
        return choice.mode, {tool.name for tool in choice.tools}
    return choice or "auto", None


def _shape_of(text: t.TextConfig | None) -> AnswerShape | None:
    form = text.format if text else None
    if form is None:
        return None
    given = form.model_dump(by_alias=True, exclude_none=True)
    if isinstance(form, t.TextJsonSchema):
        given = {"type": given.pop("type"), "json_schema": given}
    return answer_shape(given)


_WORDS: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^(tools\[\d+\])\.function"), r"\1"),
    (re.compile(r"^messages(\[\d+\])?(\.tool_calls\[\d+\]\.function)?\.?"), "input: "),
)
"""Names of chat completions in the texts of errors, and what these are called here."""


@contextmanager
def own_words() -> Iterator[None]:
    """Errors of the layers below in the words of this API."""
    try:
        yield
    except ContextLengthError as error:
        found = api_error_of(error)
        found.param, found.message = "input", found.message.replace("prompt:", "input:", 1)
        raise found from None
    except UserError as error:
        text = str(error)
        for pattern, words in _WORDS:
            text = pattern.sub(words, text, count=1)
        raise UserError(text) from None
