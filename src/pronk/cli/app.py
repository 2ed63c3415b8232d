"""The command line: its verbs, and what becomes of a mistake.

Results go to stdout, all else to stderr. Exit 0: done; 2: the user's mistake, told in one line;
1: ours, told in one line as well (`pronk --debug VERB ...` adds the traceback); 130: Ctrl-C.
"""

import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from pronk.cli.bench import bench
from pronk.cli.chat import chat
from pronk.cli.generate import generate
from pronk.cli.list import list_
from pronk.cli.perplexity import perplexity
from pronk.cli.pull import pull
from pronk.cli.rm import rm
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
    """


for _verb in (chat, generate, pull, list_, show, rm, tokenize, bench, perplexity):
    cli.add_command(_verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, that of the process by default; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = False
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
        if debug:
            traceback.print_exc()
        return _fail(_unexpected(error), 1)


def _usage(error: click.ClickException) -> str:
    """click's message as "NAME: what is wrong with its value"."""
    message = error.format_message()
    if isinstance(error, click.BadParameter) and error.param and error.message:
        name = error.param.opts[0] if isinstance(error.param, click.Option) else ""
        message = f"{name or error.param.human_readable_name}: {error.message}"
    return message.rstrip(".")


def _unexpected(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller --ctx or a model with fewer bits a weight"
    return (
        f"unexpected {type(error).__name__}: {error}; this is a bug,"
        " `pronk --debug ...` shows where"
    )


def _fail(message: str, code: int) -> int:
    click.echo(f"pronk: error: {' '.join(message.split())}", err=True)
    return code


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_left()
    return code


def _reader_left() -> int:
    """`pronk ... | head` has seen enough. Python's flush at exit must find no pipe to break."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
