"""An opened model file or folder, whatever its format: configuration, metadata, tensors.

Opening checks everything and reads no weights; `get` gives the raw rows of one tensor.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

from pronk.backends.formats import KINDS
from pronk.backends.protocol import U8, RawTensor
from pronk.checkpoints.mapped import MappedFile, quoted
from pronk.checkpoints.names import Format, is_ignored, native_name, tensor_names, tensor_shape
from pronk.core.config import ModelConfig
from pronk.core.errors import CheckpointError

Read: TypeAlias = Callable[[], tuple[U8, Callable[[], None]]]
"""Gives raw rows `[rows, bytes_per_row]` and what to call once they are not needed any more."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that a file holds. A vector has one row. `kind` may be one that Pronk cannot read:
    `check` refuses those of the tensors that the model needs."""

    kind: str
    shape: tuple[int, ...]
    nbytes: int
    read: Read


class Checkpoint:
    """A model on disk. `metadata` is what its file says: GGUF's key/values, or the contents of
    config.json or params.json."""

    def __init__(
        self,
        path: Path,
        fmt: Format,
        config: ModelConfig,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Stored],
        files: Sequence[MappedFile],
    ) -> None:
        """`tensors` has the file's own names and is checked against `config` here."""
        self.path = path
        self.format: Format = fmt
        self.config = config
        self.metadata = metadata
        self._tensors = check(path, fmt, config, tensors)
        self._files = files

    def names(self) -> list[str]:
        """Canonical names (see names.py); no "output" when the embeddings are tied."""
        return list(self._tensors)

    def get(self, name: str) -> RawTensor:
        """Raw rows: a view of the file where that is possible, else a copy (Hugging Face's wq and
        wk, Meta's shards). CheckpointError for a tensor that the checkpoint does not have."""
        stored = self._stored(name)
        data, release = stored.read()
        return RawTensor(name, stored.kind, self.shape(name), data, release)

    def kind(self, name: str) -> str:
        """Block format of a tensor, without reading it."""
        return self._stored(name).kind

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, columns) of a tensor, without reading it."""
        return tensor_shape(name, self.config)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored, without reading it."""
        return self._stored(name).nbytes

    def _stored(self, name: str) -> Stored:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: the model has no tensor {quoted(name)}")
        return self._tensors[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(stored.nbytes for stored in self._tensors.values())

    def files(self) -> list[tuple[str, int, int]]:
        """Path (links followed), size and time of change in nanoseconds of each file with weights,
        as it was when it was opened; nothing once they are closed."""
        open_files = [file for file in self._files if file.size]
        return [(str(file.path.resolve()), file.size, file.mtime_ns) for file in open_files]

    def kinds(self) -> dict[str, int]:
        """How many tensors each block format has, the most frequent first."""
        return dict(Counter(stored.kind for stored in self._tensors.values()).most_common())

    def close(self) -> None:
        """Closes the files; tensors that were handed out stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check(
    path: Path, fmt: Format, config: ModelConfig, tensors: Mapping[str, Stored]
) -> dict[str, Stored]:
    """`tensors` by canonical name. CheckpointError for a tensor that is missing, has another shape
    than `config` asks for, is of an unsupported kind, or is one that Llama does not have."""
    found = {}
    left = dict(tensors)
    for name in tensor_names(config):
        native = native_name(name, fmt)
        stored = left.pop(native, None)
        if stored is None:
            raise CheckpointError(f"{path}: tensor {native!r} is missing")
        _check_tensor(path, native, stored, tensor_shape(name, config))
        found[name] = stored
    if config.tied_embeddings:
        left.pop(native_name("output", fmt), None)
    for native in left:
        if not is_ignored(native, fmt):
            raise CheckpointError(
                f"{path}: tensor {quoted(native)} is no part of a Llama model of"
                f" {config.n_layers} layers"
            )
    return found


def _check_tensor(path: Path, native: str, stored: Stored, expected: tuple[int, int]) -> None:
    shape = (1, *stored.shape) if expected[0] == 1 and len(stored.shape) == 1 else stored.shape
    if shape != expected:
        wanted = expected[1:] if expected[0] == 1 else expected
        raise CheckpointError(
            f"{path}: tensor {native!r} has shape {list(stored.shape)},"
            f" the configuration asks for {list(wanted)}"
        )
    if stored.kind not in KINDS:
        raise CheckpointError(
            f"{path}: tensor {native!r} is stored as {stored.kind}, which is not supported"
            f" (supported: {', '.join(KINDS)})"
        )
