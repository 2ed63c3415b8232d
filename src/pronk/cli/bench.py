"""`pronk bench`: speed of a model on this machine, and how far it is from the machine's limits."""

import resource
import sys
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import click

from pronk.cli.common import (
    LoadOptions,
    check_threads,
    columns,
    emit,
    human_bytes,
    json_option,
    load_options,
    text,
    whole,
)
from pronk.cli.progress import Reporter

if TYPE_CHECKING:
    from pronk.core.progress import Progress
    from pronk.engine.bench import Phase, Plan, Run
    from pronk.engine.demand import Fraction, Limits
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
@click.option("--profile", is_flag=True, help="Also show where the time of a step goes.")
@load_options
@json_option
def bench(
    model: str,
    prompt: int,
    generate: int,
    depth: int,
    batch: int,
    repeat: int,
    profile: bool,
    load: LoadOptions,
    as_json: bool,
) -> None:
    """Measure prefill and decode speed.

    Before and after each run the machine's memory bandwidth and int8 rate are measured, and each
    speed is also given as the fraction of them that it uses, counting bytes as they are held in
    memory. With several runs the medians count, of speeds and of fractions.
    """
    from pronk.engine.bench import Plan

    plan = Plan(prompt, generate, depth, batch, repeat)
    with Reporter() as progress:
        result = run_bench(model, plan, load, progress, profile=profile)
    if as_json:
        emit(result)
    else:
        _print(result)


def run_bench(
    model: str, plan: "Plan", load: LoadOptions, progress: "Progress", *, profile: bool
) -> dict[str, Any]:
    """The measurements as JSON values: tokens, bytes and multiply-accumulates a second."""
    from pronk.backends.select import select_backend
    from pronk.checkpoints.pull import locate
    from pronk.engine import bench as measure

    check_threads(load.threads)
    ops = cast("LoadOps", select_backend(load.backend))
    if profile:
        measure.check_profile(ops)
    path = locate(model, progress=progress)
    subject = measure.load_subject(
        path,
        plan,
        ops=ops,
        threads=load.threads,
        kv_dtype=load.kv_dtype,
        layout_cache=load.layout_cache,
        progress=progress,
    )
    loaded = _peak_memory()
    prefill = measure.measure_prefill(subject, plan, progress=progress)
    decode = measure.measure_decode(subject, plan, progress=progress)
    limits = [run.timing.limits for run in (*prefill.runs, *decode.runs)]
    return {
        "model": model,
        "parameters": subject.config.n_params,
        "weight_bytes": subject.weight_bytes,
        "weight_file_bytes": subject.file_bytes,
        "prompt": plan.prompt,
        "generate": plan.generate,
        "depth": plan.depth,
        "batch": plan.batch,
        "repeat": plan.repeat,
        "backend": ops.name,
        **_machine(ops.name, subject.threads),
        **_limits([known for known in limits if known]),
        "prefill": _phase(prefill, profile),
        "decode": _phase(decode, profile),
        # without what the backend keeps to measure the bandwidth with
        "peak_memory_bytes": max(loaded, _peak_memory() - subject.meter.nbytes),
    }


def _limits(measured: "list[Limits]") -> dict[str, Any]:
    """The medians of what was measured beside the runs; unknown without the compiled core."""
    return {
        "bandwidth_bytes_per_s": median(m.bandwidth for m in measured) if measured else None,
        "int8_macs_per_s": median(m.int8 for m in measured) if measured else None,
    }


def _phase(phase: "Phase", profile: bool) -> dict[str, Any]:
    first = phase.runs[0]
    result = {
        "tokens_per_s": phase.rate,
        "bytes_per_token": first.demand.nbytes / first.tokens,
        "macs_per_token": first.demand.macs / first.tokens,
        "fraction_of": _fraction(phase.used),
        "runs": [_run(run) for run in phase.runs],
    }
    if profile:
        result["profile"] = [
            {
                "operation": operation.name,
                "seconds_per_step": operation.seconds,
                "share": operation.share,
                "fraction_of": _fraction(operation.used),
            }
            for operation in phase.profile()
        ]
    return result


def _run(run: "Run") -> dict[str, Any]:
    return {
        "tokens_per_s": run.rate,
        **_limits([run.timing.limits] if run.timing.limits else []),
        "fraction_of": _fraction(run.used),
    }


def _fraction(used: "Fraction | None") -> dict[str, float] | None:
    return asdict(used) if used else None


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
    rows = [["PHASE", "TOKENS", "TOKENS/S", *_FRACTIONS]]
    for phase, tokens in (("prefill", result["prompt"]), ("decode", result["generate"])):
        measured = result[phase]
        speed = f"{measured['tokens_per_s']:.1f}"
        rows.append([phase, str(tokens), speed, *_percent(measured["fraction_of"])])
    click.echo(columns(rows))
    if result["isa"]:
        click.echo(
            f"machine: reads {result['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s,"
            f" {result['int8_macs_per_s'] / 1e9:.0f} G int8 multiply-accumulates/s;"
            f" peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB"
        )
        click.echo(_weights(result["weight_bytes"], result["weight_file_bytes"]))
    for phase in ("prefill", "decode"):
        if profile := result[phase].get("profile"):
            click.echo(f"\n{phase}, a step:\n{_profile(profile)}")


def _weights(held: int, stored: int) -> str:
    words = f"OF BANDWIDTH counts bytes as held in memory: {human_bytes(held)} of weights"
    return words + f", {human_bytes(stored)} in the file" * (abs(held - stored) > 0.1 * stored)


_FRACTIONS = ("OF BANDWIDTH", "OF INT8 RATE")


def _profile(operations: list[dict[str, Any]]) -> str:
    rows = [["OPERATION", "MS", "SHARE", *_FRACTIONS]]
    for operation in operations:
        numbers = f"{1000 * operation['seconds_per_step']:.2f}", f"{100 * operation['share']:.1f} %"
        rows.append([operation["operation"], *numbers, *_percent(operation["fraction_of"], "")])
    return columns(rows)


def _percent(used: dict[str, float] | None, unknown: str = "?") -> list[str]:
    return [f"{100 * used[k]:.1f} %" if used else unknown for k in ("bandwidth", "int8")]
