"""What guessing several tokens a step brings, and what it costs where it brings nothing.

    python bench/speculation.py smollm2-135m --random 8B.gguf --raw RAW.jsonl \\
        --out docs/results/speculation.md
    python bench/speculation.py smollm2-135m --draft SMALLER.gguf --raw RAW.jsonl --out PAGE.md
    python bench/speculation.py --raw RAW.jsonl --out PAGE.md

Each task is written without and with guesses in turn, every run by a new engine without any memory
of earlier answers; both must write the same tokens. The texts are in speculation_tasks.py.
--draft adds runs with a draft model. --random takes a model with random weights: what it writes
repeats nothing, so guesses are made up of its own answer, right as often as `--right` says, and
only what they cost is measured; --random-draft is a draft model for it.

Runs are appended to RAW as they end; the last command only writes the page again. Exits with 1
where an answer was not the same with and without guesses.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from pronk.backends.protocol import Sampled
from pronk.backends.select import select_backend
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.open import open_checkpoint
from pronk.checkpoints.pull import locate
from pronk.core.errors import PronkError, UserError
from pronk.engine.draft import Speculator
from pronk.engine.draft_file import check_same_vocabulary
from pronk.engine.draft_model import DraftModel, Shadow
from pronk.engine.engine import Computes, Engine
from pronk.engine.estimates import Costs
from pronk.engine.load import load_model, load_tokenizer, need_of, use_threads
from pronk.engine.lookup import LONGEST_MATCH, Lookup
from pronk.engine.memory import fit, free_memory
from pronk.engine.request import Request, SamplingParams
from pronk.engine.runner import Runner
from pronk.engine.scheduler import Outcome, Slice
from pronk.text.chat import chat_format_for
from pronk.text.grammar import Grammar, Matchers
from pronk.text.messages import messages_from_dicts
from pronk.text.tokenizer import Tokenizer
from speculation_page import SET, Run, write_page
from speculation_tasks import GREEDY, Task, story, tasks

CONTEXT, MOST_SIDE_BY_SIDE = 1024, 16
PAUSE = 0.3
"""Seconds between runs."""


@dataclass
class Model:
    """A loaded model, and with `draft` one that drafts for it; costs of steps are kept from run to
    run, as in an engine that has run for a while."""

    name: str
    tokenizer: Tokenizer
    runner: Computes
    n_blocks: int
    draft: Computes | None
    share: float

    def __post_init__(self) -> None:
        self.costs: dict[str, tuple[Costs, Costs]] = {}

    def engine(self, way: str, lookup: Lookup | None = None) -> Engine:
        """`way`: "without" guesses, "lookup" (and what a grammar forces), "draft" (these, too)."""
        speculator = None
        if way != "without":
            speculator = Speculator(self._drafter() if way == "draft" else None, lookup)
            costs, draft_costs = self.costs.setdefault(way, (Costs(), Costs()))
            speculator.costs = costs
            if speculator.drafter is not None:
                speculator.drafter.costs = draft_costs
        return Engine(
            self.runner, vocab_size=self.tokenizer.vocab_size, context=CONTEXT,
            n_blocks=self.n_blocks, max_batch=MOST_SIDE_BY_SIDE, speculator=speculator,
        )  # fmt: skip

    def _drafter(self) -> DraftModel:
        assert self.draft is not None
        return DraftModel(
            self.draft, context=CONTEXT, n_blocks=self.n_blocks, share=self.share,
            stop_ids=self.tokenizer.stop_ids,
        )  # fmt: skip


def open_model(name: str, draft: str | None, threads: int, stack: ExitStack) -> Model:
    ops: Any = select_backend("cpu")
    use_threads(ops, threads)
    checkpoints = [stack.enter_context(open_checkpoint(locate(n))) for n in (name, draft) if n]
    needs = [need_of(c, ops, token_budget=512, max_batch=MOST_SIDE_BY_SIDE) for c in checkpoints]
    need = needs[0].with_draft(needs[1]) if draft else needs[0]
    tokenizers = [load_tokenizer(c) for c in checkpoints]
    check_same_vocabulary(tokenizers[0], tokenizers[-1])
    _, n_blocks = fit(need, CONTEXT, "f16", free_memory())

    def runner(checkpoint: Checkpoint) -> Runner:
        print(f"loading {checkpoint.path.name}", file=sys.stderr)
        weights = load_model(checkpoint, ops, n_positions=CONTEXT)
        return Runner(
            ops, checkpoint.config, weights, n_blocks=n_blocks, threads=threads,
            n_tokens=tokenizers[0].vocab_size,
        )  # fmt: skip

    runners = [runner(checkpoint) for checkpoint in checkpoints]
    return Model(
        checkpoints[0].path.name, tokenizers[0], runners[0], n_blocks,
        runners[1] if draft else None, needs[-1].weights / needs[0].weights,
    )  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """What some requests have written after their first tokens, and how long that took."""

    figures: Mapping[str, Any]
    """Of a Run."""
    answers: list[list[int]]


Make: TypeAlias = Callable[[], list[Request]]


def timed(engine: Engine, requests: Sequence[Request]) -> Timed:
    for request in requests:
        engine.add(request)
    while not all(request.n_output for request in requests):
        engine.step()
    before, steps, started = sum(r.n_output for r in requests), 0, time.perf_counter()
    while engine.has_work:
        engine.step()
        steps += 1
    seconds = time.perf_counter() - started
    for request in requests:
        request.raise_error()
    stats = engine.stats()
    figures = {
        "seconds": seconds, "steps": steps, "tokens": sum(r.n_output for r in requests) - before,
        "drafted": stats.drafted, "accepted": stats.accepted,
    }  # fmt: skip
    return Timed(figures, [request.output for request in requests])


def maker(tokenizer: Tokenizer, task: Task) -> Make:
    """Makes the requests of a task, which are good for one run."""
    form = chat_format_for(tokenizer)
    params = SamplingParams(**task.options)
    grammar = None if task.schema is None else Grammar.of_json_schema(task.schema)
    matchers = None if grammar is None else Matchers(tokenizer)

    def ids(prompt: str) -> list[int]:
        if form is None:
            return tokenizer.encode(prompt, bos=tokenizer.add_bos)
        return form.render(messages_from_dicts([{"role": "user", "content": prompt}])).ids

    prompts = [ids(prompt) for prompt in task.prompts]

    def make() -> list[Request]:
        return [
            Request(
                prompt, params, eos_ids=tokenizer.stop_ids,
                constraint=matchers.matcher(grammar) if matchers and grammar else None,
            )
            for prompt in prompts
        ]  # fmt: skip

    return make


class Bench:
    """Runs tasks and writes down what came of them."""

    def __init__(self, raw: Path) -> None:
        self.differ = False
        self._raw = raw
        self._answers: dict[tuple[str, str], list[list[int]]] = {}

    def measure(
        self, model: Model, task: Task, make: Make, n_runs: int,
        engines: Mapping[str, Callable[[], Engine]],
    ) -> None:  # fmt: skip
        """Paired runs; which way goes first changes from round to round."""
        for i in range(n_runs):
            for way in [*engines] if i % 2 else reversed([*engines]):
                found = timed(engines[way](), make())
                self._book(Run(model.name, task.group, task.name, way, i, **found.figures))
                self._compare((model.name, task.name), found.answers, way)
                time.sleep(PAUSE)

    def _book(self, run: Run) -> None:
        append(self._raw, "run", dataclasses.asdict(run))
        print(
            f"{run.model}: {run.task}, {run.way} {run.round + 1}: {run.rate:.1f} tokens/s,"
            f" {run.tokens / max(1, run.steps):.2f} a step",
            file=sys.stderr,
        )

    def _compare(self, what: tuple[str, str], answers: list[list[int]], way: str) -> None:
        if self._answers.setdefault(what, answers) != answers:
            self.differ = True
            print(f"speculation: {what[1]}: the answer is another one {way}", file=sys.stderr)


# Random weights


class Rehearsed(Lookup):
    """Guesses a known answer, each token right as often as `right` says."""

    def __init__(self, answer: Sequence[int], right: float) -> None:
        super().__init__()
        self._answer, self._right = answer, right

    def find(self, request: Request, behind: Sequence[int], most: int) -> tuple[list[int], int]:
        at = request.n_output + len(behind)
        tokens = [self.token(i) for i in range(at, min(at + most, len(self._answer)))]
        return tokens, LONGEST_MATCH if tokens else 0

    def token(self, at: int) -> int:
        """What is guessed at a place of the answer is the same each time."""
        right = random.Random(at).random() < self._right
        return self._answer[at] if right else self._answer[at] ^ 1


class RehearsedModel:
    """Takes the time of a model, and draws what is rehearsed."""

    def __init__(self, model: Computes, rehearsed: Rehearsed) -> None:
        self._model, self._rehearsed = model, rehearsed

    def run(self, slices: Sequence[Slice]) -> Sequence[Outcome]:
        outcomes = self._model.run(slices)
        return [self._outcome(s) if s.sample else o for s, o in zip(slices, outcomes, strict=True)]

    def _outcome(self, s: Slice) -> Outcome:
        assert isinstance(s.request, Shadow)
        return [Sampled(self._rehearsed.token(s.request.known - s.request.of.n_prompt))]


def measure_random(bench: Bench, model: Model, args: argparse.Namespace) -> None:
    """A model with random weights: guesses that are right as often as asked for."""
    params = SamplingParams(temperature=0.0, max_tokens=args.n, ignore_eos=True)

    def make() -> list[Request]:
        return [Request(range(32, 64), params)]

    answer = timed(model.engine("without"), make()).answers[0]
    timed(model.engine("lookup", Rehearsed(answer, 0.8)), make())  # until costs are known
    for right in args.right:
        rehearsed = Rehearsed(answer, right)
        engines = {
            "without": partial(model.engine, "without"),
            "lookup": partial(model.engine, "lookup", rehearsed),
        }
        if model.draft is not None:
            drawn = dataclasses.replace(model, draft=RehearsedModel(model.draft, rehearsed))
            engines["draft"] = partial(drawn.engine, "draft", Rehearsed((), 0))
        task = Task(SET, f"{100 * right:.0f} % of guesses right", (), {})
        bench.measure(model, task, make, args.random_runs, engines)


def measure_tasks(bench: Bench, model: Model, args: argparse.Namespace) -> None:
    ways = ["without", "lookup", *(["draft"] if model.draft is not None else [])]
    for way in ways:  # until the costs of steps are known
        warm = Task("", "", (story("a king"), story("a queen")), {**GREEDY, "max_tokens": 64})
        timed(model.engine(way), maker(model.tokenizer, warm)())
    for task in tasks():
        engines = {way: partial(model.engine, way) for way in ways}
        bench.measure(model, task, maker(model.tokenizer, task), args.r, engines)


def append(path: Path, kind: str, fields: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"kind": kind, **fields}) + "\n")


def machine(threads: int) -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "threads": f"{threads} of {os.cpu_count()} cores",
        "python": platform.python_version(),
    }


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def shares(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers from 0 to 1")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a name or a path, as everywhere in Pronk")
    parser.add_argument("--draft", help="a model of the same vocabulary that drafts for MODEL")
    parser.add_argument("--random", help="a model with random weights")
    parser.add_argument("--random-draft", help="a model that drafts for that one")
    parser.add_argument("--right", type=shares, default=[0.95, 0.8, 0.6, 0.0])
    parser.add_argument("--raw", type=Path, required=True, help="JSON lines; runs are appended")
    parser.add_argument("--out", type=Path, help="Markdown page")
    parser.add_argument("-r", type=whole, default=5, help="rounds of each task")
    parser.add_argument("--random-runs", type=whole, default=3, help="rounds with random weights")
    parser.add_argument("-n", type=whole, default=64, help="tokens with random weights")
    parser.add_argument("--threads", type=whole, default=os.cpu_count())
    args = parser.parse_args(argv)
    if not (args.model or args.random) and not args.raw.is_file():
        parser.error(f"--raw: there is no file {args.raw}, and no MODEL to measure")
    if args.draft and not args.model:
        parser.error("--draft: there is no MODEL that it could draft for")
    if args.random_draft and not args.random:
        parser.error("--random-draft: there is no --random that it could draft for")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    bench = Bench(args.raw)
    work = (
        (args.model, args.draft, measure_tasks), (args.random, args.random_draft, measure_random)
    )  # fmt: skip
    try:
        if args.model or args.random:
            append(args.raw, "machine", machine(args.threads))
        for name, draft, measure in work:
            if name:
                with ExitStack() as stack:
                    measure(bench, open_model(name, draft, args.threads, stack), args)
        if args.out:
            write_page(args.raw, args.out)
    except (PronkError, UserError) as error:
        print(f"speculation: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"speculation: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if bench.differ else 0


if __name__ == "__main__":
    sys.exit(main())
