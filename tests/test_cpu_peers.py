"""bench/cpu_peers.py: a whole small measurement, and the arithmetic of its page."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.tiny_models import CONFIG, write_gguf

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("cpu_peers")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("cpu_page")


def run_of(page: ModuleType, **fields: Any) -> Any:
    same = {
        "experiment": "speed", "session": 1, "round": 0, "file": "m.gguf", "engine": "pronk",
        "phase": "decode", "seconds": 2.0, "tokens": 10, "steps": 10,
        "before": {"bandwidth": 4e9, "int8": 1e11}, "after": {"bandwidth": 6e9, "int8": 1e11},
        "nbytes": 5e9, "macs": 2e10, "kv_bytes": 1000,
    }  # fmt: skip
    return page.Run(**same | fields)


def test_a_run_is_compared_with_the_limits_around_it(page: ModuleType) -> None:
    run = run_of(page)
    assert run.used.bandwidth == pytest.approx(0.5)  # 2.5 of 5 GB/s
    assert run.used.int8 == pytest.approx(0.1)
    assert run.bound == run.used.bandwidth
    assert replace(run, phase="prefill").bound == run.used.int8
    assert not replace(run, foreign=0.1).disturbed
    assert replace(run, foreign=0.2).disturbed


def test_ratios_are_of_neighbours(page: ModuleType) -> None:
    mine = [run_of(page, round=n, seconds=s) for n, s in enumerate((1.0, 2.0, 4.0))]
    theirs = [run_of(page, round=n, seconds=s) for n, s in enumerate((3.0, 6.0, 4.0))]
    assert page.ratio(mine, theirs, lambda r: r.rate) == pytest.approx(3)
    assert page.ratio(mine[:1], theirs[1:], lambda r: r.rate) is None


def test_what_depth_explains(page: ModuleType) -> None:
    """A step takes 0.2 s; at depth 100,000 another 0.1 GB are read at 5 GB/s: 0.02 s."""
    flat = [run_of(page)]
    deep = [run_of(page, depth=100_000, seconds=2.2)]
    assert page.explained(flat, deep) == pytest.approx(1)
    assert page.explained(flat, [replace(deep[0], seconds=4.4)]) == pytest.approx(2)
    assert page.explained([], deep) is None


def test_page_of_every_experiment(page: ModuleType, tmp_path: Path) -> None:
    runs = [
        run_of(page, phase=phase, engine=engine, round=n, seconds=seconds)
        for n in range(3)
        for engine, seconds in (("pronk", 2.0), ("llama.cpp", 3.0))
        for phase in ("prefill", "decode")
    ]
    runs += [run_of(page, experiment="rows", rows=n, tokens=10 * n) for n in (1, 8)]
    runs += [
        run_of(page, experiment="depth", phase=phase, depth=depth, seconds=1 + depth / 1000)
        for phase in ("prefill", "decode")
        for depth in (0, 1000)
    ]
    runs += [
        run_of(page, experiment="busy", variant=variant, seconds=seconds)
        for variant, seconds in (("quiet", 1.0), ("bound", 2.0), ("free", 4.0))
    ]
    runs += [run_of(page, experiment="start", phase="start", before=None, after=None)]
    lines = [page.line_of("run", run) for run in runs]
    lines += [
        page.line_of("machine", {"processor": "a processor"}),
        page.line_of("files", {"name": "m.gguf", "about": "weights"}),
        page.line_of("skipped", {"name": "ik_llama.cpp", "about": "not there"}),
        page.line_of(
            "engines", {"name": "pronk", "about": {"version": "1", "build": "A = 1 | B = 0 | "}}
        ),
        page.line_of("notes", {"text": "Built by hand."}),
        page.line_of("notes", {"text": "Built by hand."}),
    ]
    raw, out = tmp_path / "raw.jsonl", tmp_path / "page.md"
    raw.write_text("\n".join(lines) + "\n")
    page.write_page(raw, out)
    text = out.read_text()
    for row in (
        "| m.gguf | decode 10 | llama.cpp | 3.3 (3.3 to 3.3) | 33 (33 to 33) % | 1.50 | 3 |",
        "| m.gguf | pronk | 8 | 200.0 (200.0 to 200.0) | 1.00 | 40.0 (40.0 to 40.0) | 8.00 | 1 |",
        "| m.gguf | pronk | 10.0 (10.0 to 10.0) | 5.0 (5.0 to 5.0) | 0.50 | 2.5 (2.5 to 2.5) | 0.25"
        " | 1 |",
        "| m.gguf | pronk | 2.00 (2.00 to 2.00) | 1 |",
        "| pronk | 1 | A |  |",
        "Machine: a processor.",
        "ik_llama.cpp was left out: not there.",
    ):
        assert row in text
    assert "| m.gguf | pronk | 1000 | 10.0 (10.0 to 10.0) | 5.0 (5.0 to 5.0) | 0.50 |" in text
    assert text.count("\n| speed | ") == 12
    assert text.count("Built by hand.") == 1


def test_a_line_that_was_not_written_to_its_end(
    page: ModuleType, peers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = tmp_path / "raw.jsonl", tmp_path / "page.md"
    whole = page.line_of("run", run_of(page)) + "\n"
    raw.write_text(whole + whole[:100])
    assert peers.main(["page", "--raw", str(raw), "--out", str(out)]) == 0
    assert f"the last line of {raw} is not whole and was ignored" in capsys.readouterr().err
    assert "| m.gguf | decode 10 | pronk |" in out.read_text()
    note = ["--note", "Built so."]
    assert peers.main(["page", "--raw", str(raw), "--out", str(out), *note]) == 0
    assert raw.read_text() == whole + page.line_of("notes", {"text": "Built so."}) + "\n"
    assert "Built so." in out.read_text()
    for text in (whole[:100] + "\n" + whole, "words\n", '{"kind": "x"}\n', "[]\n", '{"a": 1}\n'):
        raw.write_text(text)
        assert peers.main(["page", "--raw", str(raw), "--out", str(out)]) == 2
        assert "line 1 of" in capsys.readouterr().err
        assert peers.main(["speed", str(tmp_path / "x.gguf"), "--raw", str(raw)]) == 2
        assert raw.read_text() == text, "nothing of it is cut off"


def test_without_matplotlib(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not page.plot([run_of(page)], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_plot(page: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert page.plot([run_of(page), run_of(page, phase="prefill")], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def test_a_measurement(
    peers: ModuleType, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Pronk, and a neighbour that is not installed."""
    pytest.importorskip("pronk.backends.cpu")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    raw, out = model.with_name("raw.jsonl"), model.with_name("page.md")
    files = (str(model), "--raw", str(raw), "--out", str(out), "--threads", "1", "-r", "2")
    monkeypatch.setenv("PRONK_FUSED", "nonsense")  # the user's own settings are none of a run's
    args = ("-p", "40", "-n", "6", "--engines", "pronk,ik_llama.cpp", "--note", "Just a test.")
    assert peers.main(["speed", *files, *args]) == 0
    assert "ik_llama.cpp is left out: no module named" in capsys.readouterr().err
    assert peers.main(["rows", *files, "-n", "2", "--engines", "pronk"]) == 0
    found = [json.loads(line) for line in raw.read_text().splitlines()]
    runs = [line for line in found if line["kind"] == "run"]
    prefill, decode, *_ = runs
    assert [(r["phase"], r["tokens"]) for r in runs[:4]] == [("prefill", 40), ("decode", 6)] * 2
    assert [(r["rows"], r["tokens"]) for r in runs[4:9]] == [(n, 2 * n) for n in (1, 2, 4, 8, 16)]
    linear = CONFIG.n_params - 32 * CONFIG.vocab_size - 5 * 32  # neither embedding nor norms
    kv = 2 * 2 * CONFIG.n_layers * CONFIG.n_kv_heads * CONFIG.head_dim
    assert prefill["kv_bytes"] == kv
    assert prefill["nbytes"] == 4 * linear + 40 * kv
    assert decode["nbytes"] == 6 * 4 * linear + (2 + 3 + 4 + 5 + 6 + 7) * kv
    assert decode["before"]["bandwidth"] > 1e8
    assert "| tiny.gguf | pronk | 16 | " in out.read_text()
    assert "Just a test." in out.read_text()


def test_nothing_measured(
    peers: ModuleType, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pytest.importorskip("pronk.backends.cpu")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    files = (str(model), "--raw", str(model.with_name("raw.jsonl")), "--threads", "1", "-r", "1")
    for engine, python, why in (
        ("ik_llama.cpp", sys.executable, "no module named 'ik_llama_cpp'"),
        ("llama.cpp", "/nowhere/python", "cannot run /nowhere/python: No such file or directory"),
    ):
        args = ("--engines", engine, "--python", f"{engine}={python}")
        for experiment in ("speed", "start"):
            assert peers.main([experiment, *files, *args]) == 2
            told = capsys.readouterr().err
            assert f"{engine} is left out: {why}\n" in told
            assert told.endswith("cpu_peers: nothing was measured\n")


def test_last_words(peers: ModuleType) -> None:
    log = "loading\n\nTraceback:\n  import numpy\nModuleNotFoundError: No module named 'numpy'\n"
    assert peers.last_words(log) == "import numpy / No module named 'numpy'"
    assert peers.last_words("") == ""


def test_what_a_kind_is_run_with(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRONK_LAYOUT_CACHE", "1")
    monkeypatch.setenv("PRONK_ISA", "portable")
    kinds = peers.KINDS_OF_ENGINE
    given = {k: v for k, v in kinds["pronk-avx2"].environment().items() if k.startswith("PRONK_")}
    assert given == {"PRONK_ISA": "avx2"}
    assert "PATH" in kinds["pronk"].environment()
    answer = {"version": "1", "build": "kernels for avx2", "options": ""}
    assert kinds["pronk-avx2"].described(answer)["options"] == "PRONK_ISA=avx2"


def test_a_build_that_is_not_of_its_kind(peers: ModuleType) -> None:
    kind = peers.KINDS_OF_ENGINE["llama.cpp-avx2"]
    native = {"version": "1", "build": "CPU : AVX2 = 1 | AVX512 = 1 | ", "options": "a=1"}
    with pytest.raises(peers.PeerError, match=r"its build has AVX512 = 1; .* by --python"):
        kind.described(native)
    assert peers.KINDS_OF_ENGINE["llama.cpp"].described(native) == native
    for flags in ("CPU : AVX2 = 1 | ", "AVX2 = 1 | AVX512 = 0 | AVX512_VBMI = 0 | "):
        assert kind.described(native | {"build": flags})["options"] == "a=1"


def test_what_llama_cpp_computes_of_a_prompt(peers: ModuleType) -> None:
    chunks = importlib.import_module("peer_worker").chunks
    assert chunks(1100, 16) == [
        [(16, 512, False)], [(528, 512, False)], [(1040, 76, True)],
    ]  # fmt: skip
    assert chunks(512, 0) == [[(0, 512, True)]]


def test_huge_pages(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert peers.huge_pages(tmp_path / "enabled") == "madvise"
    assert peers.huge_pages(tmp_path / "nothing") == "unknown"


def test_mistakes(
    peers: ModuleType, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    raw = str(model.with_name("raw.jsonl"))
    monkeypatch.setattr(peers, "free_memory", lambda: 10)
    assert peers.main(["speed", str(model), "--raw", raw]) == 2
    assert "need about 1.6 GB together, 0.0 GB are free" in capsys.readouterr().err
    for args, match in (
        (["speed", "--raw", raw], "every experiment needs one or more"),
        (["page", str(model), "--raw", raw], "the page none"),
        (["speed", str(model), "--raw", raw, "--engines", "x"], "unknown engine 'x'"),
        (["speed", str(model), "--raw", raw, "--python", "x=y"], "'x=y' is not ENGINE=PATH"),
        (["speed", str(model), "--raw", raw, "-r", "0"], "-r: 0 is not a whole number of at le"),
        (["speed", str(model), "--raw", raw, "--threads", "0"], "--threads: 0 is not a whole"),
        (["speed", str(model), "--raw", raw, "-p", "-3"], "-p: -3 is not a whole number"),
        (["depth", str(model), "--raw", raw, "--depth", "x"], "--depth: x is not a whole number"),
        (["speed", str(model), "--raw", "/nodir/x"], "--raw: there is no folder /nodir"),
        (["page", "--raw", "nothing", "--out", "page.md"], "--raw: there is no file nothing"),
        (["page", "--raw", raw], "--out: the page needs a place"),
    ):
        with pytest.raises(SystemExit) as ended:
            peers.main(args)
        assert ended.value.code == 2
        assert match in capsys.readouterr().err
    for engines in ("llama.cpp", "pronk,llama.cpp"):
        assert peers.main(["rows", str(model), "--raw", raw, "--engines", engines]) == 2
        assert "--engines: llama.cpp runs one sequence only" in capsys.readouterr().err
