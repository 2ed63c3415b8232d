"""Turns the raw results of `serving.py` into docs/results/serving.md. Measures nothing.

All runs of a raw file count; of two of the same name the later one does.
"""

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from server_lab import Json, read_raw

HEAD = """# The server under load

Written by `bench/serving.py`. The client runs on the same machine as the servers and keeps what
comes as it came, with the time; it is read afterwards. Figures are medians of the runs, with the
least and the most where there are several; times to the first token and between pieces of text are
medians over the runs of percentiles within a run. The servers take turns within a round, and
"times" is the median of the ratios of rounds.

In both servers the tokens that end an answer are forbidden (`logit_bias`), so all answers have the
length that was asked for; usage is checked. `sampled` is temperature 0.8, top_p 0.95, top_k 40 and
min_p 0.05 with a seed for each stream, and no penalties. llama-cpp-python's server computes one
request at a time, while others wait; it is told not to interrupt the running one for a new one, as
it otherwise would, and not to keep logits that nobody asked for.

Greedy answers of a small model soon repeat themselves, and Pronk guesses what repeats: the sampled
rows say more of what computing a token takes. Of the peer's 12 to 14 ms a token of SmolLM2 its
engine takes about 9 (`cpu.md`), its server the rest.
"""


def write_page(raw: Path, out: Path) -> None:
    lines = read_raw(raw)
    runs = [line for line in lines if line["kind"] == "run"]
    machines = [line for line in lines if line["kind"] == "machine"]
    parts = [HEAD]
    if machines:
        about = [v for name, v in machines[-1].items() if name != "kind"]
        parts.append(f"Machine: {', '.join(about)}.\n")
    parts += disturbance(runs)
    for make in (throughput, chat, cost, prefix, overload):
        parts += make(runs)
    wide = [part if part.startswith("|") else wrapped(part) for part in parts]
    out.write_text("\n".join(wide).rstrip() + "\n")


def wrapped(text: str) -> str:
    """Lines of at most 100 characters; some text has them already."""
    return "\n".join(textwrap.fill(line, 100) for line in text.split("\n"))


def of(runs: Sequence[Json], experiment: str) -> list[Json]:
    """The runs of an experiment; the last one of each round."""
    kept: dict[Any, Json] = {}
    for run in runs:
        if run["experiment"] == experiment:
            kept[_name(run), run["server"], run["round"]] = run
    return list(kept.values())


def _name(run: Json) -> tuple[Any, ...]:
    return tuple(run.get(key) for key in ("file", "mode", "streams", "tokens"))


def groups(runs: Iterable[Json], key: Callable[[Json], Any]) -> dict[Any, list[Json]]:
    found: dict[Any, list[Json]] = defaultdict(list)
    for run in runs:
        found[key(run)].append(run)
    return dict(found)


def spread(values: Sequence[float], digits: int = 1, scale: float = 1) -> str:
    low, mid, high = (scale * f(values) for f in (min, median, max))
    if len(values) == 1:
        return f"{mid:.{digits}f}"
    return f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def millis(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.01 else f"{1000 * seconds:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def disturbance(runs: Sequence[Json]) -> list[str]:
    measured = [run for run in runs if "foreign_cpu" in run]
    bad = [run for run in measured if run["foreign_cpu"] > 0.05 * run["seconds"] + 0.05]
    if not measured:
        return []
    return [
        f"In {len(bad)} of {len(measured)} runs other processes, here or on the machine's host,"
        " took more than 5 % of a processor.\n"
    ]


# Tables.


def throughput(runs: Sequence[Json]) -> list[str]:
    found = of(runs, "throughput")
    if not found:
        return []
    return [
        "## Streams of completions",
        "",
        "`/v1/completions` with `stream`, a prompt of its own of about 60 tokens for each stream,"
        " all sent at once. Tokens a second: tokens of all answers, from the first request to the"
        " last end. Milliseconds to the first token, and between pieces of text (a piece may hold"
        " several tokens where they were guessed, or where a token is no whole character).",
        "",
        *streams_table(found),
        "",
    ]


def chat(runs: Sequence[Json]) -> list[str]:
    found = of(runs, "chat")
    if not found:
        return []
    return ["## Streams of chats", "", "The same with `/v1/chat/completions`.", "",
            *streams_table(found), ""]  # fmt: skip


def streams_table(found: Sequence[Json]) -> list[str]:
    head = ("file", "streams", "tokens", "how", "server", "tokens a second", "times",
            "first 50 %", "first 99 %", "between 50 %", "90 %", "99 %", "runs")  # fmt: skip
    rows = []
    for (file, mode, streams, tokens), alike in groups(found, _name).items():
        servers = groups(alike, lambda run: run["server"])
        for server, own in servers.items():
            other = servers.get("llama-cpp-python", []) if server == "pronk" else []
            rows.append((
                file, str(streams), str(tokens), mode, server,
                spread([run["rate"] for run in own]), ratio(own, other),
                *(millis(median(run["first"][p] for run in own)) for p in ("50", "99")),
                *(gap(own, p) for p in ("50", "90", "99")), str(len(own)),
            ))  # fmt: skip
    return table(head, rows)


def gap(runs: Sequence[Json], part: str) -> str:
    values = [run["gap"][part] for run in runs if run["gap"]]
    return millis(median(values)) if values else ""


def ratio(runs: Sequence[Json], others: Sequence[Json]) -> str:
    theirs = {run["round"]: run["rate"] for run in others}
    found = [run["rate"] / theirs[run["round"]] for run in runs if run["round"] in theirs]
    return f"{median(found):.2f}" if found else ""


def cost(runs: Sequence[Json]) -> list[str]:
    """What the processors did."""
    found = [*of(runs, "throughput"), *of(runs, "chat")]
    if not found:
        return []
    rows = []
    for key, alike in groups(found, lambda r: (r["experiment"], *_name(r), r["server"])).items():
        experiment, file, mode, streams, tokens, server = key
        n = streams * tokens
        rows.append((
            experiment, file, str(streams), mode, server,
            spread([1000 * run["server_cpu"] / n for run in alike], 2),
            spread([1000 * run["client_cpu"] / n for run in alike], 2),
        ))  # fmt: skip
    head = ("experiment", "file", "streams", "how", "server", "server", "client")
    return ["## Processor time", "", "Milliseconds of one processor for a token, prompts included.",
            "", *table(head, rows), ""]  # fmt: skip


def prefix(runs: Sequence[Json]) -> list[str]:
    found = of(runs, "prefix")
    if not found:
        return []
    first, crowd = [], []
    for file, alike in groups(found, lambda run: run["file"]).items():
        hits = [hit for run in alike for hit in run["hits"]]
        first.append((
            file, str(alike[0]["prompt_tokens"]), str(min(n for r in alike for n in r["cached"])),
            spread([run["cold"] for run in alike], 0, 1000), spread(hits, 0, 1000),
            spread([run["cold"] / run["hit"] for run in alike]), str(len(alike)),
        ))  # fmt: skip
        for name, words in (("shared", "the same prefix"), ("apart", "a prefix each")):
            found_at_once = [run[name] for run in alike if run[name]]
            if found_at_once:
                crowd.append((
                    file, words, spread([one["first"] for one in found_at_once], 0, 1000),
                    spread([one["last"] for one in found_at_once], 0, 1000),
                    str(int(median(n for one in found_at_once for n in one["cached"]))),
                    str(len(found_at_once)),
                ))  # fmt: skip
    return [
        "## Prompts that begin alike", "",
        "Milliseconds to the first token of a request alone: with a prompt that begins like no"
        " other (cold), then with several that begin like it and end differently (hit).", "",
        *table(("file", "tokens", "found", "cold", "hit", "times shorter", "runs"), first), "",
        "Eight such requests at once, with a prefix that nobody had sent before: milliseconds until"
        " the first and the last of them has its first token, and the tokens of a prompt that were"
        " not computed (median).", "",
        *table(("file", "prompts", "first", "last", "found", "runs"), crowd), "",
    ]  # fmt: skip


def overload(runs: Sequence[Json]) -> list[str]:
    found = of(runs, "overload")
    if not found:
        return []
    rows = []
    for file, alike in groups(found, lambda run: run["file"]).items():
        kept = [run["beside"]["rate"] / run["alone"]["rate"] for run in alike]
        statuses: dict[str, int] = defaultdict(int)
        for run in alike:
            for status, n in run["statuses"].items():
                statuses[status] += n
        rows.append((
            file, ", ".join(f"{n} with {status}" for status, n in sorted(statuses.items())),
            *(millis(median(run["refused"][p] for run in alike)) for p in ("50", "99", "max")),
            spread([run["alone"]["rate"] for run in alike]),
            spread([run["beside"]["rate"] for run in alike]), f"{median(kept):.2f}",
            str(len(alike)),
        ))  # fmt: skip
    head = ("file", "answered", "50 %", "99 %", "longest", "alone", "beside", "ratio", "runs")
    return [
        "## More requests than are let in", "",
        "`--max-queue 4`, four streams that fill it, and 50 further requests a second while they"
        " run: how those were answered, after how many milliseconds, and the tokens a second of the"
        " four streams without and with them.", "", *table(head, rows), "",
    ]  # fmt: skip
