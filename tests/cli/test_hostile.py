"""Model files that mean harm, and surroundings that do not work: full, closed or read-only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import Pronk
from engine.tiny_models import write_gguf, write_hf
from pronk.checkpoints import hub
from pronk.checkpoints.catalog import resolve_model
from pronk.cli.printable import one_line, printable

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
EVIL = "\x1b[31mRED\x1b]0;title\x07\x9b2J\u202eback\nname          fake"


def without_controls(text: str) -> bool:
    return all(c == "\n" or c.isprintable() for c in text)


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[0m\r\n\tb\x7f\x9b\u2028\u202e\ud800") == (
        "a\\x1b[0m\\r\n\tb\\x7f\\x9b\\u2028\\u202e\\ud800"
    )
    assert printable("Grüße, 你好 👩‍💻 \\x1b") == "Grüße, 你好 👩‍💻 \\x1b"
    assert one_line(" a\n\tb \x1b") == "a b \\x1b"


def test_show_prints_no_escape_sequence_of_a_file(tmp_path: Path, pronk: Pronk) -> None:
    keys = {"general.license": EVIL, "tokenizer.chat_template": EVIL}
    path = str(write_gguf(tmp_path / "evil.gguf", **keys))
    out = pronk("show", path).out
    assert without_controls(out)
    assert "licence       \\x1b[31mRED\\x1b]0;title\\x07\\x9b2J\\u202eback name fake\n" in out
    assert out.endswith(
        "chat template:\n\\x1b[31mRED\\x1b]0;title\\x07\\x9b2J\\u202eback\nname          fake\n"
    )
    facts = json.loads(pronk("show", path, "--json").out)
    assert (facts["licence"], facts["chat_template"]) == (EVIL, EVIL)


def test_an_error_prints_no_escape_sequence_of_a_file_name(tmp_path: Path, pronk: Pronk) -> None:
    (tmp_path / "\x1b[2J.gguf").write_bytes(b"")
    ran = pronk("show", str(tmp_path))
    assert (ran.code, ran.out) == (2, "")
    assert "name one of them: \\x1b[2J.gguf\n" in ran.err


@pytest.mark.parametrize(
    "file",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
     "generation_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "device", "huge"])
def test_a_tokenizer_file_must_be_a_small_regular_file(
    tmp_path: Path, file: str, kind: str, pronk: Pronk
) -> None:
    folder = write_hf(tmp_path / "model")
    (folder / file).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(folder / file)
    elif kind == "device":
        (folder / file).symlink_to("/dev/zero")
    else:
        (folder / file).touch()
        os.truncate(folder / file, 1 << 40)
    ran = pronk("tokenize", str(folder), "x")
    assert (ran.code, ran.out) == (2, "")
    said = "at most" if kind == "huge" else "not a regular file"
    assert f"{file}: " in ran.err
    assert said in ran.err


@pytest.mark.parametrize("arguments", [["list"], ["show", "{tiny}"], ["generate", "{tiny}", "a"]])
def test_a_closed_stderr_is_no_error(arguments: list[str], tiny: str, own_cache: Path) -> None:
    command = [sys.executable, "-m", "pronk", *(a.format(tiny=tiny) for a in arguments)]
    shell = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, timeout=60
    )
    assert shell.returncode == 0


def test_a_closed_stdin_is_empty(tiny: str, own_cache: Path) -> None:
    command = [sys.executable, "-m", "pronk", "chat", tiny]
    shell = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, timeout=60
    )
    assert (shell.returncode, shell.stdout) == (2, "")
    assert shell.stderr.startswith("pronk: error: PROMPT: it is empty")
    assert shell.stderr.count("\n") == 1


@pytest.fixture
def snapshot() -> Path:
    """A Llama model that another program left in the hub's cache."""
    folder = hub.repo_folder(LLAMA)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots").mkdir()
    return write_hf(folder / "snapshots" / "c0ffee")


def test_a_cache_that_cannot_be_written_can_be_read(
    snapshot: Path, tmp_path: Path, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (row,) = json.loads(pronk("list", "--json").out)["models"]
    assert (row["name"], row["path"]) == ("llama-3.2-1b-instruct", str(snapshot))
    assert json.loads(pronk("show", LLAMA, "--json").out)["path"] == str(snapshot)
    assert pronk("tokenize", LLAMA, "x").code == 0
    assert pronk("generate", LLAMA, "x", "--max-tokens", "1").code == 0


def test_rm_leaves_what_another_program_fetched(snapshot: Path, pronk: Pronk) -> None:
    assert pronk("show", LLAMA).code == 0
    ran = pronk("rm", LLAMA)
    assert (ran.code, ran.out) == (2, "")
    name = resolve_model(LLAMA).name
    assert ran.err.startswith(f"pronk: error: NAME: {name} was not fetched by pull but by another")
    assert (snapshot / "model.safetensors").exists()
