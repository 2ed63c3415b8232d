"""Pronk beside llama.cpp (`llama-cpp-python`) on the same GGUF files, in one run.

    python bench/beside_llama_cpp.py FILE... [-p 512] [-n 64] [-r 5] [--threads 2] [--out PAGE.md]

Each engine lives in a process of its own that sleeps while the other one is measured; runs
alternate, so a machine that slows down slows both. Prefill: one prompt of random ids, to the
logits of its last token. Decode: greedy tokens after a prompt of one token. The figure is the
median over the runs, the ratio the median of the ratios of neighbouring runs.
"""

import argparse
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

Measure = Callable[[str, int], float]
"""(phase, tokens) -> tokens a second."""


def pronk_measure(path: Path, threads: int, context: int) -> Measure:
    from pronk.backends.select import select_backend
    from pronk.engine.bench import Plan, load_subject, measure_decode, measure_prefill

    ops: Any = select_backend("cpu")
    plan = Plan(prompt=context - 2, generate=context - 2, repeat=1)
    subject = load_subject(path, plan, ops=ops, threads=threads, kv_dtype="f16")

    def measure(phase: str, tokens: int) -> float:
        if phase == "prefill":
            return measure_prefill(subject, Plan(prompt=tokens, repeat=1)).median
        return measure_decode(subject, Plan(generate=tokens, repeat=1)).median

    return measure


def llama_cpp_measure(path: Path, threads: int, context: int) -> Measure:
    import numpy as np
    from llama_cpp import Llama

    llm = Llama(
        str(path), n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def measure(phase: str, tokens: int) -> float:
        rates = []
        for _ in range(2):  # the first one warms up, as Pronk's does
            llm.reset()
            ids = rng.integers(0, llm.n_vocab(), tokens if phase == "prefill" else 1)
            began = time.perf_counter()
            llm.eval([int(i) for i in ids])
            if phase == "decode":
                token = llm.sample(temp=0.0)
                began = time.perf_counter()
                for _ in range(tokens):
                    llm.eval([token])
                    token = llm.sample(temp=0.0)
            rates.append(tokens / (time.perf_counter() - began))
        return rates[-1]

    return measure


ENGINES = {"pronk": pronk_measure, "llama.cpp": llama_cpp_measure}


def serve(connection: Connection, engine: str, path: Path, threads: int, context: int) -> None:
    measure = ENGINES[engine](path, threads, context)
    connection.send("ready")
    while (task := connection.recv()) is not None:
        connection.send(measure(*task))


class Worker:
    """An engine in a process of its own."""

    def __init__(self, engine: str, path: Path, threads: int, context: int) -> None:
        spawn = get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, engine, path, threads, context))
        self._process.start()
        theirs.close()
        self._connection.recv()

    def __call__(self, phase: str, tokens: int) -> float:
        self._connection.send((phase, tokens))
        rate = float(self._connection.recv())
        time.sleep(0.5)  # until its threads sleep
        return rate

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def compare(path: Path, args: argparse.Namespace) -> list[str]:
    context = max(args.p, args.n) + 8
    workers = {engine: Worker(engine, path, args.threads, context) for engine in ENGINES}
    rows = []
    for phase, tokens in (("prefill", args.p), ("decode", args.n)):
        runs: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for i in range(args.r):
            for engine, worker in workers.items():
                runs[engine].append(worker(phase, tokens))
            print(f"{path.name} {phase} {i + 1}/{args.r}", file=sys.stderr)
        ratio = median(a / b for a, b in zip(*runs.values(), strict=True))
        cells = [f"{median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in runs.values()]
        rows.append(f"| {path.name} | {phase} {tokens} | {' | '.join(cells)} | {ratio:.2f} |")
        print(rows[-1], flush=True)
    for worker in workers.values():
        worker.close()
    return rows


def limits(threads: int) -> str:
    from pronk.backends import cpu

    bandwidth = cpu.measure_bandwidth(threads, 3.0) / 1e9
    int8 = cpu.measure_int8(threads, 3.0) / 1e9
    return (
        f"Measured in the same run, {threads} threads, kernels for {cpu.isa()}: read bandwidth"
        f" {bandwidth:.1f} GB/s, int8 {int8:.0f} GMAC/s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("-p", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("-n", type=int, default=64, help="tokens to generate")
    parser.add_argument("-r", type=int, default=5, help="alternating runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()

    import llama_cpp

    lines = [
        "# Pronk beside llama.cpp",
        "",
        f"`bench/beside_llama_cpp.py`, llama-cpp-python {llama_cpp.__version__} built for this"
        " machine; tokens a second, median (least to most) of"
        f" {args.r} alternating runs; the ratio is the median of the ratios of neighbouring runs.",
        "",
        limits(args.threads),
        "",
        "| file | phase | Pronk | llama.cpp | ratio |",
        "|---|---|---|---|---|",
    ]
    for path in args.files:
        lines += compare(path, args)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
