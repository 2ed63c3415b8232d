import io
import sys

import pytest

from pronk.cli import progress
from pronk.cli.progress import Reporter


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(reporter: Reporter, clock: Clock, what: str, seconds: float, n: int = 10) -> None:
    for i in range(n + 1):
        reporter(i, n, what)
        clock.now += seconds / n


def test_short_work_is_not_worth_a_word(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter:
        steps(reporter, clock, "loading", 1.0)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_told_in_a_few_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter:
        steps(reporter, clock, "loading", 60.0, 120)
        steps(reporter, clock, "scoring", 1.0)
        reporter(0, 0, "waiting")
        reporter(0, 0, "waiting")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "loading 5 %", "loading 30 %", "loading 55 %", "loading 80 %", "loading 100 %", "waiting",
    ]  # fmt: skip


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Reporter() as reporter:
        steps(reporter, clock, "loading", 0.3)
        assert screen.getvalue() == ""
        steps(reporter, clock, "fetching", 2.0)
        steps(reporter, clock, "unpacking", 2.0)
    shown = screen.getvalue()
    assert "loading" not in shown
    assert shown.index("fetching") < shown.index("unpacking")
    assert shown.count("100%") >= 2
    assert shown.endswith("\n")


def test_an_interrupted_bar_gives_the_line_back(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)

    def work() -> None:
        with Reporter() as reporter:
            reporter(0, 10, "fetching")
            clock.now += 1
            reporter(5, 10, "fetching")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert screen.getvalue().endswith("\n")
