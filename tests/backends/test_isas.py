"""The kernel tests on the instruction sets that this process has not chosen."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

cpu = pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")

TESTS = Path(__file__).parent


ARM = platform.machine() in ("aarch64", "arm64")
ISAS = ["dotprod", "portable"] if ARM else ["avx512vnni", "avxvnni", "avx2", "portable"]


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_on(isa: str) -> None:
    if isa == cpu.isa():
        pytest.skip("is the one that the other tests run on")
    env = {**os.environ, "PRONK_ISA": isa}
    probe = "from pronk.backends import cpu; print(cpu.isa())"
    found = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True)
    if found.returncode and "this processor has no" in found.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert found.stdout.strip() == isa, found.stderr
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-qxp", "no:cacheprovider",
            TESTS / "test_cpu_kernels.py", TESTS.parent / "engine" / "test_fused.py",
        ],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_an_unknown_isa_is_named() -> None:
    probe = "from pronk.backends.select import select_backend; select_backend('cpu').isa()"
    env = {**os.environ, "PRONK_ISA": "sse9"}
    run = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"unknown name 'sse9'; choose one of {', '.join(ISAS)}" in run.stderr
