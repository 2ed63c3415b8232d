"""The command line: its verbs, and what becomes of a mistake.

Results go to stdout, all else to stderr. Exit 0: done; 2: the user's mistake, told in one line;
1: ours, told in one line as well (`pronk --debug VERB ...` adds the traceback); 130: Ctrl-C.
"""

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from pronk.cli.bench import bench
from pronk.cli.chat import chat
from pronk.cli.generate import generate
from pronk.cli.key import key
from pronk.cli.list import list_
from pronk.cli.perplexity import perplexity
from pronk.cli.printable import one_line
from pronk.cli.pull import pull
from pronk.cli.rm import rm
from pronk.cli.serve import serve
from pronk.cli.show import show
from pronk.cli.tokenize import tokenize
from pronk.core.errors import PronkError


def _print_version(context: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from pronk import __version__

        click.echo(f"pronk {__version__}")
        context.exit()


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
)
@click.option("--debug", is_flag=True, help="Show the traceback of an unexpected error.")
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def cli(debug: bool) -> None:
    """Run Llama models on this computer.

    MODEL is a catalog name (smollm2-135m, llama-3.1-8b-instruct, ...; see `pronk list --all`), a
    Hugging Face id (owner/name), or a path to a GGUF file, a Hugging Face folder or a Meta folder.

    Models are kept in ~/.cache/pronk (under XDG_CACHE_HOME where that is set; on macOS in
    ~/Library/Caches/pronk), those of Hugging Face in its own cache (HF_HOME). With --layout-cache
    (or PRONK_LAYOUT_CACHE=1) packed weights are kept there, too, in layouts/, which may be deleted
    at any time.
    """


for _verb in (chat, generate, pull, list_, show, rm, tokenize, bench, perplexity, key, serve):
    cli.add_command(_verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, that of the process by default; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = False
    if sys.stderr is None:  # closed, as stdout below: whoever started us reads no words
        sys.stderr = io.StringIO()
    if sys.stdout is None:
        return _fail("the output cannot be written: stdout is closed", 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows no emoji
    try:
        with cli.make_context("pronk", arguments or ["--help"]) as context:
            debug = context.params["debug"]
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as stop:
        return _flushed(stop.exit_code)
    except click.ClickException as error:
        return _fail(_usage(error), 2)
    except PronkError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\npronk: interrupted", err=True)
        return 130
    except BrokenPipeError:
        return _reader_left()
    except Exception as error:  # the one place where a bug of ours becomes a line
        if isinstance(error, OSError) and _is_of_output(error):
            return _output_failed(error)
        if debug:
            traceback.print_exc()
        return _fail(_unexpected(error), 1)


def _usage(error: click.ClickException) -> str:
    """click's message as "NAME: what is wrong with its value"."""
    message = error.format_message()
    if isinstance(error, click.BadParameter) and error.param and error.message:
        name = error.param.opts[0] if isinstance(error.param, click.Option) else ""
        message = f"{name or error.param.human_readable_name}: {error.message}"
    elif message.startswith("Got unexpected extra argument") and _takes_text(error):
        message = f"{message.rstrip('.')}; a text of several words needs quotes"
    return message.rstrip(".")


def _takes_text(error: click.ClickException) -> bool:
    command = error.ctx.command if isinstance(error, click.UsageError) and error.ctx else None
    return command is not None and any(p.name in ("prompt", "text") for p in command.params)


def _unexpected(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller --ctx or a model with fewer bits a weight"
    return (
        f"unexpected {type(error).__name__}: {error}; this is a bug,"
        " `pronk --debug ...` shows where"
    )


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be as full as stdout; the code still tells
        click.echo(f"pronk: error: {one_line(message)}", err=True)
    return code


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_left()
    except OSError as error:
        return _output_failed(error)
    return code


def _reader_left() -> int:
    """`pronk ... | head` has seen enough."""
    _discard_output()
    return 0


def _is_of_output(error: OSError) -> bool:
    """Whether an error is of writing to stdout: what could not be written still cannot."""
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _output_failed(error: OSError) -> int:
    _discard_output()
    return _fail(f"the output cannot be written: {error.strerror or error}", 1)


def _discard_output() -> None:
    """Python's flush at exit must find nothing to fail at."""
    with contextlib.suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
