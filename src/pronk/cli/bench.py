"""`pronk bench`: speed of a model on this machine, and how far it is from the machine's limits."""

import resource
import sys
from typing import TYPE_CHECKING, Any, cast

import click

from pronk.cli.common import (
    LoadOptions,
    check_threads,
    columns,
    emit,
    json_option,
    load_options,
    text,
    whole,
)
from pronk.cli.progress import Reporter

if TYPE_CHECKING:
    from pronk.core.progress import Progress
    from pronk.engine.bench import Demand, Limits, Plan, Speed
    from pronk.engine.load import LoadOps


@click.command()
@click.argument("model", type=text)
@click.option("-p", "prompt", type=whole(1), default=512, show_default=True, help="Tokens to read.")
@click.option(
    "-n", "generate", type=whole(1), default=128, show_default=True, help="Tokens to write."
)
@click.option(
    "-d",
    "depth",
    type=whole(0),
    default=0,
    show_default=True,
    help="Tokens already in the context.",
)
@click.option(
    "-b", "batch", type=whole(1, 512), default=1, show_default=True, help="Sequences side by side."
)
@click.option(
    "-r",
    "repeat",
    type=whole(1, 1000),
    default=5,
    show_default=True,
    help="Runs; the median counts.",
)
@load_options
@json_option
def bench(
    model: str,
    prompt: int,
    generate: int,
    depth: int,
    batch: int,
    repeat: int,
    load: LoadOptions,
    as_json: bool,
) -> None:
    """Measure prefill and decode speed.

    In the same run the machine's memory bandwidth and int8 rate are measured, and each speed is
    also given as the fraction of them that it uses.
    """
    from pronk.engine.bench import Plan

    plan = Plan(prompt, generate, depth, batch, repeat)
    with Reporter() as progress:
        result = run_bench(model, plan, load, progress)
    if as_json:
        emit(result)
    else:
        _print(result)


def run_bench(model: str, plan: "Plan", load: LoadOptions, progress: "Progress") -> dict[str, Any]:
    """The measurements as JSON values: tokens, bytes and multiply-accumulates a second."""
    from pronk.backends.select import select_backend
    from pronk.checkpoints.pull import locate
    from pronk.engine import bench as measure

    check_threads(load.threads)
    path = locate(model, progress=progress)
    ops = cast("LoadOps", select_backend(load.backend))
    subject = measure.load_subject(
        path,
        plan,
        ops=ops,
        threads=load.threads,
        kv_dtype=load.kv_dtype,
        progress=progress,
    )
    prefill = measure.measure_prefill(subject, plan, progress=progress)
    decode = measure.measure_decode(subject, plan, progress=progress)
    peak = _peak_memory()  # before the buffers that the bandwidth is measured with
    limits = _limits(ops.name, subject.threads, progress)
    return {
        "model": model,
        "parameters": subject.config.n_params,
        "weight_bytes": subject.weight_bytes,
        "prompt": plan.prompt,
        "generate": plan.generate,
        "depth": plan.depth,
        "batch": plan.batch,
        "repeat": plan.repeat,
        "backend": ops.name,
        **_machine(ops.name, subject.threads),
        "bandwidth_bytes_per_s": limits.bandwidth if limits else None,
        "int8_macs_per_s": limits.int8 if limits else None,
        "prefill": _phase(prefill, measure.prefill_demand(subject, plan), limits),
        "decode": _phase(decode, measure.decode_demand(subject, plan), limits),
        "peak_memory_bytes": peak,
    }


def _phase(speed: "Speed", demand: "Demand", limits: "Limits | None") -> dict[str, Any]:
    return {
        "tokens_per_s": speed.median,
        "runs": list(speed.runs),
        "bytes_per_token": demand.nbytes,
        "macs_per_token": demand.macs,
        "fraction_of": demand.fraction(speed.median, limits) if limits else None,
    }


def _limits(backend: str, threads: int, progress: "Progress") -> "Limits | None":
    """The machine's limits with as many threads; unknown without the compiled core."""
    if backend != "cpu":
        return None
    from pronk.backends import cpu
    from pronk.engine.bench import Limits

    progress(0, 0, "measuring the machine")
    return Limits(cpu.measure_bandwidth(threads, 0.5), cpu.measure_int8(threads, 0.5))


def _machine(backend: str, threads: int) -> dict[str, Any]:
    """Instruction set and threads; nothing is known of NumPy's own."""
    if backend != "cpu":
        return {"isa": None, "threads": None}
    from pronk.backends import cpu

    return {"isa": cpu.isa(), "threads": threads}


def _peak_memory() -> int:
    """Most bytes that this process had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _print(result: dict[str, Any]) -> None:
    where = f"{result['backend']} backend"
    if result["isa"]:
        where += f" ({result['isa']}), {result['threads']} threads"
    click.echo(f"{result['model']}, {where}, batch {result['batch']}, depth {result['depth']}")
    rows = [["PHASE", "TOKENS", "TOKENS/S", "OF BANDWIDTH", "OF INT8 RATE"]]
    for phase, tokens in (("prefill", result["prompt"]), ("decode", result["generate"])):
        measured = result[phase]
        used = measured["fraction_of"]
        fractions = [f"{100 * used[k]:.1f} %" if used else "?" for k in ("bandwidth", "int8")]
        rows.append([phase, str(tokens), f"{measured['tokens_per_s']:.1f}", *fractions])
    click.echo(columns(rows))
    if result["isa"]:
        click.echo(
            f"machine: reads {result['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s,"
            f" {result['int8_macs_per_s'] / 1e9:.0f} G int8 multiply-accumulates/s;"
            f" peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB"
        )
