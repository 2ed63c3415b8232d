"""Typed look-ups in the metadata of a model file, with errors that name file, key and value."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pronk.core.errors import CheckpointError

_T = TypeVar("_T", int, bool, str)

_MAX_HEAD_DIM = 65_536
"""Far above any model (128); keeps a damaged head size from asking for a table of gigabytes."""


def brief(value: object) -> str:
    """A value out of a file, made safe for a one-line message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


class Fields:
    """A mapping whose values have no known types. A key that is absent or null takes its default;
    without a default it must be there."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        """`path` is named in every error."""
        self.path, self.values = path, values

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at most 64 bits."""
        value = self._typed(key, default, int, "a whole number")
        if abs(value) >= 1 << 64:
            raise CheckpointError(f"{self.path}: {key} must be below 2^64, got {brief(value)}")
        return value

    def head_dim(self, key: str, default: int | None = None) -> int:
        """A head size that tables may be made for; ModelConfig says what else it must be."""
        size = self.integer(key, default)
        if not 1 <= size <= _MAX_HEAD_DIM:
            raise CheckpointError(
                f"{self.path}: heads must have 1 to {_MAX_HEAD_DIM} dimensions, {key} gives {size}"
            )
        return size

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key, default)
        if type(value) is int and abs(value) < 1 << 64:
            value = float(value)
        if type(value) is not float or not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {key} must be a finite number, got {brief(value)}")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        return self._typed(key, default, bool, "true or false")

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, default, str, "a string")

    def _typed(self, key: str, default: Any, kind: type[_T], wanted: str) -> _T:
        value: _T = self.get(key, default)
        # Not isinstance(): true is no whole number.
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {key} must be {wanted}, got {brief(value)}")
        return value
