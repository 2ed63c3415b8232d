"""Fixtures of the server's tests: a PostgreSQL of their own, on loopback, stores, and whole servers
with a model."""

import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import Live, live_server
from openai import OpenAI
from store_samples import Clock

from engine.tiny_models import write_gguf
from pronk.server.store import Store

SYSTEM_USER = "postgres"  # made by Debian's package; the server refuses to run as root


def _programs() -> Path | None:
    """The folder of PostgreSQL's programs, the newest one of Debian's first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def _missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _as_user(command: list[str]) -> subprocess.CompletedProcess[str]:
    options = {"user": SYSTEM_USER, "group": SYSTEM_USER} if os.geteuid() == 0 else {}
    return subprocess.run(command, cwd="/", check=True, capture_output=True, text=True, **options)  # type: ignore[call-overload]


@pytest.fixture
def free_port() -> int:
    """A port of loopback that nobody listens at."""
    return _free_port()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server that lives as long as the tests, without a database's name."""
    programs = _programs()
    if programs is None:
        _missing("no PostgreSQL: `apt-get install postgresql` gives one")
    assert programs is not None
    if importlib.util.find_spec("psycopg") is None:
        _missing("no psycopg: `pip install 'psycopg[binary]'`")
    folder = Path(tempfile.mkdtemp(prefix="pronk-pg-", dir="/tmp"))  # its user must get there
    if os.geteuid() == 0:
        shutil.chown(folder, SYSTEM_USER, SYSTEM_USER)
    data, log, password = folder / "data", folder / "log", folder / "password"
    secret = secrets.token_hex(16)
    port = _free_port()
    password.write_text(secret)
    password.chmod(0o644)
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -F"
    control = [str(programs / "pg_ctl"), "-D", str(data), "-l", str(log), "-w"]
    try:
        _as_user(
            [str(programs / "initdb"), "-D", str(data), "-U", "pronk", "-A", "scram-sha-256",
             "-E", "UTF8", "--no-sync", f"--pwfile={password}"]
        )  # fmt: skip
        _as_user([*control, "-o", options, "start"])
        try:
            yield f"postgresql://pronk:{secret}@127.0.0.1:{port}"
        finally:
            _as_user([*control, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres(postgres_server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    import psycopg

    name = "t_" + re.sub(r"\W", "", request.node.name.lower())[:30] + secrets.token_hex(4)
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        yield f"{postgres_server}/{name}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """What `Store` gets as its URL: None for SQLite, then that of an empty PostgreSQL database."""
    if request.param == "sqlite":
        return None
    url: str = request.getfixturevalue("postgres")
    return url


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(
    tmp_path: Path, database_url: str | None, clock: Clock
) -> Iterator[Callable[[], Store]]:
    """Opens stores of the same data, as several processes one after the other (SQLite) or at the
    same time (PostgreSQL) would."""
    opened: list[Store] = []

    def open_one() -> Store:
        opened.append(Store(tmp_path, database_url, clock=clock))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[[], Store]) -> Store:
    return open_store()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a model of random weights, "tiny", that has Llama 3's chat format and a context
    of 2048 tokens, most of them single bytes."""
    folder = tmp_path_factory.mktemp("tiny-server")
    model = write_gguf(folder / "tiny.gguf", **{"llama.context_length": 2048})
    with live_server([model], folder / "data") as server:
        yield server


@pytest.fixture(scope="session")
def server_url(tiny_server: Live) -> str:
    return tiny_server.url


@pytest.fixture(scope="session")
def smollm2_server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with SmolLM2-135M-Instruct, "smollm2"."""
    data = tmp_path_factory.mktemp("smollm2-server")
    with live_server(
        [smollm2_path], data, options={"ctx": 2048}, aliases={"smollm2": smollm2_path.stem}
    ) as server:
        yield server


@pytest.fixture(scope="session")
def openai_client(tiny_server: Live) -> Iterator[OpenAI]:
    """OpenAI's own client of the server with the model "tiny"."""
    with OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
