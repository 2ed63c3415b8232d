"""`pronk generate`: raw completion of a prompt, without any chat format."""

import contextlib
import dataclasses
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import click

from pronk.cli.common import (
    LoadOptions,
    SamplingOptions,
    check_model_argument,
    columns,
    context_option,
    emit,
    json_option,
    length_explained,
    load_model,
    load_options,
    note_cut,
    sampling_options,
    text,
    whole,
)
from pronk.cli.input import read_prompt

if TYPE_CHECKING:
    from pronk.engine.llm import LLM
    from pronk.engine.replies import Completion

MAX_TOKENS = 256
"""The default of the command line: enough to read, and soon over."""


@click.command()
@click.argument("model", type=text)
@click.argument("prompt", type=text, required=False)
@click.option("--file", "path", type=text, help="Read all of a file as the prompt; - is stdin.")
@click.option(
    "--logprobs",
    type=whole(0, 100),
    metavar="N",
    help="Log probability of each token and of the N likeliest.",
)
@sampling_options(temperature="0, greedy", top_p="1, off", max_tokens=str(MAX_TOKENS))
@context_option
@load_options
@json_option
def generate(
    model: str,
    prompt: str | None,
    path: str | None,
    logprobs: int | None,
    sampling: SamplingOptions,
    ctx: int | None,
    load: LoadOptions,
    as_json: bool,
) -> None:
    """Continue PROMPT. Only the continuation is printed, as it comes.

    Without PROMPT and --file the prompt is what is piped in, without the newline at its end.
    """
    if prompt is None and path is None:
        check_model_argument("generate", model)
    prompt = read_prompt(prompt, path)
    llm = load_model(model, load, ctx=ctx)
    options = {"max_tokens": MAX_TOKENS, "logprobs": logprobs, **sampling.given()}
    with length_explained(llm):
        if as_json:
            emit(completion_json(model, llm, llm.generate(prompt, **options)))
            return
        completion = say(llm.stream_generate(prompt, **options))
    if completion.logprobs:
        click.echo("\n" + logprob_table(llm, completion))
    note_cut(completion, llm.context)


def say(pieces: "Generator[str, None, Completion]") -> "Completion":
    """Prints a continuation as it comes. A reader that leaves ends it."""
    with contextlib.closing(pieces):
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                click.echo()
                completion: Completion = end.value
                return completion
            click.echo(piece, nl=False)  # which flushes


def completion_json(model: str, llm: "LLM", completion: "Completion") -> dict[str, Any]:
    """The object that --json prints."""
    timings = completion.timings
    return {
        "model": model,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "usage": dataclasses.asdict(completion.usage),
        "timings": dataclasses.asdict(timings)
        | {"prompt_speed": timings.prompt_speed, "decode_speed": timings.decode_speed},
        "logprobs": None
        if completion.logprobs is None
        else [
            {
                "id": item.token,
                "piece": llm.tokenizer.decode([item.token]),
                "logprob": item.logprob,
                "top": [
                    {"id": token, "piece": llm.tokenizer.decode([token]), "logprob": logprob}
                    for token, logprob in item.top
                ],
            }
            for item in completion.logprobs
        ],
    }


def logprob_table(llm: "LLM", completion: "Completion") -> str:
    """One line a token: id, log probability, text, and the likeliest tokens instead."""
    rows = [["ID", "LOGPROB", "TEXT", "LIKELIEST"]]
    for item in completion.logprobs or ():
        likeliest = ", ".join(
            f"{llm.tokenizer.decode([token])!r} {logprob:.3f}" for token, logprob in item.top
        )
        piece = repr(llm.tokenizer.decode([item.token]))
        rows.append([str(item.token), f"{item.logprob:.4f}", piece, likeliest])
    return columns(rows)
