"""The frame around the verbs: help, versions, exit codes, and mistakes as one line."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import pronk as package
from cli.conftest import Pronk
from pronk.cli.app import cli, main
from pronk.cli.common import note
from pronk.core.errors import MemoryLimitError, PronkError, UserError
from pronk.engine.prompts import CHAT_DEFAULTS

VERBS = {
    "bench", "chat", "generate", "key", "list", "perplexity", "pull", "rm", "serve", "show",
    "tokenize",
}  # fmt: skip


def fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.commands["list"], "callback", fail)


def test_help_lists_the_verbs(pronk: Pronk) -> None:
    ran = pronk("--help")
    assert ran.code == 0
    assert ran.err == ""
    listed = ran.out.partition("Commands:")[2]
    assert set(re.findall(r"^  (\w+)", listed, re.MULTILINE)) == VERBS == set(cli.commands)
    assert "..." not in listed  # every short help fits its line
    assert pronk() == pronk("-h") == ran


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_and_option_has_help(verb: str, pronk: Pronk) -> None:
    ran = pronk(verb, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: pronk {verb}")
    options = [p for p in cli.commands[verb].params if isinstance(p, click.Option)]
    assert all(option.help for option in options)


def test_version(pronk: Pronk) -> None:
    assert pronk("--version").out == f"pronk {package.__version__}\n"
    assert pronk("-V") == pronk("--version")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--x: 1 is too small"), 2, "--x: 1 is too small"),
        (MemoryLimitError("too large"), 2, "too large"),
        (UserError("two\nlines"), 2, "two lines"),
        (PronkError("ours"), 1, "ours"),
        (
            MemoryError(), 1,
            "out of memory; try a smaller --ctx or a model with fewer bits a weight",
        ),
        (
            ZeroDivisionError("oops"), 1,
            "unexpected ZeroDivisionError: oops; this is a bug, `pronk --debug ...` shows where",
        ),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    error: Exception, code: int, line: str, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_with(error, monkeypatch)
    ran = pronk("list")
    assert (ran.code, ran.out, ran.err) == (code, "", f"pronk: error: {line}\n")


def test_debug_shows_where(pronk: Pronk, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(ZeroDivisionError("oops"), monkeypatch)
    ran = pronk("--debug", "list")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert ran.err.rstrip().splitlines()[-1].startswith("pronk: error: unexpected")


def test_ctrl_c_is_130(pronk: Pronk, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(KeyboardInterrupt(), monkeypatch)
    ran = pronk("list")
    assert (ran.code, ran.out, ran.err) == (130, "", "\npronk: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option '--nonsense'"),
        (["pull"], "Missing argument 'NAME'"),
        (["pull", "a", "b"], "Got unexpected extra argument (b)"),
        (["chat", "how", "are", "you"],
         "Got unexpected extra argument (you); a text of several words needs quotes"),
        (["tokenize", "a", "b", "c", "d"],
         "Got unexpected extra arguments (c d); a text of several words needs quotes"),
        (["chat", "--seeed", "1"], "No such option '--seeed'. Did you mean '--seed'?"),
        (["chat", "--seed"], "Option '--seed' requires an argument"),
        (["chat", "--backend", "cuda"],
         "--backend: 'cuda' is not one of 'auto', 'cpu', 'reference'"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_line(arguments: list[str], line: str, pronk: Pronk) -> None:
    ran = pronk(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"pronk: error: {line}\n"


def python(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


def test_python_m_pronk() -> None:
    process = python("-m", "pronk", "show", "nothing-like-it")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("pronk: error: NAME: unknown model 'nothing-like-it'")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pronk", "list", "--all"]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=30)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
@pytest.mark.parametrize("arguments", [["list", "--all"], ["list", "--json"], ["--help"], ["-V"]])
def test_a_full_disk_is_told_in_one_line(unbuffered: list[str], arguments: list[str]) -> None:
    command = [sys.executable, *unbuffered, "-m", "pronk", *arguments]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=30)
    line = b"pronk: error: the output cannot be written: No space left on device\n"
    assert (process.returncode, process.stderr) == (1, line)


def test_stderr_that_is_full_as_well() -> None:
    command = [sys.executable, "-m", "pronk", "list", "--all"]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, timeout=30).returncode == 1


def test_an_error_of_reading_is_not_blamed_on_the_output(
    pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_with(OSError(errno.EIO, "Input/output error"), monkeypatch)
    ran = pronk("list")
    assert ran.code == 1
    assert "unexpected OSError" in ran.err


def test_a_closed_stdout_is_told() -> None:
    process = python("-c", (
        "import sys; from pronk.cli.app import main; sys.stdout = None;"
        "raise SystemExit(main(['list']))"
    ))  # fmt: skip
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == "pronk: error: the output cannot be written: stdout is closed\n"


def test_help_tells_the_defaults(pronk: Pronk) -> None:
    def words(*arguments: str) -> str:
        return " ".join(pronk(*arguments).out.split())

    chat, generate = words("chat", "--help"), words("generate", "--help")
    assert f"likeliest token (default: the model's, else {CHAT_DEFAULTS['temperature']})." in chat
    assert f"this probability (default: the model's, else {CHAT_DEFAULTS['top_p']})." in chat
    assert "Longest answer in tokens (default: until the context is full)." in chat
    assert "[default: f16]" in chat
    assert "likeliest token (default: 0, greedy)." in generate
    assert "Longest answer in tokens (default: 256)." in generate
    assert "none if it fails" in generate
    assert "Models are kept in ~/.cache/pronk" in words("--help")


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(click, "echo", lambda words, err: shown.append(words))
    note("words")
    monkeypatch.setenv("NO_COLOR", "1")
    note("words")
    assert shown == ["\x1b[2mwords\x1b[0m", "words"]


def test_sigint_ends_a_process_cleanly(tmp_path: Path) -> None:
    fifo = tmp_path / "never-written"
    os.mkfifo(fifo)
    process = python("-m", "pronk", "generate", "smollm2-135m", "--file", str(fifo))
    writer = os.open(fifo, os.O_WRONLY)  # waits until the process reads
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    os.close(writer)
    assert (process.returncode, err) == (130, "\npronk: interrupted\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pronk.cli.app import main; main(['--help']);"
        "print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    out, _ = python("-c", code).communicate(timeout=30)
    loaded = out.splitlines()[-1]
    for name in ("numpy", "tokenizers", "jinja2", "huggingface_hub", "tiktoken", "rich", "regex"):
        assert f"'{name}'" not in loaded


def test_output_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import click; from pronk.cli.app import cli, main;"
        "cli.commands['list'].callback = lambda **_: click.echo('caf\\u00e9 \\U0001f600');"
        "raise SystemExit(main(['list']))"
    )
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert process.returncode == 0
    assert process.stdout == "café \\U0001f600\n".encode("latin-1")


def test_main_reads_the_process_arguments(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pronk", "--version"])
    assert main() == 0
    assert capfd.readouterr().out.startswith("pronk ")
