"""Writes the pages of docs/results that are made of tests: what was compared and how far apart, and
what each mistake of a user prints.

    python bench/pages.py

Runs tests/conformance and tests/backends for parity.md and tests/cli/test_bad_input.py for
bad-input.md, and turns what the tests record into tables. A test that fails or is skipped is
counted as such.
"""

import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "results"
PEERS = ("transformers", "torch", "llama-models", "gguf", "tokenizers", "tiktoken")

HEAD = """# Parity with other implementations

Written by `bench/pages.py` from the tests in `tests/conformance` and `tests/backends`, which
hold these figures to their bounds at every run: float32 logits within 1e-4 of transformers and of
Meta's own model code; SmolLM2's quantized weights within 0.001 of mean KL divergence and 0.1 % of
perplexity of the same weights in float32 (0.002 and 0.3 % over an int8 cache), over 10,240 tokens.
"""


BAD_INPUT = """# Mistakes and what they print

Written by `bench/pages.py` from `tests/cli/test_bad_input.py`. Each ends with exit status 2, with
nothing on stdout and this line on stderr. The files are a tiny model and damaged copies of it.

| command | line |
|---|---|
"""


def run_tests(*paths: str) -> tuple[int, list[ElementTree.Element]]:
    """Exit status of pytest, and a `testcase` element for each test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *paths, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        return code, list(ElementTree.parse(report).iter("testcase"))


def outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error", "skipped"):
        if case.find(kind) is not None:
            return kind
    return "passed"


def figures(cases: list[ElementTree.Element]) -> list[str]:
    """A line for each test that recorded figures."""
    lines = ["| test | figures |", "|---|---|"]
    for case in cases:
        found = {p.get("name"): p.get("value") for p in case.iter("property")}
        if found:
            text = ", ".join(f"{name} {value}" for name, value in found.items())
            lines.append(f"| {case.get('name')} | {text} |")
    return lines


def counts(cases: list[ElementTree.Element]) -> list[str]:
    lines = ["| file | passed | skipped | failed |", "|---|---|---|---|"]
    files = sorted({case.get("classname") or "" for case in cases})
    for file in files:
        n = Counter(outcome(case) for case in cases if case.get("classname") == file)
        failed = n["failure"] + n["error"]
        lines.append(f"| {file} | {n['passed']} | {n['skipped']} | {failed} |")
    return lines


def versions() -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PEERS]
    return f"Python {platform.python_version()}, {', '.join(found)}."


def cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def parity() -> int:
    code, cases = run_tests("tests/conformance", "tests/backends")
    parts = [HEAD, versions(), "\n## Figures\n", *figures(cases), "\n## Tests\n", *counts(cases)]
    (PAGES / "parity.md").write_text("\n".join(parts) + "\n")
    return code


def bad_input() -> int:
    code, cases = run_tests("tests/cli/test_bad_input.py")
    found = [(p.get("name"), p.get("value")) for case in cases for p in case.iter("property")]
    rows = [f"| `` {cell(command)} `` | `` {cell(line)} `` |" for command, line in found]
    (PAGES / "bad-input.md").write_text(BAD_INPUT + "\n".join(rows) + "\n")
    return code


def main() -> int:
    PAGES.mkdir(parents=True, exist_ok=True)
    return max(bad_input(), parity())


if __name__ == "__main__":
    sys.exit(main())
