"""Writes model files. So far GGUF version 3, little-endian, tensor by tensor; encoding weights
into a block format is not done here."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, Self

from pronk.backends.formats import KINDS
from pronk.core.errors import UserError

ALIGNMENT: Final = 32

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11
_PACK: Final = {_U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?", _U64: "<Q", _I64: "<q"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written. `name` is GGUF's own; `shape` has the rows first."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """CheckpointError when the columns are no whole number of blocks."""
        return KINDS[self.kind].row_bytes(self.shape[-1]) * prod(self.shape[:-1])


class GgufWriter:
    """Writes the tensors of `specs` in their order:

        with GgufWriter(path, metadata, specs) as out:
            for spec in specs:
                out.write(chunks_of(spec))

    The file appears at `path` when all is written; before that, and after an exception, there is
    nothing. Values of metadata are bool, int, float (stored in 32 bits), str, or lists of one
    type of these.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], specs: Sequence[TensorSpec]
    ) -> None:
        """UserError when the file cannot be written."""
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._left = list(specs)[::-1]
        header = _header(metadata, specs)
        try:
            self._file = self._partial.open("wb")
            self._file.write(header + bytes(-len(header) % ALIGNMENT))
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise self._failed(error) from None

    def write(self, chunks: Iterable[Any]) -> None:
        """The next tensor: buffers (bytes, contiguous uint8 arrays) that add up to its size."""
        spec = self._left.pop()
        written = 0
        try:
            for chunk in chunks:
                written += self._file.write(chunk)
            self._file.write(bytes(-written % ALIGNMENT))
        except OSError as error:
            raise self._failed(error) from None
        assert written == spec.nbytes, (spec, written)

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written: {error.strerror}; nothing was kept")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
            if kind is None:
                assert not self._left, [spec.name for spec in self._left]
                self._partial.replace(self.path)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self._partial.unlink(missing_ok=True)


def _header(metadata: Mapping[str, Any], specs: Sequence[TensorSpec]) -> bytes:
    """Everything before the data: metadata, then name, dimensions, type and offset of tensors."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(specs), len(metadata))]
    for key, value in metadata.items():
        kind = _type_of(value)
        parts += _string(key), struct.pack("<I", kind), _value(kind, value)
    offset = 0
    for spec in specs:
        dims = spec.shape[::-1]
        kind_id = KINDS[spec.kind].ggml_id
        place = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind_id, offset)
        parts += _string(spec.name), place
        offset += spec.nbytes + -spec.nbytes % ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _type_of(value: object) -> int:
    match value:
        case bool():
            return _BOOL
        case int():
            if value < 0:
                return _I32 if value >= -(1 << 31) else _I64
            return _U32 if value < 1 << 32 else _U64
        case float():
            return _F32
        case str():
            return _STRING
        case list():
            return _ARRAY
    raise AssertionError(f"GGUF metadata cannot hold {value!r}")


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _string(value)
    if kind != _ARRAY:
        return struct.pack(_PACK[kind], value)
    # Lists of whole numbers are signed 32-bit, as token types are everywhere.
    element = _type_of(value[0]) if value else _I32
    element = _I32 if element == _U32 else element
    return struct.pack("<IQ", element, len(value)) + b"".join(_value(element, v) for v in value)
