"""A headless Chromium from the system's packages, driven by Selenium."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


def tools() -> tuple[str, str] | None:
    """Paths of the browser and of its driver, or None."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def need_tools() -> None:
    """Skips the test where there is no browser; fails it where the tests run for a change."""
    if tools() is None:
        why = "no Chromium: install the packages chromium and chromium-driver (Debian's names)"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)


@contextmanager
def browser(*flags: str, downloads: Path | None = None) -> Iterator[Chrome]:
    """A browser with a profile of its own. The driver's path is given, so nothing is downloaded."""
    found = tools()
    assert found is not None
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = found[0]
        for flag in (*FLAGS, f"--user-data-dir={profile}", *flags):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # The offer to save a password takes the keys that the test types meanwhile.
        prefs: dict[str, object] = {"credentials_enable_service": False}
        if downloads is not None:
            prefs["download.default_directory"] = str(downloads)
        options.add_experimental_option("prefs", prefs)
        driver = Chrome(options, ChromeService(found[1]))
        try:
            yield driver
        finally:
            driver.quit()
