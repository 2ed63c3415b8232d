"""What all verbs share: option types, the options of loading and sampling, what their errors say,
and output. Input is in input.py.

Importing this loads nothing but click; what a verb needs is imported inside its function.
"""

import contextlib
import functools
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from pronk.cli.progress import Reporter
from pronk.core.errors import ContextLengthError, UserError

if TYPE_CHECKING:
    from pronk.backends.protocol import KvDtype
    from pronk.checkpoints.catalog import Licence, ModelRef
    from pronk.engine.llm import LLM
    from pronk.engine.replies import Completion

Command: TypeAlias = Callable[..., None]

_THREADS_A_PROCESSOR = 4
"""More cannot be meant."""


# Option types: functions from the text of an option to its value. Their messages name the value and
# the limit; app.py puts the option's name in front. Their own names are what --help shows.


def text(value: str) -> str:
    """Any text; bytes of the command line that are no UTF-8 are refused."""
    data = value.encode("utf-8", "surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise click.BadParameter(f"invalid UTF-8 at byte {error.start} (0x{byte:02x})") from None


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def n(value: str) -> int:
        with contextlib.suppress(ValueError):
            number = int(value)
            if low <= number and (high is None or number <= high):
                return number
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise click.BadParameter(f"{value} is not a whole number {limits}")

    return n


def real(low: float, high: float, *, positive: bool = False) -> Callable[[str], float]:
    """A number from `low` to `high`; `low` itself only if it is not `positive`."""

    def x(value: str) -> float:
        with contextlib.suppress(ValueError):
            number = float(value)
            if low <= number <= high and not (positive and number == low):
                return number
        limits = f"above {low:g} and at most" if positive else f"from {low:g} to"
        raise click.BadParameter(f"{value} is not a number {limits} {high:g}")

    return x


def bias(value: str) -> tuple[int, float]:
    """ID=AMOUNT, what is added to the logit of one token."""
    token, equals, amount = value.partition("=")
    if not equals:
        raise click.BadParameter(f"{value} is not ID=AMOUNT, such as 42=-100")
    try:
        return whole(0)(token), real(-100, 100)(amount)
    except click.BadParameter as error:
        raise click.BadParameter(f"{value} is not ID=AMOUNT: {error.message}") from None


_SPANS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


def span(value: str) -> int:
    """A time span such as 30d, in seconds."""
    number, unit = value[:-1], value[-1:]
    if number.isdecimal() and number.isascii() and unit in _SPANS and 1 <= int(number) <= 10**6:
        return int(number) * _SPANS[unit]
    raise click.BadParameter(f"{value} is not a time span such as 12h, 30d, 8w or 1y")


# Options that several verbs have.


@dataclass(frozen=True, slots=True)
class LoadOptions:
    threads: int | None
    backend: str
    kv_dtype: "KvDtype"
    layout_cache: bool | None


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
    click.option("--threads", type=whole(1, 1024), help="CPU threads (default: all cores)."),
    click.option("--backend", type=click.Choice(["auto", "cpu", "reference"]), default="auto",
                 help="Compiled kernels or plain NumPy (default: auto, the kernels if there)."),
    click.option("--kv-dtype", type=click.Choice(["f32", "f16", "int8"]), default="f16",
                 show_default=True, help="How keys and values are stored."),
    click.option("--layout-cache/--no-layout-cache", default=None,
                 help="Keep the packed weights on disk, as much again as the model, for a faster"
                 " start (default: no, unless PRONK_LAYOUT_CACHE is 1)."),
)  # fmt: skip


def _sampling(temperature: str, top_p: str, max_tokens: str) -> Sequence[Wrap]:
    """The options of sampling; the arguments say what the verb's defaults are."""
    return (
        click.option("--temperature", type=real(0, 100),
                     help=f"0 always takes the likeliest token (default: {temperature})."),
        click.option("--top-p", type=real(0, 1, positive=True),
                     help="Only the likeliest tokens that together reach this probability"
                     f" (default: {top_p})."),
        click.option("--top-k", type=whole(0),
                     help="Only the k likeliest tokens (default: 0, off)."),
        click.option("--min-p", type=real(0, 1),
                     help="Only tokens at least this fraction as likely as the likeliest"
                     " (default: 0, off)."),
        click.option("--repetition-penalty", type=real(0, 100, positive=True),
                     help="Makes tokens seen before less likely (default: 1, off)."),
        click.option("--presence-penalty", type=real(-2, 2),
                     help="Taken off the logit of each token of the answer (default: 0)."),
        click.option("--frequency-penalty", type=real(-2, 2),
                     help="The same, as often as the token occurs (default: 0)."),
        click.option("--logit-bias", type=bias, metavar="ID=X", multiple=True,
                     help="Added to a token's logit; may be repeated."),
        click.option("--stop", type=text, multiple=True,
                     help="Text that ends the answer; may be repeated."),
        click.option("--max-tokens", type=whole(1),
                     help=f"Longest answer in tokens (default: {max_tokens})."),
        click.option("--seed", type=whole(0, 2**63 - 1),
                     help="Same seed, same answer (default: a new one each time)."),
    )  # fmt: skip


context_option: Wrap = click.option(
    "--ctx", type=whole(1), help="Context in tokens (default: the model's, up to 8192)."
)
json_option: Wrap = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout; none if it fails."
)


def load_options(command: Command) -> Command:
    """Adds the options of loading; the command gets them as one argument `load`."""
    return _bundle(command, _LOAD, LoadOptions, "load")


def sampling_options(*, temperature: str, top_p: str, max_tokens: str) -> Wrap:
    """Adds the options of sampling, with the defaults that --help names; the command gets them as
    one argument `sampling`."""
    options = _sampling(temperature, top_p, max_tokens)
    return lambda command: _bundle(command, options, SamplingOptions, "sampling")


def _bundle(
    command: Command,
    options: Sequence[Wrap],
    bundle: type[LoadOptions] | type[SamplingOptions],
    name: str,
) -> Command:
    @functools.wraps(command)
    def bundled(**values: Any) -> None:
        own = {field: values.pop(field) for field in bundle.__slots__}
        command(**values, **{name: bundle(**own)})

    wrapped: Command = bundled
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def load_model(model: str, options: LoadOptions, *, ctx: int | None) -> "LLM":
    """Loads a model for a verb: progress on stderr, and the licence terms on first use."""
    from pronk.checkpoints.catalog import licence_of, resolve_model
    from pronk.engine.llm import LLM

    check_threads(options.threads)
    check_gated(model)
    with Reporter() as progress:
        llm = LLM(
            model,
            ctx=ctx,
            threads=options.threads,
            backend=options.backend,
            kv_dtype=options.kv_dtype,
            layout_cache=options.layout_cache,
            progress=progress,
        )
    show_terms_once(licence_of(resolve_model(model), llm.metadata))
    return llm


def check_threads(threads: int | None) -> None:
    """Refuses a number that can only be slow: each step waits for the slowest thread."""
    limit = _THREADS_A_PROCESSOR * (os.cpu_count() or 1)
    if threads is not None and threads > limit:
        raise UserError(
            f"--threads: {threads} is more than {limit}, {_THREADS_A_PROCESSOR} for each processor"
            " of this machine"
        )


def check_gated(model: str) -> None:
    """Says of a model that is not on disk what it takes to get it, where that is an account."""
    from pronk.checkpoints.catalog import HubSource, resolve_model
    from pronk.checkpoints.pull import find

    ref = resolve_model(model)
    if ref.entry and isinstance(ref.entry.source, HubSource) and ref.entry.source.gated:
        if find(ref):
            return
        raise UserError(
            f"MODEL: {ref.name} is not on disk; fetch it ({ref.entry.nbytes / 1e9:.1f} GB) with"
            f" `pronk pull {ref.name}`, which needs a Hugging Face token and Meta's licence"
            f" accepted at https://huggingface.co/{ref.repo}"
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


def ref_of(model: str) -> "ModelRef":
    from pronk.checkpoints.catalog import resolve_model

    return resolve_model(model)


# What errors say.


@contextlib.contextmanager
def model_is_called(name: str) -> Iterator[None]:
    """Errors about MODEL call it what the verb calls it."""
    try:
        yield
    except UserError as error:
        before, found, words = str(error).partition("MODEL: ")
        if before or not found:
            raise
        raise UserError(f"{name}: {words}") from error


def check_model_argument(verb: str, argument: str) -> None:
    """For a verb with one argument only: refuses what looks like its text, not like its MODEL."""
    from pronk.checkpoints.catalog import (
        DEFAULT_MODEL,
        close_names,
        find_entry,
        looks_like_model,
        unknown_model,
    )

    if find_entry(argument) or looks_like_model(argument):
        return
    if close_names(argument) and not any(map(str.isspace, argument)):
        raise UserError(unknown_model(argument))
    shown = argument if len(argument) <= 40 else f"{argument[:37]}..."
    raise UserError(
        f"MODEL: {shown!r} was taken as MODEL, and no model is called that; for a text:"
        f" pronk {verb} {DEFAULT_MODEL} {shlex.quote(shown)}"
    )


@contextlib.contextmanager
def length_explained(llm: "LLM", *advice: str) -> Iterator[None]:
    """A prompt that does not fit: says what would help here, `advice` first."""
    try:
        yield
    except ContextLengthError as error:
        most = llm.config.context
        ways = ["shorten it", *advice]
        if error.n_context < most:
            ways.append(f"raise --ctx (this model: up to {most})")
        raise UserError(
            f"prompt: {error.n_prompt} tokens do not fit the context of {error.n_context} (one must"
            f" stay free for the answer); {' or '.join(ways)}"
        ) from error


def note_cut(completion: "Completion", context: int, advice: str = "") -> None:
    """Says why an answer ended before its end, if it did."""
    if completion.finish_reason != "length":
        return
    usage = completion.usage
    if usage.prompt_tokens + usage.completion_tokens >= context:
        note(f"(the context of {context} tokens is full{advice})")
    else:
        note(f"(cut after {counted(usage.completion_tokens, 'token')})")


# Output.


def emit(result: Mapping[str, Any]) -> None:
    """The one JSON object of `--json`."""
    click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))


def note(words: str) -> None:
    """A word to the person, on stderr, dim where that is a terminal (and NO_COLOR is not set)."""
    click.echo(words if os.environ.get("NO_COLOR") else click.style(words, dim=True), err=True)


def counted(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


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
