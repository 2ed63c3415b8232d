"""A valid file with a few bytes changed, or cut short, either opens or is refused: nothing else
may happen, whatever was hit. When it opens, its tensors can be read too."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import gguf_keys, write_gguf, write_hf, write_meta

from pronk.checkpoints.open import open_checkpoint
from pronk.core.errors import CheckpointError

MUTATIONS = 600


def mutate(blob: bytes, interesting: int, rng: random.Random) -> bytes:
    """One to four changed bytes among the first (or, for zips, the last) `interesting` ones;
    sometimes a cut, sometimes a run of equal bytes."""
    changed = bytearray(blob)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(interesting) if interesting > 0 else rng.randrange(interesting, 0)
        changed[at] = rng.choice((rng.randrange(256), 0, 255, changed[at] ^ 1 << rng.randrange(8)))
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    if rng.random() < 0.1 and changed:
        at = rng.randrange(len(changed))
        changed[at : at + 8] = bytes([rng.choice((0, 255, 127))]) * 8
    return bytes(changed)


def open_mutants(path: Path, file: Path, interesting: int, seed: int) -> int:
    """How many of the mutants of `file` open."""
    blob, rng, opened = file.read_bytes(), random.Random(seed), 0
    texts: list[str] = []
    for _ in range(MUTATIONS):
        file.write_bytes(mutate(blob, interesting, rng))
        try:
            with open_checkpoint(path) as checkpoint:
                for name in checkpoint.names():
                    assert checkpoint.get(name).data.ndim == 2
            opened += 1
        except CheckpointError as error:
            texts.append(str(error))
    assert not any("\n" in text for text in texts)
    return opened


@pytest.mark.parametrize("seed", [1, 2])
def test_gguf(tmp_path: Path, seed: int) -> None:
    keys = gguf_keys() | {"tokenizer.ggml.tokens": [str(n) for n in range(20)], "x": [1, 2]}
    path = write_gguf(tmp_path / "m.gguf", keys)
    assert 0 < open_mutants(path, path, 2200, seed) < MUTATIONS


@pytest.mark.parametrize(
    ("write", "file", "interesting"),
    [
        (write_hf, "model.safetensors", 2000),
        (write_hf, "config.json", 300),
        (write_meta, "params.json", 200),
        (write_meta, "consolidated.00.pth", 3000),
        (write_meta, "consolidated.00.pth", -2000),
    ],
)
def test_folders(
    tmp_path: Path, write: Callable[[Path], Path], file: str, interesting: int
) -> None:
    folder = write(tmp_path / "model")
    opened = open_mutants(folder, folder / file, interesting, 3)
    assert 0 < opened < MUTATIONS
    assert sorted(os.listdir(tmp_path)) == ["model"]
