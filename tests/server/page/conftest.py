"""A browser and a server for the tests of the page; where there is no browser they skip."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browser, need_tools
from fake_openai import FakeServer, running
from page_driver import Page
from selenium.webdriver import Chrome


@pytest.fixture(scope="session")
def fake() -> Iterator[FakeServer]:
    need_tools()
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
def driver(fake: FakeServer, downloads: Path) -> Iterator[Chrome]:
    with browser("--force-prefers-reduced-motion", downloads=downloads) as chrome:
        yield chrome


@pytest.fixture
def page(driver: Chrome, fake: FakeServer) -> Iterator[Page]:
    """A fresh page; afterwards its console must be free of complaints."""
    fake.key = None
    fake.answers.clear()
    fake.bodies.clear()
    fake.paths.clear()
    fake.gone.clear()
    driver.get(f"{fake.url}/static/icon.svg")  # nothing of the page runs while storage is cleared
    driver.execute_script("localStorage.clear()")
    driver.set_window_size(1200, 900)
    driver.get_log("browser")
    opened = Page(driver, fake)
    opened.open()
    yield opened
    serious = [
        entry["message"]
        for entry in driver.get_log("browser")
        if entry["level"] == "SEVERE" and "Failed to load resource" not in entry["message"]
    ]
    assert serious == []
