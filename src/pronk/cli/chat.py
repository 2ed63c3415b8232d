"""`pronk chat`: one answer, or a conversation in the terminal."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from pronk.cli.common import (
    LoadOptions,
    SamplingOptions,
    context_option,
    emit,
    json_option,
    load_model,
    load_options,
    note_cut,
    sampling_options,
    text,
)
from pronk.cli.conversation import Conversation, converse, say
from pronk.cli.input import on_a_terminal, read_chat_prompt, read_text
from pronk.core.errors import UserError

if TYPE_CHECKING:
    from pronk.engine.replies import Reply


@click.command()
@click.argument("model", type=text, required=False)
@click.argument("prompt", type=text, required=False)
@click.option("--system", type=text, help="System prompt.")
@click.option(
    "--tools",
    type=text,
    metavar="FILE",
    help="JSON list of OpenAI tool definitions that the model may call.",
)
@sampling_options(
    temperature="the model's, else 0.6",
    top_p="the model's, else 0.9",
    max_tokens="until the context is full",
)
@context_option
@load_options
@json_option
def chat(
    model: str | None,
    prompt: str | None,
    system: str | None,
    tools: str | None,
    sampling: SamplingOptions,
    ctx: int | None,
    load: LoadOptions,
    as_json: bool,
) -> None:
    """Chat, or answer PROMPT.

    Without MODEL the default model (smollm2-135m) is used, which is fetched on first use. Without
    PROMPT, on a terminal, a conversation begins (/help lists its commands).

    Text that is piped in is the prompt, without the newline at its end; with PROMPT it follows that
    after a blank line, so `cat FILE | pronk chat "Summarize:"` works. It is read to its end. Beside
    PROMPT it must begin within 1 second, else PROMPT is answered alone and stderr says so; with
    `< /dev/null` nothing is read.

    Sampling values that come with a model go before the defaults below.
    """
    model, prompt = model_and_prompt(model, prompt)
    definitions = None if tools is None else read_tools(tools)
    interactive = prompt is None and on_a_terminal()
    if interactive and as_json:
        raise UserError("PROMPT: --json needs one, as an argument or on stdin")
    if not interactive:
        prompt = read_chat_prompt(prompt)
    llm = load_model(model, load, ctx=ctx)
    conversation = Conversation(llm, system, definitions, sampling.given())
    if prompt is None:
        converse(conversation, model)
        return
    conversation.ask(prompt)
    if as_json:
        emit(reply_json(model, conversation.answer()))
    elif reply := say(conversation.stream()).reply:
        note_cut(reply, llm.context)


def model_and_prompt(first: str | None, second: str | None) -> tuple[str, str | None]:
    """What the two arguments are. A lone one is the model where it names one, exists as a path or
    looks like an id or a path; else it is the prompt for the default model, unless it is a word
    so close to a model's name that it was meant as one."""
    from pronk.checkpoints.catalog import (
        DEFAULT_MODEL,
        close_names,
        find_entry,
        looks_like_model,
        unknown_model,
    )

    if first is None:
        return DEFAULT_MODEL, None
    if find_entry(first) or looks_like_model(first):
        return first, second
    if second is not None:
        raise UserError(f"{unknown_model(first)} (a prompt of several words needs quotes)")
    if close_names(first) and not any(map(str.isspace, first)):
        raise UserError(
            f"{unknown_model(first)} (for a prompt of this one word: pronk chat {DEFAULT_MODEL}"
            f" {first})"
        )
    return DEFAULT_MODEL, first


def read_tools(path: str) -> list[dict[str, Any]]:
    """The tool definitions of a file, checked."""
    from pronk.text.tools import tools_from_dicts

    try:
        definitions = json.loads(read_text("--tools", path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--tools: {path} is not JSON: {error}") from None
    try:
        tools_from_dicts(definitions)
    except UserError as error:
        raise UserError(f"--tools: {path}: {error}") from None
    checked: list[dict[str, Any]] = definitions
    return checked


def reply_json(model: str, reply: "Reply") -> dict[str, Any]:
    """The object that --json prints."""
    timings = reply.timings
    return {
        "model": model,
        "text": reply.text,
        "tool_calls": [dataclasses.asdict(call) for call in reply.tool_calls],
        "finish_reason": reply.finish_reason,
        "token_ids": reply.token_ids,
        "seed": reply.seed,
        "usage": dataclasses.asdict(reply.usage),
        "timings": dataclasses.asdict(timings)
        | {"prompt_speed": timings.prompt_speed, "decode_speed": timings.decode_speed},
    }
