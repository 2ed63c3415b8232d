"""Vectors against transformers' last hidden states, on the same random weights."""

from pathlib import Path

import numpy as np
import pytest

from engine.tiny_models import write_hf
from pronk import LLM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_same_vectors(tmp_path: Path, pooling: str) -> None:
    folder = write_hf(tmp_path / "model")
    ids = [5, 17, 42, 7, 99, 3]
    model = transformers.LlamaModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    vector = states.mean(axis=0) if pooling == "mean" else states[-1]
    with LLM(folder, backend="reference", kv_dtype="f32") as llm:
        found = llm.embed(ids, pooling=pooling)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, vector / np.linalg.norm(vector), atol=1e-5)
