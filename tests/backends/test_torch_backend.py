"""The PyTorch backend against the reference, on models of random weights."""

from typing import Any

import numpy as np
import pytest

from engine.tiny_models import CONFIG, random_checkpoint
from pronk.backends import reference
from pronk.backends.protocol import BLOCK, F32, I32, Batch
from pronk.core.errors import UserError
from pronk.engine.load import load_model
from pronk.model.llama import forward

torch = pytest.importorskip("torch")

from pronk.backends.torch import TorchOps  # noqa: E402

IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 70).astype(np.int32)


def batch_of(spans: list[tuple[int, int]], blocks: list[list[int]]) -> Batch:
    """Rows of positions `a` to `b` of each sequence."""
    positions = np.concatenate([np.arange(a, b) for a, b in spans]).astype(np.int32)
    starts = np.cumsum([0, *(b - a for a, b in spans)]).astype(np.int32)
    lengths = np.array([b for _, b in spans], np.int32)
    return Batch(positions, starts, lengths, np.array(blocks, np.int32))


def in_chunks(ops: Any, kv_dtype: Any) -> F32:
    """Logits of IDS in three steps, beside a second sequence of its first 40 tokens."""
    with random_checkpoint() as checkpoint:
        weights = load_model(checkpoint, ops, n_positions=128)
    kv = ops.make_kv(CONFIG, 6, kv_dtype)
    found = []
    for a, b in ((0, 40), (40, 69), (69, 70)):
        batch = batch_of([(a, b), (0, 40)], [[2, 0, 3], [1, 4, -1]])
        ids: I32 = np.concatenate([IDS[a:b], IDS[:40]])
        logits = ops.to_host(forward(ops, CONFIG, weights, ids, batch, kv))
        found.append(logits[: b - a])
        np.testing.assert_allclose(logits[b - a :], found[0], atol=1e-4)
    return np.concatenate(found)


@pytest.mark.parametrize(("kv_dtype", "atol"), [("f32", 1e-4), ("f16", 1e-3), ("int8", 2e-2)])
def test_paged_steps_agree_with_the_reference(kv_dtype: str, atol: float) -> None:
    """Tolerances: what one unit of the stored type may do where a value is on the edge."""
    wanted = in_chunks(reference, kv_dtype)
    np.testing.assert_allclose(in_chunks(TorchOps("cpu", "f32"), kv_dtype), wanted, atol=atol)


def test_bfloat16_is_close() -> None:
    wanted = in_chunks(reference, "f32")
    found = in_chunks(TorchOps("cpu", "bf16"), "f32")
    assert np.abs(found - wanted).mean() < 0.02 * np.abs(wanted).mean()


def packed(ops: Any) -> Any:
    """Logits of two texts, one after another, without a cache."""
    with random_checkpoint() as checkpoint:
        weights = load_model(checkpoint, ops, n_positions=128)
    batch = batch_of([(0, 50), (0, 20)], [[-1], [-1]])
    return forward(ops, CONFIG, weights, IDS, batch, None)


def test_packed_texts_agree_with_the_reference() -> None:
    ops = TorchOps("cpu", "f32")
    np.testing.assert_allclose(ops.to_host(packed(ops)), packed(reference), atol=1e-4)


def test_blocks_of_the_cache_are_bytes() -> None:
    ops = TorchOps("cpu", "f32")
    for kv_dtype in ("f32", "f16", "int8"):
        kv = ops.make_kv(CONFIG, 3, kv_dtype)
        assert ops.block_bytes(kv) == reference.kv_bytes(CONFIG, 1, kv_dtype)
        data = np.random.default_rng(1).integers(0, 100, ops.block_bytes(kv)).astype(np.uint8)
        ops.write_block(kv, 1, data)
        np.testing.assert_array_equal(ops.read_block(kv, 1), data)
        assert not ops.read_block(kv, 0).any()
        with pytest.raises(ValueError, match="outside"):
            ops.read_block(kv, 3)
        with pytest.raises(ValueError, match="bytes"):
            ops.write_block(kv, 0, data[:-1])
    assert BLOCK == 32


def test_unknown_devices_and_dtypes_are_refused() -> None:
    with pytest.raises(UserError, match="device: 'cuda:99' cannot be used"):
        TorchOps("cuda:99")
    with pytest.raises(UserError, match="dtype: 'f8' is not one of f32, bf16"):
        TorchOps("cpu", "f8")
