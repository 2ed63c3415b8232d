"""What rounding costs on a real model: SmolLM2's quantized weights on the CPU backend against the
same weights dequantized to float32, over more than 10,000 tokens of real text.

The float32 run uses the CPU backend's float32 kernels and a float32 cache; they are held to the
reference and to transformers in test_parity.py.
"""

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pronk.backends.formats import dequantize
from pronk.backends.protocol import BLOCK, F32, I32, Batch, KvDtype, RawTensor
from pronk.backends.reference import log_softmax
from pronk.checkpoints.open import Checkpoint, open_checkpoint
from pronk.engine.load import load_model
from pronk.model.llama import forward

cpu: Any = pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")

WINDOW, WINDOWS = 512, 20


class Dequantized:
    """A checkpoint whose tensors are all float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def get(self, name: str) -> RawTensor:
        raw = self._checkpoint.get(name)
        data = dequantize(raw.kind, raw.data).view(np.uint8).reshape(raw.shape[0], -1)
        return RawTensor(raw.name, "F32", raw.shape, data)


def text_ids(path: Path) -> I32:
    from pronk.text.tokenizer import tokenizer_from_gguf

    with open_checkpoint(path) as checkpoint:
        tokenizer = tokenizer_from_gguf(checkpoint.metadata)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer.encode(text[: 8 * WINDOW * WINDOWS])[: WINDOW * WINDOWS]
    assert len(ids) == WINDOW * WINDOWS > 10_000
    return np.array(ids, np.int32)


def logprobs_of(checkpoint: Any, kv_dtype: KvDtype) -> Callable[[I32], F32]:
    """A function from a window of ids to log probabilities `[T, V]`."""
    config = checkpoint.config
    weights = load_model(checkpoint, cpu, n_positions=WINDOW)
    n_blocks = WINDOW // BLOCK
    kv = cpu.make_kv(config, n_blocks, kv_dtype)
    batch = Batch(
        np.arange(WINDOW, dtype=np.int32),
        np.array([0, WINDOW], np.int32),
        np.array([WINDOW], np.int32),
        np.arange(n_blocks, dtype=np.int32)[None],
    )
    return lambda ids: log_softmax(forward(cpu, config, weights, ids, batch, kv))


# KV cache: most KL divergence and most change of perplexity allowed
CASES: dict[KvDtype, tuple[float, float]] = {"f16": (0.001, 0.002), "int8": (0.002, 0.003)}


@dataclass
class Totals:
    """Sums over the windows for one case."""

    divergence: float = 0.0
    same: int = 0
    nll: float = 0.0
    exact_nll: float = 0.0

    def add(self, exact: F32, got: F32, ids: I32) -> None:
        rows = np.arange(WINDOW - 1)
        self.divergence += float((np.exp(exact) * (exact - got)).sum())
        self.same += int((exact.argmax(-1) == got.argmax(-1)).sum())
        self.nll -= float(got[rows, ids[1:]].sum())
        self.exact_nll -= float(exact[rows, ids[1:]].sum())


@pytest.fixture(scope="module")
def totals(smollm2_path: Path) -> dict[Any, Totals]:
    """All cases over the same windows, one window at a time: log probabilities of all would take
    gigabytes."""
    cpu.set_threads(2)
    sums = {case: Totals() for case in CASES}
    with open_checkpoint(smollm2_path) as checkpoint:
        exact = logprobs_of(Dequantized(checkpoint), "f32")
        runs = {case: logprobs_of(checkpoint, case) for case in CASES}
        for ids in np.split(text_ids(smollm2_path), WINDOWS):
            want = exact(ids)
            for case, run in runs.items():
                sums[case].add(want, run(ids), ids)
    return sums


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case} cache")
def test_divergence_and_perplexity(
    case: KvDtype,
    totals: dict[Any, Totals],
    record_property: Callable[[str, object], None],
) -> None:
    total, scored = totals[case], WINDOWS * (WINDOW - 1)
    divergence = total.divergence / (WINDOWS * WINDOW)
    change = float(np.exp((total.nll - total.exact_nll) / scored) - 1)
    record_property("mean KL divergence", f"{divergence:.6f}")
    record_property("top-1 agreement", f"{total.same / (WINDOWS * WINDOW):.2%}")
    record_property("perplexity", f"{np.exp(total.nll / scored):.4f}")
    record_property("change of perplexity", f"{change:+.4%}")
    most_divergence, most_change = CASES[case]
    assert divergence <= most_divergence
    assert abs(change) <= most_change
