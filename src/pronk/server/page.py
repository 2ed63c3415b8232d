"""The page at `/`: a chat in the browser, from files of this package (web/).

The files are read once, sent as they are or gzipped, and asked for anew on every visit with the tag
of what the browser has, so that a newer Pronk never runs with an older script. The policy in the
headers lets the page load nothing but these files and talk to nothing but this server; scripts in a
model's answer cannot run, even if the page's own care with text should fail.
"""

import gzip
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from pronk.server.errors import not_found

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes HTML
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "Cache-Control": "no-cache",  # kept, but never shown before asking whether it still holds
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_NO_WEIGHT = re.compile(r"q=0(\.0*)?")

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file of the page."""

    media_type: str
    data: bytes
    zipped: bytes
    tag: str
    """Changes with the contents (the ETag of HTTP, quotes included)."""


@cache
def web_files() -> Mapping[str, WebFile]:
    """The files of the page by name."""
    found = {}
    for entry in files("pronk.server").joinpath("web").iterdir():
        ending = entry.name.rpartition(".")[2]
        if ending in _TYPES:
            data = entry.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            zipped = gzip.compress(data, mtime=0)
            found[entry.name] = WebFile(_TYPES[ending], data, zipped, tag)
    return found


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, "index.html")


@router.api_route("/static/{name}", methods=["GET", "HEAD"])
async def static(request: Request, name: str) -> Response:
    """A file that the page loads."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    """The file, or that the browser has it already. Raises ApiError (404)."""
    file = web_files().get(name)
    if file is None:
        raise not_found("file", name)
    headers = {**_HEADERS, "ETag": f"W/{file.tag}"}
    if _has(request.headers.get("If-None-Match", ""), file.tag):
        return Response(status_code=304, headers=headers)
    if _takes_gzip(request.headers.get("Accept-Encoding", "")):
        headers["Content-Encoding"] = "gzip"
        return Response(file.zipped, media_type=file.media_type, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)


def _has(tags: str, tag: str) -> bool:
    """Whether `tag` is among those of an If-None-Match, compared weakly (RFC 9110, 13.1.2)."""
    given = [text.strip().removeprefix("W/") for text in tags.split(",")]
    return tag in given or "*" in given


def _takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding names gzip and does not rule it out by `q=0`."""
    for part in accepted.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() == "gzip":
            return not _NO_WEIGHT.fullmatch(weight.strip())
    return False
