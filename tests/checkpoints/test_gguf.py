"""GGUF files that are right, and the many ways in which they can be wrong."""

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    CONFIG,
    assert_equal,
    gguf_keys,
    read_all,
    refused,
    weights,
    write_gguf,
)

from pronk.checkpoints.names import native_name
from pronk.checkpoints.open import open_checkpoint
from pronk.core.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


def tensors() -> dict[str, Any]:
    return {native_name(name, "gguf"): w for name, w in weights().items()}


def with_keys(folder: Path, **changes: Any) -> Path:
    """A file whose metadata differ; None takes a key out. `__` stands for a dot."""
    keys = gguf_keys() | {key.replace("__", "."): value for key, value in changes.items()}
    return write_gguf(folder / "m.gguf", {k: v for k, v in keys.items() if v is not None})


def patch(path: Path, at: int, raw: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(raw)


def after(path: Path, name: str) -> int:
    """The byte behind a key or a tensor's name."""
    blob = path.read_bytes()
    return blob.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


def test_everything_is_read(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "gguf"
        assert replace(checkpoint.config, norm_eps=CONFIG.norm_eps) == CONFIG
        assert checkpoint.metadata["llama.block_count"] == 2
        assert checkpoint.kinds() == {"F32": 21}
        assert (checkpoint.kind("embed"), checkpoint.shape("embed")) == ("F32", (20, 32))
        assert checkpoint.nbytes == sum(w.nbytes for w in weights().values())
        with pytest.raises(CheckpointError, match=r"no tensor 'layers\.2\.wq'"):
            checkpoint.get("layers.2.wq")
    assert_equal(read_all(path), weights())


def test_version_2(path: Path) -> None:
    patch(path, 4, struct.pack("<I", 2))
    assert_equal(read_all(path), weights())


def test_tensors_outlive_the_checkpoint(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    raw = checkpoint.get("output")
    checkpoint.close()
    raw.release()
    np.testing.assert_array_equal(raw.data.view(np.float32), weights()["output"])


def test_tied(tmp_path: Path) -> None:
    untied = tensors()
    del untied["output.weight"]
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", None, untied)) as checkpoint:
        assert checkpoint.config.tied_embeddings
        assert "output" not in checkpoint.names()


def test_every_type_of_metadata(tmp_path: Path) -> None:
    values = {
        "a": True, "b": -5, "c": 1 << 40, "d": 0.5, "e": "näh", "f": [1, -2], "g": ["x", ""],
        "h": [True, False], "i": [0.5], "j": [], "k": -(1 << 40), "l": [["p"], [], [["q"]]],
    }  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", gguf_keys() | values)
    with open_checkpoint(path) as checkpoint:
        assert {key: checkpoint.metadata[key] for key in values} == values


def test_rope_divisors(tmp_path: Path) -> None:
    freqs = np.array([1, 1, 2.5, 8], np.float32)
    with_freqs = tensors() | {"rope_freqs.weight": freqs}
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", None, with_freqs)) as checkpoint:
        assert checkpoint.config.rope_divisors == (1.0, 1.0, 2.5, 8.0)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", gguf_keys() | linear, with_freqs)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.rope_divisors == (4.0, 4.0, 10.0, 32.0)
    path = write_gguf(tmp_path / "m.gguf", gguf_keys() | linear)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.rope_divisors == (4.0,) * 4


@pytest.mark.parametrize(
    ("keys", "divisors"),
    [
        ({"scaling.factor": 4.0}, (4.0,) * 4),  # the type is linear unless it is said
        ({"scale_linear": 2.0}, (2.0,) * 4),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, (4.0,) * 4),
        ({"scaling.type": "linear", "scale_linear": 2}, (2.0,) * 4),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "linear"}, None),
        ({"scaling.factor": 0.0}, None),
        ({"scaling.factor": 1.0}, None),
    ],
)
def test_linear_scaling(
    tmp_path: Path, keys: dict[str, Any], divisors: tuple[float, ...] | None
) -> None:
    added = {f"llama.rope.{key}": value for key, value in keys.items()}
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", gguf_keys() | added)) as checkpoint:
        assert checkpoint.config.rope_divisors == divisors


@pytest.mark.parametrize("size", [1 << 17, 1 << 34, (1 << 63) - 2])
def test_a_head_size_asks_for_no_memory(tmp_path: Path, size: int) -> None:
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes = {f"llama__{key.replace('.', '__')}": size for key in keys}
    path = with_keys(tmp_path, llama__rope__scaling__factor=2.0, **sizes)
    with refused(f"heads must have 1 to 65536 dimensions, .*key_length gives {size}", 1 << 17):
        open_checkpoint(path)


@pytest.mark.parametrize("values", [[1, 1, 0, 1], [1, np.nan, 1, 1], [1, -1, 1, 1]])
def test_rope_divisors_must_be_positive(tmp_path: Path, values: list[float]) -> None:
    freqs = {"rope_freqs.weight": np.array(values, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", None, tensors() | freqs)
    with refused("rope_freqs.weight' has values not above 0"):
        open_checkpoint(path)


def test_rope_divisors_of_another_head_size(tmp_path: Path) -> None:
    freqs = {"rope_freqs.weight": np.ones(5, np.float32)}
    with refused(r"'rope_freqs.weight' is F32 \[5\], expected F32 \[4\]"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", None, tensors() | freqs))


def test_vocabulary_gives_the_size(tmp_path: Path) -> None:
    path = with_keys(
        tmp_path, llama__vocab_size=None, tokenizer__ggml__tokens=[str(n) for n in range(20)]
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.vocab_size == 20


def test_equal_counts_for_each_layer(tmp_path: Path) -> None:
    path = with_keys(tmp_path, llama__attention__head_count_kv=[2, 2])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.n_kv_heads == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general__architecture": "qwen2"}, "general.architecture is 'qwen2'; only 'llama'"),
        ({"general__architecture": None}, "general.architecture is None"),
        ({"llama__block_count": None}, "llama.block_count is missing"),
        ({"llama__block_count": "two"}, "llama.block_count must be a whole number, got 'two'"),
        ({"llama__block_count": True}, "llama.block_count must be a whole number, got True"),
        ({"llama__block_count": 1 << 62}, "'blk.2.attn_norm.weight' is missing"),
        ({"llama__block_count": 1}, "'blk.1.attn_norm.weight' is no part of a Llama model of 1"),
        ({"llama__block_count": 0}, "n_layers must be a positive integer, got 0"),
        ({"llama__embedding_length": 40}, r"shape \[20, 32\], the configuration asks for \[20, 40"),
        ({"llama__embedding_length": 34}, "34 is no multiple of head_count 4"),
        ({"llama__attention__head_count": 0}, "no multiple of head_count 0"),
        ({"llama__attention__head_count_kv": [2, 1]}, "head_count_kv differs from layer to layer"),
        ({"llama__attention__key_length": 9}, "head_dim 9 is odd"),
        ({"llama__attention__value_length": 4}, "value_length is 4, heads have 8 dimensions"),
        ({"llama__rope__dimension_count": 4}, "rope.dimension_count is 4, heads have 8"),
        ({"llama__rope__freq_base": float("nan")}, "rope.freq_base must be a finite number"),
        ({"llama__rope__scaling__type": "yarn"}, "scaling.type is 'yarn'; 'none' and 'linear'"),
        ({"llama__rope__scaling__factor": "4"}, "scaling.factor must be a finite number"),
        ({"llama__rope__scale_linear": -4.0}, "scale_linear must be at least 0, got -4.0"),
        (
            {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": -1.0},
            "scaling.factor must be at least 0, got -1.0",
        ),
        ({"llama__expert_count": 8}, "llama.expert_count is 8, which is not supported"),
        ({"llama__logit_scale": 2.0}, "llama.logit_scale is 2.0, which is not supported"),
        ({"general__alignment": 48}, "general.alignment must be a power of two, got 48"),
        ({"general__alignment": 0}, "general.alignment must be a power of two, got 0"),
        ({"general__alignment": "x" * 999}, "general.alignment must be a power of two"),
        ({"general__alignment": 1 << 31}, "truncated"),
        ({"llama__vocab_size": 21}, r"shape \[20, 32\], the configuration asks for \[21, 32\]"),
        ({"tokenizer__ggml__tokens": ["a", "b"]}, r"configuration asks for \[2, 32\]"),
        ({"split__count": 2}, "part 1 of 2 must be called NAME-00001-of-00002.gguf"),
    ],
)
def test_refused_metadata(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    path = with_keys(tmp_path, **changes)
    with refused(match):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"])
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    some = tensors()
    del some[name]
    with refused(f"tensor '{name}' is missing"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", None, some))


def test_tensor_of_another_model(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", None, tensors() | bias)
    with refused("tensor 'blk.0.attn_q.bias' is no part of a Llama model"):
        open_checkpoint(path)


def test_misshapen_tensor(tmp_path: Path) -> None:
    wrong = {"blk.1.attn_k.weight": np.zeros((16, 31), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", None, tensors() | wrong)
    with refused(
        r"'blk.1.attn_k.weight' has shape \[16, 31\], the configuration asks for \[16, 32"
    ):
        open_checkpoint(path)


def test_misshapen_norm(tmp_path: Path) -> None:
    wrong = {"output_norm.weight": np.zeros(31, np.float32)}
    with refused(r"'output_norm.weight' has shape \[31\], the configuration asks for \[32\]"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", None, tensors() | wrong))


@pytest.mark.parametrize(
    ("type_id", "match"),
    [
        (16, r"type IQ2_XXS \(number 16\), which is not supported"),
        (999, r"type unknown \(number 999\), which is not supported"),
        (12, "32 columns; Q4_K needs a multiple of 256"),
    ],
)
def test_types(path: Path, type_id: int, match: str) -> None:
    patch(path, after(path, "blk.0.attn_q.weight") + 20, struct.pack("<I", type_id))
    with refused(f"'blk.0.attn_q.weight' has {match}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("offset", "match"),
    [
        (5, "'blk.0.attn_q.weight' has offset 5, no multiple of 32"),
        (1 << 62, "truncated: tensor 'blk.0.attn_q.weight' ends at byte 46116860184273"),
        (32, "tensors 'token_embd.weight' and 'blk.0.attn_q.weight' overlap"),
    ],
)
def test_offsets(path: Path, offset: int, match: str) -> None:
    patch(path, after(path, "blk.0.attn_q.weight") + 24, struct.pack("<Q", offset))
    with refused(match):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (struct.pack("<IQQ", 2, 0, 32), r"has shape \[32, 0\]"),
        (struct.pack("<IQQ", 2, 1 << 63, 1 << 63), "9223372036854775808|truncated"),
        (struct.pack("<I", 0), "has 0 dimensions; 1 to 4"),
        (struct.pack("<I", 1 << 31), "has 2147483648 dimensions"),
        (struct.pack("<IQQQ", 3, 2, 2, 2), "Llama has only vectors and matrices"),
    ],
)
def test_dimensions(path: Path, raw: bytes, match: str) -> None:
    patch(path, after(path, "blk.0.attn_q.weight"), raw)
    with refused(match):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("at", "raw", "match"),
    [
        (0, b"GGML", r"starts with b'GGML', not with b'GGUF'"),
        (4, struct.pack("<I", 1), "GGUF version 1; versions 2 and 3 are read"),
        (4, struct.pack("<I", 4), "GGUF version 4"),
        (4, struct.pack(">I", 3), "a big-endian GGUF file"),
        (8, struct.pack("<Q", 1 << 60), "tensor '' has 0 dimensions"),
        (16, struct.pack("<Q", 1 << 60), "truncated|metadata key"),
        (24, struct.pack("<Q", 1 << 60), "a metadata key claims to have 1152921504606846976 bytes"),
        (24, struct.pack("<Q", 65_536), "a metadata key claims to have 65536 bytes"),
    ],
)
def test_header(path: Path, at: int, raw: bytes, match: str) -> None:
    patch(path, at, raw)
    with refused(match):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (struct.pack("<IQ", 8, 1 << 40), "claims 1099511627776 elements"),
        (struct.pack("<IQ", 8, 1 << 20), "truncated: metadata key 'k'"),
        (struct.pack("<IQ", 4, 1 << 21), "truncated: metadata key 'k'"),
        (struct.pack("<IQ", 8, 3) + struct.pack("<Q", 1 << 50), "ends inside string 0"),
        (struct.pack("<IQ", 77, 3), "'k' has a value of unknown type 77"),
        (struct.pack("<IQ", 9, 1) * 9, "'k' has arrays nested more than 4 deep"),
    ],
)
def test_arrays(tmp_path: Path, raw: bytes, match: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_keys() | {"k": ["some", "text"] * 40})
    patch(path, after(path, "k") + 4, raw)
    with refused(match):
        open_checkpoint(path)


def test_strings(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_keys() | {"name": "abc", "list": ["abc", "def"]})
    at = after(path, "name") + 4
    patch(path, at, struct.pack("<Q", 1 << 40))
    with refused("'name' claims to have 1099511627776 bytes"):
        open_checkpoint(path)
    patch(path, at, struct.pack("<Q", 3) + b"a\xff")
    with refused("'name' is not valid UTF-8"):
        open_checkpoint(path)
    patch(path, at + 8, b"abc")
    patch(path, after(path, "list") + 16 + 11 + 8, b"\xff")
    with refused("'list': string 1 is not valid UTF-8"):
        open_checkpoint(path)


def test_names_given_twice(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_keys() | {"key.1": 1, "key.2": 2})
    patch(path, after(path, "key.2") - 1, b"1")
    with refused("metadata key 'key.1' is given twice"):
        open_checkpoint(path)
    path = write_gguf(tmp_path / "m.gguf")
    patch(path, after(path, "blk.1.attn_k.weight") - 15, b"0")
    with refused("tensor 'blk.0.attn_k.weight' is given twice"):
        open_checkpoint(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    """Cut at each byte up to the tensor data, and at many in it."""
    path = write_gguf(tmp_path / "m.gguf", gguf_keys() | {"a": ["b", "c"], "d": [1, 2]})
    size = path.stat().st_size
    data = size - sum(-(-w.nbytes // 32) * 32 for w in weights().values())
    for cut in [*range(size - 1, data, -999), *range(data, -1, -1)]:
        os.truncate(path, cut)
        with pytest.raises(CheckpointError, match=r"truncated|not a GGUF file") as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)


def write_parts(folder: Path, count: int = 3) -> list[Path]:
    """A model split as llama.cpp splits it: metadata in the first part."""
    names = list(tensors())
    paths = []
    for number in range(count):
        keys = {"split.no": number, "split.count": count, "split.tensors.count": len(names)}
        part = {name: tensors()[name] for name in names[number::count]}
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        paths.append(write_gguf(path, (gguf_keys() if number == 0 else {}) | keys, part))
    return paths


def test_split_files(tmp_path: Path) -> None:
    first, second, third = write_parts(tmp_path)
    assert_equal(read_all(first), weights())
    with refused("part 2 of 3; name the first, m-00001-of-00003.gguf"):
        open_checkpoint(second)
    third.unlink()
    with refused("m-00003-of-00003.gguf: cannot be read: No such file"):
        open_checkpoint(first)


def test_split_files_with_a_tensor_twice(tmp_path: Path) -> None:
    first, second, _ = write_parts(tmp_path)
    second.write_bytes(first.read_bytes())
    with refused("tensor 'token_embd.weight' is in an earlier part too"):
        open_checkpoint(first)


def test_message_stays_one_line(tmp_path: Path) -> None:
    strange = {"a\nb\x1b[2J" + "c" * 500: np.zeros(3, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", None, tensors() | strange)
    with refused(r"tensor 'a\\nb\\x1b\[2Jc+\.\.\.' is no part") as _:
        open_checkpoint(path)
