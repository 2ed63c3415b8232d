"""Turns the raw results of `cpu_peers.py` into docs/results/cpu.md and its plot. Measures nothing.

The raw file has one JSON object a line: runs, and what is known of the machine, the engines and the
files. All runs of a file count, from however many sessions; start a new file to begin anew.
"""

import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pronk.core.errors import UserError
from pronk.engine.demand import Demand, Fraction, Limits


@dataclass(frozen=True)
class Run:
    """One measured run of one engine."""

    experiment: str
    session: int
    round: int
    file: str
    engine: str
    phase: str
    """"prefill", "decode" or "start"."""
    seconds: float
    tokens: int
    steps: int
    depth: int = 0
    rows: int = 1
    """Sequences side by side."""
    variant: str = ""
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    """The machine's limits."""
    nbytes: float = 0
    macs: float = 0
    """Of the whole run at least."""
    kv_bytes: float = 0
    """Of one position."""
    foreign: float = 0
    """Seconds of processor time that other processes took meanwhile, of this machine or of others
    on its host."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def step(self) -> float:
        """Seconds."""
        return self.seconds / self.steps

    @property
    def limits(self) -> Limits:
        assert self.before is not None
        assert self.after is not None
        pairs = [(self.before[name] + self.after[name]) / 2 for name in ("bandwidth", "int8")]
        return Limits(*pairs)

    @property
    def used(self) -> Fraction:
        return Demand(self.nbytes, self.macs).fraction(self.seconds, self.limits)

    @property
    def disturbed(self) -> bool:
        return self.foreign > 0.05 * self.seconds + 0.02  # which is measured in hundredths

    @property
    def bound(self) -> float:
        """The fraction that matters: prefill is bound by arithmetic, decode by bandwidth."""
        return self.used.int8 if self.phase == "prefill" else self.used.bandwidth


@dataclass
class Raw:
    runs: list[Run]
    machine: dict[str, str]
    engines: dict[str, dict[str, str]]
    """By name: version, build."""
    files: dict[str, str]
    """By name: what is in it."""
    skipped: dict[str, str]
    """Engine by name: why."""
    notes: list[str]

    def of(self, experiment: str) -> list[Run]:
        return [run for run in self.runs if run.experiment == experiment]


def line_of(kind: str, fields: dict[str, Any] | Run) -> str:
    return json.dumps({"kind": kind} | (asdict(fields) if isinstance(fields, Run) else fields))


def read_raw(path: Path) -> Raw:
    """Raises UserError for a line that is none of `cpu_peers.py`. A last one without its end was
    not written to the end: it is ignored, and a line on stderr says so."""
    raw = Raw([], {}, {}, {}, {}, [])
    *lines, rest = path.read_text(errors="replace").split("\n")
    for n, line in enumerate(lines, 1):
        try:
            add_line(raw, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"--raw: line {n} of {path} is not one that this script writes"
            ) from None
    if rest:
        print(f"the last line of {path} is not whole and was ignored", file=sys.stderr)
    return raw


def add_line(raw: Raw, fields: dict[str, Any]) -> None:
    match fields.pop("kind"):
        case "run":
            raw.runs.append(Run(**fields))
        case "machine":
            raw.machine = fields
        case "notes":
            raw.notes.append(fields["text"])
        case "engines" | "files" | "skipped" as kind:
            getattr(raw, kind)[fields["name"]] = fields["about"]
        case kind:
            raise ValueError(kind)


def ordered(values: Iterable[str]) -> list[str]:
    """Without repetitions, in the order of their first appearance."""
    return list(dict.fromkeys(values))


Key = tuple[int, int]


def by_round(runs: Iterable[Run]) -> dict[Key, Run]:
    return {(run.session, run.round): run for run in runs}


def ratio(runs: Sequence[Run], others: Sequence[Run], of: Callable[[Run], float]) -> float | None:
    """The median of the ratios of runs of the same round; None where no round has both."""
    mine, theirs = by_round(runs), by_round(others)
    ratios = [of(mine[key]) / of(theirs[key]) for key in mine if key in theirs]
    return median(ratios) if ratios else None


def spread(values: Sequence[float], digits: int, scale: float = 1) -> str:
    low, mid, high = (scale * f(values) for f in (min, median, max))
    return f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines, ""]


def pick(runs: Iterable[Run], **wanted: Any) -> list[Run]:
    return [r for r in runs if all(getattr(r, name) == value for name, value in wanted.items())]


def groups(runs: Iterable[Run], *names: str) -> list[tuple[tuple[Any, ...], list[Run]]]:
    found: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        found[tuple(getattr(run, name) for name in names)].append(run)
    return list(found.items())


SPEED = """Prefill: a prompt of random tokens, new in each run, until the next token is known.
Decode: tokens written greedily behind a context of one token, the first one not counted. A step is
at least one read of the weights as the file has them and of 16-bit keys and values, and the
multiply-accumulates of all layers, of which the last computes the rows without an answer only as
far as their keys and values; a step without any answer reads no more weights of it either. Prefill
is given as the fraction of the int8 rate that these take, decode as the fraction of the bandwidth.
"times" is Pronk's speed divided by the engine's in the same round."""


def speed(raw: Raw, experiment: str) -> list[str]:
    runs = raw.of(experiment)
    rows = []
    for (file, phase, tokens), runs_of_all in groups(runs, "file", "phase", "tokens"):
        first = next((r.engine for r in runs_of_all if r.engine.startswith("pronk")), "")
        mine = pick(runs_of_all, engine=first)
        for (engine,), own in groups(runs_of_all, "engine"):
            rows.append([
                file, f"{phase} {tokens}", engine, spread([r.rate for r in own], 1),
                f"{spread([r.bound for r in own], 0, 100)} %",
                "" if engine == first else number(ratio(mine, own, lambda r: r.rate)),
                str(len(own)),
            ])  # fmt: skip
    head = ["file", "phase", "engine", "tokens a second", "of the limit", "times", "runs"]
    return [SPEED, "", *table(head, rows)]


ROWS = """Sequences written side by side, one token of each in a step, sampling included. Cost and
gain are compared with one sequence in the same round."""


def rows_of_a_step(raw: Raw, experiment: str) -> list[str]:
    rows = []
    for (file, engine), runs in groups(raw.of(experiment), "file", "engine"):
        one = pick(runs, rows=1)
        for (n,), own in groups(runs, "rows"):
            cost, gain = (ratio(own, one, of) for of in (lambda r: r.step, lambda r: r.rate))
            rows.append([
                file, engine, str(n), spread([r.step for r in own], 1, 1000), number(cost),
                spread([r.rate for r in own], 1), number(gain), str(len(own)),
            ])  # fmt: skip
    head = ["file", "engine", "rows", "ms a step", "times one row", "tokens a second",
            "times one row", "runs"]  # fmt: skip
    return [ROWS, "", *table(head, rows)]


DEPTH = """The same with many tokens before: keys and values of these are computed once and stay
from run to run. Each run is compared with the one at depth 0 of the same round. A step of decode at
depth is explained by what it takes at depth 0 and the time to read the additional keys and values
at the bandwidth measured beside it."""


def depth(raw: Raw, experiment: str) -> list[str]:
    rows = []
    for (file, engine), runs in groups(raw.of(experiment), "file", "engine"):
        for d in sorted({run.depth for run in runs} - {0}):
            prefill, decode = pick(runs, phase="prefill"), pick(runs, phase="decode")
            kept = ratio(pick(prefill, depth=d), pick(prefill, depth=0), lambda r: r.rate)
            flat, deep = pick(decode, depth=0), pick(decode, depth=d)
            rows.append([
                file, engine, f"{d}",
                *(spread([r.rate for r in pick(prefill, depth=at)], 1) for at in (0, d)),
                number(kept),
                *(spread([r.step for r in which], 1, 1000) for which in (flat, deep)),
                number(d * deep[0].kv_bytes / 1e9) if deep else "",
                number(explained(flat, deep)),
            ])  # fmt: skip
    head = ["file", "engine", "depth", "prefill at 0", "at depth", "ratio",
            "decode at 0, ms a token", "at depth", "more GB to read",
            "measured / explained"]  # fmt: skip
    return [DEPTH, "", *table(head, rows)]


def explained(flat: Sequence[Run], deep: Sequence[Run]) -> float | None:
    at_zero = by_round(flat)
    ratios = [
        run.step / (at_zero[key].step + run.depth * run.kv_bytes / run.limits.bandwidth)
        for key, run in by_round(deep).items()
        if key in at_zero
    ]
    return median(ratios) if ratios else None


BUSY = """Decode while another process does nothing but count: none, one bound to the last core, one
that the system places. Compared with the undisturbed run of the same round."""


def busy(raw: Raw, experiment: str) -> list[str]:
    rows = []
    for (file, engine), runs in groups(raw.of(experiment), "file", "engine"):
        quiet = pick(runs, variant="quiet")
        cells = [spread([r.rate for r in quiet], 1)]
        for variant in ("bound", "free"):
            own = pick(runs, variant=variant)
            cells += [spread([r.rate for r in own], 1) if own else ""]
            cells += [number(ratio(own, quiet, lambda r: r.rate))]
        rows.append([file, engine, *cells, str(len(quiet))])
    head = ["file", "engine", "undisturbed, tokens a second", "one bound to a core", "ratio",
            "one placed freely", "ratio", "runs"]  # fmt: skip
    return [BUSY, "", *table(head, rows)]


START = """From the start of a process (Python's included) to the first token of an answer, the
file being in the page cache: it is read through before each start. Pronk also makes its tokenizer
and encodes a text; the others are given token ids."""


def start(raw: Raw, experiment: str) -> list[str]:
    rows = [
        [file, engine, spread([r.seconds for r in own], 2), str(len(own))]
        for (file, engine), own in groups(raw.of(experiment), "file", "engine")
    ]
    return [START, "", *table(["file", "engine", "seconds", "runs"], rows)]


SECTIONS: dict[str, tuple[str, Callable[[Raw, str], list[str]]]] = {
    "speed": ("Prefill and decode", speed),
    "rows": ("Several rows in a step", rows_of_a_step),
    "depth": ("Deep in the context", depth),
    "busy": ("With a busy core", busy),
    "avx2": ("Without AVX-512", speed),
    "start": ("From start to first token", start),
}

INTRO = """# Pronk and other engines on a CPU

Written by `bench/cpu_peers.py`; the figures are medians, with the least and the most. Each engine
lives in a process of its own that sleeps while another one is measured, and the engines take turns,
so that a machine that slows down slows all of them; ratios are medians of the ratios of runs of the
same round. What the machine can do is measured before and after every run by loops of Pronk: the
read bandwidth (the best of several ways to stream through 512 MB) and the rate of int8
multiply-accumulates in registers, by the loop of the instruction set that a table is about. A
fraction compares a run with the mean of its two neighbours; where the machine changes its speed
between them, a fraction can come out above one or too low.
"""

ENGINES = """Build is what the engine itself reports. llama.cpp runs with its defaults: it maps the
file and repacks at load, into memory of its own, what it has a layout for. ik_llama.cpp repacks at
load (`-rtr`) without mapping, computes q, k and v in one product (`-mqkv`) and uses flash attention
(`-fa`). Both read prompts in batches of 512. Pronk asks the system for huge pages itself; engines
with `GLIBC_TUNABLES` among their options get them through the C library, the others have them if
transparent huge pages are set to `always`.
"""


def features(build: str) -> str:
    """Of "AVX = 1 | NEON = 0 | ..." the names of what is there."""
    flags = [part.partition("=") for part in build.rpartition(":")[2].split("|")]
    there = [name.strip() for name, equals, value in flags if value.strip() == "1"]
    return ", ".join(there) or build


def machine(raw: Raw) -> list[str]:
    limits = [run.limits for run in raw.runs if run.before]
    lines = [f"Machine: {', '.join(raw.machine.values())}.", ""]
    if limits:
        bandwidth = spread([limit.bandwidth for limit in limits], 1, 1e-9)
        int8 = spread([limit.int8 for limit in limits], 0, 1e-9)
        lines += [f"Beside the runs: read bandwidth {bandwidth} GB/s, int8 rate {int8} GMAC/s."]
        lines += [disturbances(raw), ""]
    return lines


def engines_and_files(raw: Raw) -> list[str]:
    rows = [
        [name, f["version"], features(f["build"]), f.get("options", "")]
        for name, f in raw.engines.items()
    ]
    notes = [f"{name} was left out: {why}." for name, why in raw.skipped.items()]
    notes += ordered(raw.notes)
    return [
        "## Engines and files", "", ENGINES,
        *table(["engine", "version", "build", "options"], rows),
        *table(["file", "contents"], [[name, what] for name, what in raw.files.items()]),
        *(line for note in notes for line in (note, "")),
    ]  # fmt: skip


def disturbances(raw: Raw) -> str:
    runs = [run for run in raw.runs if run.before and run.variant in ("", "quiet")]
    n = sum(run.disturbed for run in runs)
    return (
        f"In {n} of {len(runs)} runs other processes, here or on the machine's host, took more"
        " than 5 % of a processor."
    )


def raw_table(raw: Raw) -> list[str]:
    rows = []
    for r in raw.runs:
        limits = used = ["", ""]
        if r.before:
            limits = [f"{r.limits.bandwidth / 1e9:.1f}", f"{r.limits.int8 / 1e9:.0f}"]
            used = [f"{100 * r.used.bandwidth:.1f}", f"{100 * r.used.int8:.1f}"]
        rows.append([
            r.experiment, f"{r.round}", r.file, r.engine, f"{r.phase} {r.tokens}", str(r.depth),
            str(r.rows), r.variant, f"{r.seconds:.3f}", f"{r.foreign:.2f}", f"{r.rate:.2f}",
            *limits, *used,
        ])  # fmt: skip
    head = ["experiment", "round", "file", "engine", "run", "depth", "rows", "variant", "seconds",
            "of others", "tokens/s", "GB/s", "GMAC/s", "% of bandwidth", "% of int8"]  # fmt: skip
    body = table(head, rows)
    return ["## All runs", "", "<details><summary>Raw table</summary>", "", *body, "</details>"]


def write_page(raw_path: Path, out: Path) -> None:
    """The page, and beside it a plot where there are speeds and matplotlib is there."""
    raw = read_raw(raw_path)
    lines = [INTRO, *machine(raw)]
    if raw.of("speed") and plot(raw.of("speed"), out.with_suffix(".png")):
        lines += [f"![Fractions of the machine's limits]({out.with_suffix('.png').name})", ""]
    for experiment, (title, section) in SECTIONS.items():
        if raw.of(experiment):
            lines += [f"## {title}", "", *section(raw, experiment)]
    out.write_text("\n".join([*lines, *engines_and_files(raw), *raw_table(raw)]) + "\n")


COLOURS = {"pronk": "#c1440e", "llama.cpp": "#4a6fa5", "ik_llama.cpp": "#8aa29e"}


def plot(runs: Sequence[Run], path: Path) -> bool:
    """Bars of the fractions of the limits: prefill on the left, decode on the right. False without
    matplotlib."""
    try:
        importlib.import_module("matplotlib").use("agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return False
    files, engines = ordered(r.file for r in runs), ordered(r.engine for r in runs)
    figure, axes = pyplot.subplots(
        1, 2, figsize=(10, 1.2 + 0.32 * len(files) * (len(engines) + 1)), sharey=True
    )
    titles = {"prefill": "prefill, of the int8 rate", "decode": "decode, of the read bandwidth"}
    for axis, (phase, title) in zip(axes, titles.items(), strict=True):
        bars(axis, pick(runs, phase=phase), files, engines)
        axis.set_title(title, loc="left", fontsize=11)
    axes[0].invert_yaxis()
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def bars(axis: Any, runs: Sequence[Run], files: Sequence[str], engines: Sequence[str]) -> None:
    height = 1 / (len(engines) + 1)
    for i, engine in enumerate(engines):
        for j, file in enumerate(files):
            values = [100 * r.bound for r in pick(runs, file=file, engine=engine)]
            if not values:
                continue
            place, middle = j + (i - (len(engines) - 1) / 2) * height, median(values)
            label = engine if j == 0 else None
            axis.barh(place, middle, height * 0.9, color=COLOURS.get(engine), label=label)
            axis.plot([min(values), max(values)], [place, place], color="black", linewidth=1)
            axis.text(max(values) + 1.5, place, f"{middle:.0f} %", va="center", fontsize=9)
    axis.set_yticks(range(len(files)), files, fontsize=9)
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 20), [f"{x} %" for x in range(0, 101, 20)], fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.axvline(100, color="grey", linewidth=0.8, linestyle=":")
