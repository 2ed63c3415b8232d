"""LoRA adapters against PEFT: a random transformers Llama with a random adapter, both saved by
their own libraries, read by ours. Tolerance for float32 weights: 1e-4 on logits of order 1.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pronk.backends.protocol import F32
from pronk.backends.select import select_backend
from pronk.checkpoints.open import open_checkpoint
from pronk.core.errors import CheckpointError, UserError
from pronk.engine.engine import Engine
from pronk.engine.load import load_model
from pronk.engine.request import Request
from pronk.engine.runner import Runner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-4
BACKENDS = ["reference", "cpu"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, dict[str, Any]] = {
    "default targets": {"r": 4, "lora_alpha": 8, "target_modules": None},
    "everything": {"r": 3, "lora_alpha": 7, "target_modules": EVERYTHING},
    "all-linear": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
    "regular expression": {"r": 4, "lora_alpha": 4, "target_modules": r".*\.(q|k|down)_proj"},
    "rank-stabilized": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": EVERYTHING},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": EVERYTHING,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 7, "q_proj": 1},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 24, "v_proj": 5, r".*\.0\..*": 3},
    },
    "one layer": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"],
                  "layers_to_transform": [1]},
    "excluded": {"r": 4, "lora_alpha": 8, "target_modules": EVERYTHING,
                 "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
}  # fmt: skip


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Any:
    try:
        return select_backend(request.param)
    except UserError as error:
        pytest.skip(str(error))


def save_model(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=3, vocab_size=131,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def save_adapter(model: Any, folder: Path, **options: Any) -> Any:
    """The model with a random adapter (PEFT's own start leaves B zero), read from where it was
    saved: the file sorts patterns, and the first one that fits a name counts."""
    base = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT itself uses of transformers
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.15)
        adapted.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(base, folder).eval()


def our_logits(ops: Any, model: Path, adapter: Path | None, ids: list[int]) -> F32:
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        weights = load_model(checkpoint, ops, n_positions=512)
    runner = Runner(
        ops, config, weights, n_blocks=8, n_tokens=config.vocab_size, threads=1, kv_dtype="f32"
    )
    engine = Engine(
        runner, vocab_size=config.vocab_size, context=256, n_blocks=8, adapters=runner.adapters
    )
    if adapter is not None:
        engine.load_adapter("theirs", adapter)
    logits_TV = np.full((len(ids), config.vocab_size), np.nan, np.float32)

    def observer(start: int, logits: F32) -> None:
        logits_TV[start : start + len(logits)] = logits

    name = None if adapter is None else "theirs"
    engine.run([Request(ids, None, observer=observer, adapter=name)])
    return logits_TV


def their_logits(model: Any, ids: list[int]) -> F32:
    with torch.no_grad():
        logits: F32 = model(torch.tensor([ids])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, ops: Any, case: str) -> None:
    model = save_model(tmp_path / "model")
    adapted = save_adapter(model, tmp_path / "adapter", **CASES[case])
    ids = np.random.default_rng(0).integers(0, 131, 40).tolist()
    expected = their_logits(adapted, ids)
    with adapted.disable_adapter():
        base = their_logits(adapted, ids)
    assert np.abs(expected - base).max() > 0.1
    found = our_logits(ops, tmp_path / "model", tmp_path / "adapter", ids)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    found = our_logits(ops, tmp_path / "model", None, ids)
    np.testing.assert_allclose(found, base, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "'use_dora' is True"),
        ({"modules_to_save": ["lm_head"]}, r"'modules_to_save' is \['lm_head'\]"),
        ({"bias": "lora_only"}, "'bias' is 'lora_only'"),
        ({"lora_bias": True}, "'lora_bias' is True"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [3, 4]}, "'trainable_token_indices' is"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = save_model(tmp_path / "model")
    save_adapter(model, tmp_path / "adapter", **{"r": 4, "target_modules": ["q_proj"], **options})
    with pytest.raises(CheckpointError, match=message):
        our_logits(select_backend("reference"), tmp_path / "model", tmp_path / "adapter", [1])


def test_an_adapter_of_the_inner_model(tmp_path: Path, ops: Any) -> None:
    """Trained on LlamaModel, its names have one `model.` less."""
    model = save_model(tmp_path / "model")
    options = CASES["patterns"] | {
        "rank_pattern": {"^layers.0.self_attn.q_proj": 2, "^model.layers.0.self_attn.q_proj": 9}
    }
    adapted = save_adapter(model.model, tmp_path / "adapter", **options)
    ids = np.random.default_rng(1).integers(0, 131, 20).tolist()
    with torch.no_grad():
        hidden = adapted(torch.tensor([ids])).last_hidden_state
        expected = model.lm_head(hidden)[0].numpy()
    found = our_logits(ops, tmp_path / "model", tmp_path / "adapter", ids)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
