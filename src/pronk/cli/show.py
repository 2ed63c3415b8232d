"""`pronk show`: what a model is, from the catalog and from its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pronk.cli.common import (
    FORMATS,
    emit,
    human_bytes,
    human_count,
    json_option,
    model_is_called,
    ref_of,
    text,
)
from pronk.cli.printable import one_line, printable
from pronk.core.errors import UserError

if TYPE_CHECKING:
    from pronk.checkpoints.catalog import Licence, ModelRef
    from pronk.checkpoints.checkpoint import Checkpoint
    from pronk.core.config import ModelConfig


@click.command()
@click.argument("name", type=text)
@json_option
@model_is_called("NAME")
def show(name: str, as_json: bool) -> None:
    """Show what a model is: size, format, licence, chat template.

    NAME is a catalog name, a Hugging Face id or a path.
    """
    from pronk.checkpoints.catalog import licence_terms

    facts, licence = describe(ref_of(name))
    if as_json:
        emit(facts | {"licence_terms": licence_terms(licence) if licence else []})
        return
    for label, value in _lines(facts):
        click.echo(f"{label:<14}{one_line(value)}")
    if template := facts.get("chat_template"):
        click.echo(f"\nchat template:\n{printable(template.rstrip())}")
    if licence and (terms := licence_terms(licence)):
        click.echo("\n" + "\n".join(terms))


def describe(ref: "ModelRef") -> tuple[dict[str, Any], "Licence | None"]:
    """The facts of a model as JSON values; those that only its files tell are missing where it is
    not on disk."""
    from pronk.checkpoints.open import open_checkpoint
    from pronk.checkpoints.pull import find

    path = ref.path
    if path is None and (found := find(ref)):
        path = found.path
    if path is None:
        return _catalog_facts(ref), ref.licence
    with open_checkpoint(path) as checkpoint:
        licence, licence_id = _licence(ref, checkpoint)
        return {
            "name": ref.name,
            "path": str(path),
            "licence": licence_id,
            "licence_url": licence.url if licence else None,
            **_file_facts(checkpoint),
        }, licence


def _catalog_facts(ref: "ModelRef") -> dict[str, Any]:
    entry = ref.entry
    if entry is None:
        raise UserError(f"NAME: {ref.name} is not on disk; `pronk pull {ref.name}` fetches it")
    return {
        "name": entry.name,
        "path": None,
        "licence": entry.licence.id,
        "licence_url": entry.licence.url,
        "format": entry.format,
        "parameters": entry.parameters,
        "bytes": entry.nbytes,
        "context": entry.context,
    }


def _licence(ref: "ModelRef", checkpoint: "Checkpoint") -> tuple["Licence | None", str | None]:
    """The licence as far as Pronk knows it, and its id as far as the file tells."""
    from pronk.checkpoints.catalog import licence_of

    licence = licence_of(ref, checkpoint.metadata)
    stated = checkpoint.metadata.get("general.license")
    return licence, licence.id if licence else stated if isinstance(stated, str) else None


def _file_facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    config = checkpoint.config
    tokenizer, template = _tokenizer_facts(checkpoint)
    return {
        "format": checkpoint.format,
        "parameters": config.n_params,
        "bytes": checkpoint.nbytes,
        "tensors": checkpoint.kinds(),
        "context": config.context,
        "layers": config.n_layers,
        "dim": config.dim,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "ffn_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tied_embeddings,
        "rope": _rope(config),
        "tokenizer": tokenizer,
        "chat_template": template,
    }


def _rope(config: "ModelConfig") -> dict[str, Any]:
    scaling = config.rope_scaling
    return {
        "theta": config.rope_theta,
        "scaling": None
        if scaling is None
        else {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_context": scaling.original_context,
        },
        "largest_divisor": max(config.rope_divisors) if config.rope_divisors else None,
    }


def _tokenizer_facts(checkpoint: "Checkpoint") -> tuple[str, str | None]:
    """The kind of the vocabulary and the chat template, or why there is none of them."""
    from pronk.engine.load import load_tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint)
    except UserError as error:
        return f"none: {error}", None
    kind = _tokenizer_kind(checkpoint.format, checkpoint.metadata, checkpoint.path)
    return f"{kind}, {tokenizer.vocab_size} tokens", tokenizer.chat_template


def _tokenizer_kind(fmt: str, metadata: Mapping[str, Any], path: Path) -> str:
    if fmt == "gguf":
        pre = metadata.get("tokenizer.ggml.pre", "default")
        return f"{metadata.get('tokenizer.ggml.model')} BPE in the file, pre-tokenizer {pre}"
    names = ("tokenizer.json", "tokenizer.model")
    return next((name for name in names if (path / name).exists()), names[0])


def _lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts for people."""
    lines = [
        ("name", facts["name"]),
        ("on disk", facts["path"] or f"no; `pronk pull {facts['name']}` fetches it"),
        ("format", FORMATS[facts["format"]]),
        ("parameters", human_count(facts["parameters"])),
        ("weights", human_bytes(facts["bytes"])),
        ("context", f"{facts['context']} tokens"),
        ("licence", " ".join(filter(None, (facts["licence"], facts["licence_url"]))) or "not told"),
    ]
    if "tensors" in facts:
        lines += _file_lines(facts)
    return lines


def _file_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["tensors"].items())
    tied = "tied" if facts["tied_embeddings"] else "separate"
    rope, scaling = facts["rope"], facts["rope"]["scaling"]
    scaled = "not scaled"
    if scaling:
        scaled = f"scaled by {scaling['factor']:g} from {scaling['original_context']} positions"
    elif rope["largest_divisor"]:
        scaled = f"scaled by up to {rope['largest_divisor']:g} (table in the file)"
    return [
        ("tensors", kinds),
        (
            "shape",
            f"{facts['layers']} layers, width {facts['dim']}, hidden {facts['ffn_dim']},"
            f" {facts['heads']} heads of {facts['head_dim']} sharing {facts['kv_heads']}"
            " key/value heads",
        ),
        ("embeddings", f"{facts['vocab_size']} tokens, output {tied}"),
        ("rope", f"theta {rope['theta']:g}, {scaled}"),
        ("tokenizer", facts["tokenizer"]),
    ]
