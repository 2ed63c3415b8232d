"""`pronk list`: the models on disk, or all that the catalog knows."""

from typing import Any

import click

from pronk.cli.common import FORMATS, columns, emit, human_bytes, human_count, json_option, note

_FEW = 3
"""Whoever has fewer models may be looking for more."""


@click.command(name="list")
@click.option("--all", "everything", is_flag=True, help="The whole catalog, on disk or not.")
@json_option
def list_(everything: bool, as_json: bool) -> None:
    """List the models on disk."""
    from pronk.checkpoints import cache

    rows = _on_disk()
    if everything:
        rows += _others({row["name"] for row in rows})
    if as_json:
        emit({"models": rows})
    elif rows:
        click.echo(columns([["NAME", "PARAMETERS", "SIZE", "FORMAT", "LICENCE", "ON DISK"],
                            *map(_cells, rows)]))  # fmt: skip
    else:
        note("no models on disk; `pronk pull smollm2-135m` fetches one")
    if as_json:
        return
    if not everything and len(rows) < _FEW:
        note("(`pronk list --all` shows what can be pulled)")
    if kept := cache.folder_bytes(cache.layouts_folder()):
        note(
            f"(packed weights of --layout-cache: {human_bytes(kept)} in {cache.layouts_folder()};"
            " they may be deleted)"
        )


def _on_disk() -> list[dict[str, Any]]:
    from pronk.checkpoints.catalog import CATALOG
    from pronk.checkpoints.pull import on_disk

    rows = []
    for model in on_disk():
        entry = CATALOG.get(model.name)
        rows.append(
            {
                "name": model.name,
                "parameters": entry.parameters if entry else None,
                "bytes": model.nbytes,
                "format": _format(model.path.suffix, [file.path for file in model.files]),
                "licence": model.licence or None,
                "path": str(model.path),
            }
        )
    return rows


def _format(suffix: str, files: list[str]) -> str:
    if suffix.lower() == ".gguf":
        return "gguf"
    return "meta" if any(name.endswith(".pth") for name in files) else "hf"


def _others(names: set[str]) -> list[dict[str, Any]]:
    from pronk.checkpoints.catalog import CATALOG

    rows = []
    for entry in CATALOG.values():
        if entry.name in names:
            continue
        rows.append(
            {
                "name": entry.name,
                "parameters": entry.parameters,
                "bytes": entry.nbytes,
                "format": entry.format,
                "licence": entry.licence.id,
                "path": None,
            }
        )
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        human_count(row["parameters"]) if row["parameters"] else "?",
        human_bytes(row["bytes"]),
        FORMATS[row["format"]],
        row["licence"] or "?",
        row["path"] or "no",
    ]
