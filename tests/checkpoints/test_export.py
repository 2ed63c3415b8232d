"""The GGUF writer: nothing is left behind unless all of it was written."""

import os
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import gguf_keys

from pronk.checkpoints.export import GgufWriter, TensorSpec
from pronk.core.errors import CheckpointError, UserError

SPECS = [TensorSpec("a", "F32", (3,)), TensorSpec("b", "Q4_0", (2, 64))]


def test_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with GgufWriter(path, gguf_keys(), SPECS) as out:
        out.write([bytes(12)])
        out.write([bytes(36), np.zeros(36, np.uint8)])
        assert not path.exists()
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert path.stat().st_size % 32 == 0


def test_nothing_stays_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"before")

    def interrupted() -> None:
        with GgufWriter(path, {}, SPECS) as out:
            out.write([bytes(12)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_sizes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), GgufWriter(tmp_path / "m.gguf", {}, SPECS) as out:
        out.write([bytes(13)])
    with pytest.raises(AssertionError), GgufWriter(tmp_path / "m.gguf", {}, SPECS) as out:
        out.write([bytes(12)])
    assert os.listdir(tmp_path) == []


def test_columns_must_be_whole_blocks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Q4_0 has blocks of 32 weights; 33 columns"):
        GgufWriter(tmp_path / "m.gguf", {}, [TensorSpec("a", "Q4_0", (1, 33))])
    assert os.listdir(tmp_path) == []


def test_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m.gguf: cannot be written: No such file or directory"):
        GgufWriter(tmp_path / "none" / "m.gguf", {}, SPECS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / ".m.gguf.partial").symlink_to("/dev/full")
    big = [TensorSpec("a", "F32", (1 << 20,))]
    with (
        pytest.raises(UserError, match=r"m\.gguf: cannot be written: No space left on device"),
        GgufWriter(tmp_path / "m.gguf", {}, big) as out,
    ):
        out.write([bytes(1 << 22)])
    assert os.listdir(tmp_path) == []
