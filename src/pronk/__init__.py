"""Pronk: a Llama 3.1 system. `LLM` runs a model; everything else is in the subpackages.

Importing this package loads nothing heavy: `LLM` and NumPy come with the first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pronk.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from pronk.engine.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
