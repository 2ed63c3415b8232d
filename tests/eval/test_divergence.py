from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.tiny_models import random_checkpoint, write_gguf
from pronk.backends import reference
from pronk.backends.protocol import F32
from pronk.checkpoints.open import open_checkpoint
from pronk.engine.llm import LLM
from pronk.engine.load import load_tokenizer
from pronk.eval.divergence import (
    change_of_perplexity,
    compare,
    dequantized,
    documentation_ids,
    predictor,
)
from pronk.eval.perplexity import measure_perplexity

V = 9


def model_of(seed: int):  # type: ignore[no-untyped-def]
    table = np.random.default_rng(seed).normal(0, 2, (V, V)).astype(np.float32)

    def predict(ids: Sequence[int]) -> F32:
        return table[np.array(ids)] * np.linspace(1, 2, len(ids), dtype=np.float32)[:, None]

    return predict


@pytest.mark.parametrize("n", [2, 8, 9, 15, 16, 100])
def test_models_beside_one_reference(n: int) -> None:
    """As each measured alone, by the tested function."""
    ids = np.random.default_rng(1).integers(0, V, n).tolist()
    exact, models = model_of(0), {"a": model_of(1), "b": model_of(2), "same": model_of(0)}
    found = compare(exact, models, ids, ctx=8)
    for name, model in models.items():
        alone = measure_perplexity(model, ids, ctx=8, stride=7, bos_id=None, reference=exact)
        assert found[name] == alone
        assert found[name].n_scored == n - 1
    assert found["same"].comparison is not None
    assert found["same"].comparison.kl_divergence == 0
    assert change_of_perplexity(found["same"]) == 0
    ratio = found["a"].perplexity / found["same"].perplexity
    assert change_of_perplexity(found["a"]) == pytest.approx(ratio - 1)


def test_each_window_is_asked_for_once() -> None:
    asked: list[list[int]] = []

    def exact(ids: Sequence[int]) -> F32:
        asked.append(list(ids))
        return model_of(0)(ids)  # type: ignore[no-any-return]

    compare(exact, {1: model_of(1), 2: model_of(2)}, [0, 1, 2, 3, 4, 5, 6, 7], ctx=4)
    assert asked == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]


def test_dequantized_weights() -> None:
    checkpoint = random_checkpoint()
    exact = dequantized(checkpoint)
    assert exact.kinds() == {"F32": len(checkpoint.names())}
    assert exact.nbytes == checkpoint.nbytes  # it was float32
    for name in checkpoint.names():
        raw, same = checkpoint.get(name), exact.get(name)
        assert same.shape == raw.shape
        assert np.array_equal(same.data.reshape(-1), raw.data.reshape(-1))


def test_a_predictor_gives_the_logits_of_the_engine(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    ids = np.random.default_rng(2).integers(0, 100, 45).tolist()
    with open_checkpoint(path) as checkpoint, LLM(path, backend="reference", kv_dtype="f32") as llm:
        predict = predictor(dequantized(checkpoint), reference, ctx=64, kv_dtype="f32")
        predict([1] * 64)  # leaves nothing behind
        assert np.allclose(predict(ids), llm.logits(ids), atol=1e-5)
        assert np.array_equal(predict(ids[:33]), predict(ids)[:33])


def test_documentation(tmp_path: Path) -> None:
    with open_checkpoint(write_gguf(tmp_path / "m.gguf")) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    ids = documentation_ids(tokenizer, 1000)
    assert len(ids) == 1000
    assert "statement" in tokenizer.decode(ids)
