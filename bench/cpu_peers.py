"""Pronk beside llama.cpp and ik_llama.cpp on the same GGUF files, in alternating runs.

    python bench/cpu_peers.py speed FILE... --raw RAW.jsonl --out docs/results/cpu.md
    python bench/cpu_peers.py rows|depth|busy|avx2|start FILE... --raw RAW.jsonl --out PAGE.md
    python bench/cpu_peers.py page --raw RAW.jsonl --out PAGE.md

speed   prefill and decode of every engine
rows    Pronk with 1 to 16 sequences side by side
depth   prefill and decode behind many tokens (--depth)
busy    decode while another process keeps a core busy
avx2    Pronk with PRONK_ISA=avx2, and a llama.cpp that was built without AVX-512
start   from the start of a process to the first token
page    only writes the page again

Every run is appended to RAW as it ends, and the page is made of all that is there, after an
interruption, too. An engine that lives elsewhere: `--python ik_llama.cpp=/path/to/bin/python`; one
that cannot be imported is left out with a note. `--note` puts a sentence on the page, such as how
an engine was built. `peer_worker.py` says how each is run; the page (`cpu_page.py`, which needs
matplotlib) says how each number comes about.

Exits with 2 where nothing was measured.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_page import Run, features, line_of, read_raw, write_page
from pronk.backends.formats import KINDS
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.open import open_checkpoint
from pronk.core.config import ModelConfig
from pronk.core.errors import PronkError, UserError
from pronk.engine.bench import weight_sizes
from pronk.engine.demand import Chunk, Step, Weights, demands, total, weight_bytes
from pronk.engine.load import MERGED
from pronk.engine.memory import free_memory

WORKER = Path(__file__).with_name("peer_worker.py")
PAUSE = 0.4
"""Seconds after a run: until the threads of its engine sleep."""


TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Kind:
    """What is run under a name."""

    engine: str
    env: dict[str, str]
    without: str = ""
    """A feature that its build must not have."""

    def environment(self) -> dict[str, str]:
        """The user's, less what would change Pronk unseen."""
        kept = {name: v for name, v in os.environ.items() if not name.startswith("PRONK_")}
        return kept | self.env

    def described(self, answer: dict[str, str]) -> dict[str, str]:
        """What a worker says of itself, with the environment. Raises PeerError for what it says it
        could not do, and for a build that is not of this kind."""
        if "error" in answer:
            raise PeerError(answer["error"])
        if self.without and self.without in features(answer["build"]).split(", "):
            raise PeerError(
                f"its build has {self.without} = 1; give the interpreter of one without by --python"
            )
        given = [f"{name}={value}" for name, value in self.env.items()]
        return answer | {"options": ", ".join([*given, *filter(None, [answer["options"]])])}


HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""The C library then asks for huge pages, as Pronk does for itself."""

KINDS_OF_ENGINE = {
    "pronk": Kind("pronk", {}),
    "llama.cpp": Kind("llama.cpp", {}),
    "ik_llama.cpp": Kind("ik_llama.cpp", HUGE_PAGES),
    "pronk-avx2": Kind("pronk", {"PRONK_ISA": "avx2"}),
    "llama.cpp-avx2": Kind("llama.cpp", {}, without="AVX512"),
    "llama.cpp-huge": Kind("llama.cpp", HUGE_PAGES),
    "pronk-int8": Kind("pronk-int8", {}),
    "pronk-cached": Kind("pronk", {"PRONK_LAYOUT_CACHE": "1"}),
}
ALL = ("pronk", "llama.cpp", "ik_llama.cpp")


class PeerError(Exception):
    """An engine that is not there or has ended."""


@dataclass(frozen=True)
class Subject:
    """A model file, and what its weights ask of a machine."""

    path: Path
    config: ModelConfig
    weights: Weights
    """Bytes in the file."""
    about: str

    def kv_bytes(self, engine: str) -> int:
        """Of one position: in 16 bits, or in 8 with a float32 scale for each head."""
        c = self.config
        head = c.head_dim + 4 if engine == "pronk-int8" else 2 * c.head_dim
        return 2 * c.n_layers * c.n_kv_heads * head


def open_subject(path: Path) -> Subject:
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        parts = [part for group in MERGED.values() for part in group]
        names = [f"layers.{i}.{part}" for i in range(config.n_layers) for part in parts]
        names.append("embed" if config.tied_embeddings else "output")
        kinds = Counter(checkpoint.kind(name) for name in names)
        sizes = weight_sizes(checkpoint, lambda name: stored_bytes(checkpoint, name))
    mix = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    about = (
        f"{config.n_params / 1e6:.0f} million weights in {config.n_layers} layers;"
        f" {weight_bytes(sizes) / 1e9:.2f} GB of linear weights ({mix} tensors)"
    )
    return Subject(path, config, sizes, about)


def stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    rows, columns = checkpoint.shape(name)
    return rows * KINDS[checkpoint.kind(name)].row_bytes(columns)


def processor_seconds() -> float:
    """Of all processes since the start, and what the host has taken away."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _wait, irq, soft, stolen = map(int, fields[1:9])
    return (user + nice + system + irq + soft + stolen) / TICKS


class Worker:
    """An engine in a process of its own. Raises PeerError where it cannot be had."""

    def __init__(self, kind: Kind, python: str, *arguments: object) -> None:
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER), "serve", kind.engine, *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                env=kind.environment(),
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise PeerError(f"cannot run {python}: {error.strerror}") from error
        try:
            self.about = kind.described(self._answer())
        except PeerError:
            self.close()
            raise

    def ask(self, **task: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer says more
        answer = self._answer()
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._log.seek(0)
        raise PeerError(f"ended with {code}: {last_words(self._log.read())}")

    def cpu_seconds(self) -> float:
        """Processor time that it has taken."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def close(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def last_words(log: str) -> str:
    """The end of a log, exceptions without their class."""
    lines = [line.strip() for line in log[-2000:].splitlines() if line.strip()]
    return " / ".join(re.sub(r"^[\w.]+(Error|Exception): ", "", line) for line in lines[-2:])[-300:]


class Lab:
    """What all experiments share: options, the raw file, a place for notes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.session = int(time.time())
        self.n_runs = 0
        open_end(args.raw)
        self.write("machine", machine(args.threads))

    def write(self, kind: str, fields: dict[str, Any] | Run) -> None:
        append(self.args.raw, kind, fields)
        self.n_runs += isinstance(fields, Run)

    def python(self, name: str) -> str:
        python: str = self.args.python.get(name, sys.executable)
        return python

    def engines(self, default: Sequence[str]) -> list[str]:
        return list(self.args.engines or default)

    def skip(self, name: str, why: object) -> None:
        print(f"{name} is left out: {why}", file=sys.stderr)
        self.write("skipped", {"name": name, "about": str(why)})

    @contextmanager
    def open(
        self, path: Path, engines: Sequence[str], *, tokens: int, rows: int = 1, depth: int = 0,
        limits: str = "pronk",
    ) -> Iterator["Table"]:  # fmt: skip
        """The engines that can be had, each with the file loaded and room for runs of so many
        tokens. `limits` names the one whose environment the machine is measured in."""
        subject, context = open_subject(path), depth + tokens + 8
        check_memory(subject, engines, context * rows)
        self.write("files", {"name": path.name, "about": subject.about})
        with ExitStack() as stack:
            meter = Worker(
                Kind("limits", KINDS_OF_ENGINE[limits].env), self.python(limits), "",
                self.args.threads, 0, 0, 0,
            )  # fmt: skip
            stack.callback(meter.close)
            workers: dict[str, Worker] = {}
            for name in engines:
                print(f"loading {path.name} with {name}", file=sys.stderr)
                try:
                    worker = Worker(
                        KINDS_OF_ENGINE[name], self.python(name), path, self.args.threads, context,
                        rows, depth,
                    )  # fmt: skip
                except PeerError as error:
                    self.skip(name, error)
                    continue
                stack.callback(worker.close)
                workers[name] = worker
                self.write("engines", {"name": name, "about": worker.about})
            yield Table(self, subject, meter, workers)


class Table:
    """The engines side by side over one file."""

    def __init__(
        self, lab: Lab, subject: Subject, meter: Worker, workers: dict[str, Worker]
    ) -> None:
        self.lab, self.subject = lab, subject
        self._meter, self._workers = meter, workers
        self._before: dict[str, float] | None = None

    @property
    def names(self) -> list[str]:
        return list(self._workers)

    def warm(self, **task: object) -> None:
        """An unmeasured run of each engine."""
        for name in self.names:
            try:
                self._workers[name].ask(**task)
            except PeerError as error:
                self._drop(name, error)
        self._before = None

    def run(
        self, experiment: str, n: int, name: str, phase: str, tokens: int, *, depth: int = 0,
        rows: int = 1, variant: str = "", beside: AbstractContextManager[None] | None = None,
    ) -> None:  # fmt: skip
        """One measured run between two measurements of the machine, the second of which serves the
        next run, too. `beside` is entered for the run only."""
        if name not in self._workers:
            return  # it ended on the way
        before = self._before or self._meter.ask(phase="read")
        worker = self._workers[name]
        try:
            with beside or nullcontext():
                taken = processor_seconds() - worker.cpu_seconds()
                found = worker.ask(phase=phase, tokens=tokens, depth=depth, rows=rows)
                foreign = processor_seconds() - worker.cpu_seconds() - taken
        except PeerError as error:
            self._drop(name, error)
            return
        time.sleep(PAUSE)
        self._before = after = self._meter.ask(phase="read")
        steps = [[Chunk(*chunk) for chunk in step] for step in found["work"]]
        computed = sum(chunk.n for step in steps for chunk in step)
        run = Run(
            experiment, self.lab.session, n, self.subject.path.name, name, phase,
            found["seconds"], computed, len(steps), depth, rows, variant, before, after,
            kv_bytes=self.subject.kv_bytes(name), foreign=round(max(foreign, 0), 2),
            **self._demand(name, steps),
        )  # fmt: skip
        self.lab.write("run", run)
        self._tell(run)

    def _demand(self, name: str, steps: Sequence[Step]) -> dict[str, float]:
        subject = self.subject
        asked = total(demands(subject.config, subject.weights, subject.kv_bytes(name), steps))
        return {"nbytes": asked.nbytes, "macs": asked.macs}

    def _drop(self, name: str, error: PeerError) -> None:
        self.lab.skip(name, error)
        del self._workers[name]

    def _tell(self, run: Run) -> None:
        words = f"{run.experiment} {run.file} {run.round + 1}/{self.lab.args.r} {run.engine}"
        words += f" {run.phase} {run.tokens}"
        words += f" behind {run.depth}" * (run.depth > 0) + f" {run.variant}" * bool(run.variant)
        words += f": {run.rate:.1f} tokens/s, {100 * run.bound:.1f} % of the limit"
        if run.disturbed and run.variant in ("", "quiet"):
            words += f" (others took {run.foreign:.2f} s of processor time meanwhile)"
        print(words, file=sys.stderr)


def check_memory(subject: Subject, engines: Sequence[str], positions: int) -> None:
    kv_bytes = max(map(subject.kv_bytes, engines))
    each = weight_bytes(subject.weights) + positions * kv_bytes + (500 << 20)
    free = free_memory()
    if free is not None and len(engines) * each > free:
        raise UserError(
            f"--engines: {', '.join(engines)} with {subject.path.name} need about"
            f" {len(engines) * each / 1e9:.1f} GB together, {free / 1e9:.1f} GB are free"
        )


def machine(threads: int) -> dict[str, str]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (i.partition(":") for i in info)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model = fields.get("model name", platform.machine())
    return {
        "processor": f"{model} (family {fields.get('cpu family')}, model {fields.get('model')})",
        "cores": f"{os.cpu_count()} cores, {threads} threads used by each engine",
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": platform.system(),
        "huge pages": f"transparent huge pages: {huge_pages()}",
        "python": f"Python {platform.python_version()}",
    }


def huge_pages(path: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> str:
    """always, madvise (those who ask for them) or never: the word in brackets."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"


# The raw file.


def append(raw: Path, kind: str, fields: dict[str, Any] | Run) -> None:
    with raw.open("a") as file:
        file.write(line_of(kind, fields) + "\n")


def open_end(raw: Path) -> None:
    """Makes sure that the file can be gone on with: cuts off a last line that has no end. Raises
    UserError for a file that is something else."""
    if raw.exists():
        read_raw(raw)
        os.truncate(raw, raw.read_bytes().rfind(b"\n") + 1)


# The experiments. Each runs every engine once in a round.


def measure_speed(lab: Lab, path: Path, experiment: str = "speed") -> None:
    avx2 = experiment == "avx2"
    engines = lab.engines(("pronk-avx2", "llama.cpp-avx2") if avx2 else ALL)
    tokens = max(lab.args.p, lab.args.n)
    with lab.open(path, engines, tokens=tokens, limits=engines[0] if avx2 else "pronk") as table:
        table.warm(phase="prefill", tokens=lab.args.p, depth=0, rows=1)
        table.warm(phase="decode", tokens=4, depth=0, rows=1)
        for n in range(lab.args.r):
            for phase, tokens in (("prefill", lab.args.p), ("decode", lab.args.n)):
                for name in table.names:
                    table.run(experiment, n, name, phase, tokens)


def measure_avx2(lab: Lab, path: Path) -> None:
    measure_speed(lab, path, "avx2")


ROWS = (1, 2, 4, 8, 16)


def measure_rows(lab: Lab, path: Path) -> None:
    engines = lab.engines(("pronk",))
    able = [name for name, kind in KINDS_OF_ENGINE.items() if kind.engine.startswith("pronk")]
    for name in engines:
        if name not in able:
            raise UserError(
                f"--engines: {name} runs one sequence only; rows takes {', '.join(able)}"
            )
    with lab.open(path, engines, tokens=lab.args.n, rows=max(ROWS)) as table:
        table.warm(phase="decode", tokens=4, depth=0, rows=max(ROWS))
        for n in range(lab.args.r):
            for name in table.names:
                for count in ROWS:
                    table.run("rows", n, name, "decode", lab.args.n, rows=count)


def measure_depth(lab: Lab, path: Path) -> None:
    deep, tokens = lab.args.depth, max(lab.args.p, lab.args.n)
    with lab.open(path, lab.engines(("pronk", "pronk-int8")), tokens=tokens, depth=deep) as table:
        print(f"computing {deep} tokens once for each engine", file=sys.stderr)
        for at in (deep, 0):
            table.warm(phase="prefill", tokens=lab.args.p, depth=at, rows=1)
            table.warm(phase="decode", tokens=4, depth=at, rows=1)
        for n in range(lab.args.r):
            for name in table.names:
                for phase, tokens in (("prefill", lab.args.p), ("decode", lab.args.n)):
                    for at in (0, deep):
                        table.run("depth", n, name, phase, tokens, depth=at)


def measure_busy(lab: Lab, path: Path) -> None:
    with lab.open(path, lab.engines(ALL), tokens=max(lab.args.n, 8)) as table:
        table.warm(phase="decode", tokens=8, depth=0, rows=1)
        for n in range(lab.args.r):
            for name in table.names:
                for variant in ("quiet", "bound", "free"):
                    other = None if variant == "quiet" else counting(bound=variant == "bound")
                    table.run("busy", n, name, "decode", lab.args.n, variant=variant, beside=other)


@contextmanager
def counting(*, bound: bool) -> Iterator[None]:
    """Another process that keeps a core busy: the last one, or whichever the system chooses."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            if bound:
                os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
            time.sleep(PAUSE)
            yield
        finally:
            process.kill()


def measure_start(lab: Lab, path: Path) -> None:
    left = lab.engines(("pronk", "pronk-cached", "llama.cpp"))
    lab.write("files", {"name": path.name, "about": open_subject(path).about})
    if "pronk-cached" in left:
        start_once(lab, path, "pronk-cached")  # makes the cache
    for n in range(lab.args.r):
        for name in list(left):
            read_through(path)
            try:
                seconds = start_once(lab, path, name)
            except PeerError as error:
                lab.skip(name, error)
                left.remove(name)
                continue
            lab.write("run", Run("start", lab.session, n, path.name, name, "start", seconds, 1, 1))
            print(
                f"start {path.name} {n + 1}/{lab.args.r} {name}: {seconds:.2f} s", file=sys.stderr
            )


def start_once(lab: Lab, path: Path, name: str) -> float:
    """Seconds from before the process to its first token."""
    kind = KINDS_OF_ENGINE[name]
    command = [lab.python(name), str(WORKER), "first", kind.engine, str(path)]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, str(lab.args.threads)], capture_output=True, text=True, errors="replace",
            env=kind.environment(),
        )  # fmt: skip
    except OSError as error:
        raise PeerError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode or not done.stdout:
        raise PeerError(f"ended with {done.returncode}: {last_words(done.stderr)}")
    answer = json.loads(done.stdout)
    clock = answer.pop("clock", 0.0)
    lab.write("engines", {"name": name, "about": kind.described(answer)})
    return float(clock) - began


def read_through(path: Path) -> None:
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


EXPERIMENTS: dict[str, Callable[[Lab, Path], None]] = {
    "speed": measure_speed, "rows": measure_rows, "depth": measure_depth, "busy": measure_busy,
    "avx2": measure_avx2, "start": measure_start,
}  # fmt: skip


def named_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or name not in KINDS_OF_ENGINE:
        raise argparse.ArgumentTypeError(f"{text!r} is not ENGINE=PATH")
    return name, path


def engine_names(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in KINDS_OF_ENGINE:
            known = ", ".join(KINDS_OF_ENGINE)
            raise argparse.ArgumentTypeError(f"unknown engine {name!r}; known are {known}")
    return found


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "page"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--raw", type=Path, required=True, help="JSON lines; runs are appended")
    parser.add_argument("--out", type=Path, help="Markdown page; the plot lies beside it")
    parser.add_argument(
        "--engines", type=engine_names, help="comma-separated, instead of the usual ones"
    )
    parser.add_argument("--python", type=named_path, action="append", default=[])
    parser.add_argument("--note", action="append", default=[], help="a sentence for the page")
    parser.add_argument("-p", type=count, default=512, help="tokens of a prompt")
    parser.add_argument("-n", type=count, default=64, help="tokens to write")
    parser.add_argument("-r", type=count, default=5, help="rounds")
    parser.add_argument("--depth", type=count, default=16_384, help="tokens before those of a run")
    parser.add_argument("--threads", type=count, default=os.cpu_count())
    args = parser.parse_args(argv)
    args.python = dict(args.python)
    page = args.experiment == "page"
    if page == bool(args.files):
        parser.error("FILE: every experiment needs one or more, the page none")
    if page and args.out is None:
        parser.error("--out: the page needs a place")
    if page and not args.raw.is_file():
        parser.error(f"--raw: there is no file {args.raw}")
    for name, path in (("--raw", args.raw), ("--out", args.out)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{name}: there is no folder {path.parent}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        code = 0 if args.experiment == "page" else measure(args)
        if args.note:
            open_end(args.raw)
        for text in args.note:
            append(args.raw, "notes", {"text": text})
        if args.out:
            write_page(args.raw, args.out)
    except UserError as error:
        print(f"cpu_peers: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cpu_peers: {error.filename or args.raw}: {error.strerror}", file=sys.stderr)
        return 2
    return code


def measure(args: argparse.Namespace) -> int:
    """The exit code."""
    lab = Lab(args)
    try:
        for path in args.files:
            EXPERIMENTS[args.experiment](lab, path)
    except KeyboardInterrupt:
        return 130
    except (PronkError, PeerError) as error:
        print(f"cpu_peers: {error}", file=sys.stderr)
        return 2
    if not lab.n_runs:
        print("cpu_peers: nothing was measured", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
