"""Every kernel of the CPU backend against the NumPy reference, at every size around a tile's edge.

Runs on the instruction set that the process has chosen; `test_isas.py` repeats it on the others.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from backends.random_weights import DENSE, random_tensor
from pronk.backends import reference
from pronk.backends.formats import KINDS, dequantize
from pronk.backends.protocol import BLOCK, F32, KV_DTYPES, Batch, KvDtype
from pronk.core.config import ModelConfig

cpu = pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")

ROWS = (*range(1, 18), 31, 64, 130)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"threads{n}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    cpu.set_threads(request.param)
    yield request.param
    cpu.set_threads(1)


def relative_error(got: F32, want: F32) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def rounded_activations(x_TD: F32) -> F32:
    """What a kernel that quantizes activations sees: blocks of 32 in 8 bits, or in 16 where a block
    holds a value of more than six times the row's root mean square."""
    blocks = x_TD.reshape(len(x_TD), -1, 32)
    peaks = np.abs(blocks).max(axis=-1, keepdims=True)
    stand_out = peaks[..., 0] > 6 * np.sqrt(np.square(x_TD).mean(axis=1, keepdims=True))
    levels = np.where(stand_out, np.float32(127 * 256), np.float32(127))[..., None]
    codes = np.rint(blocks * (levels / np.where(peaks > 0, peaks, 1)))
    return (codes * (peaks / levels)).reshape(x_TD.shape).astype(np.float32)


def activations(rng: np.random.Generator, rows: int, inputs: int) -> F32:
    """Rows with outliers, so that some blocks are rounded to 16 bits: in every row at the same
    inputs, in a few rows elsewhere, and rows without any."""
    x_TD = rng.standard_normal((rows, inputs)).astype(np.float32)
    x_TD[:, inputs // 3] *= 50
    x_TD[::3] = np.clip(x_TD[::3], -1, 1)
    x_TD[1::7, -1] = -200
    return x_TD


@pytest.mark.parametrize("kind", KINDS)
def test_linear_equals_reference_and_rows_are_independent(kind: str, threads: int) -> None:
    """Within 2e-6 of the product with the dequantized weight (activations rounded as documented);
    and a row's numbers are bit for bit the same alone and among any number of other rows."""
    rng = np.random.default_rng(1)
    for outputs, inputs in ((7, 256), (16, 512), (40, 768), (100, 256), (130, 1280)):
        tensor = random_tensor(kind, outputs, inputs, rng)
        packed = cpu.make_weight([tensor])
        dense = dequantize(kind, tensor.data).astype(np.float64)
        x_TD = activations(rng, max(ROWS), inputs)
        alone = np.concatenate([cpu.linear(x_TD[t : t + 1], packed) for t in range(len(x_TD))])
        seen = x_TD if kind in DENSE else rounded_activations(x_TD)
        assert relative_error(alone, seen.astype(np.float64) @ dense.T) < 2e-6
        for rows in ROWS:
            np.testing.assert_array_equal(cpu.linear(x_TD[:rows], packed), alone[:rows])


@pytest.mark.parametrize("inputs", [1, 3, 20, 63, 64, 65, 130])
def test_dense_linear_takes_any_number_of_inputs(inputs: int) -> None:
    rng = np.random.default_rng(2)
    tensor = random_tensor("F32", 33, inputs, rng)
    x_TD = rng.standard_normal((5, inputs)).astype(np.float32)
    want = reference.linear(x_TD, reference.make_weight([tensor]))
    assert relative_error(cpu.linear(x_TD, cpu.make_weight([tensor])), want) < 2e-6


def test_stacked_tensors_of_different_kinds() -> None:
    """q and k in Q4_K beside v in Q6_K, as llama.cpp's mixed files have them."""
    rng = np.random.default_rng(3)
    tensors = [
        random_tensor(kind, n, 512, rng) for kind, n in (("Q4_K", 24), ("Q6_K", 40), ("F16", 9))
    ]
    x_TD = rng.standard_normal((9, 512)).astype(np.float32)
    want = np.concatenate([cpu.linear(x_TD, cpu.make_weight([t])) for t in tensors], axis=1)
    np.testing.assert_array_equal(cpu.linear(x_TD, cpu.make_weight(tensors)), want)


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_rows_are_the_dequantized_ones(kind: str) -> None:
    tensor = random_tensor(kind, 50, 512, np.random.default_rng(4))
    ids = np.array([3, 49, 0, 3], np.int32)
    np.testing.assert_array_equal(
        cpu.embed(ids, cpu.make_table(tensor)), reference.embed(ids, reference.make_table(tensor))
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "MXFP4"])
@pytest.mark.parametrize("inputs", [32, 96, 288, 544, 576])
def test_blocks_that_do_not_fill_a_chunk(kind: str, inputs: int, threads: int) -> None:
    rng = np.random.default_rng(16)
    tensor = random_tensor(kind, 77, inputs, rng)
    dense = dequantize(kind, tensor.data).astype(np.float64)
    x_TD = activations(rng, 17, inputs)
    packed = cpu.make_weight([tensor])
    want = rounded_activations(x_TD).astype(np.float64) @ dense.T
    for rows in range(1, 18):
        assert relative_error(cpu.linear(x_TD[:rows], packed), want[:rows]) < 2e-6


def test_zero_and_outlier_activations() -> None:
    """A row of zeros gives zeros; a huge outlier does not disturb the precision of other blocks."""
    rng = np.random.default_rng(5)
    tensor = random_tensor("Q4_0", 32, 256, rng)
    packed = cpu.make_weight([tensor])
    x_TD = rng.standard_normal((1, 256)).astype(np.float32)
    assert not cpu.linear(np.zeros_like(x_TD), packed).any()
    x_TD[0, :32] = 0
    quiet = cpu.linear(x_TD, packed)
    x_TD[0, 7] = 3e4
    outlier = dequantize("Q4_0", tensor.data)[:, 7] * np.float32(3e4)
    np.testing.assert_allclose(
        cpu.linear(x_TD, packed)[0] - outlier, quiet[0], atol=2e-3, rtol=1e-3
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damage_in_activations_is_not_hidden(value: float) -> None:
    rng = np.random.default_rng(17)
    for kind in ("Q4_0", "Q4_1", "Q6_K", "Q2_K"):
        packed = cpu.make_weight([random_tensor(kind, 20, 256, rng)])
        x_TD = rng.standard_normal((5, 256)).astype(np.float32)
        x_TD[2, 100] = value
        y_TO = cpu.linear(x_TD, packed)
        assert np.isnan(y_TO[2]).all(), kind
        assert np.isfinite(np.delete(y_TO, 2, axis=0)).all(), kind


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-36, 1e-31, 1e-29])
def test_activations_near_the_smallest_float(size: float) -> None:
    rng = np.random.default_rng(18)
    tensor = random_tensor("Q8_0", 16, 64, rng)
    y_TO = cpu.linear(np.full((1, 64), size, np.float32), cpu.make_weight([tensor]))
    want = dequantize("Q8_0", tensor.data).sum(axis=1) * size
    np.testing.assert_allclose(y_TO[0], want, atol=2e-28, rtol=1e-4)


def test_row_ops_do_not_depend_on_threads() -> None:
    """Big enough that threads take part: the same bits as with one."""
    rng = np.random.default_rng(19)
    x, residual = rng.standard_normal((2, 130, 1000)).astype(np.float32)
    w, cos_sin = rng.standard_normal(1000).astype(np.float32), rng.standard_normal((130, 50, 2))
    positions = np.arange(130, dtype=np.int32)

    def everything() -> list[F32]:
        heads = x.reshape(130, 10, 100).copy()
        q, k = cpu.rope(heads, heads[:, :2].copy(), cos_sin.astype(np.float32), positions)
        return [cpu.rms_norm(x, w, 1e-5), *cpu.rms_norm(x, w, 1e-5, residual), cpu.swiglu(x), q, k]

    cpu.set_threads(1)
    want = everything()
    for n in (2, 3):
        cpu.set_threads(n)
        for got, expected in zip(everything(), want, strict=True):
            np.testing.assert_array_equal(got, expected)
    cpu.set_threads(1)


def test_thread_counts_may_change_between_ops() -> None:
    """Two engines with different numbers of threads take turns: late threads of the larger one
    must not write where the smaller one has no room."""
    rng = np.random.default_rng(20)
    packed = cpu.make_weight([random_tensor("Q4_0", 640, 64, rng)])
    x_TD = rng.standard_normal((2, 64)).astype(np.float32)
    want = cpu.linear(x_TD, packed)
    for _ in range(3000):
        for n in (6, 2):
            cpu.set_threads(n)
            np.testing.assert_array_equal(cpu.linear(x_TD, packed), want)
    cpu.set_threads(1)


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 63, 64, 65, 576, 1000])
def test_rms_norm(dim: int) -> None:
    rng = np.random.default_rng(6)
    x, residual = rng.standard_normal((2, 9, dim)).astype(np.float32)
    w = rng.standard_normal(dim).astype(np.float32)
    np.testing.assert_allclose(
        cpu.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5), rtol=2e-6, atol=1e-6
    )
    got, got_sum = cpu.rms_norm(x, w, 1e-5, residual)
    want, want_sum = reference.rms_norm(x, w, 1e-5, residual)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(got_sum, want_sum)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 100, 1536])
def test_swiglu(width: int) -> None:
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((5, 2 * width)) * 10).astype(np.float32)
    np.testing.assert_allclose(cpu.swiglu(x), reference.swiglu(x), rtol=3e-6, atol=1e-7)


def test_swiglu_far_outside_the_range_of_exp() -> None:
    gate = np.array([[-1e4, -100.0, -88.5, 0.0, 88.5, 100.0, 1e4, np.inf]], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)], axis=1)
    np.testing.assert_allclose(cpu.swiglu(x), reference.swiglu(x), rtol=3e-6, atol=1e-30)


def test_rope() -> None:
    rng = np.random.default_rng(8)
    cos_sin = rng.standard_normal((40, 10, 2)).astype(np.float32)
    q, k = (
        rng.standard_normal((7, 6, 20)).astype(np.float32),
        rng.standard_normal((7, 2, 20)).astype(np.float32),
    )
    positions = np.array([0, 39, 5, 6, 7, 8, 1], np.int32)
    want = reference.rope(q, k, cos_sin, positions)
    got = cpu.rope(q.copy(), k.copy(), cos_sin, positions)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6)


# ---- attention ----------------------------------------------------------------------------------


def config_of(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        dim=heads * head_dim, n_layers=1, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim,
        ffn_dim=64, vocab_size=64, context=4096,
    )  # fmt: skip


class Context:
    """Random q, k, v of a few sequences over shuffled blocks, and both backends' caches."""

    def __init__(self, config: ModelConfig, lengths: list[int], dtype: KvDtype, seed: int) -> None:
        rng = np.random.default_rng(seed)
        H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
        self.lengths = lengths
        self.q = [rng.standard_normal((n, H, K)).astype(np.float32) for n in lengths]
        self.k = [rng.standard_normal((n, G, K)).astype(np.float32) for n in lengths]
        self.v = [rng.standard_normal((n, G, K)).astype(np.float32) for n in lengths]
        width = max(-(-n // BLOCK) for n in lengths)
        n_blocks = sum(-(-n // BLOCK) for n in lengths) + 3
        free = iter(rng.permutation(n_blocks))
        self.blocks = np.full((len(lengths), width), -1, np.int32)
        for s, n in enumerate(lengths):
            for b in range(-(-n // BLOCK)):
                self.blocks[s, b] = next(free)
        self.caches = {
            "cpu": cpu.make_kv(config, n_blocks, dtype)[0],
            "reference": reference.make_kv(config, n_blocks, dtype)[0],
        }

    def step(self, backend: str, spans: list[tuple[int, int]]) -> list[F32]:
        """Rows first..last-1 of each sequence in one step; the outputs by sequence."""
        module = cpu if backend == "cpu" else reference
        starts = np.cumsum([0, *(last - first for first, last in spans)]).astype(np.int32)
        batch = Batch(
            np.concatenate([np.arange(*span) for span in spans]).astype(np.int32),
            starts,
            np.array([last for _, last in spans], np.int32),
            self.blocks,
        )
        q, k, v = (
            np.concatenate([x[first:last] for x, (first, last) in zip(xs, spans, strict=True)])
            for xs in (self.q, self.k, self.v)
        )
        o = module.attention(q, k, v, self.caches[backend], batch)
        return [o[a:b] for a, b in pairwise(starts)]

    def whole(self, backend: str) -> list[F32]:
        return self.step(backend, [(0, n) for n in self.lengths])


SHAPES = [(4, 4, 64), (6, 2, 128), (9, 3, 64), (8, 1, 128), (2, 1, 20), (3, 3, 80), (40, 1, 32)]


def assert_close(got: F32, want: F32, dtype: KvDtype) -> None:
    """Both backends round keys and values alike. Over int8 the kernels also round queries and
    weights to 8 bits, which costs about 0.5 % of values of size 1."""
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-2 if dtype == "int8" else 3e-5)
    if dtype == "int8" and got.size:
        assert np.sqrt(np.mean((got - want) ** 2)) < 6e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_attention_equals_reference(
    shape: tuple[int, int, int], dtype: KvDtype, threads: int
) -> None:
    context = Context(config_of(*shape), [1, 33, 70, 32], dtype, seed=9)
    for got, want in zip(context.whole("cpu"), context.whole("reference"), strict=True):
        assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_attention_over_many_partitions(dtype: KvDtype, threads: int) -> None:
    """Contexts beyond one partition (256 positions), in chunks and then row by row."""
    context = Context(config_of(4, 2, 64), [1100, 530], dtype, seed=10)
    whole = context.whole("reference")
    for first, last in ((0, 500), (500, 1098), (1098, 1099), (1099, 1100)):
        spans = [(first, last), (min(first, 530), min(last, 530))]
        for got, want, span in zip(context.step("cpu", spans), whole, spans, strict=True):
            assert_close(got, want[slice(*span)], dtype)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_attention_of_a_row_depends_on_nothing_but_its_context(dtype: KvDtype) -> None:
    """Bit for bit the same alone, in chunks of any size, beside others, and on any thread count."""
    cpu.set_threads(1)
    config = config_of(6, 2, 64)
    want = Context(config, [700], dtype, seed=11).whole("cpu")[0]
    for chunk in (1, 7, 64, 512):
        cpu.set_threads(2 if chunk % 2 else 3)
        context = Context(config, [700], dtype, seed=11)
        got = [context.step("cpu", [(i, min(i + chunk, 700))])[0] for i in range(0, 700, chunk)]
        np.testing.assert_array_equal(np.concatenate(got), want)
    cpu.set_threads(1)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_reused_blocks_may_hold_infinities(dtype: KvDtype) -> None:
    """What an earlier owner left behind the context's end must not leak in."""
    config = config_of(2, 1, 32)
    context = Context(config, [40], dtype, seed=12)
    want = context.whole("cpu")[0]
    assert np.isfinite(want).all()
    dirty = Context(config, [40], dtype, seed=12)
    full = np.full((64, 1, 32), np.inf, np.float32)
    batch = Batch(np.arange(64, dtype=np.int32), np.array([0, 64], np.int32),
                  np.array([64], np.int32), dirty.blocks)  # fmt: skip
    cpu.attention(np.zeros((64, 2, 32), np.float32), full, full, dirty.caches["cpu"], batch)
    np.testing.assert_array_equal(dirty.whole("cpu")[0], want)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_a_value_too_large_for_float16_stays_in_its_row(dtype: KvDtype) -> None:
    """Rows before it must not see it, alone or in one step with it; both backends saturate."""
    config = config_of(2, 1, 32)
    contexts = [Context(config, [20], dtype, seed=21) for _ in range(2)]
    for context in contexts:
        context.v[0][7] = 1e5
        context.k[0][9] = -1e5
    whole = contexts[0].whole("cpu")[0]
    one_by_one = [contexts[1].step("cpu", [(i, i + 1)])[0] for i in range(20)]
    np.testing.assert_array_equal(whole, np.concatenate(one_by_one))
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(whole, contexts[0].whole("reference")[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_an_infinite_value_stays_behind_the_rows_before_it(dtype: KvDtype) -> None:
    config = config_of(2, 1, 32)
    contexts = [Context(config, [20], dtype, seed=22) for _ in range(3)]
    for context in contexts[:2]:
        context.v[0][7] = np.inf
    whole = contexts[0].whole("cpu")[0]
    one_by_one = [contexts[1].step("cpu", [(i, i + 1)])[0] for i in range(20)]
    np.testing.assert_array_equal(whole, np.concatenate(one_by_one))
    np.testing.assert_array_equal(whole[:7], contexts[2].whole("cpu")[0][:7])


def test_attention_without_a_cache_sees_each_sequence_alone() -> None:
    rng = np.random.default_rng(13)
    q, k, v = (rng.standard_normal((50, h, 32)).astype(np.float32) for h in (4, 2, 2))
    starts = np.array([0, 10, 11, 50], np.int32)
    positions = np.concatenate([np.arange(n) for n in np.diff(starts)]).astype(np.int32)
    batch = Batch(positions, starts, np.diff(starts).astype(np.int32), np.zeros((3, 0), np.int32))
    want = reference.attention(q, k, v, None, batch)
    np.testing.assert_allclose(cpu.attention(q, k, v, None, batch), want, rtol=2e-5, atol=2e-5)


# ---- the native side refuses what would read or write out of bounds -----------------------------


def test_misshapen_arguments_are_refused() -> None:
    from pronk.backends import _cpu

    weight = cpu.make_weight([random_tensor("Q4_0", 16, 64, np.random.default_rng(14))])
    with pytest.raises(ValueError, match="wrong width"):
        cpu.linear(np.zeros((2, 32), np.float32), weight)
    with pytest.raises(ValueError, match="outside the table"):
        cpu.embed(
            np.array([50], np.int32),
            cpu.make_table(random_tensor("F32", 50, 8, np.random.default_rng(0))),
        )
    with pytest.raises(ValueError, match="row bytes"):
        _cpu.PackedWeight(64).append(2, np.zeros((4, 35), np.uint8))
    with pytest.raises(ValueError, match="unknown tensor kind"):
        _cpu.PackedWeight(64).append(999, np.zeros((4, 36), np.uint8))


@pytest.mark.parametrize("block", [-1, 99])
def test_blocks_outside_the_cache_are_refused(block: int) -> None:
    context = Context(config_of(2, 1, 32), [40], "f16", seed=15)
    context.blocks[0, 1] = block
    with pytest.raises(ValueError, match="block outside"):
        context.whole("cpu")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_blocks_are_copied_whole(backend: str, head_dim: int, kv_dtype: KvDtype) -> None:
    """A block that is read and written into another cache, at another place, gives attention the
    same bits; the blocks beside it stay as they are."""
    ops = cpu if backend == "cpu" else reference
    config = ModelConfig(
        vocab_size=10, dim=2 * head_dim, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=head_dim,
        ffn_dim=64, norm_eps=1e-5, rope_theta=10_000.0, context=256,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    one, other = (ops.make_kv(config, n, kv_dtype) for n in (3, 5))

    def attend(layer: object, blocks: list[int], start: int, stop: int) -> F32:
        q, k, v = rng.standard_normal((3, stop - start, 2, head_dim)).astype(np.float32)
        batch = Batch(
            np.arange(start, stop, dtype=np.int32),
            np.array([0, stop - start], np.int32),
            np.array([stop], np.int32),
            np.array([blocks], np.int32),
        )
        found: F32 = ops.attention(q, k, v, layer, batch)
        return found

    for layer in one:
        attend(layer, [1, 2], 0, 2 * BLOCK)
    for layer in other:
        attend(layer, [0, 1, 2, 3, 4], 0, 5 * BLOCK)
    before = [ops.read_block(other, b).tobytes() for b in range(5)]
    moved = [ops.read_block(one, b) for b in (1, 2)]
    assert len(moved[0]) == ops.block_bytes(one) == ops.block_bytes(other)
    if head_dim % 16 == 0:
        assert len(moved[0]) == ops.kv_bytes(config, 1, kv_dtype)
    moved[0].flags.writeable = False  # as from a file
    ops.write_block(other, 3, moved[0])
    ops.write_block(other, 0, moved[1])
    after = [ops.read_block(other, b).tobytes() for b in range(5)]
    assert after == [moved[1].tobytes(), before[1], before[2], moved[0].tobytes(), before[4]]
    state = rng.bit_generator.state
    for mine, theirs in zip(one, other, strict=True):
        rng.bit_generator.state = state
        here = attend(mine, [1, 2, 0], 2 * BLOCK, 2 * BLOCK + 3)
        rng.bit_generator.state = state
        there = attend(theirs, [3, 0, 2], 2 * BLOCK, 2 * BLOCK + 3)
        np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_blocks_outside_a_cache_are_refused(backend: str, kv_dtype: KvDtype) -> None:
    ops = cpu if backend == "cpu" else reference
    config = ModelConfig(
        vocab_size=10, dim=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, ffn_dim=64,
        norm_eps=1e-5, rope_theta=10_000.0, context=256,
    )  # fmt: skip
    kv = ops.make_kv(config, 3, kv_dtype)
    whole = np.full(ops.block_bytes(kv), 7, np.uint8)
    for block in (-1, 3, 1 << 40):
        with pytest.raises(ValueError, match="outside the cache"):
            ops.read_block(kv, block)
        with pytest.raises(ValueError, match="outside the cache"):
            ops.write_block(kv, block, whole)
    for data in (whole[:-1], np.append(whole, whole), whole[:0]):
        with pytest.raises(ValueError, match="not as many bytes"):
            ops.write_block(kv, 0, data)
    assert not any(ops.read_block(kv, b).any() for b in range(3))
