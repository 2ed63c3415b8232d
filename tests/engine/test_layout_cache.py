"""Packed weights on disk: the same numbers from them, and never anybody else's or a failure."""

import errno
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from backends.random_weights import random_tensor
from engine.tiny_models import CONFIG, random_checkpoint, write_gguf, write_hf
from pronk.backends import reference
from pronk.backends.protocol import F32, RawTensor
from pronk.checkpoints import layouts
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.export import GgufWriter, TensorSpec
from pronk.checkpoints.names import native_name, tensor_names, tensor_shape
from pronk.checkpoints.open import open_checkpoint
from pronk.engine.llm import LLM
from pronk.engine.load import load_model
from pronk.model.llama import LlamaWeights

cpu = pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")

MIXED = replace(CONFIG, dim=256, head_dim=64, ffn_dim=512)
KINDS = {"wq": "Q4_K", "wk": "Q4_K", "wv": "Q6_K", "wo": "Q4_0", "w_gate": "Q8_0", "w_up": "Q8_0",
         "w_down": "IQ4_XS", "output": "F16", "embed": "Q4_0"}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packed weights go: nobody else's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PRONK_LAYOUT_CACHE", raising=False)
    return tmp_path / "cache" / "pronk" / "layouts"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_mixed(tmp_path / "mixed.gguf")


def write_mixed(path: Path, seed: int = 0) -> Path:
    """A model with many block formats; another seed gives a file of the same size."""
    rng = np.random.default_rng(seed)
    tensors = [mixed_tensor(name, rng) for name in tensor_names(MIXED)]
    metadata = {
        "general.architecture": "llama", "llama.context_length": MIXED.context,
        "llama.embedding_length": MIXED.dim, "llama.block_count": MIXED.n_layers,
        "llama.feed_forward_length": MIXED.ffn_dim, "llama.attention.head_count": MIXED.n_heads,
        "llama.attention.head_count_kv": MIXED.n_kv_heads,
        "llama.attention.key_length": MIXED.head_dim, "llama.vocab_size": MIXED.vocab_size,
        "llama.attention.layer_norm_rms_epsilon": MIXED.norm_eps,
        "llama.rope.freq_base": MIXED.rope_theta,
    }  # fmt: skip
    specs = [
        TensorSpec(native_name(t.name, "gguf"), t.kind, t.shape if t.shape[0] > 1 else t.shape[1:])
        for t in tensors
    ]
    with GgufWriter(path, metadata, specs) as out:
        for tensor in tensors:
            out.write([np.ascontiguousarray(tensor.data)])
    return path


def mixed_tensor(name: str, rng: np.random.Generator) -> RawTensor:
    kind = KINDS.get(name.rpartition(".")[2], "F32")
    return replace(random_tensor(kind, *tensor_shape(name, MIXED), rng), name=name)


class Told:
    """A progress that remembers the words of what has no total: notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.work: list[tuple[str, int, int]] = []

    def __call__(self, done: int, total: int, what: str) -> None:
        if total:
            self.work.append((what, done, total))
        else:
            self.notices.append(what)

    def has_written(self) -> bool:
        return any(what == "writing packed weights" for what, _, _ in self.work)


def load(
    path: Path, told: Told, *, ops: ModuleType = cpu, cache: bool | None = True
) -> LlamaWeights:
    with open_checkpoint(path) as checkpoint:
        return load_model(checkpoint, ops, n_positions=16, layout_cache=cache, progress=told)


def numbers(weights: LlamaWeights) -> list[F32]:
    """What each linear weight makes of some rows."""
    rng = np.random.default_rng(9)
    linear = [w for layer in weights.layers
              for w in (layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down)]  # fmt: skip
    x = {w.k: rng.standard_normal((3, w.k)).astype(np.float32) for w in (*linear, weights.output)}
    return [cpu.linear(x[w.k], w) for w in (*linear, weights.output)]


def same(one: list[F32], other: list[F32]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_second_start_reads_packed_weights_only(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = numbers(load(model, Told(), cache=False))
    assert not folder.exists()
    first = Told()
    assert same(numbers(load(model, first)), plain)
    assert first.has_written()
    assert only(folder).stat().st_mode & 0o077 == 0

    def no_packing(tensors: object) -> None:
        raise AssertionError(tensors)

    monkeypatch.setattr(cpu, "make_weight", no_packing)
    second = Told()
    assert same(numbers(load(model, second)), plain)
    assert not second.has_written()
    assert first.notices == second.notices == []


def test_progress_of_both_starts_rises_to_the_end(model: Path) -> None:
    for _ in range(2):
        told = Told()
        load(model, told)
        for what in {what for what, _, _ in told.work}:
            done = [(d, t) for w, d, t in told.work if w == what]
            assert done == sorted(done)
            assert done[-1][0] == done[-1][1]
        loading = [d for w, d, _ in told.work if w == "loading"]
        assert len(set(loading)) > 4 * MIXED.n_layers


def test_logits_are_the_same(tmp_path: Path, folder: Path) -> None:
    paths = [write_gguf(tmp_path / "model.gguf"), write_hf(tmp_path / "folder")]
    for path in paths:
        ids = [3, 1, 4, 1, 5]
        logits = [LLM(path, layout_cache=cache).logits(ids) for cache in (False, True, True)]
        np.testing.assert_array_equal(logits[0], logits[1])
        np.testing.assert_array_equal(logits[0], logits[2])
    assert len(list(folder.iterdir())) == 2


def test_nothing_is_kept_unless_asked_for(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model, Told(), cache=None)
    monkeypatch.setenv("PRONK_LAYOUT_CACHE", "0")
    load(model, Told(), cache=None)
    monkeypatch.setenv("PRONK_LAYOUT_CACHE", "1")
    load(model, Told(), cache=False)
    assert not folder.exists()
    load(model, Told(), cache=None)
    assert only(folder).stat().st_size > 0


def test_another_file_in_the_model_s_place(model: Path, folder: Path) -> None:
    """Same path, same size: the time tells."""
    load(model, Told())
    before = os.stat(model)
    write_mixed(model, seed=1)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    plain = numbers(load(model, Told(), cache=False))
    for expect_written in (True, False):
        told = Told()
        assert same(numbers(load(model, told)), plain)
        assert told.has_written() == expect_written
    assert len(list(folder.iterdir())) == 1, "the old one is replaced"


def test_another_version_of_the_layouts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model, Told())
    monkeypatch.setattr(cpu, "LAYOUT_VERSION", cpu.LAYOUT_VERSION + 1)
    told = Told()
    load(model, told)
    assert told.has_written()


def test_another_way_to_read_tensors(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model, Told())
    monkeypatch.setattr(layouts, "READER_VERSION", layouts.READER_VERSION + 1)
    told = Told()
    load(model, told)
    assert told.has_written()


def test_links_to_a_model_share_its_packed_weights(model: Path, folder: Path) -> None:
    load(model, Told())
    link = model.with_name("link.gguf")
    link.symlink_to(model)
    told = Told()
    load(link, told)
    assert not told.has_written()
    assert len(list(folder.iterdir())) == 1


def damaged(data: bytes) -> dict[str, bytes]:
    """Ways in which a file can be wrong."""
    index = int.from_bytes(data[8:16], "little")

    def flipped(at: int) -> bytes:
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    return {
        "empty": b"", "a few bytes": data[:7], "head only": data[:100], "page only": data[:4096],
        "half": data[: len(data) // 2], "no index": data[:index], "short by one": data[:-1],
        "longer": data + b"x", "magic": flipped(0), "place of the index": flipped(9),
        "length of the index": flipped(16), "CRC": flipped(24), "index": flipped(index + 50),
        "first weight": flipped(4096), "last weight": flipped(index - 5000),
        "hole": data[:8192] + bytes(4096) + data[12288:], "zeros": bytes(len(data)),
        "foreign": b"GGUF" * 5000,
    }  # fmt: skip


def test_damaged_files_are_written_anew(model: Path, folder: Path) -> None:
    plain = numbers(load(model, Told()))
    path = only(folder)
    whole = path.read_bytes()
    for what, data in damaged(whole).items():
        path.write_bytes(data)
        told = Told()
        assert same(numbers(load(model, told)), plain), what
        assert told.has_written() == (what != "longer"), what
        assert told.notices == []
        if what != "longer":
            assert path.read_bytes() == whole, what


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"weights"', b'"WEIGHTS"'), (b'"source"', b'"sources"'), (b": [256, [", b": [-25, ["),
        (b": [256, [", b": 256, ["), (b", 4096, ", b", 99999999999999999999, "),
        (b", 4096, ", b", 4100, "), (b", 4096, ", b', "a", '), (b", 4096, ", b", -4096, "),
        (b": [256, [[5, ", b": [256, [[99, "), (b": [256, [[5, ", b": [256, [[4, "),
    ],
)  # fmt: skip
def test_numbers_that_no_weight_has(model: Path, folder: Path, old: bytes, new: bytes) -> None:
    """An index with a right CRC and wrong contents."""
    plain = numbers(load(model, Told()))
    whole = only(folder).read_bytes()
    changed = with_index(whole, lambda text: text.replace(old, new, 1))
    assert changed != whole
    only(folder).write_bytes(changed)
    told = Told()
    assert same(numbers(load(model, told)), plain)
    assert told.has_written()
    assert told.notices == []


def with_index(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The file with another index, and its CRC."""
    _, start, length, _ = struct.unpack("<8sQQI", data[:28])
    text = change(data[start : start + length])
    head = struct.pack("<8sQQI", data[:8], start, len(text), zlib.crc32(text))
    return head + data[28:start] + text


def test_a_folder_in_the_file_s_place_is_told(model: Path, folder: Path) -> None:
    plain = numbers(load(model, Told()))
    path = only(folder)
    path.unlink()
    path.mkdir()
    told = Told()
    assert same(numbers(load(model, told)), plain)
    (notice,) = told.notices
    assert notice.startswith("layout cache not written: cannot write ")
    assert [entry.name for entry in folder.iterdir()] == [path.name], "no partial file stays"


def test_no_space_is_told_before_anything_is_written(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    told = Told()
    load(model, told)
    (notice,) = told.notices
    assert notice.startswith("layout cache not written: disk full: keeping packed weights needs ")
    assert "\n" not in notice
    assert not told.has_written()
    assert list(folder.iterdir()) == []


def test_space_that_ends_while_writing_is_told(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = numbers(load(model, Told(), cache=False))
    monkeypatch.setattr(layouts._Writer, "_write", full)
    told = Told()
    assert same(numbers(load(model, told)), plain)
    (notice,) = told.notices
    assert notice.startswith("layout cache not written: disk full: no space left in ")
    assert list(folder.iterdir()) == [], "no partial file stays"


def test_a_cache_that_cannot_be_made_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told = Told()
    load(model, told)
    (notice,) = told.notices
    assert notice.startswith("layout cache not written: ")
    assert str(tmp_path / "file") in notice


def test_interrupted_writing_leaves_nothing(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layouts._Writer, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(model, Told())
    assert list(folder.iterdir()) == []


def test_a_model_that_changes_while_it_is_loaded_is_not_kept(model: Path, folder: Path) -> None:
    told = Told()
    with open_checkpoint(model) as checkpoint:
        os.utime(model, ns=(1, 1))
        load_model(checkpoint, cpu, n_positions=8, layout_cache=True, progress=told)
    (notice,) = told.notices
    assert notice == f"layout cache not written: {model} has changed since it was opened"
    assert not folder.exists()


def test_what_cannot_be_kept_is_told(model: Path, folder: Path) -> None:
    told = Told()
    load(model, told, ops=reference)
    assert told.notices == ["no layout cache: the reference backend packs no weights"]
    told = Told()
    in_memory: Checkpoint = random_checkpoint()
    load_model(in_memory, cpu, n_positions=8, layout_cache=True, progress=told)
    assert told.notices == ["no layout cache: random is not on disk"]
    assert not folder.exists()


def test_threads_that_write_at_once(model: Path, folder: Path) -> None:
    plain = numbers(load(model, Told(), cache=False))
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: numbers(load(model, Told())), range(8)))
    assert all(same(each, plain) for each in loaded)
    assert [path.suffix for path in folder.iterdir()] == [".layout"]


def test_processes_that_write_at_once(model: Path, folder: Path) -> None:
    code = (
        "import sys, pathlib; from pronk.backends import cpu;"
        "from pronk.checkpoints.open import open_checkpoint; from pronk.engine.load import *;"
        "load_model(open_checkpoint(pathlib.Path(sys.argv[1])), cpu, n_positions=8,"
        " layout_cache=True)"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(model)]) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    told = Told()
    load(model, told)
    assert not told.has_written()
    assert [path.suffix for path in folder.iterdir()] == [".layout"]


def test_a_file_that_is_replaced_stays_valid_for_who_has_it(model: Path, folder: Path) -> None:
    load(model, Told())
    weights = load(model, Told())
    before = numbers(weights)
    os.utime(model, ns=(5, 5))
    told = Told()
    load(model, told)
    assert told.has_written()
    only(folder).unlink()
    assert same(numbers(weights), before)


def test_leftovers_go_when_another_model_is_written(model: Path, folder: Path) -> None:
    """Those of dead processes and of models that are gone; not those of processes at work."""
    other = write_mixed(model.with_name("other.gguf"))
    load(other, Told())
    (orphan,) = folder.iterdir()
    old, young = folder / ".old.partial", folder / ".young.partial"
    for path in (old, young):
        path.touch()
    os.utime(old, (1, 1))
    load(model, Told())
    assert {orphan, young} < set(folder.iterdir())
    assert not old.exists()
    other.unlink()
    model.touch()
    load(model, Told())
    assert not orphan.exists()
    assert len(list(folder.glob("*.layout"))) == 1
