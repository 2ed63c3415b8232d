"""A module imports only from its own folder or from lower layers (docs/architecture.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pronk

ROOT = Path(pronk.__file__).parent
LAYERS = {
    "core": 0, "text": 1, "backends": 1, "model": 2, "checkpoints": 2, "quant": 2, "engine": 3,
    "data": 3, "train": 4, "guard": 4, "agent": 4, "eval": 4, "server": 5, "scale": 5, "cli": 6,
}  # fmt: skip
TORCH_ALLOWED = ("backends/torch", "train/", "quant/", "guard/prompt_guard.py")
WEB_ALLOWED = ("server/", "scale/")
WEB = {"fastapi", "starlette", "uvicorn", "sqlalchemy", "prometheus_client", "ray"}
MODULES = sorted(ROOT.rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_look_down(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    folder = relative.split("/")[0] if "/" in relative else None
    for name in imports_of(path):
        parts = name.split(".")
        layered = parts[0] == "pronk" and len(parts) > 1 and parts[1] in LAYERS
        if layered and folder is not None and parts[1] != folder:
            assert LAYERS[parts[1]] < LAYERS[folder], f"{relative} imports {name}"
        if parts[0] == "torch":
            assert relative.startswith(TORCH_ALLOWED), f"{relative} imports torch"
        if parts[0] in WEB:
            assert relative.startswith(WEB_ALLOWED), f"{relative} imports {name}"
        if parts[:3] == ["pronk", "backends", "_cpu"]:
            assert relative == "backends/cpu.py", f"{relative} imports the compiled core"


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=lambda p: p.name)
def test_core_needs_only_the_standard_library(path: Path) -> None:
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top == "pronk" or top in sys.stdlib_module_names, f"core imports {name}"


def test_every_folder_has_a_layer() -> None:
    folders = {p.relative_to(ROOT).parts[0] for p in MODULES if p.parent != ROOT}
    assert folders <= LAYERS.keys()


def test_import_pronk_loads_no_heavy_library() -> None:
    code = "import sys, pronk; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    for name in ("numpy", "torch", "tokenizers", "typer", "rich", "jinja2", "huggingface_hub"):
        assert f"'{name}'" not in loaded.stdout
