"""Fixtures that several folders of tests share."""

import os
import signal
from pathlib import Path

import pytest

from pronk.checkpoints.cache import cache_root


def pytest_configure() -> None:
    """A shell in the background starts programs that ignore Ctrl-C, and they their children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M: PRONK_TEST_SMOLLM2, else the one that `pronk pull` fetched."""
    if given := os.environ.get("PRONK_TEST_SMOLLM2"):
        return Path(given)
    for path in sorted((cache_root() / "models" / "smollm2-135m").glob("*.gguf")):
        return path
    pytest.skip("no SmolLM2: run `pronk pull smollm2-135m` or set PRONK_TEST_SMOLLM2")
