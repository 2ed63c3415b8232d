"""The page docs/results/speculation.md, made of the runs of bench/speculation.py."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

SET = "Guesses that are right as often as was set"

HEAD = """# Several tokens a step

Written by `bench/speculation.py`. Each task is written with and without guesses in turn, and both
wrote the same tokens in every run. Tokens a second are counted from the first token on, so without
the reading of the prompt; they are medians, with the least and the most. *times* is the median of
the ratios of runs of the same round. Every run has an engine of its own that has never seen the
text; it keeps only what steps of so many rows take. *right* is the share of the guessed tokens that
were the ones drawn, *a step* how many tokens a step yielded in all, *guessed* how many were guessed
for each token written.
"""

ABOUT = {
    "Text that repeats its prompt": (
        "Tasks of repeating, correcting and quoting, as they come up in editing. A small model"
        " corrects next to nothing, but what it writes is the text."
    ),
    "Text that does not": (
        "Free text: guesses can only cost here. The greedy story without a penalty runs into loops"
        " of its own, which then are guessed."
    ),
    "JSON of a schema": "The grammar forces names and punctuation; these tokens are guessed first.",
    "Side by side": (
        "Several sequences in a step: more rows are dear then, and fewer tokens are guessed. Tokens"
        " a second are those of all sequences."
    ),
    SET: (
        "Random weights: what such a model writes repeats nothing and nothing could guess it. The"
        " guesses are therefore made of the answer itself, each token right as often as the task"
        " says, independently; what is measured is what computing and throwing away costs, and how"
        " many tokens are guessed. These are no figures of a text that anybody wrote."
    ),
}

WAYS = {"lookup": "", "draft": ", draft model"}


@dataclass(frozen=True)
class Run:
    """One run of a task."""

    model: str
    group: str
    task: str
    way: str
    round: int
    seconds: float
    steps: int
    tokens: int
    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def write_page(raw: Path, out: Path) -> None:
    found = [json.loads(line) for line in raw.read_text().splitlines() if line.strip()]
    runs = [Run(**_without_kind(fields)) for fields in found if fields["kind"] == "run"]
    machines = [_without_kind(fields) for fields in found if fields["kind"] == "machine"]
    out.write_text("\n".join(_page(runs, machines)) + "\n")


def _without_kind(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "kind"}


def _page(runs: Sequence[Run], machines: Iterable[Mapping[str, str]]) -> Iterator[str]:
    yield HEAD
    yield from dict.fromkeys(
        f"Machine: {m['processor']}, {m['threads']}, Python {m['python']}." for m in machines
    )
    for group in dict.fromkeys(run.group for run in runs):
        yield f"\n## {group}\n"
        yield f"{ABOUT.get(group, '')}\n"
        yield (
            "| model | task | tokens | without | with | times | right | guessed | a step | runs |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|"
        yield from _lines([run for run in runs if run.group == group])


def _lines(runs: Sequence[Run]) -> Iterator[str]:
    for model, task in dict.fromkeys((run.model, run.task) for run in runs):
        own = [run for run in runs if (run.model, run.task) == (model, task)]
        for way, words in WAYS.items():
            pairs = list(_pairs(own, way))
            if pairs:
                yield _line(model, task + words, pairs)


def _pairs(runs: Sequence[Run], way: str) -> Iterator[tuple[Run, Run]]:
    """Runs without and with guesses of the same round, in the order in which they were run."""
    without: Run | None = None
    guessing: Run | None = None
    for run in runs:
        if run.way == "without":
            without = run
        elif run.way == way:
            guessing = run
        if without and guessing and without.round == guessing.round:
            yield without, guessing
            without = guessing = None


def _line(model: str, task: str, pairs: Sequence[tuple[Run, Run]]) -> str:
    plain, runs = [p for p, _ in pairs], [g for _, g in pairs]
    drafted, tokens = sum(r.drafted for r in runs), sum(r.tokens for r in runs)
    right = f"{100 * sum(r.accepted for r in runs) / drafted:.0f} %" if drafted else ""
    cells = (
        model, task, str(runs[0].tokens), _range([r.rate for r in plain]),
        _range([r.rate for r in runs]), _range([g.rate / p.rate for p, g in pairs], 2), right,
        f"{drafted / tokens:.2f}", f"{tokens / sum(r.steps for r in runs):.2f}", str(len(runs)),
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _range(values: Sequence[float], digits: int = 1) -> str:
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
