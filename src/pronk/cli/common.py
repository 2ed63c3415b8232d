"""What all verbs share: option types, the options of loading and sampling, output, progress.

Importing this loads nothing but click; what a verb needs is imported inside its function.
"""

import functools
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import click

from pronk.core.errors import UserError

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from pronk.checkpoints.catalog import Licence, ModelRef
    from pronk.engine.llm import LLM

Command: TypeAlias = Callable[..., None]


# Option types. Each message names the value and the limit; app.py puts the option's name before it.


class Text(click.ParamType):
    """Any text; bytes of the command line that are no UTF-8 are refused."""

    name = "text"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        data = str(value).encode("utf-8", "surrogateescape")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self.fail(f"invalid UTF-8 at byte {error.start} (0x{data[error.start]:02x})", param, ctx)


class Whole(click.ParamType):
    """A whole number from `low` to `high`."""

    name = "n"

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, high

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            number = int(value)
        except ValueError:
            number = self.low - 1
        if number < self.low or (self.high is not None and number > self.high):
            limits = f"from {self.low} to {self.high}" if self.high else f"of at least {self.low}"
            self.fail(f"{value} is not a whole number {limits}", param, ctx)
        return number


class Real(click.ParamType):
    """A number from `low` to `high`; `low` itself only if it is not `positive`."""

    name = "x"

    def __init__(self, low: float, high: float, *, positive: bool = False) -> None:
        self.low, self.high, self.positive = low, high, positive

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not self.low <= number <= self.high or (self.positive and number == self.low):
            limits = f"above {self.low:g} and at most" if self.positive else f"from {self.low:g} to"
            self.fail(f"{value} is not a number {limits} {self.high:g}", param, ctx)
        return number


class Bias(click.ParamType):
    """ID=AMOUNT, what is added to the logit of one token."""

    name = "id=x"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, amount = str(value).partition("=")
        try:
            return Whole(0).convert(token, None, None), Real(-100, 100).convert(amount, None, None)
        except click.BadParameter as error:
            self.fail(f"{value!r} is not ID=AMOUNT: {error.message}", param, ctx)


def read_text(name: str, path: str) -> str:
    """The text of a file ("-": standard input). UserError names the byte that is no UTF-8."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot read {path}: {error.strerror}") from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UserError(
            f"{name}: {path} is not UTF-8: byte {error.start} is 0x{byte:02x} ({error.reason})"
        ) from None


def read_prompt(prompt: str | None, path: str | None) -> str:
    """PROMPT or the text of --file, whichever was given."""
    if (prompt is None) == (path is None):
        raise UserError("PROMPT: give either PROMPT or --file FILE")
    text = prompt if prompt is not None else read_text("--file", path or "-")
    if not text:
        raise UserError("PROMPT: it is empty; at least one character is needed")
    return text


# Options that several verbs have.


@dataclass(frozen=True, slots=True)
class LoadOptions:
    threads: int | None
    backend: str
    kv_dtype: str


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """None, or nothing, stands for the model's own default."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: tuple[tuple[int, float], ...]
    stop: tuple[str, ...]
    max_tokens: int | None
    seed: int | None

    def given(self) -> dict[str, Any]:
        """What the user set, as keyword arguments of `LLM.chat` and `LLM.generate`."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["logit_bias"] = dict(self.logit_bias)
        values["stop"] = list(self.stop)
        return {name: value for name, value in values.items() if value not in (None, {}, [])}


Wrap: TypeAlias = Callable[[Command], Command]

_LOAD: Sequence[Wrap] = (
    click.option("--threads", type=Whole(1, 1024), help="CPU threads (default: all cores)."),
    click.option("--backend", type=click.Choice(["auto", "cpu", "reference"]), default="auto",
                 help="Compiled kernels or plain NumPy."),
    click.option("--kv-dtype", type=click.Choice(["f32", "f16", "int8"]), default="f16",
                 help="How keys and values are stored."),
)  # fmt: skip

_SAMPLING: Sequence[Wrap] = (
    click.option("--temperature", type=Real(0, 100), help="0 always takes the likeliest token."),
    click.option("--top-p", type=Real(0, 1, positive=True),
                 help="Only the likeliest tokens that together reach this probability."),
    click.option("--top-k", type=Whole(0), help="Only the k likeliest tokens; 0 is off."),
    click.option("--min-p", type=Real(0, 1),
                 help="Only tokens at least this fraction as likely as the likeliest."),
    click.option("--repetition-penalty", type=Real(0, 100, positive=True),
                 help="Makes tokens seen before less likely; 1 is off."),
    click.option("--presence-penalty", type=Real(-2, 2),
                 help="Taken off the logit of each token of the answer."),
    click.option("--frequency-penalty", type=Real(-2, 2),
                 help="The same, as often as the token occurs."),
    click.option("--logit-bias", type=Bias(), multiple=True,
                 help="Added to a token's logit; may be repeated."),
    click.option("--stop", type=Text(), multiple=True,
                 help="Text that ends the answer; may be repeated."),
    click.option("--max-tokens", type=Whole(1), help="Longest answer in tokens."),
    click.option("--seed", type=Whole(0, 2**63 - 1), help="Same seed, same answer."),
)  # fmt: skip

context_option: Wrap = click.option(
    "--ctx", type=Whole(1), help="Context in tokens (default: the model's, up to 8192)."
)
json_option: Wrap = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout."
)


def load_options(command: Command) -> Command:
    """Adds the options of loading; the command gets them as one argument `load`."""
    return _bundle(command, _LOAD, LoadOptions, "load")


def sampling_options(command: Command) -> Command:
    """Adds the options of sampling; the command gets them as one argument `sampling`."""
    return _bundle(command, _SAMPLING, SamplingOptions, "sampling")


def _bundle(
    command: Command,
    options: Sequence[Wrap],
    bundle: type[LoadOptions] | type[SamplingOptions],
    name: str,
) -> Command:
    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        own = {field: values.pop(field) for field in bundle.__slots__}
        command(**values, **{name: bundle(**own)})

    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper


def load_model(
    model: str, options: LoadOptions, *, ctx: int | None, max_batch: int | None = None
) -> "LLM":
    """Loads a model for a verb: progress on stderr, and the licence terms on first use."""
    from pronk.checkpoints.catalog import resolve_model
    from pronk.engine.llm import LLM

    show_terms_once(resolve_model(model).licence)
    arguments: dict[str, Any] = {} if max_batch is None else {"max_batch": max_batch}
    with shown_progress() as progress:
        return LLM(
            model,
            ctx=ctx,
            threads=options.threads,
            backend=options.backend,
            kv_dtype=options.kv_dtype,
            progress=progress,
            **arguments,
        )


def show_terms_once(licence: "Licence | None") -> None:
    """Prints on stderr, the first time on this machine, what a Llama licence asks to be shown."""
    from pronk.checkpoints import cache, catalog

    if licence is None or not (lines := catalog.licence_terms(licence)):
        return
    shown = cache.cache_root() / "notices" / licence.id
    if shown.exists():
        return
    note("\n".join([*lines, "(shown once; `pronk show MODEL` repeats it)"]))
    try:
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.touch()
    except OSError:
        return  # a cache that cannot be written only means that the terms are shown again


def ref_of(text: str) -> "ModelRef":
    from pronk.checkpoints.catalog import resolve_model

    return resolve_model(text)


# Output.


def emit(result: Mapping[str, Any]) -> None:
    """The one JSON object of `--json`."""
    click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """A word to the person, on stderr, dim where that is a terminal."""
    click.secho(text, err=True, dim=True)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table: columns two spaces apart; numbers of a column to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [all(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


FORMATS = {"gguf": "GGUF", "hf": "Hugging Face", "meta": "Meta"}


def human_bytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def human_count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


# Progress.

_PATIENCE_S = 0.5
"""Work that is over before this is not worth a word."""
_PLAIN_EVERY_S = 15.0
"""How often progress is told where stderr is a file or a pipe."""


class Reporter:
    """A `Progress` for people: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # downloads report from a thread of their own
        self._what = ""
        self._since = self._said = 0.0
        self._bar: ProgressBar[int] | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        with self._lock:
            now = time.monotonic()
            if what != self._what:
                self._end()
                self._what, self._since, self._said = what, now, 0.0
            if now - self._since < _PATIENCE_S and total:
                return
            if total and sys.stderr.isatty():
                self._draw(done, total)
            else:
                self._say(done, total, now)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = click.progressbar(
                length=total, label=self._what, file=sys.stderr, show_pos=False, width=30
            )
            self._bar.__enter__()
        self._bar.update(done - self._bar.pos)

    def _say(self, done: int, total: int, now: float) -> None:
        if self._said and now - self._said < _PLAIN_EVERY_S and done < total:
            return
        self._said = now
        percent = f" {100 * done // total} %" if total else ""
        click.echo(f"{self._what}{percent}", err=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._end()


@contextmanager
def shown_progress() -> Iterator[Reporter]:
    """Progress of what runs inside, on stderr."""
    with Reporter() as reporter:
        yield reporter
