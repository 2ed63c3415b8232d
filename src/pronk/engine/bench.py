"""Speed of a loaded model: how fast it reads a prompt and how fast it writes, each also as a
fraction of what this machine could do at most.

Both are measured through the engine, as a user meets them, sampling included. The bounds are
simple on purpose: a step cannot be faster than reading its weights and its keys and values once
from memory, nor than doing its multiply-accumulates at the machine's int8 rate.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from pronk.backends.protocol import BLOCK, KvDtype
from pronk.checkpoints.open import open_checkpoint
from pronk.core.config import ModelConfig
from pronk.core.errors import MemoryLimitError, UserError
from pronk.core.progress import Progress, silent
from pronk.engine.blocks import blocks_for
from pronk.engine.engine import Engine, pending
from pronk.engine.load import LoadOps, load_model, need_of, use_threads
from pronk.engine.memory import Need, free_memory
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import Runner

STEP_TOKENS = 512
"""Most rows of a step, as everywhere in the engine."""


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
class Limits:
    """What the machine can do."""

    bandwidth: float
    """Bytes a second read from memory."""
    int8: float
    """Multiply-accumulates a second."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one token of a phase asks of the machine."""

    nbytes: float
    """Read from memory; weights are shared by the rows of a step."""
    macs: float

    def fraction(self, rate: float, limits: Limits) -> dict[str, float]:
        """How much of the bandwidth and of the int8 rate `rate` tokens a second use."""
        return {
            "bandwidth": rate * self.nbytes / limits.bandwidth,
            "int8": rate * self.macs / limits.int8,
        }


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, all sequences together, of each run."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.runs)


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model with a KV cache that holds a whole plan, so that nothing is preempted."""

    engine: Engine
    config: ModelConfig
    weight_bytes: int
    """Of the linear weights, as the backend holds them."""
    kv_bytes: float
    """Keys and values of one position."""
    threads: int


def load_subject(
    path: Path,
    plan: Plan,
    *,
    ops: LoadOps,
    threads: int | None,
    kv_dtype: KvDtype,
    progress: Progress = silent,
) -> Subject:
    """`threads` None: all that this process may use. Raises UserError where the plan does not fit
    the model's context, MemoryLimitError where it does not fit the memory."""
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        if plan.context > config.context:
            raise UserError(
                f"bench: -d {plan.depth} with -p {plan.prompt} and -n {plan.generate} takes"
                f" {plan.context} positions, the model's context is {config.context}"
            )
        n_blocks = plan.batch * blocks_for(plan.context)
        budget = max(STEP_TOKENS, plan.batch)
        need = need_of(checkpoint, ops, token_budget=budget, max_batch=plan.batch)
        _check_memory(need, plan, kv_dtype)
        threads = use_threads(ops, threads)
        weights = load_model(checkpoint, ops, n_positions=plan.context, progress=progress)
    runner = Runner(
        ops, config, weights, n_blocks=n_blocks, n_tokens=config.vocab_size, threads=threads,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    engine = Engine(
        runner,
        vocab_size=config.vocab_size,
        context=plan.context,
        n_blocks=n_blocks,
        max_batch=plan.batch,
        token_budget=budget,
    )
    return Subject(engine, config, need.weights, need.kv_bytes(1, kv_dtype) / BLOCK, threads)


def _check_memory(need: Need, plan: Plan, kv_dtype: KvDtype) -> None:
    total = need.total(plan.context, plan.batch * blocks_for(plan.context), kv_dtype)
    free = free_memory()
    if free is not None and total > free:
        raise MemoryLimitError(
            f"memory: {total / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free;"
            " try smaller -d, -p, -n or -b, or a model with fewer bits a weight"
        )


def measure_prefill(subject: Subject, plan: Plan, *, progress: Progress = silent) -> Speed:
    """Speed of reading `prompt` tokens, to the first token of the answer."""
    engine, config, rates = subject.engine, subject.config, []
    for run in range(plan.repeat + 1):  # the first, unmeasured one warms caches and clocks up
        progress(run, plan.repeat + 1, "measuring prefill")
        starts = [_random_ids(config, plan.depth, (run, i)) for i in range(plan.batch)]
        if plan.depth >= BLOCK:
            engine.run([Request(ids, None) for ids in starts])  # leaves its blocks in the cache
        requests = [
            Request(ids + _random_ids(config, plan.prompt, (run, i, 1)), _greedy(1))
            for i, ids in enumerate(starts)
        ]
        began = time.perf_counter()
        engine.run(requests)
        seconds = time.perf_counter() - began
        rates.append(sum(r.n_prompt - (r.cached or 0) for r in requests) / seconds)
    progress(plan.repeat + 1, plan.repeat + 1, "measuring prefill")
    return Speed(tuple(rates[1:]))


def measure_decode(subject: Subject, plan: Plan, *, progress: Progress = silent) -> Speed:
    """Speed of writing `generate` tokens after the first one."""
    engine, config, rates = subject.engine, subject.config, []
    params = _greedy(plan.generate + 1)
    for run in range(plan.repeat + 1):
        progress(run, plan.repeat + 1, "measuring decode")
        requests = [
            Request(_random_ids(config, max(plan.depth, 1), (run, i, 2)), params)
            for i in range(plan.batch)
        ]
        for request in requests:
            engine.add(request)
        while pending(requests) and not all(request.n_output for request in requests):
            engine.step()
        before = sum(request.n_output for request in requests)
        began = time.perf_counter()
        while pending(requests):
            engine.step()
        seconds = time.perf_counter() - began
        rates.append((sum(request.n_output for request in requests) - before) / seconds)
    progress(plan.repeat + 1, plan.repeat + 1, "measuring decode")
    return Speed(tuple(rates[1:]))


def prefill_demand(subject: Subject, plan: Plan) -> Demand:
    """The weights are read once a step; of keys and values a perfect kernel reads each position
    once a step, too."""
    config, rows = subject.config, plan.prompt * plan.batch
    steps = -(-rows // STEP_TOKENS)
    context = plan.depth + plan.prompt / 2
    kv = steps * plan.batch * context * subject.kv_bytes
    head = config.dim * config.vocab_size / plan.prompt  # logits of the last row only
    return Demand((steps * subject.weight_bytes + kv) / rows, _layer_macs(config, context) + head)


def decode_demand(subject: Subject, plan: Plan) -> Demand:
    """A step writes one token for each of the `batch` sequences, which share the weights."""
    config, context = subject.config, max(plan.depth, 1) + plan.generate / 2
    nbytes = subject.weight_bytes / plan.batch + context * subject.kv_bytes
    return Demand(nbytes, _layer_macs(config, context) + config.dim * config.vocab_size)


def _layer_macs(config: ModelConfig, context: float) -> float:
    """Multiply-accumulates of one token in all layers, attending to `context` positions."""
    width = config.n_heads * config.head_dim
    kv_width = config.n_kv_heads * config.head_dim
    linear = config.dim * (2 * width + 2 * kv_width) + 3 * config.dim * config.ffn_dim
    return config.n_layers * (linear + 2 * context * width)


def _greedy(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, ignore_eos=True)


def _random_ids(config: ModelConfig, n: int, seed: Sequence[int]) -> list[int]:
    """Ids that no other run has: a stored prefix would make the measurement a lie."""
    return list(map(int, np.random.default_rng(seed).integers(0, config.vocab_size, n)))
