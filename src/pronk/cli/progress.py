"""Progress for people: a bar on a terminal, now and then a line elsewhere; always on stderr."""

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

_BAR_AFTER_S = 0.5
_LINE_AFTER_S = 3.0
"""Work that is over before this is not worth a bar on a terminal, or a line elsewhere."""
_LINE_EVERY_S = 15.0


class Reporter:
    """A `core.progress.Progress`, and the context in which it is shown."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # downloads report from a thread of their own
        self._what = ""
        self._since = self._said = 0.0
        self._bar: ProgressBar[int] | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        with self._lock:
            now = time.monotonic()
            if what != self._what:
                self._end()
                self._what, self._since, self._said = what, now, 0.0
            waited = now - self._since
            if total and sys.stderr.isatty():
                if waited > _BAR_AFTER_S:
                    self._draw(done, total)
            elif waited > _LINE_AFTER_S or not total:
                self._say(done, total, now)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = click.progressbar(
                length=total, label=self._what, file=sys.stderr, show_pos=False, width=30
            )
            self._bar.__enter__()
        self._bar.update(done - self._bar.pos)

    def _say(self, done: int, total: int, now: float) -> None:
        if self._said and now - self._said < _LINE_EVERY_S and not 0 < done == total:
            return
        self._said = now
        percent = f" {100 * done // total} %" if total else ""
        click.echo(f"{self._what}{percent}", err=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._end()
