"""What rounding costs on a real model: SmolLM2's quantized weights on the CPU backend against the
same weights dequantized to float32, over more than 10,240 tokens of real text. bench/quality.py
does the same for every type of weights.

The float32 run uses the CPU backend's float32 kernels and a float32 cache; they are held to the
reference and to transformers in test_parity.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pronk.backends.protocol import KvDtype
from pronk.checkpoints.open import open_checkpoint
from pronk.engine.load import load_tokenizer
from pronk.eval.divergence import (
    change_of_perplexity,
    compare,
    dequantized,
    documentation_ids,
    predictor,
)
from pronk.eval.perplexity import Perplexity

cpu: Any = pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")

CTX, WINDOWS = 512, 21

# KV cache: most KL divergence and most change of perplexity allowed
CASES: dict[KvDtype, tuple[float, float]] = {"f16": (0.001, 0.001), "int8": (0.002, 0.003)}


@pytest.fixture(scope="module")
def found(smollm2_path: Path) -> dict[KvDtype, Perplexity]:
    cpu.set_threads(2)
    with open_checkpoint(smollm2_path) as checkpoint:
        ids = documentation_ids(load_tokenizer(checkpoint), WINDOWS * (CTX - 1) + 1)
        exact = predictor(dequantized(checkpoint), cpu, ctx=CTX, kv_dtype="f32")
        models = {case: predictor(checkpoint, cpu, ctx=CTX, kv_dtype=case) for case in CASES}
        return compare(exact, models, ids, ctx=CTX)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case} cache")
def test_divergence_and_perplexity(
    case: KvDtype,
    found: dict[KvDtype, Perplexity],
    record_property: Callable[[str, object], None],
) -> None:
    result, change = found[case], change_of_perplexity(found[case])
    assert result.n_scored > 10_240
    assert result.comparison is not None
    divergence = result.comparison.kl_divergence
    record_property("mean KL divergence", f"{divergence:.6f}")
    record_property("top-1 agreement", f"{result.comparison.top1_agreement:.2%}")
    record_property("perplexity", f"{result.perplexity:.4f}")
    record_property("change of perplexity", f"{change:+.4%}")
    most_divergence, most_change = CASES[case]
    assert divergence <= most_divergence
    assert abs(change) <= most_change
