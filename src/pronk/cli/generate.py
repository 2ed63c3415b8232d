"""`pronk generate`: raw completion of a prompt, without any chat format."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from pronk.cli.common import (
    LoadOptions,
    SamplingOptions,
    columns,
    context_option,
    counted,
    emit,
    json_option,
    load_model,
    load_options,
    note,
    read_prompt,
    sampling_options,
    text,
    whole,
)

if TYPE_CHECKING:
    from pronk.engine.llm import LLM
    from pronk.engine.replies import Completion


@click.command()
@click.argument("model", type=text)
@click.argument("prompt", type=text, required=False)
@click.option("--file", "path", type=text, help="Read the prompt from a file; - is stdin.")
@click.option(
    "--logprobs",
    type=whole(0, 100),
    metavar="N",
    help="Log probability of each token and of the N likeliest.",
)
@sampling_options
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
    """Continue PROMPT. Only the continuation is printed."""
    prompt = read_prompt(prompt, path)
    llm = load_model(model, load, ctx=ctx)
    completion = llm.generate(prompt, logprobs=logprobs, **sampling.given())
    if as_json:
        emit(completion_json(model, llm, completion))
        return
    click.echo(completion.text)
    if completion.logprobs:
        click.echo("\n" + logprob_table(llm, completion))
    if completion.finish_reason == "length":
        note(f"(cut after {counted(len(completion.token_ids), 'token')})")


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
