"""bench/quality.py: the model with wider rows, a small measurement, and its page."""

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from engine.tiny_models import CONFIG, random_checkpoint, write_gguf
from pronk.backends import reference
from pronk.checkpoints.open import open_checkpoint
from pronk.core.errors import UserError
from pronk.eval.divergence import predictor

BENCH = Path(__file__).parents[1] / "bench"
WIDE = replace(CONFIG, dim=192, n_heads=6, n_kv_heads=2, head_dim=64, ffn_dim=256)


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("quality")


def measured(quality: ModuleType, case: str, way: str, **fields: Any) -> Any:
    same = {
        "kinds": {"Q4_0": 211, "F32": 61}, "scored": 10_731, "exact_perplexity": 14.0,
        "perplexity": 14.028, "kl": 0.0015, "kl_p99": 0.01, "same_top": 0.98,
        "about": {"Pronk": "1"},
    }  # fmt: skip
    return quality.Measured(case, way, **same | fields)


@pytest.mark.parametrize("tied", [False, True])
def test_wider_rows_compute_the_same(quality: ModuleType, tmp_path: Path, tied: bool) -> None:
    config = replace(WIDE, tied_embeddings=tied)
    checkpoint = random_checkpoint(config)
    models = importlib.import_module("make_model")
    vocabulary = models.synthetic_vocabulary(config.vocab_size)
    checkpoint.metadata = models.metadata(config, vocabulary, "random")
    plain = predictor(checkpoint, reference, ctx=64, kv_dtype="f32")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 50).tolist()
    for wide, dim in ((False, 192), (True, 256)):
        quality.write_float32(checkpoint, tmp_path / f"{wide}.gguf", wide=wide)
        with open_checkpoint(tmp_path / f"{wide}.gguf") as made:
            assert made.config.dim == dim
            assert made.shape("layers.0.wo") == (dim, 2 * dim)
            predict = predictor(made, reference, ctx=64, kv_dtype="f32")
        assert np.allclose(predict(ids), plain(ids), atol=1e-4)


def test_a_mix_of_two_files(quality: ModuleType, tmp_path: Path) -> None:
    few, many = (write_gguf(tmp_path / f"{seed}.gguf", seed=seed) for seed in (1, 2))
    quality.mix(few, many, tmp_path / "mix.gguf", 2)
    with open_checkpoint(tmp_path / "mix.gguf") as made:
        for path, names in ((many, ("embed", "norm", "layers.0.wq")), (few, ("layers.1.wq",))):
            with open_checkpoint(path) as source:
                for name in names:
                    assert np.array_equal(made.get(name).data, source.get(name).data)


def test_zeros_lie_evenly(quality: ModuleType) -> None:
    channels, n = quality.spread(576)
    assert n == 768
    assert len(set(channels)) == 576
    assert np.bincount(channels // 256).tolist() == [192] * 3


def test_other_shapes_are_refused(quality: ModuleType) -> None:
    with pytest.raises(UserError, match="200 channels"):
        quality.spread(200)
    with pytest.raises(UserError, match="three query heads"):
        quality.wide_config(CONFIG)


def test_what_is_known_is_not_measured_again(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pronk.backends.cpu", reason="the compiled core is not built")
    monkeypatch.setattr(quality, "CTX", 64)
    monkeypatch.setattr(quality, "WINDOWS", 2)
    monkeypatch.setattr(quality, "silence_llama_cpp", lambda: None)
    raw, out = tmp_path / "raw.jsonl", tmp_path / "page.md"
    path = write_gguf(tmp_path / "m.gguf")
    command = [str(path), "--folder", str(tmp_path / "files"), "--raw", str(raw), "--out", str(out)]
    command += ["--types", "plain/as published", "--threads", "1"]
    assert quality.main([*command, "--ways", "f16"]) == 0
    assert quality.main([*command, "--ways", "f16,int8"]) == 0
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    assert [line["way"] for line in lines] == ["f16", "int8"]
    assert all(line["scored"] == 2 * 63 and 0 < line["kl"] < 0.01 for line in lines)
    assert quality.main([*command, "--ways", "f16", "--again"]) == 0
    assert len(raw.read_text().splitlines()) == 3
    assert path.exists()
    assert "| as published |" in out.read_text()


def test_the_page(quality: ModuleType, tmp_path: Path) -> None:
    runs = [
        measured(quality, "plain/Q4_0", "f16", kl=0.5),  # measured again below
        measured(quality, "plain/Q4_0", "f16"),
        measured(quality, "plain/Q4_0", "llama.cpp", kl=0.004),
        measured(quality, "wide/Q4_K", "f16", perplexity=13.9),
        measured(quality, "wide/Q4_K", "int8", kl=0.0021),
    ]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
    assert quality.main(["--raw", str(raw), "--out", str(tmp_path / "page.md")]) == 0
    lines = (tmp_path / "page.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| Q4", "| SmolLM2"))]
    assert rows == [
        "| Q4_0 | 211 Q4_0 | 14.00 | 0.001500 | 0.0100 | 98.00% | +0.200% | yes"
        " | 0.004000 | 98.00% | +0.200% |",
        "| Q4_K | 211 Q4_0 | 14.00 | 0.001500 | 0.0100 | 98.00% | -0.714% | **no** |  |  |  |",
        "| SmolLM2-135M with rows of 768 | Q4_K | 14.00 | 0.002100 | 0.0100 | 98.00% | +0.200%"
        " | **no** |",
    ]


def test_unknown_names_are_refused(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--types", "plain/Q9"), ("--ways", "f64")):
        with pytest.raises(SystemExit):
            quality.main(["m.gguf", "--raw", str(tmp_path / "raw"), option, value])
        assert repr(value).strip("'") in capsys.readouterr().err
