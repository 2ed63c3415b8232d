"""`--layout-cache` of the verbs that load a model, and how what it keeps goes away."""

import json
from pathlib import Path

import pytest

from cli.conftest import Pronk
from pronk.checkpoints import cache
from pronk.checkpoints.catalog import CATALOG, DEFAULT_MODEL, resolve_model
from pronk.engine.bench import Meter

pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")

RUNS = {
    "generate": ("generate", "{model}", "a b c", "--max-tokens", "4"),
    "chat": ("chat", "{model}", "a b c", "--max-tokens", "4", "--seed", "1"),
    "bench": ("bench", "{model}", "-p", "8", "-n", "2", "-r", "1"),
    "perplexity": ("perplexity", "{model}", "{text}", "--ctx", "16"),
}


@pytest.fixture(autouse=True)
def not_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRONK_LAYOUT_CACHE", raising=False)
    monkeypatch.setattr(Meter, "BANDWIDTH_SECONDS", 0.001)  # what bench measures is not tested here
    monkeypatch.setattr(Meter, "INT8_SECONDS", 0.001)


@pytest.mark.parametrize("verb", RUNS)
def test_verbs_keep_packed_weights_if_told_to(
    verb: str, tiny: str, tmp_path: Path, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("a b c d e f g h " * 20)
    command = [word.format(model=tiny, text=tmp_path / "text") for word in RUNS[verb]]
    layout = cache.layout_path(Path(tiny))
    monkeypatch.setenv("PRONK_LAYOUT_CACHE", "1")
    plain = pronk(*command, "--no-layout-cache")
    assert plain.code == 0
    assert not layout.exists()
    monkeypatch.delenv("PRONK_LAYOUT_CACHE")
    for _ in range(2):
        ran = pronk(*command, "--layout-cache")
        assert ran.code == 0
        assert layout.exists()
        if verb != "bench":
            assert (ran.out, ran.err) == (plain.out, plain.err)
        written = layout.stat().st_mtime_ns
    assert pronk(*command, "--layout-cache").code == 0
    assert layout.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["PRONK_LAYOUT_CACHE", "PRONK_FUSED"])
def test_switches_are_0_or_1(
    name: str, tiny: str, pronk: Pronk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "yes")
    ran = pronk("generate", tiny, "a", "--max-tokens", "2")
    assert ran.code == 2
    assert f"{name}: 'yes' is neither 0 nor 1; unset it for the default" in ran.err


def test_what_cannot_be_written_is_one_line_on_stderr(
    tiny: str, pronk: Pronk, own_cache: Path
) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / "layouts").touch()
    plain = pronk("generate", tiny, "a", "--max-tokens", "2")
    ran = pronk("generate", tiny, "a", "--max-tokens", "2", "--layout-cache")
    assert (ran.code, ran.out) == (0, plain.out)
    notice, *others = ran.err.splitlines()
    assert notice.startswith(f"layout cache not written: cannot write {own_cache / 'layouts'}")
    assert others == plain.err.splitlines()


def test_list_tells_of_packed_weights_and_rm_removes_them(
    tiny: str, pronk: Pronk, own_cache: Path
) -> None:
    ref = resolve_model(DEFAULT_MODEL)
    path = cache.model_folder(ref) / "model.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(Path(tiny).read_bytes())
    licence = CATALOG[DEFAULT_MODEL].licence.id
    cache.record(ref, cache.describe(ref, path, "x==1", licence, {path: True}))
    before = pronk("list").err
    assert pronk("generate", DEFAULT_MODEL, "a", "--max-tokens", "2", "--layout-cache").code == 0
    assert pronk("generate", tiny, "a", "--max-tokens", "2", "--layout-cache").code == 0
    layout, other = cache.layout_path(path), cache.layout_path(Path(tiny))
    kept = layout.stat().st_size
    note = pronk("list").err.removeprefix(before)
    assert note.startswith("(packed weights of --layout-cache: ")
    assert f" in {own_cache / 'layouts'}; they may be deleted)\n" in note
    freed = json.loads(pronk("rm", DEFAULT_MODEL, "--json").out)["freed_bytes"]
    assert not layout.exists()
    assert freed > kept + Path(tiny).stat().st_size
    assert other.exists()
