"""Pronk's server beside llama-cpp-python's, which serves one request at a time, and by itself.

    python bench/serving.py all SMALL.gguf --large LARGE.gguf --peer-python PATH --raw RAW.jsonl \\
        --out docs/results/serving.md
    python bench/serving.py throughput|chat|prefix|overload SMALL.gguf --raw RAW.jsonl --out PAGE.md
    python bench/serving.py page --raw RAW.jsonl --out PAGE.md

throughput  streams of /v1/completions side by side, the servers in turn
chat        streams of /v1/chat/completions, the same way
prefix      time to the first token with a prefix that has been computed before, and without
overload    requests beyond --max-queue, and what they do to those that run
page        only writes the page again

SMALL is measured with all of it; LARGE, a model that takes long, with fewer and shorter runs of
throughput and prefix. `--peer-python` is an interpreter with llama-cpp-python[server]; without it
Pronk is measured alone. Every run is appended to RAW as it ends; the same command after an
interruption goes on where it was, and a new RAW begins anew. `serving_page.py` says how each number
comes about.

Exits with 2 where nothing could be measured.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_peers import count, machine
from pronk.checkpoints.open import open_checkpoint
from pronk.engine.load import load_tokenizer
from server_lab import (
    Exchange,
    Json,
    LabError,
    Reply,
    Server,
    all_at_once,
    append,
    exchange,
    first_model,
    processor_seconds,
    read_raw,
    request_bytes,
    start_peer,
    start_pronk,
    story,
)
from serving_page import write_page

PEER_CONTEXT = 4096
LARGE_TOKENS = 24
LARGE_STREAMS = (1, 16)
LARGE_ROUNDS = 2
SUFFIXES = 8
AT_ONCE = 8
PREFIX_SENTENCES = 84
"""About 1,000 tokens."""
RUNNING = 4
"""Streams that an overload must not disturb."""
EXTRA_A_SECOND = 50
PAUSE = 0.5
"""Seconds after a run: until the threads of its server sleep."""
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05}
GREEDY = {"temperature": 0}


@dataclass(frozen=True)
class Target:
    """A running server, and how it is asked."""

    server: Server
    model: str
    no_end: dict[str, float]
    """A logit_bias without which answers would differ in length."""

    @property
    def name(self) -> str:
        return self.server.name

    def body(self, tokens: int, sampling: Json, **more: Any) -> Json:
        body = {
            "model": self.model, "max_tokens": tokens, "stream": True, "logit_bias": self.no_end,
            **sampling, **more,
        }  # fmt: skip
        if self.name == "pronk":
            return {**body, "stream_options": {"include_usage": True}}
        return {**body, "repeat_penalty": 1.0}  # its default would cost it time

    def completion(self, prompt: str, tokens: int, sampling: Json, **more: Any) -> bytes:
        body = self.body(tokens, sampling, prompt=prompt, **more)
        return request_bytes("/v1/completions", body)

    def chat(self, prompt: str, tokens: int, sampling: Json, **more: Any) -> bytes:
        messages = [{"role": "user", "content": prompt}]
        body = self.body(tokens, sampling, messages=messages, **more)
        return request_bytes("/v1/chat/completions", body)


@contextlib.contextmanager
def watched(server: Server, found: Json) -> Iterator[None]:
    """Puts into `found` the processor seconds that pass meanwhile, by whose they are."""
    everybody, own, me = processor_seconds(), server.cpu_seconds(), time.process_time()
    yield
    found["server_cpu"] = round(server.cpu_seconds() - own, 2)
    found["client_cpu"] = round(time.process_time() - me, 2)
    rest = processor_seconds() - everybody - found["server_cpu"] - found["client_cpu"]
    found["foreign_cpu"] = round(max(rest, 0), 2)


class Lab:
    """Options, the raw file and what is in it already."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.raw: Path = args.raw
        self.n_runs = 0
        self._done = {_key(line) for line in read_raw(self.raw) if line["kind"] == "run"}
        append(self.raw, "machine", dict(machine(args.threads)))

    def has(self, **key: Any) -> bool:
        found = _key(key) in self._done
        if found:
            self.n_runs += 1
        return found

    def write(self, fields: Json) -> None:
        append(self.raw, "run", fields)
        self._done.add(_key(fields))
        self.n_runs += 1

    def tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def pronk(self, path: Path, *flags: str) -> Iterator[Target]:
        with (
            tempfile.TemporaryDirectory(prefix="serving-") as folder,
            start_pronk(
                self.args.python, str(path), "--data-dir", folder, "--threads",
                str(self.args.threads), "--kv-disk", "0", *flags,
            ) as server,
        ):  # fmt: skip
            yield Target(server, first_model(server.url), end_bias(path))

    @contextlib.contextmanager
    def both(self, path: Path) -> Iterator[list[Target]]:
        """Pronk and, where there is one, the peer."""
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(self.pronk(path))]
            if self.args.peer_python:
                self.tell(f"loading {path.name} with llama-cpp-python")
                peer = start_peer(
                    self.args.peer_python, str(path), context=PEER_CONTEXT,
                    threads=self.args.threads,
                )  # fmt: skip
                stack.enter_context(peer)
                targets.append(Target(peer, path.name, targets[0].no_end))
            yield targets


_KEY = ("experiment", "file", "server", "mode", "streams", "tokens", "round", "case")


def _key(fields: Json) -> tuple[Any, ...]:
    """What a run is, without what came out."""
    return tuple(fields.get(name) for name in _KEY)


def end_bias(path: Path) -> dict[str, float]:
    """A logit_bias that forbids all tokens that end an answer, as the file has them."""
    with open_checkpoint(path) as checkpoint:
        return {str(id): -100.0 for id in sorted(load_tokenizer(checkpoint).stop_ids)}


# Numbers of a run.


def read(exchanges: Sequence[Exchange], tokens: int, name: str) -> list[Reply]:
    """Answers that have all written `tokens` tokens, or LabError."""
    replies = [one.reply() for one in exchanges]
    for reply in replies:
        if reply.status != 200 or not reply.done:
            text = reply.body[-300:].decode(errors="replace")
            raise LabError(f"{name}: status {reply.status}, the answer ends with {text!r}")
        if reply.finish_reason != "length":
            raise LabError(f"{name}: an answer ended for {reply.finish_reason}, not its length")
        if reply.usage and reply.usage["completion_tokens"] != tokens:
            raise LabError(f"{name}: usage is {reply.usage}, {tokens} tokens were asked for")
    return replies


def summary(replies: Sequence[Reply], tokens: int) -> Json:
    began, ended = min(r.began for r in replies), max(r.ended for r in replies)
    firsts = [reply.to_first for reply in replies]
    gaps = [gap for reply in replies for gap in reply.gaps]
    return {
        "seconds": ended - began,
        "rate": len(replies) * tokens / (ended - began),
        "first": percentiles(firsts),
        "gap": percentiles(gaps),
        "pieces": sum(len(reply.texts) for reply in replies),
        "prompt_tokens": [r.usage["prompt_tokens"] for r in replies if r.usage],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Seconds; the values nearest to the middle and the end."""
    ordered = sorted(values)

    def at(part: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 5)

    if not ordered:
        return {}
    return {"50": at(0.5), "90": at(0.9), "99": at(0.99), "max": round(ordered[-1], 5)}


# Throughput.


def measure_throughput(
    lab: Lab, path: Path, *, streams: Sequence[int], tokens: int, rounds: int,
    modes: Sequence[str] = ("greedy", "sampled"), experiment: str = "throughput",
) -> None:  # fmt: skip
    plan = [(n, mode, k) for n in range(rounds) for mode in modes for k in streams]
    names = ["pronk", *["llama-cpp-python"] * bool(lab.args.peer_python)]
    keys = [
        {"experiment": experiment, "file": path.name, "server": name, "mode": mode,
         "streams": k, "tokens": tokens, "round": n}
        for n, mode, k in plan for name in names
    ]  # fmt: skip
    if all(lab.has(**key) for key in keys):
        return
    with lab.both(path) as targets:
        for target in targets:
            run_streams(target, f"warm {time.time()}", 1, 4, GREEDY, experiment)
        for n, mode, k in plan:
            step = [key for key in keys if (key["round"], key["mode"], key["streams"])
                    == (n, mode, k)]  # fmt: skip
            if all(lab.has(**key) for key in step):
                continue
            for target, key in zip(targets, step, strict=True):
                time.sleep(PAUSE)
                found = run_streams(target, f"{n} {mode} {k}", k, tokens, sampling_of(mode),
                                    experiment)  # fmt: skip
                lab.write({**key, **found})
                lab.tell(
                    f"{experiment} {path.name} {n + 1}/{rounds} {target.name} {mode} {k} streams:"
                    f" {found['rate']:.1f} tokens/s, first after {found['first']['50']:.2f} s"
                )


def sampling_of(mode: str) -> Json:
    return SAMPLED if mode == "sampled" else GREEDY


def run_streams(
    target: Target, seed: str, streams: int, tokens: int, sampling: Json, experiment: str
) -> Json:
    """One run: prompts of about 60 tokens, each its own."""
    ask = target.chat if experiment == "chat" else target.completion
    requests = [
        ask(f"{story(4, f'{seed} {i}')} Then", tokens, sampling, seed=i) for i in range(streams)
    ]
    found: Json = {}
    with watched(target.server, found):
        exchanges = asyncio.run(all_at_once(target.server.port, requests))
    return {**found, **summary(read(exchanges, tokens, target.name), tokens)}


# Prefixes.


def measure_prefix(lab: Lab, path: Path, *, rounds: int, brief: bool = False) -> None:
    """`brief`: with fewer requests, and without those at once that share nothing."""
    key: Json = {"experiment": "prefix", "file": path.name, "server": "pronk"}
    if all(lab.has(**key, round=n) for n in range(rounds)):
        return
    with lab.pronk(path) as target:
        run_streams(target, "warm", 1, 4, GREEDY, "prefix")
        for n in range(rounds):
            if lab.has(**key, round=n):
                continue
            cold = first_of(target, f"{story(PREFIX_SENTENCES, f'prefix {n}')} Once")
            hits = [
                first_of(target, f"{story(PREFIX_SENTENCES, f'prefix {n}')} {story(1, f'{n} {i}')}")
                for i in range(3 if brief else SUFFIXES)
            ]
            shared = together(target, [story(PREFIX_SENTENCES, f"crowd {n}")] * AT_ONCE)
            crowd = [story(PREFIX_SENTENCES, f"crowd {n} {i}") for i in range(AT_ONCE)]
            apart = None if brief else together(target, crowd)
            lab.write({
                **key, "round": n, "cold": cold["first"], "prompt_tokens": cold["prompt"],
                "hit": statistics.median(hit["first"] for hit in hits),
                "hits": [hit["first"] for hit in hits], "cached": [hit["cached"] for hit in hits],
                "shared": shared, "apart": apart,
            })  # fmt: skip
            lab.tell(
                f"prefix {path.name} {n + 1}/{rounds}: cold {cold['first']:.2f} s, hit"
                f" {statistics.median(hit['first'] for hit in hits):.3f} s; {AT_ONCE} at once"
                f" {shared['last']:.2f} s"
                + (f", {apart['last']:.2f} s where they share nothing" if apart else "")
            )


def first_of(target: Target, prompt: str) -> Json:
    """Time to the first token of a request alone."""
    time.sleep(PAUSE / 5)
    one = asyncio.run(exchange(target.server.port, target.completion(prompt, 2, GREEDY)))
    (reply,) = read([one], 2, target.name)
    usage = reply.usage or {}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {"first": reply.to_first, "prompt": usage["prompt_tokens"], "cached": cached}


def together(target: Target, prefixes: Sequence[str]) -> Json:
    """Requests that arrive at once, each with an ending of its own."""
    requests = [
        target.completion(f"{prefix} {story(1, f'{i} end')}", 2, GREEDY)
        for i, prefix in enumerate(prefixes)
    ]
    exchanges = asyncio.run(all_at_once(target.server.port, requests))
    replies = read(exchanges, 2, target.name)
    firsts = [reply.to_first for reply in replies]
    cached = [r.usage["prompt_tokens_details"]["cached_tokens"] for r in replies if r.usage]
    return {"first": min(firsts), "last": max(firsts), "cached": cached}


# Overload.


def measure_overload(lab: Lab, path: Path, *, tokens: int, rounds: int) -> None:
    key: Json = {"experiment": "overload", "file": path.name, "server": "pronk", "tokens": tokens}
    if all(lab.has(**key, round=n) for n in range(rounds)):
        return
    with lab.pronk(path, "--max-queue", str(RUNNING)) as target:
        run_streams(target, "warm", 1, 4, GREEDY, "overload")
        for n in range(rounds):
            if lab.has(**key, round=n):
                continue
            time.sleep(PAUSE)
            found = asyncio.run(_overload(target, n, tokens))
            lab.write({**key, "round": n, **found})
            lab.tell(
                f"overload {path.name} {n + 1}/{rounds}: {found['alone']['rate']:.1f} tokens/s"
                f" alone, {found['beside']['rate']:.1f} beside {found['extra']} further requests,"
                f" refused after {1000 * found['refused']['50']:.1f} ms"
                f" (99 %: {1000 * found['refused']['99']:.1f})"
            )


async def _overload(target: Target, n: int, tokens: int) -> Json:
    """The full number of streams alone, then with further requests knocking all the time."""
    port = target.server.port

    def streams(case: str) -> list[bytes]:
        return [
            target.completion(f"{story(4, f'{case} {n} {i}')} Then", tokens, GREEDY)
            for i in range(RUNNING)
        ]

    alone = await all_at_once(port, streams("alone"))
    running = asyncio.ensure_future(all_at_once(port, streams("beside")))
    await asyncio.sleep(0.1)  # all of them are in
    extra: list[asyncio.Task[Exchange]] = []
    probe = target.completion("One too many", 2, GREEDY)
    while not running.done():
        extra.append(asyncio.ensure_future(exchange(port, probe)))
        await asyncio.sleep(1 / EXTRA_A_SECOND)
    beside = await running
    free = min(one.ended for one in beside)  # then there is room for one more
    answered = [one.reply() for one in await asyncio.gather(*extra)]
    during = [reply for reply in answered if reply.ended < free]
    refused = [reply for reply in during if reply.status in (429, 503)]
    if not refused:
        raise LabError("overload: the streams ended before anything was refused; ask for more -n")
    return {
        "alone": summary(read(alone, tokens, target.name), tokens),
        "beside": summary(read(beside, tokens, target.name), tokens),
        "extra": len(during),
        "statuses": dict(Counter(str(reply.status) for reply in during)),
        "retry_after": sum("retry-after" in reply.headers for reply in refused),
        "refused": percentiles([reply.seconds for reply in refused]),
    }  # fmt: skip


# The command.


def measure(args: argparse.Namespace) -> None:
    lab = Lab(args)
    small, large, rounds = args.file, args.large, args.r
    wanted = ("throughput", "chat", "prefix", "overload")
    for experiment in wanted if args.experiment == "all" else (args.experiment,):
        if experiment == "throughput":
            measure_throughput(lab, small, streams=args.streams, tokens=args.n, rounds=rounds)
        if experiment == "chat":
            measure_throughput(
                lab, small, streams=(max(args.streams),), tokens=args.n, rounds=rounds,
                modes=("greedy",), experiment="chat",
            )  # fmt: skip
        if experiment == "prefix":
            measure_prefix(lab, small, rounds=rounds)
        if experiment == "overload":
            measure_overload(lab, small, tokens=4 * args.n, rounds=rounds)
        if large and experiment == "throughput":
            measure_throughput(
                lab, large, streams=LARGE_STREAMS, tokens=LARGE_TOKENS,
                rounds=min(rounds, LARGE_ROUNDS), modes=("greedy",),
            )  # fmt: skip
        if large and experiment == "prefix":
            measure_prefix(lab, large, rounds=1, brief=True)
    if not lab.n_runs:
        raise LabError("nothing was measured")


def numbers(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "experiment", choices=["all", "throughput", "chat", "prefix", "overload", "page"]
    )
    parser.add_argument("file", nargs="?", type=Path, help="GGUF file of a small model")
    parser.add_argument("--large", type=Path, help="GGUF file of a model that takes long")
    parser.add_argument("--raw", type=Path, required=True, help="JSON lines; runs are appended")
    parser.add_argument("--out", type=Path, help="Markdown page")
    parser.add_argument("--python", default=sys.executable, help="interpreter with Pronk")
    parser.add_argument("--peer-python", help="interpreter with llama-cpp-python[server]")
    parser.add_argument("--streams", type=numbers, default=[1, 4, 16], help="side by side")
    parser.add_argument("-n", type=count, default=128, help="tokens of an answer")
    parser.add_argument("-r", type=count, default=3, help="rounds")
    parser.add_argument("--threads", type=count, default=os.cpu_count())
    args = parser.parse_args(argv)
    if (args.experiment == "page") == bool(args.file):
        parser.error("FILE: every experiment needs one, the page none")
    for path in filter(None, (args.file, args.large)):
        if not path.is_file():
            parser.error(f"FILE: there is no file {path}")
    for name, path in (("--raw", args.raw), ("--out", args.out)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{name}: there is no folder {path.parent}")
    if args.experiment == "page" and not (args.out and args.raw.is_file()):
        parser.error("page: needs --out, and a --raw that is there")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.experiment != "page":
            measure(args)
        if args.out:
            write_page(args.raw, args.out)
    except LabError as error:
        print(f"serving: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
