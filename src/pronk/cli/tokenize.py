"""`pronk tokenize`: text to token ids and back."""

import re
from typing import TYPE_CHECKING

import click

from pronk.cli.common import check_gated, check_model_argument, emit, json_option, text
from pronk.cli.input import read_given
from pronk.cli.progress import Reporter
from pronk.core.errors import UserError

if TYPE_CHECKING:
    from pronk.text.tokenizer import Tokenizer


@click.command()
@click.argument("model", type=text)
@click.argument("text", type=text, required=False)
@click.option("--file", "path", type=text, help="Read the text from a file; - is stdin.")
@click.option(
    "--decode",
    "ids",
    type=text,
    metavar="IDS",
    help="Print the text of these ids, given as 1,2,3 or '1 2 3'.",
)
@click.option("--special", is_flag=True, help="Let the text of special tokens become those tokens.")
@click.option("--bos", is_flag=True, help="Begin with the beginning-of-text token.")
@json_option
def tokenize(
    model: str,
    text: str | None,
    path: str | None,
    ids: str | None,
    special: bool,
    bos: bool,
    as_json: bool,
) -> None:
    """Print the token ids of TEXT, or the text of ids.

    Without TEXT and --file the text is what is piped in, with the newline at its end.
    """
    if ids is not None and (text is not None or path is not None or special or bos):
        raise UserError("--decode: goes with no TEXT, --file, --special or --bos")
    if ids is not None:
        tokens = parse_ids(ids)
        decoded = open_tokenizer(model).decode(tokens)
        if as_json:
            emit({"ids": tokens, "text": decoded})
        else:
            click.echo(decoded)
        return
    if text is None and path is None:
        check_model_argument("tokenize", model)
    text = read_given("TEXT", text, path)
    tokenizer = open_tokenizer(model)
    tokens = tokenizer.encode(text, bos=bos, special=special)
    if as_json:
        pieces = [tokenizer.decode([token]) for token in tokens]
        emit({"ids": tokens, "pieces": pieces, "count": len(tokens)})
    else:
        click.echo(" ".join(map(str, tokens)))


def parse_ids(text: str) -> list[int]:
    """Ids separated by commas or spaces, in brackets or not, as `tokenize` and JSON print them."""
    parts = re.split(r"[,\s]+", text.strip().removeprefix("[").removesuffix("]").strip())
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,9}", part):
            raise UserError(f"--decode: {part!r} is not a token id; give ids as 1,2,3")
    return [int(part) for part in parts]


def open_tokenizer(model: str) -> "Tokenizer":
    """The tokenizer of a model, without loading its weights."""
    from pronk.checkpoints.open import open_checkpoint
    from pronk.checkpoints.pull import locate
    from pronk.engine.load import load_tokenizer

    check_gated(model)
    with Reporter() as progress:
        path = locate(model, progress=progress)
    with open_checkpoint(path) as checkpoint:
        return load_tokenizer(checkpoint)
