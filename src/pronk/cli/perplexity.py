"""`pronk perplexity`: how well a model predicts a text, and how close it is to a reference."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import click

from pronk.cli.common import (
    LoadOptions,
    counted,
    emit,
    json_option,
    load_model,
    load_options,
    note,
    text,
    whole,
)
from pronk.cli.input import read_text
from pronk.cli.progress import Reporter
from pronk.core.errors import UserError

if TYPE_CHECKING:
    from pronk.engine.llm import LLM
    from pronk.eval.perplexity import Perplexity

FEW_TOKENS = 100
"""Below this the result says more of the text than of the model."""


@click.command()
@click.argument("model", type=text)
@click.argument("file", type=text)
@click.option("--ctx", type=whole(2), default=512, show_default=True, help="Tokens of a window.")
@click.option(
    "--stride", type=whole(1), help="From one window to the next (default: half of --ctx)."
)
@click.option(
    "--reference",
    type=text,
    metavar="MODEL",
    help="Adds KL divergence from this model and top-1 agreement with it.",
)
@click.option(
    "--reference-backend",
    type=click.Choice(["auto", "cpu", "reference"]),
    help="Backend of the reference (default: that of --backend).",
)
@load_options
@json_option
def perplexity(
    model: str,
    file: str,
    ctx: int,
    stride: int | None,
    reference: str | None,
    reference_backend: str | None,
    load: LoadOptions,
    as_json: bool,
) -> None:
    """Measure how well a model predicts a text.

    FILE is UTF-8 text, - is stdin. Windows of --ctx tokens, --stride apart, cover the text; every
    token is scored once, with at least ctx - stride tokens before it (fewer in the first window).
    """
    from pronk.eval.perplexity import measure_perplexity, windows

    if reference_backend and not reference:
        raise UserError("--reference-backend: needs --reference MODEL")
    stride = stride or ctx // 2
    if stride >= ctx:
        raise UserError(f"--stride: {stride} is not from 1 to {ctx - 1} (below --ctx)")
    content = read_text("FILE", file)
    llm = load_model(model, load, ctx=ctx)
    ids = llm.tokenizer.encode(content)
    bos_id = llm.tokenizer.bos_id if llm.tokenizer.add_bos else None
    next(windows(len(ids), ctx, stride, bos=bos_id is not None))  # refuses a text too short
    other = None
    if reference:
        options = dataclasses.replace(load, backend=reference_backend or load.backend)
        other = load_model(reference, options, ctx=ctx)
        _check_same_vocabulary(llm, other, content[:2000])
    _check_memory(ctx, llm.config.vocab_size * (2 if other else 1))
    with Reporter() as progress:
        result = measure_perplexity(
            llm.logits,
            ids,
            ctx=ctx,
            stride=stride,
            bos_id=bos_id,
            reference=other.logits if other else None,
            progress=progress,
        )
    if result.n_scored < FEW_TOKENS:
        note(f"warning: {counted(result.n_scored, 'token')} are too few to say much of a model")
    facts = {"model": model, "reference": reference, "ctx": ctx, "stride": stride}
    _report(facts, result, as_json)


def _check_same_vocabulary(llm: "LLM", other: "LLM", sample: str) -> None:
    ours, theirs = llm.config.vocab_size, other.config.vocab_size
    if ours != theirs:
        raise UserError(f"--reference: its vocabulary has {theirs} tokens, that of MODEL {ours}")
    if llm.tokenizer.encode(sample) != other.tokenizer.encode(sample):
        raise UserError("--reference: it reads the text as other tokens than MODEL does")


def _check_memory(ctx: int, n_logits: int) -> None:
    """The logits of one window are held at once, float32."""
    from pronk.engine.memory import free_memory

    free = free_memory()
    if free is not None and 4 * ctx * n_logits > free:
        raise UserError(
            f"--ctx: the logits of {ctx} tokens take {4 * ctx * n_logits / 1e9:.1f} GB,"
            f" {free / 1e9:.1f} GB are free; at most {free // (4 * n_logits)} would fit"
        )


def _report(facts: dict[str, Any], result: "Perplexity", as_json: bool) -> None:
    numbers = dataclasses.asdict(result)
    comparison = numbers.pop("comparison") or {}
    numbers |= comparison
    if as_json:
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        emit(facts | finite)
        return
    click.echo(
        f"perplexity {result.perplexity:.4f} +- {result.standard_error:.4f}"
        f" over {result.n_scored} tokens"
    )
    if result.comparison:
        c = result.comparison
        change = result.perplexity / c.reference_perplexity - 1
        click.echo(f"reference  {c.reference_perplexity:.4f} (this is {100 * change:+.2f} %)")
        click.echo(
            f"KL divergence {c.kl_divergence:.6f} nats a token, 99th percentile"
            f" {c.kl_divergence_p99:.6f}"
        )
        click.echo(f"top-1 agreement {100 * c.top1_agreement:.2f} %")
