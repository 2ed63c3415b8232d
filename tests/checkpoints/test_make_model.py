"""bench/make_model.py: what it writes opens, and its weights are of a sane size."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pronk.backends.formats import KINDS, dequantize
from pronk.checkpoints.open import open_checkpoint

SCRIPT = Path(__file__).parents[2] / "bench" / "make_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    sys.modules["make_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", [*KINDS, "q4_k_m"])
def test_every_type(script: ModuleType, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    assert script.main([str(path), "--shape", "tiny", "--type", kind, "--pure"]) == 0
    with open_checkpoint(path) as checkpoint:
        config = replace(script.SHAPES["tiny"], norm_eps=checkpoint.config.norm_eps)
        assert checkpoint.config == config
        for name in checkpoint.names():
            raw = checkpoint.get(name)
            weights = dequantize(raw.kind, raw.data)
            assert weights.shape == raw.shape
            if raw.shape[0] == 1:
                assert (weights == 1).all()
                continue
            assert raw.kind == ("Q4_K" if kind == "q4_k_m" else kind) or kind == "q4_k_m"
            deviation = weights.std() * raw.shape[1] ** 0.5
            # A scale of MXFP4 is a power of two.
            assert 0.7 < deviation < 1.42 if kind == "MXFP4" else 0.9 < deviation < 1.15
            assert abs(weights.mean()) < 0.1 * weights.std()
            if kind.startswith("TQ"):
                assert len(np.unique(np.sign(weights[0, :256]) * weights[0, :256].max())) == 3


def test_mix_of_q4_k_m(script: ModuleType) -> None:
    """The 32 layers of the 8B: as in the files that llama.cpp writes."""
    config = script.SHAPES["8b"]
    six_bits = [
        layer
        for layer in range(32)
        if script.kind_of(f"layers.{layer}.w_down", config, "q4_k_m", False) == "Q6_K"
    ]
    assert six_bits == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    kinds = {
        name: script.kind_of(name, config, "q4_k_m", False)
        for name in ("embed", "norm", "output", "layers.4.wv", "layers.6.wv", "layers.6.wq")
    }
    assert kinds == {
        "embed": "Q4_K", "norm": "F32", "output": "Q6_K", "layers.4.wv": "Q4_K",
        "layers.6.wv": "Q6_K", "layers.6.wq": "Q4_K",
    }  # fmt: skip


def test_columns_that_are_no_whole_blocks(script: ModuleType) -> None:
    config = script.SHAPES["smollm2"]
    assert script.kind_of("layers.0.wq", config, "Q4_K", False) == "Q5_0"
    assert script.kind_of("layers.0.w_down", config, "Q4_K", False) == "Q4_K"
    assert script.kind_of("embed", config, "Q4_0", False) == "Q8_0"
    odd = replace(config, dim=40)
    assert script.kind_of("layers.0.wq", odd, "Q2_K", False) == "F16"


def test_sizes_and_vocabulary_can_be_given(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    given = "--shape 1b --layers 1 --dim 96 --heads 3 --kv-heads 1 --head-dim 32 --ffn 64"
    args = [str(path), *given.split(), "--type", "Q8_0", "--vocab", "3000", "--context", "77"]
    assert script.main(args) == 0
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        assert (config.dim, config.n_layers, config.n_heads, config.context) == (96, 1, 3, 77)
        assert config.tied_embeddings
        assert config.vocab_size == 3000
        assert config.rope_divisors is not None
        assert config.rope_divisors[0] == 1
        assert config.rope_divisors[-1] == 32
        assert np.diff(config.rope_divisors).min() >= 0
        tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
        assert len(set(tokens)) == 3000
        assert checkpoint.metadata["tokenizer.ggml.bos_token_id"] == 3000 - 256
        assert tokens[3000 - 256 :][:2] == ["<|begin_of_text|>", "<|end_of_text|>"]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        for merge in checkpoint.metadata["tokenizer.ggml.merges"]:
            left, right = merge.split(" ")
            assert max(ranks[left], ranks[right]) < ranks[left + right]


def test_llama_vocabulary(script: ModuleType) -> None:
    pytest.importorskip("llama_models")
    vocabulary = script.llama_vocabulary()
    assert len(vocabulary.tokens) == 128_256
    assert vocabulary.tokens[128_009] == "<|eot_id|>"
    # As many as Hugging Face's tokenizer.json of the same vocabulary has.
    assert len(vocabulary.merges) == 280_147


def test_same_seed_same_file(script: ModuleType, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        script.make_model(path, script.SHAPES["tiny"], "Q5_K", seed=seed)
    first, second, third = (path.read_bytes() for path in paths)
    assert first == second
    assert first != third


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--vocab", "many"], "--vocab: 'many' is neither a number nor llama"),
        (["--vocab", "100"], "--vocab: 100 tokens; from 272 to 400000 are possible"),
        (["--dim", "800000", "--ffn", "9000000"], "GB are free there"),
        (["--heads", "3"], "n_heads 3 is no multiple of n_kv_heads 2"),
    ],
)
def test_bad_arguments(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str],
    match: str,
) -> None:  # fmt: skip
    assert script.main([str(tmp_path / "m.gguf"), "--shape", "tiny", *args]) == 2
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
