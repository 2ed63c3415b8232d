"""Progress of long work, told through a callback so that no layer below the CLI draws anything."""

from typing import Protocol


class Progress(Protocol):
    """Called as `progress(done, total, what)`: units are the caller's (bytes, tensors, tokens);
    total 0 means unknown; the last call of a piece of work has done == total."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def silent(done: int, total: int, what: str) -> None:
    """The progress of somebody who does not want to know."""
