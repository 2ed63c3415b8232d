"""Telling the formats apart, and what is said where there is no model."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import refused, write_gguf, write_hf, write_meta

from pronk.checkpoints.open import open_checkpoint


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "no-suffix")
    write_gguf(tmp_path / "named.safetensors")
    assert open_checkpoint(gguf).format == "gguf"
    assert open_checkpoint(tmp_path / "named.safetensors").format == "gguf"
    assert open_checkpoint(write_hf(tmp_path / "a.gguf")).format == "hf"
    assert open_checkpoint(write_meta(tmp_path / "b.gguf")).format == "meta"


def test_all_formats_hold_the_same(tmp_path: Path) -> None:
    paths = (
        write_gguf(tmp_path / "m.gguf"), write_hf(tmp_path / "hf"), write_meta(tmp_path / "meta"),
    )  # fmt: skip
    first, *others = (open_checkpoint(path) for path in paths)
    for other in others:
        assert other.names() == first.names()
        for name in first.names():
            assert (other.get(name).data == first.get(name).data).all()


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "no model in this folder: neither config.json with"),
        (["a.gguf", "b.gguf"], "the folder holds GGUF files, name one of them: a.gguf, b.gguf"),
        (["model.safetensors"], "the folder has model.safetensors but no config.json"),
        (["consolidated.00.pth"], "the folder has consolidated.00.pth but no params.json"),
        (["config.json", "pytorch_model.bin"], "the weights are .bin pickles"),
        (["params.json"], "no model in this folder"),
    ],
)
def test_folders_without_a_model(tmp_path: Path, files: list[str], match: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with refused(match):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "blob", "match"),
    [
        ("model.gguf", b"", "not a GGUF file: it starts with b''"),
        (
            "model.bin",
            b"\x00\x01\x02\x03",
            r"starts with b'\\x00\\x01\\x02\\x03', not with b'GGUF'",
        ),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0", "name the folder that holds this file"),
        ("consolidated.00.pth", b"PK\x03\x04", "name the folder that holds this file"),
    ],
)
def test_files_without_a_model(tmp_path: Path, name: str, blob: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(blob)
    with refused(match):
        open_checkpoint(tmp_path / name)


def test_no_such_path(tmp_path: Path) -> None:
    with refused("missing.gguf: no such file or folder"):
        open_checkpoint(tmp_path / "missing.gguf")


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (write_hf, "config.json"), (write_hf, "model.safetensors"),
        (write_meta, "params.json"), (write_meta, "consolidated.00.pth"),
    ],
)  # fmt: skip
def test_a_folder_where_a_file_should_be(
    tmp_path: Path, write: Callable[[Path], Path], file: str
) -> None:
    folder = write(tmp_path / "model")
    (folder / file).unlink()
    (folder / file).mkdir()
    with refused(f"{file}: cannot be read: Is a directory"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (write_hf, "config.json"), (write_hf, "model.safetensors"),
        (write_meta, "params.json"), (write_meta, "consolidated.00.pth"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "device", "endless"])
def test_what_is_no_regular_file_is_not_read(
    tmp_path: Path, write: Callable[[Path], Path], file: str, kind: str
) -> None:
    """A FIFO would wait for a writer, a device never end; a file of /proc says that it is empty."""
    folder = write(tmp_path / "model")
    (folder / file).unlink()
    if kind == "fifo":
        os.mkfifo(folder / file)
    else:
        (folder / file).symlink_to({"device": "/dev/zero", "endless": "/proc/self/status"}[kind])
    said = "not a regular file" if kind != "endless" else "not JSON|is empty"
    with refused(f"{file}: .*({said})"):
        open_checkpoint(folder)


def test_a_large_json_file_is_not_read(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    os.truncate(folder / "config.json", 1 << 40)
    with refused(f"config.json: {1 << 40} bytes, at most {64 << 20} are allowed"):
        open_checkpoint(folder)
