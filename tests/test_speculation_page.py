"""bench/speculation.py on tiny models: all of it runs, answers agree, the page says what was."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from engine.tiny_models import write_gguf

pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    module = importlib.import_module("speculation")
    short = [
        replace(
            task, prompts=tuple(prompt[:40] for prompt in task.prompts),
            options={**task.options, "max_tokens": 12},
        )
        for task in module.tasks()
    ]  # fmt: skip
    monkeypatch.setattr(module, "tasks", lambda: short)
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setattr(module, "CONTEXT", 256)
    return module


def test_a_run_and_its_page(bench: ModuleType, tmp_path: Path) -> None:
    model, draft = write_gguf(tmp_path / "m.gguf"), write_gguf(tmp_path / "d.gguf", seed=1)
    raw, out = tmp_path / "raw.jsonl", tmp_path / "page.md"
    code = bench.main(
        [
            str(model), "--draft", str(draft), "--random", str(model), "--random-draft", str(draft),
            "--raw", str(raw), "--out", str(out), "-r", "2", "--random-runs", "1", "-n", "30",
            "--right", "1,0", "--threads", "1",
        ]
    )  # fmt: skip
    assert code == 0
    runs = [json.loads(line) for line in raw.read_text().splitlines()]
    ways = [run["way"] for run in runs if run["kind"] == "run"]
    n_tasks = len(bench.tasks())
    assert [ways.count(way) for way in ("without", "lookup", "draft")] == [2 * n_tasks + 2] * 3
    page = out.read_text()
    for task in bench.tasks():
        assert f"| m.gguf | {task.name} |" in page
        assert f"| m.gguf | {task.name}, draft model |" in page
    assert "| m.gguf | 100 % of guesses right |" in page
    assert page.count("## ") == len({task.group for task in bench.tasks()}) + 1
    out.unlink()
    assert bench.main(["--raw", str(raw), "--out", str(out)]) == 0
    assert out.read_text() == page


def test_figures_are_those_of_the_runs(bench: ModuleType, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw.jsonl", tmp_path / "page.md"
    same = {"kind": "run", "model": "m", "group": "g", "task": "t", "tokens": 100}
    lines = [
        {"way": way, "round": i, "seconds": s, "steps": 100 // n, "drafted": d, "accepted": d // 2}
        for i, (way, s, n, d) in enumerate(
            [("without", 1, 1, 0), ("lookup", 0.5, 2, 80), ("lookup", 0.25, 2, 80),
             ("without", 2, 1, 0), ("without", 1, 1, 0), ("lookup", 1, 2, 80)]
        )
    ]  # fmt: skip
    for i, line in enumerate(lines):
        line["round"] = i // 2
    raw.write_text("".join(json.dumps(same | line) + "\n" for line in lines))
    assert bench.main(["--raw", str(raw), "--out", str(out)]) == 0
    (line,) = [line for line in out.read_text().splitlines() if line.startswith("| m ")]
    assert [cell.strip() for cell in line.split("|")][3:-1] == [
        "100", "100.0 (50.0 to 100.0)", "200.0 (100.0 to 400.0)", "2.00 (1.00 to 8.00)", "50 %",
        "0.80", "2.00", "3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--raw", "none.jsonl"], "there is no file none.jsonl"),
        (["m", "--raw", "x", "--right", "2"], "2 is not a list of numbers from 0 to 1"),
        (["--raw", "x", "--random", "m", "--draft", "d"], "no MODEL that it could draft for"),
        (["m", "--raw", "x", "--random-draft", "d"], "no --random that it could draft for"),
        (["m", "--raw", "x", "-r", "0"], "0 is not a whole number of at least 1"),
    ],
)
def test_bad_arguments(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert words in capsys.readouterr().err


def test_a_model_that_is_not_there(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.gguf"
    assert bench.main([str(missing), "--raw", str(tmp_path / "raw")]) == 2
    assert "missing.gguf" in capsys.readouterr().err
