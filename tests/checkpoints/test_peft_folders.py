"""LoRA adapters from PEFT folders: what is read, and what is refused by name."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import CONFIG, refused, with_header

from checkpoints.test_fuzz import mutate
from peft_folders import MODULES, interleaved, lora_config, lora_tensors, shape_of, write_adapter
from pronk.checkpoints.adapters import PARTS, AdapterFolder
from pronk.core.errors import CheckpointError

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", lora_tensors(CONFIG))


def open_adapter(folder: Path) -> AdapterFolder:
    return AdapterFolder(folder, CONFIG)


def configure(folder: Path, **changes: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(lora_config(**changes)))
    return folder


def renamed(change: Callable[[str], str], **options: Any) -> dict[str, Any]:
    return {change(name): tensor for name, tensor in lora_tensors(CONFIG, **options).items()}


def products(adapter: AdapterFolder) -> dict[str, Any]:
    return {name: np.matmul(*reversed(adapter.read(name))) for name in adapter.ranks}


def test_the_parts_are_those_that_the_tests_know() -> None:
    assert set(PARTS) == set(MODULES)


def test_everything_is_read(folder: Path) -> None:
    tensors = lora_tensors(CONFIG)
    with open_adapter(folder) as adapter:
        assert adapter.ranks == {f"layers.{i}.{part}": 4 for i in range(2) for part in PARTS}
        for i in range(CONFIG.n_layers):
            for part, module in MODULES.items():
                a, b = adapter.read(f"layers.{i}.{part}")
                name = f"{PREFIX}model.layers.{i}.{module}"
                np.testing.assert_array_equal(a, tensors[f"{name}.lora_A.weight"])
                expected = 2 * tensors[f"{name}.lora_B.weight"]
                if part in ("wq", "wk"):
                    heads = shape_of(part, CONFIG)[0] // CONFIG.head_dim
                    assert heads > 1
                    expected = interleaved(expected, heads)
                np.testing.assert_array_equal(b, expected)
                assert (a.dtype, b.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.removeprefix(PREFIX + "model."),
        lambda name: PREFIX + name.removeprefix(PREFIX + "model."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
    ids=["bare", "layers", "inner model", "adapter name"],
)
def test_other_spellings_of_the_names(
    tmp_path: Path, folder: Path, change: Callable[[str], str]
) -> None:
    other = write_adapter(tmp_path / "other", renamed(change))
    with open_adapter(folder) as expected, open_adapter(other) as found:
        for name, product in products(expected).items():
            np.testing.assert_array_equal(products(found)[name], product)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_halves(tmp_path: Path, kind: str) -> None:
    tensors = lora_tensors(CONFIG)
    if kind == "F16":
        stored: dict[str, Any] = {name: t.astype(np.float16) for name, t in tensors.items()}
        rounded = {name: t.astype(np.float32) for name, t in stored.items()}
        folder = write_adapter(tmp_path / "a", stored)
    else:
        stored = {n: (t.view(np.uint32) >> 16).astype(np.uint16) for n, t in tensors.items()}
        rounded = {n: (t.astype(np.uint32) << 16).view(np.float32) for n, t in stored.items()}
        folder = write_adapter(tmp_path / "a", stored)
        file = folder / "adapter_model.safetensors"
        rewrite_header(file, tensors, "BF16")
    with open_adapter(folder) as adapter:
        a, b = adapter.read("layers.1.w_down")
    name = f"{PREFIX}model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(a, rounded[f"{name}.lora_A.weight"])
    np.testing.assert_array_equal(b, 2 * rounded[f"{name}.lora_B.weight"])


def rewrite_header(file: Path, tensors: dict[str, Any], dtype: str) -> None:
    """Names a dtype of two bytes that NumPy does not have."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.size],
        }  # fmt: skip
        at += 2 * tensor.size
    file.write_bytes(with_header(header, file.read_bytes()[-at:]))


def scale_of(folder: Path, name: str) -> float:
    """What B is multiplied by, from a folder with the tensors of `lora_tensors`."""
    with open_adapter(folder) as adapter:
        b = adapter.read(name)[1]
    layer, part = name.rsplit(".", 1)
    original = lora_tensors(CONFIG)[f"{PREFIX}model.{layer}.{MODULES[part]}.lora_B.weight"]
    return float(b[0, 0] / original[0, 0])


@pytest.mark.parametrize(
    ("options", "name", "scale"),
    [
        ({"lora_alpha": 2}, "layers.0.wq", 0.5),
        ({"lora_alpha": 1.5}, "layers.0.wq", 0.375),
        ({"lora_alpha": 8, "use_rslora": True}, "layers.0.wo", 4.0),
        ({"alpha_pattern": {"q_proj": 16}}, "layers.1.wq", 4.0),
        ({"alpha_pattern": {"q_proj": 16}}, "layers.1.wk", 2.0),
        ({"alpha_pattern": {"proj": 16}}, "layers.1.wk", 2.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 16}}, "layers.1.wq", 4.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 16}}, "layers.0.wq", 2.0),
        ({"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 16}}, "layers.1.wq", 4.0),
        ({"alpha_pattern": {"^layers.1.self_attn.q_proj": 16}}, "layers.1.wq", 2.0),
        ({"alpha_pattern": {r".*\.1\..*": 16}}, "layers.1.w_up", 4.0),
        ({"alpha_pattern": {r"layers\.\d+\.mlp.up_proj": 16}}, "layers.1.w_up", 4.0),
        ({"alpha_pattern": {"up_proj|q_proj": 16}}, "layers.1.w_up", 4.0),
        ({"alpha_pattern": {"q_proj": 12, "self_attn.q_proj": 16}}, "layers.1.wq", 3.0),
    ],
)
def test_scales(folder: Path, options: dict[str, Any], name: str, scale: float) -> None:
    assert scale_of(configure(folder, **options), name) == pytest.approx(scale, rel=1e-6)


def test_ranks_of_their_own(tmp_path: Path) -> None:
    tensors = lora_tensors(CONFIG)
    tensors |= {n: t for n, t in lora_tensors(CONFIG, rank=2).items() if ".q_proj" in n}
    folder = write_adapter(tmp_path / "a", tensors, rank_pattern={"q_proj": 2})
    with open_adapter(folder) as adapter:
        assert {rank for name, rank in adapter.ranks.items() if name.endswith("wq")} == {2}
        assert {rank for name, rank in adapter.ranks.items() if name.endswith("wk")} == {4}
    assert scale_of(folder, "layers.0.wv") == 2.0
    with refused(r"rank_pattern\['q_proj'\] must be at least 1, got 0"):
        open_adapter(configure(folder, rank_pattern={"q_proj": 0}))
    with refused(r"q_proj.lora_A.weight' has shape \[2, 32\], the model and rank 4 ask for"):
        open_adapter(configure(folder))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj", "v_proj", "nothing_of_ours"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": None},
        {"exclude_modules": ["mlp.up_proj", "gate_proj", "down_proj", "k_proj", "o_proj"]},
        {"exclude_modules": ".*mlp.*"},
    ],
    ids=str,
)
def test_some_modules_only(tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = lora_tensors(CONFIG, parts=("wq", "wv"))
    with open_adapter(write_adapter(tmp_path / "a", tensors, **options)) as adapter:
        assert list(adapter.ranks) == ["layers.0.wq", "layers.0.wv", "layers.1.wq", "layers.1.wv"]


@pytest.mark.parametrize("layers", [1, [1], [1, 7]], ids=str)
def test_some_layers_only(tmp_path: Path, layers: Any) -> None:
    tensors = {n: t for n, t in lora_tensors(CONFIG).items() if ".layers.1." in n}
    folder = write_adapter(tmp_path / "a", tensors, layers_to_transform=layers)
    with open_adapter(folder) as adapter:
        assert list(adapter.ranks) == [f"layers.1.{part}" for part in PARTS]
    with refused("has no tensors for model.layers.0.self_attn.q_proj, which is among the target_m"):
        open_adapter(configure(folder))


def test_all_linear(folder: Path) -> None:
    assert len(open_adapter(configure(folder, target_modules="all-linear")).ranks) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only 'LORA' is supported"),
        ({"peft_type": None}, "peft_type is missing"),
        ({"bias": "all"}, "'bias' is 'all'; only 'none' is supported"),
        ({"use_dora": True}, "'use_dora' is True; only False"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' is True"),
        ({"modules_to_save": ["lm_head"]}, r"'modules_to_save' is \['lm_head'\]"),
        ({"lora_bias": True}, "'lora_bias' is True"),
        ({"use_qalora": True}, "'use_qalora' is True"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' is"),
        ({"trainable_token_indices": [3]}, "'trainable_token_indices' is"),
        ({"alora_invocation_tokens": [3]}, "'alora_invocation_tokens' is"),
        ({"target_parameters": ["x"]}, "'target_parameters' is"),
        ({"of_the_future\n": {"x": 1}}, r"'of_the_future\\n' is \{'x': 1\}; only False is supp"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', an adapter that belongs"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": ["olora"]}, "init_lora_weights is"),
        ({"r": None}, "r is missing"),
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": -4}, "r must be at least 1, got -4"),
        ({"r": 4.0}, "r must be a whole number, got 4.0"),
        ({"r": 8}, r"lora_A.weight' has shape \[4, 32\], the model and rank 8 ask for \[8, 32\]"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, got '8'"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number, got inf"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object of at most"),
        ({"alpha_pattern": {"q_proj": "x"}}, "q_proj must be a finite number, got 'x'"),
        ({"rank_pattern": {"(a*)*b": 4}}, r"rank_pattern has '\(a\*\)\*b'; only names with"),
        ({"alpha_pattern": {".*.*.*x": 4}}, "alpha_pattern has '.*x'; only names with"),
        ({"alpha_pattern": {"x" * 201: 4}}, "alpha_pattern has 'xxx"),
        ({"alpha_pattern": {str(i): 4 for i in range(10_001)}}, "at most 10000 entries"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has 'lm_head'"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must be a list of names"),
        ({"exclude_modules": 3}, "exclude_modules must be a list of names"),
        ({"target_modules": ["q_proj"]},
         "has tensors for model.layers.0.self_attn.k_proj, which is not among the target_modules"),
        ({"layers_to_transform": "all"}, "layers_to_transform must be a layer or a list of"),
        ({"layers_to_transform": [True]}, "layers_to_transform must be"),
        ({"layers_to_transform": [1]}, "has tensors for model.layers.0"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with refused(message):
        open_adapter(configure(folder, **options))


def test_the_worst_patterns_that_are_let_through(folder: Path) -> None:
    """With one more repetition that fits in another they would take a day."""
    worst = {f".*.*{'.' * 30}{i}": 3 for i in range(2000)}
    assert scale_of(configure(folder, alpha_pattern=worst), "layers.0.wq") == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{PREFIX}lm_head.lora_A.weight": np.zeros((4, 32))}, "lm_head.lora_A.weight' is no"),
        ({f"{PREFIX}model.embed_tokens.lora_embedding_A": np.zeros((4, 20))}, "is no LoRA matrix"),
        ({f"{PREFIX}{Q0}.lora_magnitude_vector": np.zeros(32)}, "magnitude_vector' is no LoRA"),
        ({f"{PREFIX}{Q0}.lora_B.bias": np.zeros(32)}, "lora_B.bias' is no LoRA matrix"),
        ({f"{PREFIX}model.layers.2.mlp.up_proj.lora_A.weight": np.zeros((4, 32))},
         "layers.2.mlp.up_proj.lora_A.weight' is no LoRA matrix .* of 2 layers"),
        ({f"{PREFIX}model.layers.00.mlp.up_proj.lora_A.weight": np.zeros((4, 32))}, "is no LoRA"),
        ({"x\ny": np.zeros(3)}, r"tensor 'x\\ny' is no LoRA"),
        ({f"{Q0}.lora_A.weight": np.zeros((4, 32))}, "are the same matrix"),
        ({f"{PREFIX}{Q0}.lora_A.weight": np.zeros((4, 16))}, r"\[4, 16\], the model and rank 4"),
        ({f"{PREFIX}{Q0}.lora_B.weight": np.zeros((4, 32))}, r"\[4, 32\], the model and rank 4"),
        ({f"{PREFIX}{Q0}.lora_B.weight": np.zeros(128)}, r"has shape \[128\]"),
        ({f"{PREFIX}{Q0}.lora_B.weight": np.zeros((32, 4, 1))}, r"has shape \[32, 4, 1\]"),
        ({f"{PREFIX}{Q0}.lora_A.weight": np.zeros((0, 32))}, r"has shape \[0, 32\]"),
        ({f"{PREFIX}{Q0}.lora_A.weight": np.zeros((4, 32), np.uint8)}, "is stored as U8"),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = dict(lora_tensors(CONFIG))
    for name, values in change.items():
        tensors[name] = values if values.dtype == np.uint8 else values.astype(np.float32)
    with refused(message):
        open_adapter(write_adapter(tmp_path / "a", tensors))


@pytest.mark.parametrize("matrix", "AB")
def test_half_a_pair(tmp_path: Path, matrix: str) -> None:
    tensors = lora_tensors(CONFIG)
    del tensors[f"{PREFIX}{Q0}.lora_{matrix}.weight"]
    with refused(f"lora_{matrix} of {Q0} is missing"):
        open_adapter(write_adapter(tmp_path / "a", tensors))


def test_a_module_without_tensors(tmp_path: Path) -> None:
    tensors = lora_tensors(CONFIG, parts=[part for part in PARTS if part != "w_up"])
    with refused("has no tensors for model.layers.0.mlp.up_proj, which is among"):
        open_adapter(write_adapter(tmp_path / "a", tensors))


def test_no_tensors(tmp_path: Path) -> None:
    with refused("it has no tensors"):
        open_adapter(write_adapter(tmp_path / "a", {}))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38], ids=str)
@pytest.mark.parametrize("matrix", "AB")
def test_numbers_that_are_not_finite(tmp_path: Path, value: float, matrix: str) -> None:
    """Or are not once they are scaled, by 2."""
    tensors = lora_tensors(CONFIG)
    tensors[f"{PREFIX}{Q0}.lora_{matrix}.weight"][1, 2] = value
    with open_adapter(write_adapter(tmp_path / "a", tensors)) as adapter:
        adapter.read("layers.0.wk")
        if matrix == "A" and value == 3e38:
            assert adapter.read("layers.0.wq")[0].max() == np.float32(3e38)
            return
        with refused(f"tensor '.*q_proj.lora_{matrix}.weight' has values that are not finite"):
            adapter.read("layers.0.wq")


def test_folders_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / "none", "\0", tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        with refused("no such folder; an adapter is a PEFT folder with adapter_config.json"):
            open_adapter(path)  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with refused("empty/adapter_config.json: cannot be read"):
        open_adapter(tmp_path / "empty")


def test_files_that_are_none(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    blob = weights.read_bytes()
    weights.write_bytes(b"")
    with refused("the file is empty"):
        open_adapter(folder)
    weights.write_bytes(blob[:-1])
    with refused("truncated"):
        open_adapter(folder)
    weights.unlink()
    with refused("adapter_model.safetensors: cannot be read"):
        open_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with refused("adapter_model.bin is a pickle, which is not read"):
        open_adapter(folder)
    os.mkfifo(weights)
    with refused("not a regular file"):
        open_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with refused("must be a JSON object"):
        open_adapter(folder)


def test_data_that_are_claimed_and_not_there(folder: Path) -> None:
    name = f"{PREFIX}{Q0}.lora_A.weight"
    huge = {name: {"dtype": "F32", "shape": [1 << 40, 32], "data_offsets": [0, 1 << 47]}}
    (folder / "adapter_model.safetensors").write_bytes(with_header(huge))
    with refused("truncated"):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("file", "interesting"), [("adapter_model.safetensors", 3000), ("adapter_config.json", 500)]
)
def test_damaged_bytes(folder: Path, file: str, interesting: int) -> None:
    blob, rng, opened, texts = (folder / file).read_bytes(), random.Random(1), 0, []
    for _ in range(500):
        (folder / file).write_bytes(mutate(blob, interesting, rng))
        try:
            with open_adapter(folder) as adapter:
                for name in adapter.ranks:
                    a, b = adapter.read(name)
                    assert np.isfinite(a).all()
                    assert np.isfinite(b).all()
            opened += 1
        except CheckpointError as error:
            texts.append(str(error))
    assert 0 < opened < 500
    assert not any("\n" in text for text in texts)


def test_a_refused_adapter_is_closed(folder: Path) -> None:
    """No mapping of the file is left behind."""
    configure(folder, target_modules=["q_proj"])
    for _ in range(3):
        with refused("which is not among"):
            open_adapter(folder)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(folder) not in maps.read_text()
