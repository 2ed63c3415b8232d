"""The files of the page and their headers; nothing comes from elsewhere."""

from collections.abc import Iterator

import httpx
import pytest
from fake_openai import FakeServer, running
from page_driver import Page

from pronk.server import page as page_files


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with running() as server:
        yield server


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    page.say("Hi", "![x](https://example.com/x.png) https://example.com")
    urls = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert urls
    assert all(url.startswith(page.fake.url) for url in urls)


def test_the_policy_stops_scripts_and_requests(page: Page) -> None:
    code = """
    const script = document.createElement('script');
    script.append('window.hit = 1');
    document.body.append(script);
    try { script.textContent = 'x'; return 'script'; } catch {}
    try { document.body.insertAdjacentHTML('beforeend', '<b></b>'); return 'html'; } catch {}
    return await fetch('http://127.0.0.1:9/').then(() => 'fetched', (e) => e.name)
      + (window.hit ?? '');
    """
    try:
        assert page.module(code) == "TypeError"
    finally:
        log = page.driver.get_log("browser")  # the policy's complaints, asked for by this test
    assert any("connect-src" in entry["message"] for entry in log)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/static/app.js", "text/javascript; charset=utf-8"),
        ("/static/style.css", "text/css; charset=utf-8"),
        ("/static/icon.svg", "image/svg+xml"),
    ],
)
def test_files_and_their_headers(server: FakeServer, path: str, kind: str) -> None:
    with httpx.Client(base_url=server.url) as client:
        plain = client.get(path, headers={"Accept-Encoding": "identity"})
        assert plain.status_code == 200
        assert plain.headers["Content-Type"] == kind
        assert "Content-Encoding" not in plain.headers
        policy = plain.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert plain.headers["X-Content-Type-Options"] == "nosniff"

        zipped = client.get(path)
        assert zipped.headers["Content-Encoding"] == "gzip"
        assert zipped.content == plain.content
        assert client.get(path, headers={"Accept-Encoding": "gzip;q=0"}).headers.get(
            "Content-Encoding"
        ) is None  # fmt: skip

        tag = plain.headers["ETag"]
        again = client.get(path, headers={"If-None-Match": f'"other", {tag}'})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("name", ["none.js", "..%2fpage.py", "%2e%2e/page.py", "__init__.py", ""])
def test_other_files_are_not_there(server: FakeServer, name: str) -> None:
    with httpx.Client(base_url=server.url) as client:
        assert client.get(f"/static/{name}").status_code == 404


def test_the_page_is_small() -> None:
    files = page_files.web_files()
    assert {"index.html", "app.js", "style.css", "icon.svg"} <= files.keys()
    assert sum(len(file.zipped) for file in files.values()) < 60_000
