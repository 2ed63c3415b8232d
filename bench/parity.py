"""Writes docs/results/parity.md from the conformance tests: what was compared, and how far apart.

    python bench/parity.py

Runs tests/conformance and tests/backends and turns the figures that the tests record into a page;
a test that fails or is skipped is listed as such.
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
PAGE = ROOT / "docs" / "results" / "parity.md"
PEERS = ("transformers", "torch", "llama-models", "gguf", "tokenizers", "tiktoken")

HEAD = """# Parity with other implementations

Written by `bench/parity.py` from the tests in `tests/conformance` and `tests/backends`, which
hold these figures to their bounds at every run: float32 logits within 1e-4 of transformers and of
Meta's own model code; SmolLM2's quantized weights within 0.002 of mean KL divergence and 0.3 % of
perplexity of the same weights in float32, over 10,240 tokens.
"""


def run_tests(report: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "tests/conformance", "tests/backends"]
    return subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False).returncode


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


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_tests(report)
        cases = list(ElementTree.parse(report).iter("testcase"))
    parts = [HEAD, versions(), "## Figures", *figures(cases), "", "## Tests", *counts(cases)]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(parts) + "\n")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
