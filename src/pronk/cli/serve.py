"""`pronk serve`: the HTTP server."""

import dataclasses
import functools
import ipaddress
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pronk.cli.common import (
    LoadOptions,
    check_gated,
    check_threads,
    context_option,
    load_options,
    model_is_called,
    note,
    real,
    text,
    whole,
)
from pronk.core.errors import UserError

if TYPE_CHECKING:
    from pronk.server.service import Service
    from pronk.server.settings import ServerSettings

_DAY = 86_400


def pair(value: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, rest = text(value).partition("=")
    if not (name and equals and rest):
        raise click.BadParameter(f"{value} is not NAME=VALUE")
    return name, rest


@click.command()
@click.argument("models", metavar="[MODEL]...", type=text, nargs=-1)
@click.option("--host", type=text, default="127.0.0.1", show_default=True, help="Address.")
@click.option("--port", type=whole(0, 65535), default=8000, show_default=True, help="0: any free.")
@click.option(
    "--api-key-file",
    type=text,
    metavar="FILE",
    help="Keys, made by `pronk key add FILE`; every route then wants one.",
)
@click.option(
    "--no-auth",
    is_flag=True,
    help="Serve other machines without keys, for everybody who can reach this one.",
)
@click.option(
    "--alias",
    "aliases",
    type=pair,
    metavar="NAME=MODEL",
    multiple=True,
    help="A further name of a model; may be repeated.",
)
@click.option(
    "--adapter",
    "adapters",
    type=pair,
    metavar="NAME=PATH",
    multiple=True,
    help="A LoRA adapter (PEFT folder) of the first model, asked for as NAME; may be repeated.",
)
@click.option(
    "--draft",
    type=text,
    metavar="MODEL",
    help="A smaller model of the same vocabulary that guesses for the first model.",
)
@context_option
@click.option(
    "--max-batch",
    type=whole(1, 4096),
    default=16,
    show_default=True,
    help="Most requests that are computed together.",
)
@click.option(
    "--max-queue",
    type=whole(1),
    default=256,
    show_default=True,
    help="Most requests in flight, running or waiting; further ones get 503.",
)
@click.option(
    "--kv-disk",
    type=real(0, 1e6),
    metavar="GB",
    default=4,
    show_default=True,
    help="Disk for prompts that may come again, also after a restart; 0: none.",
)
@click.option(
    "--data-dir",
    type=text,
    metavar="FOLDER",
    help="Files, batches, stored responses (default: ~/.cache/pronk/server).",
)
@click.option(
    "--database",
    type=text,
    metavar="URL",
    help="Where they are listed, such as postgresql+psycopg://... (default: SQLite).",
)
@click.option(
    "--timeout",
    type=real(0, _DAY, positive=True),
    metavar="SECONDS",
    help="Give a request up after this long (default: never).",
)
@click.option(
    "--drain",
    type=real(0, _DAY),
    metavar="SECONDS",
    default=30,
    show_default=True,
    help="How long requests may go on when the server is told to stop.",
)
@click.option(
    "--idle-unload",
    type=real(0, 365 * _DAY),
    metavar="SECONDS",
    help="Unload a model unused for so long (default: only when memory is short).",
)
@click.option(
    "--max-body",
    type=whole(1, 1 << 20),
    metavar="MB",
    default=16,
    show_default=True,
    help="Largest request, files apart.",
)
@click.option(
    "--share-prompts",
    is_flag=True,
    help="Keys share what was computed for prompts that begin alike; they could then find out how"
    " others' prompts begin.",
)
@click.option("--tls-cert", type=text, metavar="FILE", help="Certificate chain, PEM.")
@click.option("--tls-key", type=text, metavar="FILE", help="Its private key, PEM.")
@click.option(
    "--allow-origin",
    "origins",
    type=text,
    metavar="ORIGIN",
    multiple=True,
    help="Web pages of this origin may call the server; may be repeated.",
)
@click.option(
    "--allow-host",
    "hosts",
    type=text,
    metavar="NAME",
    multiple=True,
    help="Answer to this name without keys, too (addresses and local names always work).",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="One line, or one JSON object, a request.",
)
@click.option("--otlp-endpoint", type=text, metavar="URL", help="Send OpenTelemetry traces there.")
@load_options
def serve(
    models: tuple[str, ...],
    load: LoadOptions,
    ctx: int | None,
    max_batch: int,
    kv_disk: float,
    draft: str | None,
    adapters: tuple[tuple[str, str], ...],
    no_auth: bool,
    tls_cert: str | None,
    tls_key: str | None,
    **flags: Any,
) -> None:
    """Serve models over HTTP: a chat page and several APIs.

    The APIs are those of OpenAI, Anthropic and Ollama.

    Without MODEL all models on disk can be asked for, and the default model (smollm2-135m), which
    is fetched on first use, is loaded at once. With MODELs these, the first at once. Others are
    loaded when they are asked for, and unloaded when memory is short.

    Ctrl-C stops it: requests in flight may end, a second Ctrl-C ends them.
    """  # fmt: skip
    check_threads(load.threads)
    settings = _settings(flags)
    _check_exposure(settings, no_auth)
    _check_tls(tls_cert, tls_key)
    options = {
        "ctx": ctx,
        "roomy": True,
        "max_batch": max_batch,
        "threads": load.threads,
        "backend": load.backend,
        "kv_dtype": load.kv_dtype,
        "layout_cache": load.layout_cache,
        "kv_disk_bytes": int(kv_disk * 1e9),
    }
    sources = list(models) or _all_models()
    for source in models:
        check_gated(source)
    if draft is not None:
        from pronk.checkpoints.catalog import resolve_model

        with model_is_called("--draft"):
            resolve_model(draft)
    folders = {name: Path(os.path.expanduser(path)) for name, path in adapters}

    from pronk.server.app import create_app
    from pronk.server.run import run

    make_app = functools.partial(
        create_app, settings, sources, options=options, adapters=folders, draft=draft
    )
    run(settings, make_app, (tls_cert, tls_key), _greeting(settings))


def _settings(flags: dict[str, Any]) -> "ServerSettings":
    from pronk.server.origins import check_host_name, check_origin
    from pronk.server.settings import ServerSettings

    log_format: Literal["text", "json"] = flags["log_format"]
    settings = ServerSettings(
        host=flags["host"],
        port=flags["port"],
        database=flags["database"],
        api_key_file=_path(flags["api_key_file"]),
        aliases=dict(flags["aliases"]),
        max_body_bytes=flags["max_body"] << 20,
        max_queue=flags["max_queue"],
        request_timeout=flags["timeout"],
        drain_seconds=flags["drain"],
        idle_unload=flags["idle_unload"],
        log_format=log_format,
        otlp_endpoint=flags["otlp_endpoint"],
        share_prompts=flags["share_prompts"],
        allow_hosts=tuple(map(check_host_name, flags["hosts"])),
        allow_origins=tuple(map(check_origin, flags["origins"])),
    )
    if flags["data_dir"] is not None:
        folder = Path(os.path.expanduser(flags["data_dir"]))
        settings = dataclasses.replace(settings, data_dir=folder)
    if settings.api_key_file is None:
        settings = dataclasses.replace(settings, control_token=os.urandom(16).hex())
    return settings


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(os.path.expanduser(text))


def _check_exposure(settings: "ServerSettings", no_auth: bool) -> None:
    """A server without keys that other machines can reach must be what was meant."""
    if settings.api_key_file is None and not _is_local(settings.host) and not no_auth:
        raise UserError(
            f"--host: {settings.host} lets other machines in, and there are no keys; make one with"
            " `pronk key add keys.json --name ME` and give --api-key-file keys.json, or say"
            " --no-auth"
        )
    if no_auth and settings.api_key_file is not None:
        raise UserError("--no-auth: contradicts --api-key-file")
    if settings.allow_hosts and settings.api_key_file is not None:
        raise UserError("--allow-host: not needed with --api-key-file; every name is answered then")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.casefold() == "localhost"


def _check_tls(cert: str | None, key: str | None) -> None:
    if (cert is None) != (key is None):
        given, missing = ("--tls-cert", "--tls-key") if cert else ("--tls-key", "--tls-cert")
        raise UserError(f"{given}: needs {missing}, too")
    for name, path in (("--tls-cert", cert), ("--tls-key", key)):
        if path is not None and not os.access(os.path.expanduser(path), os.R_OK):
            raise UserError(f"{name}: {path} cannot be read")
    if cert is not None and key is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            files = os.path.expanduser(cert), os.path.expanduser(key)
            context.load_cert_chain(*files, password="")  # a server has nobody to ask for one
        except ssl.SSLError as error:
            why = (error.reason or "not PEM").replace("_", " ").lower()
            raise UserError(
                f"--tls-cert: {cert} and {key} are no certificate and its key: {why}"
            ) from None


def _all_models() -> list[str]:
    """The default model, then all that are on disk."""
    from pronk.checkpoints.catalog import DEFAULT_MODEL
    from pronk.checkpoints.pull import on_disk

    return list(dict.fromkeys([DEFAULT_MODEL, *(model.name for model in on_disk())]))


def _greeting(settings: "ServerSettings") -> Any:
    """What a person wants to know once the server is ready."""

    def greet(service: "Service", address: str) -> None:
        names = ", ".join(entry.name for entry in service.models)
        note(f"serving {names} at {address}")
        note(f"  page {address}/   OpenAI {address}/v1   Anthropic and Ollama {address}")
        if settings.control_token is not None:
            note(f"  control token (for loading and unloading): {settings.control_token}")

    return greet
