"""Logits against other people's implementations of the same model.

Random tiny models go through a folder on disk, so that reading, the rotary permutation and the
merging of weights are covered as well. Tolerance for float32 weights: 1e-4 on logits of order 1.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import pytest

from pronk.backends.protocol import BLOCK, F32, Batch
from pronk.backends.select import select_backend
from pronk.checkpoints.open import open_checkpoint
from pronk.engine.load import load_model
from pronk.model.llama import forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
BACKENDS = ["reference", "cpu"]

LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# head size, query heads for each key/value head, tied, rope factor, vocabulary
MODELS = [
    (64, 1, False, None, 97),
    (64, 3, True, None, 1003),
    (64, 4, True, 32.0, 256),
    (128, 1, True, 8.0, 131),
    (128, 4, False, 8.0, 515),
    (128, 8, False, 32.0, 77),
    (64, 8, True, 8.0, 64),
    (128, 3, False, None, 300),
]


def hf_model(head_dim: int, group: int, tied: bool, factor: float | None, vocab: int) -> Any:
    torch.manual_seed(0)
    kv_heads = 2
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, vocab_size=vocab,
        num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_theta=500000.0, rope_scaling=factor and {**LLAMA3, "factor": factor},
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norm weights other than 1 too
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


def our_logits(folder: Path, backend: str, ids: F32, chunk: int, kv_dtype: str = "f32") -> F32:
    """Logits of every position, `chunk` tokens a step over a paged cache."""
    ops: Any = select_backend(backend)
    with open_checkpoint(folder) as checkpoint:
        weights = load_model(checkpoint, ops, n_positions=len(ids))
        config = checkpoint.config
        n_blocks = -(-len(ids) // BLOCK)
        kv = ops.make_kv(config, n_blocks, kv_dtype)
        table = np.arange(n_blocks, dtype=np.int32)[None, ::-1].copy()
        pieces = []
        for first in range(0, len(ids), chunk):
            last = min(first + chunk, len(ids))
            batch = Batch(
                np.arange(first, last, dtype=np.int32), np.array([0, last - first], np.int32),
                np.array([last], np.int32), table,
            )  # fmt: skip
            pieces.append(forward(ops, config, weights, ids[first:last], batch, kv))
    return np.concatenate(pieces)


Record: TypeAlias = Callable[[str, object], None]


def check(got: F32, want: F32, record: Record) -> None:
    """Within the tolerance; the largest difference goes into docs/results/parity.md."""
    record("largest difference", f"{np.abs(got - want).max():.1e}")
    record("largest logit", f"{np.abs(want).max():.1f}")
    assert np.abs(want).max() > 0.5, "logits too small to tell anything"
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_logits_equal_transformers(
    shape: tuple[Any, ...], backend: str, tmp_path: Path, record_property: Record
) -> None:
    if backend == "cpu":
        pytest.importorskip("pronk.backends.cpu")
    model = hf_model(*shape)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, shape[-1], 75).astype(np.int32)
    with torch.no_grad():
        want = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    whole = our_logits(tmp_path, backend, ids, 75)
    check(whole, want, record_property)
    np.testing.assert_array_equal(our_logits(tmp_path, backend, ids, 13), whole)


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_positions_beyond_the_original_context(
    factor: float | None, tmp_path: Path, record_property: Record
) -> None:
    """8,300 tokens through the CPU backend, the last 64 positions compared."""
    pytest.importorskip("pronk.backends.cpu")
    model = hf_model(64, 2, True, factor, 128)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(1).integers(0, 128, 8300).astype(np.int32)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        want = model(torch.from_numpy(ids.astype(np.int64))[None], logits_to_keep=64).logits[0]
    got = our_logits(tmp_path, "cpu", ids, 512)[-64:]
    check(got, want.numpy(), record_property)


@pytest.mark.parametrize("start", [0, 8190, 100_000, 131_000])
@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_angles_equal_transformers(head_dim: int, factor: float | None, start: int) -> None:
    from pronk.core.config import ModelConfig, RopeScaling
    from pronk.model.rope import rope_table

    rotary = hf_model(head_dim, 1, True, factor, 64).model.rotary_emb
    positions = torch.arange(start, start + 40)[None]
    cos, sin = rotary(torch.zeros(1), positions)
    config = ModelConfig(
        dim=64, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=head_dim, ffn_dim=8, vocab_size=8,
        context=131072, rope_scaling=RopeScaling(factor=factor) if factor else None,
    )  # fmt: skip
    got = rope_table(config, start + 40)[start:]
    half = head_dim // 2
    np.testing.assert_allclose(got[..., 0], cos[0, :, :half].numpy(), atol=2e-6)
    np.testing.assert_allclose(got[..., 1], sin[0, :, :half].numpy(), atol=2e-6)


@pytest.mark.parametrize(("kv_dtype", "bound"), [("f16", 0.002), ("int8", 0.06)])
def test_rounded_caches_stay_close(kv_dtype: str, bound: float, tmp_path: Path) -> None:
    """Error of all logits as a fraction; weights of this size make attention far sharper than a
    trained model's, whose divergence test_quantized.py bounds."""
    model = hf_model(64, 4, True, None, 256)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(2).integers(0, 256, 70).astype(np.int32)
    for backend in BACKENDS:
        if backend == "cpu":
            pytest.importorskip("pronk.backends.cpu")
        exact = our_logits(tmp_path, backend, ids, 70)
        rounded = our_logits(tmp_path, backend, ids, 70, kv_dtype)
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        assert 0 < error < bound, backend


# ---- Meta's own model code -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def meta() -> Iterator[Any]:
    """`llama_models.llama3.model`, its tensor-parallel layers replaced by plain ones: in one
    process they compute the same, and the library that has them is not needed."""
    pytest.importorskip("llama_models")

    def linear(n_in: int, n_out: int, **_: Any) -> Any:
        return torch.nn.Linear(n_in, n_out, bias=False)

    layers = ModuleType("fairscale.nn.model_parallel.layers")
    vars(layers).update(ColumnParallelLinear=linear, RowParallelLinear=linear)
    vars(layers).update(VocabParallelEmbedding=lambda v, d, **_: torch.nn.Embedding(v, d))
    initialize = ModuleType("fairscale.nn.model_parallel.initialize")
    vars(initialize).update(get_model_parallel_world_size=lambda: 1)
    stand_ins = {
        "fairscale": ModuleType("fairscale"),
        "fairscale.nn": ModuleType("fairscale.nn"),
        "fairscale.nn.model_parallel": ModuleType("fairscale.nn.model_parallel"),
        layers.__name__: layers,
        initialize.__name__: initialize,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("llama_models.llama3.model")


META_SHAPES = [  # dim, heads, key/value heads, scaled rope, vocabulary
    (256, 4, 4, False, 97),
    (256, 4, 1, True, 128),
    (512, 4, 2, True, 301),
    (512, 8, 1, True, 64),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", META_SHAPES, ids=str)
def test_logits_equal_metas_model(
    shape: tuple[int, int, int, bool, int],
    backend: str,
    meta: Any,
    tmp_path: Path,
    record_property: Record,
) -> None:
    """A Meta folder written from Meta's own Transformer, read by ours, 75 positions compared."""
    if backend == "cpu":
        pytest.importorskip("pronk.backends.cpu")
    dim, heads, kv_heads, scaled, vocab = shape
    params = {
        "dim": dim, "n_layers": 2, "n_heads": heads, "n_kv_heads": kv_heads, "vocab_size": vocab,
        "multiple_of": 32, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0,
        "use_scaled_rope": scaled,
    }  # fmt: skip
    torch.manual_seed(3)
    model = meta.Transformer(meta.ModelArgs(**params, max_batch_size=1, max_seq_len=128)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.1)
    torch.save(model.state_dict(), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    ids = np.random.default_rng(3).integers(0, vocab, 75).astype(np.int32)
    want = model(torch.from_numpy(ids.astype(np.int64))[None], 0)[0].numpy()
    check(our_logits(tmp_path, backend, ids, 20), want, record_property)


# ---- a real model --------------------------------------------------------------------------------


def test_smollm2_equals_transformers_on_the_same_file(
    smollm2_path: Path, record_property: Record
) -> None:
    """Both dequantize the GGUF to float32: reference backend against transformers, 40 tokens."""
    pytest.importorskip("gguf")
    text = "The capital of France is Paris. def fib(n): return n if n < 2 else"
    folder, file = smollm2_path.parent, smollm2_path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    ).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        want = model(ids).logits[0].numpy()
    got = our_logits(smollm2_path, "reference", ids[0].numpy().astype(np.int32), 512)
    check(got, want, record_property)
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
