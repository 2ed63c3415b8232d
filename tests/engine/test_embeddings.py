"""Vectors of texts: the states of the last layer, whatever else the engine computes meanwhile."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.tiny_models import write_gguf
from pronk import LLM
from pronk.backends import reference
from pronk.checkpoints.open import open_checkpoint
from pronk.core.errors import UserError
from pronk.engine.load import load_model
from pronk.engine.request import Request, SamplingParams
from pronk.engine.sampling import Pooler
from pronk.model.llama import forward_hidden

IDS = [3, 1, 4, 1, 5, 9, 2, 6] * 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module", params=["reference", "cpu"])
def llm(request: pytest.FixtureRequest, path: Path) -> Iterator[LLM]:
    if request.param == "cpu":
        pytest.importorskip("pronk.backends._cpu")
    with LLM(path, backend=request.param, token_budget=64) as llm:
        yield llm


def states(path: Path) -> np.ndarray:
    """Hidden states of IDS without cache and engine."""
    with open_checkpoint(path) as checkpoint:
        weights = load_model(checkpoint, reference, n_positions=len(IDS))
        n = len(IDS)
        batch = reference_batch(n)
        ids = np.array(IDS, np.int32)
        out: np.ndarray = forward_hidden(reference, checkpoint.config, weights, ids, batch, None)
        return out


def reference_batch(n: int) -> object:
    from pronk.backends.protocol import Batch

    return Batch(
        np.arange(n, dtype=np.int32), np.array([0, n], np.int32), np.array([n], np.int32),
        np.full((1, 1), -1, np.int32),
    )  # fmt: skip


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_vectors_are_means_or_ends_of_states(llm: LLM, path: Path) -> None:
    wanted = states(path)
    mean, last = llm.embed(IDS), llm.embed(IDS, pooling="last")
    assert mean.shape == (llm.config.dim,)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, unit(wanted.mean(axis=0)), atol=2e-3)
    np.testing.assert_allclose(last, unit(wanted[-1]), atol=2e-3)
    assert np.linalg.norm(mean) == pytest.approx(1, abs=1e-6)


def test_vectors_depend_on_their_text_alone(llm: LLM) -> None:
    alone = [llm.embed(IDS[:n]) for n in (5, 60, 160)]
    together = llm.embed([IDS[:n] for n in (5, 60, 160)])
    np.testing.assert_array_equal(together, np.stack(alone))
    for budget in (7, 512):
        llm.engine.scheduler.token_budget = budget
        np.testing.assert_array_equal(llm.embed(IDS[:160]), alone[2])
    llm.engine.scheduler.token_budget = 64


def test_vectors_beside_answers_and_scores(llm: LLM) -> None:
    """One step may draw for one request, show logits to another and states to a third."""
    wanted = llm.embed(IDS), llm.generate(IDS, max_tokens=5).token_ids, llm.score(IDS)
    pooler = Pooler()
    seen: list[np.ndarray] = []
    requests = [
        Request(IDS, None, observer=pooler, watches="hidden"),
        Request(IDS, SamplingParams(max_tokens=5), eos_ids=llm.tokenizer.stop_ids),
        Request(IDS, None, observer=lambda start, logits: seen.append(logits.copy())),
    ]
    llm.engine.run(requests)
    np.testing.assert_array_equal(pooler.vector, wanted[0])
    assert requests[1].output == wanted[1]
    logits = np.concatenate(seen)[:-1, : llm.tokenizer.vocab_size].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    picked = logprobs[np.arange(len(IDS) - 1), IDS[1:]]
    np.testing.assert_allclose(picked, wanted[2], atol=1e-4)


def test_a_preempted_text_counts_once() -> None:
    pooler = Pooler()
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    pooler(0, rows[:3])
    pooler(0, rows[:2])
    pooler(2, rows[2:])
    np.testing.assert_allclose(pooler.vector, unit(rows.sum(axis=0)), rtol=1e-6)


def test_unknown_poolings_are_refused(llm: LLM) -> None:
    with pytest.raises(UserError, match="pooling: 'max' is not one of mean, last"):
        llm.embed("x", pooling="max")  # type: ignore[arg-type]
