"""Mistakes of the user: exit 2, nothing on stdout, one line that names the argument, the value and
what would work. docs/results/bad-input.md is the same list with what was printed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import Pronk
from pronk.server.keys import change_keys, new_key

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture
def folder(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the command lines below name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny, "tiny.gguf")
    data = Path("tiny.gguf").read_bytes()
    Path("magic.gguf").write_bytes(b"GGML" + data[4:])
    Path("cut.gguf").write_bytes(data[: len(data) // 2])
    Path("header.gguf").write_bytes(data[:20])
    Path("empty.gguf").write_bytes(b"")
    Path("future.gguf").write_bytes(data[:4] + b"\x63\0\0\0" + data[8:])
    Path("folder").mkdir()
    Path("text.txt").write_text("some text " * 50)
    Path("empty.txt").write_text("")
    Path("short.txt").write_bytes(b"")
    Path("latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    Path("long.txt").write_text("word " * 2000)
    Path("tools.json").write_text(json.dumps([TOOL]))
    Path("broken.json").write_text("[{")
    Path("wrong.json").write_text(json.dumps([{"type": "function"}]))
    change_keys(
        Path("keys.json"), lambda keys: keys.added(*new_key(name="alice", now=0)), create=True
    )
    return tmp_path


MISTAKES = [
    ("bench tiny.gguf --threads 9", "--threads: 9 is more than 8, 4 for each processor"),
    # the model
    ("generate smolm2-135m hi", "MODEL: unknown model 'smolm2-135m'; did you mean smollm2-135m?"),
    ("chat xyzzy hi", "MODEL: unknown model 'xyzzy'; give a name of `pronk list --all`"),
    ("chat smollm", "did you mean smollm2-135m? (for a prompt of this one word: pronk chat"),
    ("show nothing.gguf", "NAME: no such file or folder: nothing.gguf"),
    ("generate llama-3.1-8b hi", "not on disk; fetch it (16.1 GB) with `pronk pull llama-3.1-8b`"),
    ("generate some/repo hi", "some/repo is not on disk; fetch it with `pronk pull some/repo`"),
    ("show some/repo", "NAME: some/repo is not on disk"),
    ("rm smollm2-135m", "smollm2-135m is not on disk"),
    ("rm tiny.gguf", "tiny.gguf is a path; rm removes only what pull has fetched"),
    ("pull tiny.gguf", "tiny.gguf is a path; pull takes a catalog name or a hub id"),
    ("pull nonsense", "NAME: unknown model 'nonsense'"),
    ("rm nonsense", "NAME: unknown model 'nonsense'"),
    ("generate Once_upon", "MODEL: 'Once_upon' was taken as MODEL, and no model is called that; for"
     " a text: pronk generate smollm2-135m Once_upon"),
    ("tokenize hello", "for a text: pronk tokenize smollm2-135m hello"),
    ("generate smollm", "MODEL: unknown model 'smollm'; did you mean smollm2-135m?"),
    ("chat how are", "MODEL: unknown model 'how'; "),
    ("chat how are", "(a prompt of several words needs quotes)"),
    ("chat llama-3.1-8b-instruct hi", "fetch it (16.1 GB) with `pronk pull llama-3.1-8b-instruct`"),
    ("tokenize llama-3.1-8b hi", "which needs a Hugging Face token and Meta's licence accepted at"
     " https://huggingface.co/meta-llama/Llama-3.1-8B"),
    # its file
    ("generate magic.gguf hi", "magic.gguf: not a GGUF file: it starts with b'GGML'"),
    ("generate cut.gguf hi", "cut.gguf"),
    ("show header.gguf", "header.gguf"),
    ("tokenize empty.gguf hi", "empty.gguf: not a GGUF file"),
    ("show future.gguf", "future.gguf"),
    ("bench folder", "folder: no model in this folder"),
    # values of options
    ("chat tiny.gguf hi --temperature -1", "--temperature: -1 is not a number from 0 to 100"),
    ("chat tiny.gguf hi --temperature nan", "--temperature: nan is not a number from 0 to 100"),
    ("chat tiny.gguf hi --temperature hot", "--temperature: hot is not a number"),
    ("chat tiny.gguf hi --top-p 0", "--top-p: 0 is not a number above 0 and at most 1"),
    ("chat tiny.gguf hi --top-k -3", "--top-k: -3 is not a whole number of at least 0"),
    ("chat tiny.gguf hi --min-p 1.5", "--min-p: 1.5 is not a number from 0 to 1"),
    ("chat tiny.gguf hi --max-tokens 0", "--max-tokens: 0 is not a whole number of at least 1"),
    ("chat tiny.gguf hi --seed 1.5", "--seed: 1.5 is not a whole number from 0 to"),
    ("chat tiny.gguf hi --repetition-penalty 0", "--repetition-penalty: 0 is not a number above 0"),
    ("chat tiny.gguf hi --presence-penalty 3", "--presence-penalty: 3 is not a number from -2"),
    ("chat tiny.gguf hi --frequency-penalty x", "--frequency-penalty: x is not a number"),
    ("chat tiny.gguf hi --logit-bias 5", "--logit-bias: 5 is not ID=AMOUNT"),
    ("chat tiny.gguf hi --logit-bias x=1", "--logit-bias: x=1 is not ID=AMOUNT: x is not a whole"),
    ("chat tiny.gguf hi --logit-bias 999999=1", "logit_bias: token id 999999 is not in 0 to"),
    ("chat tiny.gguf hi --ctx 0", "--ctx: 0 is not a whole number of at least 1"),
    ("chat tiny.gguf hi --ctx 513", "ctx: 513 is not a whole number from 1 to 512"),
    ("chat tiny.gguf hi --threads 0", "--threads: 0 is not a whole number from 1 to 1024"),
    ("chat tiny.gguf hi --threads 1024", "--threads: 1024 is more than 8, 4 for each processor"),
    ("chat tiny.gguf hi --backend gpu", "--backend: 'gpu' is not one of"),
    ("chat tiny.gguf hi --kv-dtype f8", "--kv-dtype: 'f8' is not one of"),
    ("chat tiny.gguf hi --tools", "Option '--tools' requires an argument"),
    ("chat tiny.gguf hi --tools nothing.json", "--tools: cannot read nothing.json: No such file"),
    ("chat tiny.gguf hi --tools broken.json", "--tools: broken.json is not JSON: "),
    ("chat tiny.gguf hi --tools wrong.json", "--tools: wrong.json: tools[0].function"),
    ("generate tiny.gguf hi --logprobs 101", "--logprobs: 101 is not a whole number from 0 to 100"),
    ("bench tiny.gguf -r 0", "-r: 0 is not a whole number from 1 to 1000"),
    ("bench tiny.gguf", "-d 0 with -p 512 and -n 128 takes 513 positions, the model's"),
    ("perplexity tiny.gguf text.txt --ctx 1", "--ctx: 1 is not a whole number of at least 2"),
    ("perplexity tiny.gguf text.txt --ctx 1000", "ctx: 1000 is not a whole number from 1 to 512"),
    ("perplexity tiny.gguf text.txt --stride 512", "--stride: 512 is not from 1 to 511"),
    ("perplexity tiny.gguf text.txt --reference-backend cpu", "--reference-backend: needs --ref"),
    ("tokenize tiny.gguf --decode 1,x", "--decode: 'x' is not a token id; give ids as 1,2,3"),
    ("tokenize tiny.gguf --decode 99999", "token id 99999: the vocabulary has ids 0 to"),
    ("tokenize tiny.gguf hi --decode 1", "--decode: goes with no TEXT"),
    # keys
    ("key", "COMMAND: give add, list or rm"),
    ("key add keys", "Missing option '--name'"),
    ("key add keys --name a/b", "--name: 'a/b' is not 1 to 64 letters, digits, spaces or any of"),
    ("key add keys --name a --rpm 0", "--rpm: 0 is not a whole number from 1 to"),
    ("key add keys --name a --scope root", "--scope: 'root' is not one of 'inference', 'files'"),
    ("key add keys --name a --expires 30", "--expires: 30 is not a time span such as 12h, 30d"),
    ("key add text.txt --name a", "text.txt: not JSON: "),
    ("key list nothing", "nothing: cannot be read: No such file or directory; `pronk key add"),
    ("key list tools.json", "tools.json: must be a JSON object, is a list; key files are JSON"),
    ("key rm keys.json b", "NAME: no key 'b'; there are: alice"),
    # prompts and texts
    ("chat tiny.gguf", "PROMPT: it is empty"),
    ("generate tiny.gguf", "PROMPT: it is empty"),
    ("tokenize tiny.gguf hi --file text.txt", "TEXT: give either TEXT or --file FILE"),
    ("generate tiny.gguf hi --file text.txt", "PROMPT: give either PROMPT or --file FILE"),
    ("generate tiny.gguf --file empty.txt", "PROMPT: it is empty"),
    ("generate tiny.gguf --file nothing.txt", "--file: cannot read nothing.txt: No such file"),
    ("generate tiny.gguf --file folder", "--file: cannot read folder: Is a directory"),
    ("generate tiny.gguf --file latin1.txt",
     "--file: latin1.txt is not UTF-8: byte 3 is 0xe9 (unexpected end of data)"),
    ("perplexity tiny.gguf latin1.txt", "FILE: latin1.txt is not UTF-8: byte 3 is 0xe9"),
    ("perplexity tiny.gguf nothing.txt", "FILE: cannot read nothing.txt: No such file"),
    ("perplexity tiny.gguf short.txt", "FILE: 0 tokens are too few; at least 1 are needed"),
    ("generate tiny.gguf \udcff", "PROMPT: invalid UTF-8 at byte 0 (0xff)"),
    ("generate tiny.gguf hi --stop a\udcffb", "--stop: invalid UTF-8 at byte 1 (0xff)"),
    ("generate tiny.gguf --file long.txt", "tokens do not fit the context of 512 (one must stay"
     " free for the answer); shorten it"),
    ("chat tiny.gguf hi --ctx 2", "tokens do not fit the context of 2 (one must stay free for the"
     " answer); shorten it or raise --ctx (this model: up to 512)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), MISTAKES, ids=[ascii(line) for line, _ in MISTAKES])
def test_a_mistake_is_one_line(
    line: str,
    said: str,
    folder: Path,
    pronk: Pronk,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    ran = pronk(*line.split(" "))
    shown = line.encode(errors="backslashreplace").decode()  # one command has a broken byte
    record_property(f"pronk {shown}", ran.err.rstrip("\n"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("pronk: error: ")
    assert said in ran.err
    assert ran.err.splitlines() == [ran.err.rstrip("\n")]


def test_invalid_utf8_on_stdin(folder: Path, pronk: Pronk) -> None:
    ran = pronk("chat", "tiny.gguf", stdin=b"abc\xff")
    assert ran.code == 2
    assert (
        ran.err == "pronk: error: PROMPT: stdin is not UTF-8: byte 3 is 0xff (invalid start byte)\n"
    )


def test_json_mistakes_leave_stdout_empty(folder: Path, pronk: Pronk) -> None:
    assert pronk("generate", "tiny.gguf", "", "--json").out == ""
    assert pronk("show", "nothing.gguf", "--json").out == ""


def test_more_context_than_the_model_has_is_no_advice(folder: Path, pronk: Pronk) -> None:
    assert "--ctx" not in pronk("generate", "tiny.gguf", "--file", "long.txt").err
    assert "raise --ctx" in pronk("generate", "tiny.gguf", "--file", "long.txt", "--ctx", "64").err


def test_a_sentence_in_the_place_of_the_model(folder: Path, pronk: Pronk) -> None:
    for verb in ("generate", "tokenize"):
        ran = pronk(verb, "Once upon a time", stdin=b"ignored")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == (
            "pronk: error: MODEL: 'Once upon a time' was taken as MODEL, and no model is called"
            f" that; for a text: pronk {verb} smollm2-135m 'Once upon a time'\n"
        )


def test_a_text_is_wanted_on_a_terminal(
    folder: Path, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pronk.cli.input.on_a_terminal", lambda: True)
    assert "PROMPT: give PROMPT or --file FILE, or pipe" in pronk("generate", "tiny.gguf").err
    assert "TEXT: give TEXT or --file FILE, or pipe" in pronk("tokenize", "tiny.gguf").err


def test_stdin_that_never_ends(folder: Path, pronk: Pronk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pronk.cli.input._MOST_BYTES", 1 << 20)
    ran = pronk("chat", "tiny.gguf", stdin=b"y\n" * (1 << 20))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == ("pronk: error: PROMPT: stdin has more than 1 MiB; no context holds it\n")
