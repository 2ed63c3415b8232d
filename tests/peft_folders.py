"""LoRA adapters as PEFT writes them, made without the code under test: random matrices by the names
of Hugging Face modules, and the weights that a model has when an adapter is merged into it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.checkpoint_files import safetensors_bytes
from pronk.core.config import ModelConfig

MODULES = {
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj", "w_gate": "mlp.gate_proj", "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}  # fmt: skip
"""What Hugging Face calls our linear weights."""

Floats = npt.NDArray[np.float32]


def shape_of(part: str, c: ModelConfig) -> tuple[int, int]:
    """(outputs, inputs) of a linear weight."""
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {
        "wq": (queries, c.dim), "wk": (keys, c.dim), "wv": (keys, c.dim), "wo": (c.dim, queries),
        "w_gate": (c.ffn_dim, c.dim), "w_up": (c.ffn_dim, c.dim), "w_down": (c.dim, c.ffn_dim),
    }[part]  # fmt: skip


def lora_tensors(
    config: ModelConfig,
    *,
    rank: int = 4,
    parts: Sequence[str] = tuple(MODULES),
    seed: int = 0,
    size: float = 0.3,
) -> dict[str, Floats]:
    """A and B of every layer by PEFT's names; their product has entries of about `size` times those
    of the model."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config.n_layers):
        for part in parts:
            outputs, inputs = shape_of(part, config)
            name = f"base_model.model.model.layers.{layer}.{MODULES[part]}"
            a = rng.normal(0, inputs**-0.5, (rank, inputs))
            b = rng.normal(0, size * rank**-0.5, (outputs, rank))
            tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    return tensors


def lora_config(**changes: Any) -> dict[str, Any]:
    """As PEFT 0.21 writes it, without most of what is null."""
    return {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "bias": "none",
        "target_modules": [module.split(".")[1] for module in MODULES.values()],
        "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "task_type": "CAUSAL_LM", "init_lora_weights": True,
        "lora_dropout": 0.05, "megatron_core": "megatron.core", "layers_to_transform": None,
        "base_model_name_or_path": "somebody/something", "loftq_config": {}, "lora_bias": False,
    } | changes  # fmt: skip


def write_adapter(folder: Path, tensors: Mapping[str, npt.NDArray[Any]], **changes: Any) -> Path:
    """`changes` are options of adapter_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(lora_config(**changes)))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def merged(
    weights: Mapping[str, Floats],
    tensors: Mapping[str, Floats],
    config: ModelConfig,
    scale: float = 2.0,
) -> dict[str, Floats]:
    """W + scale B A for weights by canonical name. Hugging Face's rows j and j + K/2 of a head of q
    and k are rows 2j and 2j + 1 of ours."""
    result = dict(weights)
    for name in weights:
        *layer, part = name.split(".")
        if part not in MODULES:
            continue
        key = f"base_model.model.model.{'.'.join(layer)}.{MODULES[part]}"
        if f"{key}.lora_A.weight" not in tensors:
            continue
        a, b = (tensors[f"{key}.lora_{matrix}.weight"].astype(np.float64) for matrix in "AB")
        delta = scale * b @ a
        if part in ("wq", "wk"):
            delta = interleaved(delta, len(delta) // config.head_dim)
        result[name] = (weights[name] + delta).astype(np.float32)
    return result


def interleaved(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    result = np.empty_like(rows)
    for to, of in zip(np.split(result, heads), np.split(rows, heads), strict=True):
        to[0::2], to[1::2] = np.split(of, 2)
    return result
