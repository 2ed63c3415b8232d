"""Hugging Face folders that are right, and the many ways in which they can be wrong."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    CONFIG,
    assert_equal,
    hf_config,
    hf_tensors,
    read_all,
    refused,
    safetensors_bytes,
    weights,
    with_header,
    write_hf,
)

from pronk.checkpoints.open import open_checkpoint
from pronk.checkpoints.safetensors import read_config
from pronk.core.config import RopeScaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "model")


def config_of(**changes: Any) -> Any:
    return read_config(Path("config.json"), hf_config(**changes))


def test_everything_is_read(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "hf"
        assert checkpoint.config == CONFIG
        assert checkpoint.metadata["model_type"] == "llama"
        assert checkpoint.kinds() == {"F32": 21}
        assert checkpoint.nbytes == sum(w.nbytes for w in weights().values())
    assert_equal(read_all(folder), weights())


def test_float16_rows_are_permuted_too(tmp_path: Path) -> None:
    halves = {name: w.astype(np.float16) for name, w in hf_tensors().items()}
    with open_checkpoint(write_hf(tmp_path, halves)) as checkpoint:
        assert checkpoint.kinds() == {"F16": 21}
        for name in ("layers.1.wq", "layers.0.wk"):
            ours = checkpoint.get(name).data.view(np.float16)
            np.testing.assert_array_equal(ours, weights()[name].astype(np.float16))


def write_shards(folder: Path) -> dict[str, Any]:
    """Two shards and their index."""
    tensors = hf_tensors()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        (folder / file).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards(folder: Path) -> None:
    write_shards(folder)
    assert_equal(read_all(folder), weights())


def test_one_file_of_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert_equal(read_all(folder), weights())


def test_shards_without_an_index(folder: Path) -> None:
    write_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    with refused("2 safetensors files but no model.safetensors.index.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "target",
    ["../model.safetensors", "/etc/passwd", "sub/a.safetensors", "..\\a.safetensors",
     "c:a.safetensors", "a\0.safetensors", "model.bin", "\ud800.safetensors", 7, None,
     ["a.safetensors"]],
)  # fmt: skip
def test_index_stays_in_its_folder(folder: Path, target: Any) -> None:
    index = write_shards(folder)
    index["weight_map"]["lm_head.weight"] = target
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("'lm_head.weight' points to .*, which is no safetensors file of this folder"):
        open_checkpoint(folder)


def test_index_that_does_not_fit(folder: Path) -> None:
    index = write_shards(folder)
    index_file = folder / "model.safetensors.index.json"
    weight_map = index["weight_map"]
    index_file.write_text(
        json.dumps({"weight_map": weight_map | {"extra": weight_map["lm_head.weight"]}})
    )
    with refused("tensor 'extra' is missing"):
        open_checkpoint(folder)
    index_file.write_text(json.dumps({"weight_map": weight_map | {"extra": "gone.safetensors"}}))
    with refused("gone.safetensors: cannot be read: No such file"):
        open_checkpoint(folder)
    index_file.write_text(json.dumps({"weight_map": []}))
    with refused("weight_map must be an object"):
        open_checkpoint(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    write_shards(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with refused("is in model-00001-of-00002.safetensors too"):
        open_checkpoint(folder)


def test_legacy_frequencies_are_ignored(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_hf(folder, hf_tensors() | extra)
    assert_equal(read_all(folder), weights())


def test_tied(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(hf_config(tie_word_embeddings=True)))
    with open_checkpoint(folder) as checkpoint:
        assert "output" not in checkpoint.names()
    untied = hf_tensors()
    del untied["lm_head.weight"]
    write_hf(folder, untied)
    with refused("tensor 'lm_head.weight' is missing"):
        open_checkpoint(folder)
    config.write_text(json.dumps(hf_config(tie_word_embeddings=True)))
    open_checkpoint(folder).close()


def test_defaults() -> None:
    config = config_of(
        head_dim=None, num_key_value_heads=None, rope_theta=None, rms_norm_eps=None,
        max_position_embeddings=None, tie_word_embeddings=None,
    )  # fmt: skip
    assert config == replace(CONFIG, n_kv_heads=4, norm_eps=1e-6, context=2048)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": None},
        {"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_theta": 500_000},
    ],
)
def test_llama3_scaling_in_each_spelling(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    assert config == replace(CONFIG, rope_theta=5e5, rope_scaling=RopeScaling())


def test_other_rope_types() -> None:
    assert config_of(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7
    linear = config_of(rope_scaling={"type": "linear", "factor": 2.0})
    assert linear == replace(CONFIG, rope_divisors=(2.0,) * 4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, r"\['Qwen2ForCausalLM'\]; only LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, r"architectures is \['gpt2'\]"),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"quantization_config": {"quant_method": "awq"}}, r"the weights are quantized \('awq'\)"),
        ({"quantization_config": 3}, r"the weights are quantized \(3\)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 32.0}, "hidden_size must be a whole number, got 32.0"),
        ({"hidden_size": 10**400}, "hidden_size must be below 2"),
        ({"num_attention_heads": 0}, "n_heads must be a positive integer, got 0"),
        ({"num_key_value_heads": 3}, "n_heads 4 is no multiple of n_kv_heads 3"),
        ({"num_hidden_layers": -1}, "n_layers must be a positive integer, got -1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a finite number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number"),
        ({"rope_theta": "big"}, "rope_theta must be a finite number, got 'big'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "only a partial_rotary_factor of 1"),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object, got \[1\]"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": 5}}, "rope_scaling.rope_type must be a string, got 5"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor must be above 0"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "must exceed low_freq_factor"),
        ({"rope_parameters": LLAMA3 | {"factor": float("nan")}}, "must be a finite number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}, "head_dim": 1 << 60},
         "heads must have 1 to 65536 dimensions"),
    ],
)  # fmt: skip
def test_refused_config(changes: dict[str, Any], match: str) -> None:
    with refused(match):
        config_of(**changes)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object, is a list"),
        (b"\xff\xfe{}", "cannot be read: not UTF-8"),
        (b'{"\\ud800": 1}', "not JSON: the name '.ud800' has a lone surrogate"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"hidden_size": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' is given twice"),
    ],
)
def test_damaged_config(folder: Path, text: bytes, match: str) -> None:
    (folder / "config.json").write_bytes(text)
    with refused(f"config.json: .*{match}", limit=32 << 20):
        open_checkpoint(folder)


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("blob", "match"),
    [
        (b"\x01\x02", "truncated: a header of 513 bytes in a file of 2"),
        (b"\xff" * 8, "truncated: a header of 18446744073709551615 bytes in a file of 8"),
        (with_header(b"{}") + b"x", "tensors end at byte 10 of a file of 11"),
        (with_header(b"not json"), "not JSON"),
        (with_header({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
         "the name '.ud800' has a lone surrogate"),
        (with_header([1]), "must be a JSON object, is a list"),
        (with_header({"a": 5}), "tensor 'a' needs dtype, shape and data_offsets, has 5"),
        (with_header({"a": {"dtype": "F32"}}), "needs dtype, shape and data_offsets"),
        (with_header({"a": entry([1], [0, 4], "F33")}, b"1234"), "has dtype 'F33'"),
        (with_header({"a": entry([1], [0, 4], ["F32"])}, b"1234"), r"has dtype \['F32'\]"),
        (with_header({"a": entry([1.0], [0, 4])}, b"1234"), "must be lists of whole numbers"),
        (with_header({"a": entry([True], [0, 4])}, b"1234"), "must be lists of whole numbers"),
        (with_header({"a": entry([-1], [4, 0])}, b"1234"), "must be lists of whole numbers"),
        (with_header({"a": entry([1], [0, 4, 4])}, b"1234"), "must be lists of whole numbers"),
        (with_header({"a": entry([2], [0, 4])}, b"1234"), "needs 8 bytes"),
        (with_header({"a": entry([1 << 62, 4], [0, 4])}, b"1234"), "needs 73786976294838206464"),
        (with_header({"a": entry([1], [0, 4]), "b": entry([1], [2, 6])}, b"123456"), "overlaps"),
        (with_header({"a": entry([1], [4, 8])}, b"12345678"), "leaves a hole before it"),
        (with_header({"a": entry([1], [0, 4])}, b"12345678"), "end at byte .* of a file of"),
        (with_header({"a": entry([2], [0, 8])}, b"1234"), "truncated: tensors end at byte"),
        (with_header(b'{"a": 1, "a": 2}'), "'a' is given twice"),
    ],
)  # fmt: skip
def test_damaged_header(folder: Path, blob: bytes, match: str) -> None:
    (folder / "model.safetensors").write_bytes(blob)
    with refused(match):
        open_checkpoint(folder)


def test_header_over_the_limit(folder: Path) -> None:
    """A file that is nearly all hole on disk; its header alone would be 200 MB."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(200_000_008)
    with refused("a header of 200000000 bytes; at most 100000000 are allowed"):
        open_checkpoint(folder)


def test_truncated_anywhere(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for cut in [*range(size - 1, header, -999), *range(header, -1, -7)]:
        os.truncate(path, cut)
        with refused("truncated|the file is empty"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor 'model.norm.weight' is missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(3, np.float32)}),
            "'model.layers.0.self_attn.q_proj.bias' is no part of a Llama model",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((20, 33), np.float32)}),
            r"'lm_head.weight' has shape \[20, 33\], the configuration asks for \[20, 32\]",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": np.zeros(7, np.float32)}),
            r"has shape \[7\], the configuration asks for \[32, 32\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((20, 32), np.uint8)}),
            "'lm_head.weight' is stored as U8, which is not supported",
        ),
    ],
)
def test_wrong_tensors(folder: Path, change: Callable[[dict[str, Any]], Any], match: str) -> None:
    tensors: dict[str, Any] = hf_tensors()
    change(tensors)
    write_hf(folder, tensors)
    with refused(match):
        open_checkpoint(folder)
