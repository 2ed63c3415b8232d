"""Opens a model on disk, whichever format it has. The formats themselves are in gguf.py,
safetensors.py and meta.py."""

from pathlib import Path

from pronk.checkpoints.checkpoint import Checkpoint, Stored
from pronk.core.errors import CheckpointError

__all__ = ["Checkpoint", "Stored", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """A GGUF file, a Hugging Face folder (config.json, *.safetensors) or a Meta folder
    (params.json, consolidated.*.pth), told apart by what they hold, not by their names.

    Everything is checked, no weights are read. CheckpointError in one line names the file, what
    is wrong with it and what was expected.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    raise CheckpointError(f"{path}: no such file or folder")


def _open_folder(path: Path) -> Checkpoint:
    files = sorted(entry.name for entry in path.iterdir())
    if "config.json" in files and any(name.endswith(".safetensors") for name in files):
        from pronk.checkpoints.safetensors import open_hf

        return open_hf(path)
    if "params.json" in files and any(_is_shard(name) for name in files):
        from pronk.checkpoints.meta import open_meta

        return open_meta(path)
    raise CheckpointError(f"{path}: {_folder_advice(files)}")


def _is_shard(name: str) -> bool:
    return name.startswith("consolidated.") and name.endswith(".pth")


def _folder_advice(files: list[str]) -> str:
    """What is missing in a folder that is no model, as precisely as its files tell."""
    gguf = [name for name in files if name.endswith(".gguf")]
    if gguf:
        return f"the folder holds GGUF files, name one of them: {', '.join(gguf[:5])}"
    for needed, weights in (
        ("config.json", [name for name in files if name.endswith(".safetensors")]),
        ("params.json", [name for name in files if _is_shard(name)]),
    ):
        if weights:
            return f"the folder has {weights[0]} but no {needed}"
    if any(name.endswith(".bin") for name in files):
        return "the weights are .bin pickles; only GGUF, .safetensors and Meta's .pth are read"
    return (
        "no model in this folder: neither config.json with *.safetensors"
        " nor params.json with consolidated.*.pth"
    )


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from pronk.checkpoints.gguf import open_gguf

        return open_gguf(path)
    if path.suffix in (".safetensors", ".pth"):
        raise CheckpointError(f"{path}: name the folder that holds this file and its configuration")
    raise CheckpointError(f"{path}: not a GGUF file: it starts with {magic!r}, not with b'GGUF'")
