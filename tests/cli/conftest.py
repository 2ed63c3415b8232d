"""What the tests of the command line share: a way to run it, and a tiny model."""

import io
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.tiny_models import write_gguf
from pronk.cli.app import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Pronk = Callable[..., Ran]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees, or changes, the caches of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "pronk"


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """`serve` sends its lines to the stderr of a test, which is closed when the test has ended."""
    names = ("pronk", "uvicorn", "uvicorn.access")
    loggers = [logging.getLogger(name) for name in names]
    before = [(list(log.handlers), log.level, log.propagate) for log in loggers]
    yield
    for log, (handlers, level, propagate) in zip(loggers, before, strict=True):
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with a context of 512 tokens, on disk."""
    return str(write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def pronk(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pronk:
    """Runs a command line; `stdin` is what is piped into it."""

    def run(*arguments: str, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(list(arguments))
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
