"""docs/parameters.md says what the server does."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def parameters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("parameters")


def test_the_page_is_up_to_date(parameters: ModuleType) -> None:
    """`python bench/parameters.py` writes it."""
    assert parameters.PAGE.read_text() == parameters.page()


def test_what_it_tells(parameters: ModuleType) -> None:
    page = parameters.page()
    chat = page.split("## /v1/chat/completions\n")[1].split("\n## ")[0]
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in chat.splitlines()
            if line.startswith("| `")}  # fmt: skip
    assert rows["`temperature`"] == "honoured"
    assert rows["`user`"] == "neutral"
    assert rows["`audio`"] == "refused"
    assert "required" in next(line for line in chat.splitlines() if "`messages`" in line)
