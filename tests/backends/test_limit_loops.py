"""The loops that measure the machine, as they were compiled: a limit that is measured too low would
flatter every speed that is compared with it."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

cpu = pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 code"
)

LINE = re.compile(r"\s*([0-9a-f]+):\t(?:\{vex\} )?(\S+)\s*(.*)")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def touches_memory(self) -> bool:
        return "(" in self.operands and not self.name.startswith(("lea", "nop"))


Loop = list[Instruction]


def loops(code: list[Instruction]) -> list[Loop]:
    """Innermost loops: from the target of a jump backwards to the jump, no other jump between."""
    found = []
    since = 0  # index of the instruction after the last jump, call or return
    for i, instruction in enumerate(code):
        name, target = instruction.name, instruction.operands.partition(" ")[0]
        if not name.startswith(("j", "call", "ret")):
            continue
        if name.startswith("j") and re.fullmatch("[0-9a-f]+", target):
            to = int(target, 16)
            if code[since].address <= to < instruction.address:
                found.append([c for c in code[since : i + 1] if c.address >= to])
        since = i + 1
    return found


@pytest.fixture(scope="module")
def module_loops() -> list[Loop]:
    from pronk.backends import _cpu

    assert _cpu.__file__ is not None
    if shutil.which("objdump") is None:
        miss = pytest.fail if os.environ.get("CI") else pytest.skip  # nothing else checks them
        miss("there is no objdump; it comes with binutils")
    command = ["objdump", "-d", "--no-show-raw-insn", _cpu.__file__]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    matches = (LINE.match(line) for line in text.splitlines())
    return loops([Instruction(int(m[1], 16), m[2], m[3]) for m in matches if m])


def named(loop: Loop, name: str) -> list[Instruction]:
    return [i for i in loop if i.name == name]


def bookkeeping(loop: Loop) -> set[str]:
    """What a loop does besides vector arithmetic and prefetches."""
    return {i.name for i in loop if not i.name.startswith(("v", "prefetch"))}


COUNTING = {"add", "sub", "inc", "dec", "cmp", "test", "lea", "jne", "jb", "ja", "jl", "jg", "jae"}


@pytest.mark.parametrize(("register", "sums"), [("zmm", 16), ("ymm", 12)])
def test_two_dot_products_a_cycle(module_loops: list[Loop], register: str, sums: int) -> None:
    """More sums in registers than latency times ports, and nothing else."""
    wanted = {f"%{register}{n}" for n in range(sums)}
    bursts = []
    for loop in module_loops:
        dots = named(loop, "vpdpbusd")
        parts = [dot.operands.split(",") for dot in dots]
        if {p[2] for p in parts} == wanted and len({(p[0], p[1]) for p in parts}) == 1:
            bursts.append((loop, dots))
    assert len(bursts) == 1
    loop, dots = bursts[0]
    assert len(dots) % sums == 0
    assert not any(i.touches_memory for i in loop)
    assert bookkeeping(loop) <= COUNTING
    assert len(loop) <= len(dots) + 3


def test_products_without_vnni(module_loops: list[Loop]) -> None:
    """Sixteen multiply-adds of 256 bits, two to widen them."""
    bursts = [
        loop
        for loop in module_loops
        if len(named(loop, "vpmaddubsw")) >= 16
        and len({i.operands.rpartition(",")[0] for i in named(loop, "vpmaddubsw")}) == 1
    ]
    assert len(bursts) == 1
    loop = bursts[0]
    n = len(named(loop, "vpmaddubsw"))
    assert n % 16 == 0
    assert all("%ymm" in i.operands for i in named(loop, "vpmaddubsw"))
    assert len(named(loop, "vpaddw")) == n * 14 // 16
    assert len(named(loop, "vpmaddwd")) == len(named(loop, "vpaddd")) == n * 2 // 16
    assert not any(i.touches_memory for i in loop)
    assert bookkeeping(loop) <= COUNTING


@pytest.mark.parametrize(("register", "loads_a_line"), [("zmm", 1), ("ymm", 2)])
def test_reading_in_streams(module_loops: list[Loop], register: str, loads_a_line: int) -> None:
    """Of each stream a line is prefetched and a line is read, and added up in registers."""
    found = set()
    for loop in module_loops:
        prefetches = [i for i in loop if i.name.startswith("prefetch")]
        vector = [i for i in loop if i.name.startswith("v")]
        if not prefetches or {i.name for i in vector} != {"vpaddd"}:
            continue
        if not all(f"%{register}" in i.operands for i in vector):
            continue
        assert all(i.touches_memory for i in vector)
        assert len(vector) == loads_a_line * len(prefetches)
        assert len({i.operands.split(",")[-1] for i in vector}) in (4, 8)  # a sum for each stream
        assert not any("%rsp" in i.operands or "%rbp" in i.operands for i in loop)
        assert bookkeeping(loop) <= COUNTING
        found.add((len(prefetches), *{i.name for i in prefetches}))
    assert found == {
        (8, "prefetcht0"), (8, "prefetcht1"), (4, "prefetcht0"), (4, "prefetcht1"),
    }  # fmt: skip
