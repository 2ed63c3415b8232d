"""Speed of a loaded model: how fast it reads a prompt and how fast it writes, each also as a
fraction of what this machine could do at most.

Both are measured through the engine, as a user meets them, sampling included. What a machine can do
changes with what else runs on its host, so its limits are measured before and after each run.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from pronk.backends.protocol import BLOCK, KvDtype, Ops
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.open import open_checkpoint
from pronk.core.config import ModelConfig
from pronk.core.errors import MemoryLimitError, UserError
from pronk.core.progress import Progress, silent
from pronk.core.switches import switch
from pronk.engine.blocks import blocks_for
from pronk.engine.demand import (
    Chunk,
    Demand,
    Fraction,
    Limits,
    Step,
    Weights,
    demands,
    total,
    weight_bytes,
)
from pronk.engine.engine import Computes, Engine, pending
from pronk.engine.load import MERGED, LoadOps, load_model, need_of, use_threads
from pronk.engine.memory import Need, free_memory
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import Runner
from pronk.engine.scheduler import Outcome, Slice

STEP_TOKENS = 512
"""Most rows of a step, as everywhere in the engine."""

OPERATION = {"wqkv": "q, k, v", "wo": "attention output", "w_gate_up": "gate and up",
             "w_down": "down", "output": "other linear"}  # fmt: skip
"""What a backend's profile calls the product with each weight."""

REST = "everything else"
"""Embedding, sampling, and Python between the calls of the backend."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: `batch` sequences side by side, each `depth` tokens deep in its context,
    read `prompt` tokens and write `generate` tokens; medians over `repeat` runs."""

    prompt: int = 512
    generate: int = 128
    depth: int = 0
    batch: int = 1
    repeat: int = 5

    @property
    def context(self) -> int:
        """Tokens that one sequence needs at most: at depth 0 a first token makes the start."""
        return max(self.depth + self.prompt + 1, max(self.depth, 1) + self.generate + 1)


@dataclass(frozen=True, slots=True)
class Timing:
    """How long it took until some requests had ended."""

    seconds: float
    limits: Limits | None
    """The mean of what was measured before and after; None where the backend cannot measure."""
    spent: Mapping[str, float]
    """Seconds by operation, where the backend tells."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run of one phase."""

    timing: Timing
    work: Sequence[Step]
    demands: Mapping[str, Demand]
    """What was asked of the machine, by operation."""

    @property
    def tokens(self) -> int:
        return sum(chunk.n for step in self.work for chunk in step)

    @property
    def rate(self) -> float:
        """Tokens a second, all sequences together."""
        return self.tokens / self.timing.seconds

    @property
    def demand(self) -> Demand:
        return total(self.demands)

    @property
    def used(self) -> Fraction | None:
        return self._fraction(self.demand, self.timing.seconds)

    def used_in(self, operation: str) -> Fraction | None:
        """None, too, for an operation whose demand is not known."""
        demand, seconds = self.demands.get(operation), self.timing.spent.get(operation)
        return self._fraction(demand, seconds) if demand and seconds else None

    def _fraction(self, demand: Demand, seconds: float) -> Fraction | None:
        limits = self.timing.limits
        return demand.fraction(seconds, limits) if limits else None


@dataclass(frozen=True, slots=True)
class Operation:
    """A line of a profile."""

    name: str
    seconds: float
    """Of a step."""
    share: float
    """Of the time of a step, 1 being all."""
    used: Fraction | None


@dataclass(frozen=True, slots=True)
class Phase:
    """Measured runs of prefill or decode."""

    runs: tuple[Run, ...]

    @property
    def rate(self) -> float:
        """The median of the runs' tokens a second."""
        return median(run.rate for run in self.runs)

    @property
    def used(self) -> Fraction | None:
        """The medians of the runs' fractions: each run is compared with its own limits."""
        return _medians([run.used for run in self.runs])

    def profile(self) -> list[Operation]:
        """The operations that took time, the longest first, and last what is none of them."""
        timings, steps = [run.timing for run in self.runs], sum(len(r.work) for r in self.runs)
        total = sum(t.seconds for t in timings)
        spent = {name: sum(t.spent[name] for t in timings) for name in timings[0].spent}
        ranked = sorted(((n, s) for n, s in spent.items() if s), key=lambda item: -item[1])
        return [
            Operation(name, seconds / steps, seconds / total, self._used_in(name))
            for name, seconds in [*ranked, (REST, total - sum(spent.values()))]
        ]

    def _used_in(self, operation: str) -> Fraction | None:
        return _medians([run.used_in(operation) for run in self.runs])


def _medians(fractions: Sequence[Fraction | None]) -> Fraction | None:
    known = [fraction for fraction in fractions if fraction]
    if not known:
        return None
    return Fraction(median(f.bandwidth for f in known), median(f.int8 for f in known))


class Meter:
    """Measures the machine's limits with a backend's threads, where the backend can."""

    BANDWIDTH_SECONDS, INT8_SECONDS = 0.2, 0.1

    def __init__(self, ops: Ops, threads: int) -> None:
        self._bandwidth = getattr(ops, "measure_bandwidth", None)
        self._int8 = getattr(ops, "measure_int8", None)
        self._threads = threads
        self.nbytes = max(512 << 20, threads * (32 << 20)) if self._bandwidth else 0
        """Memory that the backend keeps to read from; see csrc/limits.cpp."""

    def read(self) -> Limits | None:
        if self._bandwidth is None or self._int8 is None:
            return None
        return Limits(
            self._bandwidth(self._threads, self.BANDWIDTH_SECONDS),
            self._int8(self._threads, self.INT8_SECONDS),
        )


class Recorder:
    """Runs a model and keeps what each step computed."""

    def __init__(self, model: Computes) -> None:
        self._model = model
        self._steps: list[Step] = []

    def take(self) -> list[Step]:
        """The steps since the last call."""
        taken, self._steps = self._steps, []
        return taken

    def run(self, slices: Sequence[Slice]) -> Sequence[Outcome]:
        self._steps.append([Chunk(s.start, s.rows, s.sample) for s in slices])
        return self._model.run(slices)


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model with a KV cache that holds a whole plan, so that nothing is preempted."""

    engine: Engine
    recorder: Recorder
    ops: Ops
    config: ModelConfig
    weights: Weights
    """As the backend holds them in memory, which is what its kernels read."""
    file_bytes: int
    """Of the same weights as their file has them."""
    kv_bytes: float
    """Keys and values of one position."""
    threads: int
    meter: Meter

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.weights)


def load_subject(
    path: Path,
    plan: Plan,
    *,
    ops: LoadOps,
    threads: int | None,
    kv_dtype: KvDtype,
    layout_cache: bool | None = None,
    progress: Progress = silent,
) -> Subject:
    """`threads` None: all that this process may use. Raises UserError where the plan does not fit
    the model's context, MemoryLimitError where it does not fit the memory."""
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        _check_context(plan, config)
        budget = max(STEP_TOKENS, plan.batch)
        need = need_of(checkpoint, ops, token_budget=budget, max_batch=plan.batch)
        threads = use_threads(ops, threads)
        meter = Meter(ops, threads)
        _check_memory(need, plan, kv_dtype, meter)
        held = weight_sizes(
            checkpoint, lambda n: ops.packed_bytes(checkpoint.kind(n), *checkpoint.shape(n))
        )
        file_bytes = weight_bytes(weight_sizes(checkpoint, checkpoint.stored_bytes))
        weights = load_model(
            checkpoint,
            ops,
            n_positions=plan.context,
            layout_cache=layout_cache,
            progress=progress,
        )
    n_blocks = plan.batch * blocks_for(plan.context)
    runner = Runner(
        ops, config, weights, n_blocks=n_blocks, n_tokens=config.vocab_size, threads=threads,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    recorder = Recorder(runner)
    engine = Engine(
        recorder,
        vocab_size=config.vocab_size,
        context=plan.context,
        n_blocks=n_blocks,
        max_batch=plan.batch,
        token_budget=budget,
    )
    kv_bytes = need.kv_bytes(1, kv_dtype) / BLOCK
    return Subject(engine, recorder, ops, config, held, file_bytes, kv_bytes, threads, meter)


def _check_context(plan: Plan, config: ModelConfig) -> None:
    if plan.context > config.context:
        raise UserError(
            f"bench: -d {plan.depth} with -p {plan.prompt} and -n {plan.generate} takes"
            f" {plan.context} positions, the model's context is {config.context}"
        )


def _check_memory(need: Need, plan: Plan, kv_dtype: KvDtype, meter: Meter) -> None:
    total = need.total(plan.context, plan.batch * blocks_for(plan.context), kv_dtype)
    total += meter.nbytes
    free = free_memory()
    if free is not None and total > free:
        raise MemoryLimitError(
            f"memory: {total / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free;"
            " try smaller -d, -p, -n or -b, or a model with fewer bits a weight"
        )


def weight_sizes(checkpoint: Checkpoint, size: Callable[[str], int]) -> Weights:
    """`size` of each tensor by name, for the linear weights."""
    layers = range(checkpoint.config.n_layers)
    sizes = {
        name: [sum(size(f"layers.{i}.{part}") for part in parts) for i in layers]
        for name, parts in MERGED.items()
    }
    return sizes | {"output": [size("embed" if checkpoint.config.tied_embeddings else "output")]}


def check_profile(ops: Ops) -> None:
    """Raises UserError where the backend does not tell where its time goes."""
    if not hasattr(ops, "take_profile"):
        raise UserError(
            f"--profile: the backend {ops.name!r} does not tell where its time goes; use 'cpu'"
        )
    if not switch("PRONK_FUSED", default=True):
        raise UserError(
            "--profile: PRONK_FUSED is 0, and only layers that run as one call tell where their"
            " time goes; unset it"
        )


def measure_prefill(subject: Subject, plan: Plan, *, progress: Progress = silent) -> Phase:
    """Speed of reading `prompt` tokens, to the first token of the answer."""
    return _measure(prefill_run, "prefill", subject, plan, progress)


def measure_decode(subject: Subject, plan: Plan, *, progress: Progress = silent) -> Phase:
    """Speed of writing `generate` tokens after the first one."""
    return _measure(decode_run, "decode", subject, plan, progress)


def _measure(
    run: Callable[[Subject, Plan, int], Run],
    phase: str,
    subject: Subject,
    plan: Plan,
    progress: Progress,
) -> Phase:
    runs = []
    for n in range(plan.repeat + 1):  # the first, unmeasured one warms caches and clocks up
        progress(n, plan.repeat + 1, f"measuring {phase}")
        runs.append(run(subject, plan, n))
    progress(plan.repeat + 1, plan.repeat + 1, f"measuring {phase}")
    return Phase(tuple(runs[1:]))


def prefill_run(subject: Subject, plan: Plan, n: int) -> Run:
    """Reads a prompt that no run with another `n` reads. What comes before it in the context is the
    same for all runs, and computed by the first."""
    starts = [_random_ids(subject.config, plan.depth, (i,)) for i in range(plan.batch)]
    if plan.depth >= BLOCK:  # leaves its blocks in the cache
        subject.engine.run([Request(ids, None) for ids in starts])
    requests = [
        Request(ids + _random_ids(subject.config, plan.prompt, (i, n, 1)), _greedy(1))
        for i, ids in enumerate(starts)
    ]
    for request in requests:
        subject.engine.add(request)
    return _timed(subject, requests)


def decode_run(subject: Subject, plan: Plan, n: int = 0) -> Run:
    """Writes after a context that is the same for all runs, whatever `n`."""
    params = _greedy(plan.generate + 1)
    requests = [
        Request(_random_ids(subject.config, max(plan.depth, 1), (i,)), params)
        for i in range(plan.batch)
    ]
    for request in requests:
        subject.engine.add(request)
    while pending(requests) and not all(request.n_output for request in requests):
        subject.engine.step()
    return _timed(subject, requests)


def _timed(subject: Subject, requests: Sequence[Request]) -> Run:
    """Steps until all requests have ended."""
    take_profile = getattr(subject.ops, "take_profile", dict)
    before = subject.meter.read()
    take_profile()  # what came before is none of this
    subject.recorder.take()
    began = time.perf_counter()
    while pending(requests):
        subject.engine.step()
    seconds = time.perf_counter() - began
    spent: dict[str, float] = take_profile()
    steps = subject.recorder.take()
    timing = Timing(seconds, _mean(before, subject.meter.read()), spent)
    return Run(timing, steps, _demands(subject, steps))


def _mean(before: Limits | None, after: Limits | None) -> Limits | None:
    if before is None or after is None:
        return None
    return Limits((before.bandwidth + after.bandwidth) / 2, (before.int8 + after.int8) / 2)


def _demands(subject: Subject, steps: Sequence[Step]) -> dict[str, Demand]:
    """By the names of the backend's profile."""
    parts = demands(subject.config, subject.weights, subject.kv_bytes, steps)
    return {OPERATION.get(name, name): demand for name, demand in parts.items()}


def _greedy(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, ignore_eos=True)


def _random_ids(config: ModelConfig, n: int, seed: Sequence[int]) -> list[int]:
    """The same ids for the same seed. What is measured must have one that no other run has: a
    stored prefix would make the measurement a lie."""
    return list(map(int, np.random.default_rng(seed).integers(0, config.vocab_size, n)))
