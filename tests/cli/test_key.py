"""`pronk key`: what is printed, what is kept, and that nothing is lost."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cli.conftest import Pronk
from pronk.cli.key import add
from pronk.core.errors import UserError
from pronk.server.keys import SCOPES, Keys, change_keys, new_key, read_keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_printed_once_and_kept_as_a_hash(file: Path, pronk: Pronk) -> None:
    ran = pronk("key", "add", str(file), "--name", "alice")
    secret = ran.out.strip()
    assert ran.code == 0
    assert secret.startswith("pk-")
    assert len(secret) >= 3 + 32
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = read_keys(file).find(secret)
    assert found is not None
    assert (found.name, found.scopes) == ("alice", {"inference", "files"})
    assert read_keys(file).find(secret + "x") is None
    assert secret not in pronk("key", "list", str(file)).out


def test_all_that_a_key_may_do(file: Path, pronk: Pronk) -> None:
    ran = pronk(
        "key", "add", str(file), "--name", "bob", "--scope", "inference", "--scope", "admin",
        "--rpm", "60", "--tpm", "100000", "--concurrency", "4", "--model", "a", "--model", "b",
        "--expires", "30d", "--json",
    )  # fmt: skip
    made = json.loads(ran.out)
    key = read_keys(file).find(made["key"])
    assert key is not None
    assert key.scopes == {"inference", "admin"}
    assert (key.requests_per_minute, key.tokens_per_minute, key.max_concurrency) == (60, 100_000, 4)
    assert key.models == {"a", "b"}
    assert key.expires_at == key.created_at + 30 * 86400
    listed = json.loads(pronk("key", "list", str(file), "--json").out)["keys"]
    assert listed == [{name: made[name] for name in made if name != "key"}]
    table = pronk("key", "list", str(file)).out.splitlines()
    assert table[0].split() == [
        "NAME", "SCOPES", "RPM", "TPM", "AT", "A", "TIME", "MODELS", "MADE", "EXPIRES",
    ]  # fmt: skip
    assert table[1].split()[:6] == ["bob", "admin,inference", "60", "100000", "4", "a,b"]


def test_a_removed_key_opens_nothing(file: Path, pronk: Pronk) -> None:
    secrets = [pronk("key", "add", str(file), "--name", name).out.strip() for name in ("a", "b")]
    assert pronk("key", "rm", str(file), "a").out == "removed the key a\n"
    assert read_keys(file).find(secrets[0]) is None
    assert read_keys(file).find(secrets[1]) is not None
    assert json.loads(pronk("key", "rm", str(file), "b", "--json").out) == {"name": "b"}
    assert "no keys in" in pronk("key", "list", str(file)).err


def test_names_are_given_once(file: Path, pronk: Pronk) -> None:
    pronk("key", "add", str(file), "--name", "a")
    before = file.read_bytes()
    ran = pronk("key", "add", str(file), "--name", "a")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "pronk: error: --name: there is a key 'a' already; names are given once\n"
    assert file.read_bytes() == before


def test_the_scopes_of_the_option_are_those_there_are() -> None:
    option = next(param for param in add.params if param.name == "scopes")
    assert set(option.type.choices) == SCOPES  # type: ignore[attr-defined]


def test_keys_made_at_the_same_time_are_all_kept(file: Path) -> None:
    def make(i: int) -> None:
        change_keys(file, lambda keys: keys.added(*new_key(name=f"k{i}", now=0)), create=True)

    threads = [threading.Thread(target=make, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(file).keys} == {f"k{i}" for i in range(12)}


def test_a_change_that_fails_leaves_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_keys(file, lambda keys: keys.added(*new_key(name="a", now=0)), create=True)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        change_keys(file, lambda keys: keys.added(*new_key(name="b", now=0)))
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.glob(f".{file.name}*")) == []


def test_a_link_stays_a_link(file: Path) -> None:
    link = file.with_name("link")
    change_keys(file, lambda keys: keys.added(*new_key(name="a", now=0)), create=True)
    link.symlink_to(file)
    change_keys(link, lambda keys: keys.added(*new_key(name="b", now=0)))
    assert link.is_symlink()
    assert len(read_keys(file).keys) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"salt": "00"}, "salt: 1 bytes, not 32"),
        ({"salt": 5}, "argument must be str, not int"),
        ({"more": 1}, "'more' is not known"),
        ({"keys": [5]}, r"keys\[0\]: 5 is not an object"),
        ({"keys": [{}]}, "'name' is missing"),
        ({"scopes": ["root"]}, r"keys\[0\].scopes: 'root' is not one of admin, files"),
        ({"scopes": "files"}, r"keys\[0\].scopes: 'files' is not a list of texts"),
        ({"hash": "abc"}, r"keys\[0\].hash: not 64 hexadecimal digits"),
        ({"name": "a\nb"}, r"keys\[0\].name: 'a\\nb' is no name"),
        ({"created_at": True}, r"keys\[0\].created_at: True is not of type int"),
        ({"requests_per_minute": 0}, r"keys\[0\].requests_per_minute: 0 is not at least 1"),
        ({"requests_per_minute": 1.5}, r"requests_per_minute: 1.5 is not of type int"),
        ({"limit": 5}, r"keys\[0\]: 'limit' is not known"),
    ],
)
def test_a_file_that_is_wrong_says_where_and_how_one_is_made(
    change: dict[str, object], said: str, file: Path
) -> None:
    change_keys(file, lambda keys: keys.added(*new_key(name="a", now=0)), create=True)
    fields = json.loads(file.read_text())
    entry = fields["keys"][0]
    for name, value in change.items():
        (fields if name in ("version", "salt", "more", "keys") else entry)[name] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=said) as raised:
        read_keys(file)
    assert str(file) in str(raised.value)
    assert f"`pronk key add {file} --name NAME`" in str(raised.value)


def test_plain_text_and_files_of_others_are_refused(file: Path) -> None:
    file.write_text("pk-abc\n")
    with pytest.raises(UserError, match=r"not JSON.*key files are JSON, made with `pronk key add"):
        read_keys(file)
    file.unlink()
    change_keys(file, lambda keys: keys.added(*new_key(name="a", now=0)), create=True)
    file.chmod(0o666)
    with pytest.raises(UserError, match=r"anybody may write it \(mode 666\); `chmod 600"):
        read_keys(file)


def test_a_running_server_reads_the_file_again(
    file: Path, pronk: Pronk, caplog: pytest.LogCaptureFixture
) -> None:
    first = pronk("key", "add", str(file), "--name", "a").out.strip()
    keys = Keys(file)
    assert keys.find(first)
    second = pronk("key", "add", str(file), "--name", "b").out.strip()
    assert keys.find(second)
    pronk("key", "rm", str(file), "a")
    assert keys.find(first) is None

    good = file.read_bytes()
    file.write_text("{")
    assert keys.find(second)  # a broken file changes nothing
    assert "key file not read again, the old keys stay" in caplog.text
    file.unlink()
    assert keys.find(second)
    file.write_bytes(good)
    assert keys.find(second)
    assert [key.name for key in keys.all] == ["b"]


def test_a_key_ends_on_its_day(file: Path) -> None:
    secret, key = new_key(name="a", now=100, expires_at=200)
    change_keys(file, lambda keys: keys.added(secret, key), create=True)
    now = 199.0
    keys = Keys(file, clock=lambda: now)
    assert keys.find(secret)
    now = 200.0
    assert keys.find(secret) is None


def test_it_needs_no_web_packages(file: Path) -> None:
    code = (
        "import sys; from pronk.cli.app import main; code = main(sys.argv[1:]);"
        "web = {'fastapi', 'starlette', 'uvicorn', 'sqlalchemy', 'prometheus_client', 'pydantic'};"
        "print(sorted(web & {m.split('.')[0] for m in sys.modules})); raise SystemExit(code)"
    )
    command = [sys.executable, "-c", code, "key", "add", str(file), "--name", "a"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_times_are_those_of_the_clock(file: Path, pronk: Pronk) -> None:
    before = int(time.time())
    made = json.loads(pronk("key", "add", str(file), "--name", "a", "--json").out)
    assert before <= made["created_at"] <= time.time()
    assert made["expires_at"] is None
