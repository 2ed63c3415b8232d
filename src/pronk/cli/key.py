"""`pronk key`: makes, lists and removes API keys of the server."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pronk.cli.common import columns, emit, json_option, note, span, text, whole
from pronk.core.errors import UserError

if TYPE_CHECKING:
    from pronk.server.keys import Key

_MOST = 10**12


@click.group(invoke_without_command=True)
@click.pass_context
def key(context: click.Context) -> None:
    """Make, list and remove API keys for `serve`.

    FILE is what `pronk serve --api-key-file FILE` reads. A server that runs takes changes of it at
    once.
    """
    if context.invoked_subcommand is None:
        raise UserError("COMMAND: give add, list or rm; `pronk key --help` tells more")


@key.command()
@click.argument("file", type=text)
@click.option("--name", type=text, required=True, help="Whose key it is; for logs and lists.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["inference", "files", "metrics", "admin"]),
    multiple=True,
    help="What it opens; may be repeated (default: inference, files).",
)
@click.option("--rpm", type=whole(1, _MOST), help="Requests a minute (default: no limit).")
@click.option(
    "--tpm",
    type=whole(1, _MOST),
    help="Tokens a minute, of prompts and answers (default: no limit).",
)
@click.option("--concurrency", type=whole(1, _MOST), help="Requests at a time (default: no limit).")
@click.option(
    "--model",
    "models",
    type=text,
    multiple=True,
    help="Name of a model that it may use; may be repeated (default: all).",
)
@click.option(
    "--expires",
    type=span,
    metavar="SPAN",
    help="How long it is valid, such as 12h, 30d or 1y (default: for ever).",
)
@json_option
def add(
    file: str,
    name: str,
    scopes: tuple[str, ...],
    rpm: int | None,
    tpm: int | None,
    concurrency: int | None,
    models: tuple[str, ...],
    expires: int | None,
    as_json: bool,
) -> None:
    """Make a key and print it, this once.

    FILE, made if need be, keeps only a hash of it.
    """  # fmt: skip
    from pronk.server.keys import DEFAULT_SCOPES, change_keys, new_key

    now = int(time.time())
    secret, made = new_key(
        name=name,
        scopes=frozenset(scopes) or DEFAULT_SCOPES,
        now=now,
        expires_at=None if expires is None else now + expires,
        requests_per_minute=rpm,
        tokens_per_minute=tpm,
        max_concurrency=concurrency,
        models=frozenset(models) or None,
    )
    change_keys(Path(file), lambda keys: keys.added(secret, made), create=True)
    if as_json:
        emit({"key": secret, **_shown(made)})
        return
    click.echo(secret)
    note("(shown this once; clients send it as `Authorization: Bearer KEY`)")


@key.command(name="list")
@click.argument("file", type=text)
@json_option
def list_(file: str, as_json: bool) -> None:
    """List the keys of FILE, without the keys themselves."""
    from pronk.server.keys import read_keys

    keys = read_keys(Path(file)).keys
    if as_json:
        emit({"keys": [_shown(one) for one in keys]})
    elif keys:
        head = ["NAME", "SCOPES", "RPM", "TPM", "AT A TIME", "MODELS", "MADE", "EXPIRES"]
        click.echo(columns([head, *map(_cells, keys)]))
    else:
        note(f"no keys in {file}; `pronk key add {file} --name NAME` makes one")


@key.command()
@click.argument("file", type=text)
@click.argument("name", type=text)
@json_option
def rm(file: str, name: str, as_json: bool) -> None:
    """Remove a key from FILE; it opens nothing from then on."""
    from pronk.server.keys import change_keys

    change_keys(Path(file), lambda keys: keys.removed(name))
    if as_json:
        emit({"name": name})
    else:
        click.echo(f"removed the key {name}")


def _shown(key: "Key") -> dict[str, Any]:
    """An entry without its hash."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "max_concurrency": key.max_concurrency,
        "models": None if key.models is None else sorted(key.models),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
    }


def _cells(key: "Key") -> list[str]:
    limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrency)
    return [
        key.name,
        ",".join(sorted(key.scopes)),
        *("-" if limit is None else str(limit) for limit in limits),
        "all" if key.models is None else ",".join(sorted(key.models)),
        _day(key.created_at),
        "never" if key.expires_at is None else _day(key.expires_at),
    ]


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
