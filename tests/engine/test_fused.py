"""All layers as one native call (csrc/stack.cpp) against single ops: the same bits."""

from dataclasses import replace

import numpy as np
import pytest

from backends.random_weights import random_tensor
from pronk.backends.protocol import BLOCK, F32, KV_DTYPES, Batch, KvDtype
from pronk.core.config import ModelConfig
from pronk.model.llama import LayerWeights, LlamaWeights, forward
from pronk.model.rope import rope_table

cpu = pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")

KINDS = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")


def vector(rng: np.random.Generator, n: int) -> F32:
    return rng.uniform(0.5, 1.5, n).astype(np.float32)


def make_weights(config: ModelConfig, kind: str, *, fused: bool) -> LlamaWeights:
    rng = np.random.default_rng(7)
    width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def weight(cols: int, *rows: int) -> object:
        return cpu.make_weight([random_tensor(kind, n, cols, rng) for n in rows])

    layers = [
        LayerWeights(
            attn_norm=vector(rng, config.dim),
            wqkv=weight(config.dim, width, kv_width, kv_width),
            wo=weight(width, config.dim),
            ffn_norm=vector(rng, config.dim),
            w_gate_up=weight(config.dim, config.ffn_dim, config.ffn_dim),
            w_down=weight(config.ffn_dim, config.dim),
        )
        for _ in range(config.n_layers)
    ]
    norm, cos_sin = vector(rng, config.dim), rope_table(config, config.context)
    return LlamaWeights(
        embed=cpu.make_table(random_tensor(kind, config.vocab_size, config.dim, rng)),
        layers=layers,
        norm=norm,
        output=weight(config.dim, config.vocab_size),
        cos_sin=cos_sin,
        stack=cpu.make_stack(config, layers, norm, cos_sin) if fused else None,
    )


def model(n_heads: int, n_kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=100, dim=256, n_layers=3, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=head_dim, ffn_dim=768, norm_eps=1e-5, rope_theta=10_000.0, context=256,
    )  # fmt: skip


def two_sequences(counts: tuple[int, int], starts: tuple[int, int]) -> Batch:
    lengths = np.array([s + n for s, n in zip(starts, counts, strict=True)], np.int32)
    positions = [np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
    return Batch(
        np.concatenate(positions).astype(np.int32),
        np.array([0, counts[0], sum(counts)], np.int32),
        lengths,
        np.arange(2 * (256 // BLOCK), dtype=np.int32).reshape(2, -1),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 32)], ids=str)
def test_one_call_gives_the_same_bits(
    kind: str, kv_dtype: KvDtype, heads: tuple[int, int, int]
) -> None:
    config = model(*heads)
    rng = np.random.default_rng(0)
    cpu.set_threads(2)
    found: list[list[F32]] = []
    ids = rng.integers(0, 100, 200).astype(np.int32)
    for fused in (False, True):
        weights = make_weights(config, kind, fused=fused)
        kv = cpu.make_kv(config, 2 * (256 // BLOCK), kv_dtype)
        steps = [
            (two_sequences((70, 9), (0, 0)), np.array([3, 69, 78], np.int32)),
            (two_sequences((1, 1), (70, 9)), None),
            (two_sequences((0, 40), (71, 10)), np.array([], np.int32)),
            (two_sequences((1, 30), (71, 50)), np.array([0, 30], np.int32)),
        ]
        found.append(
            [
                forward(cpu, config, weights, ids[: len(b.positions_T)], b, kv, rows)
                for b, rows in steps
            ]
        )
    cpu.set_threads(1)
    for plain, fused_logits in zip(*found, strict=True):
        assert np.isfinite(plain).all()
        np.testing.assert_array_equal(plain, fused_logits)


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q6_K"])
def test_steps_of_more_rows_than_a_pass(kind: str) -> None:
    """The fused block and one thread against single ops and three: 600 rows are cut in two."""
    config = replace(model(4, 2, 64), context=608)
    ids = np.random.default_rng(1).integers(0, 100, 600).astype(np.int32)
    table = np.arange(608 // BLOCK, dtype=np.int32)[None]
    batch = Batch(
        np.arange(600, dtype=np.int32),
        np.array([0, 600], np.int32),
        np.array([600], np.int32),
        table,
    )
    found = []
    for fused, threads in ((False, 3), (True, 3), (True, 1)):
        cpu.set_threads(threads)
        weights = make_weights(config, kind, fused=fused)
        kv = cpu.make_kv(config, 608 // BLOCK, "f16")
        found.append(forward(cpu, config, weights, ids, batch, kv))
    cpu.set_threads(1)
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_time_is_booked_by_operation() -> None:
    config = model(4, 4, 64)
    weights = make_weights(config, "Q4_0", fused=True)
    kv = cpu.make_kv(config, 16, "f16")
    cpu.take_profile()
    batch = two_sequences((60, 20), (0, 0))
    forward(cpu, config, weights, np.zeros(80, np.int32), batch, kv, np.array([79], np.int32))
    seconds = cpu.take_profile()
    assert all(spent > 0 for spent in seconds.values()), seconds
    assert not any(cpu.take_profile().values())


def test_weights_that_do_not_fit_are_refused() -> None:
    config = model(4, 4, 64)
    weights = make_weights(config, "Q4_0", fused=False)
    rng = np.random.default_rng(1)
    one = cpu.make_weight([random_tensor("Q4_0", 2 * config.ffn_dim, config.dim, rng)])
    layer = weights.layers[0]
    wrong = LayerWeights(layer.attn_norm, layer.wqkv, layer.wo, layer.ffn_norm, one, layer.w_down)
    with pytest.raises(ValueError, match="one tensor each"):
        cpu.make_stack(config, [wrong], weights.norm, weights.cos_sin)
    wrong = LayerWeights(
        layer.attn_norm, layer.wo, layer.wo, layer.ffn_norm, layer.w_gate_up, layer.w_down
    )
    with pytest.raises(ValueError, match="wrong shape"):
        cpu.make_stack(config, [wrong], weights.norm, weights.cos_sin)
