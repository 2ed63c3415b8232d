"""Random models that are small enough to be made anew in every test, in memory and on disk."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pronk.backends.protocol import F32
from pronk.checkpoints.checkpoint import Checkpoint, Stored
from pronk.checkpoints.export import GgufWriter, TensorSpec
from pronk.checkpoints.names import native_name, tensor_names, tensor_shape
from pronk.core.config import ModelConfig
from pronk.text.tokenizer_bpe import in_byte_alphabet
from vocabularies import ORDINARY, N, hf_json, metadata_of

SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|python_tag|>",
]  # fmt: skip

CONFIG = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64,
    vocab_size=N + len(SPECIAL), context=512, rope_theta=10_000.0,
    norm_eps=float(np.float32(1e-5)),  # GGUF stores it in 32 bits
)  # fmt: skip


def random_tensors(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, F32]:
    """Tensors by canonical name, vectors with one dimension. The output layer is large, so that
    some tokens are much likelier than others."""
    rng = np.random.default_rng(seed)

    def tensor(name: str) -> F32:
        shape = tensor_shape(name, config)
        if shape[0] == 1:
            return (1 + rng.normal(0, 0.1, shape[1:])).astype(np.float32)
        scale = {"embed": 1.0, "output": 0.5}.get(name, shape[1] ** -0.5)
        return rng.normal(0, scale, shape).astype(np.float32)

    return {name: tensor(name) for name in tensor_names(config)}


def random_checkpoint(config: ModelConfig = CONFIG, seed: int = 0) -> Checkpoint:
    """A model in memory."""

    def stored(values: F32) -> Stored:
        raw = np.atleast_2d(values).view(np.uint8)
        return Stored("F32", values.shape, raw.nbytes, lambda: (raw, lambda: None))

    tensors = {
        native_name(name, "gguf"): stored(values)
        for name, values in random_tensors(config, seed).items()
    }
    return Checkpoint(Path("random"), "gguf", config, {}, tensors, [])


def write_gguf(path: Path, *, chat: bool = True, seed: int = 0, **keys: Any) -> Path:
    """A model with Llama 3's special tokens (without the headers of a chat if not `chat`); `keys`
    are further metadata."""
    special = [text if chat or "header" not in text else f"<|no_{text[2:]}" for text in SPECIAL]
    vocabulary = metadata_of(
        tokens=[in_byte_alphabet(token) for token in ORDINARY] + special,
        token_type=[1] * N + [3] * len(special),
        add_bos_token=True,
    )
    shape = {
        "general.architecture": "llama",
        "llama.context_length": CONFIG.context,
        "llama.embedding_length": CONFIG.dim,
        "llama.block_count": CONFIG.n_layers,
        "llama.feed_forward_length": CONFIG.ffn_dim,
        "llama.attention.head_count": CONFIG.n_heads,
        "llama.attention.head_count_kv": CONFIG.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": CONFIG.norm_eps,
        "llama.rope.freq_base": CONFIG.rope_theta,
    }
    tensors = {native_name(n, "gguf"): t for n, t in random_tensors(seed=seed).items()}
    specs = [TensorSpec(name, "F32", tensor.shape) for name, tensor in tensors.items()]
    with GgufWriter(path, shape | vocabulary | keys, specs) as out:
        for tensor in tensors.values():
            out.write([tensor.view(np.uint8)])
    return path


def write_hf(folder: Path, *, padding: int = 0, **files: Any) -> Path:
    """A Hugging Face folder whose model has `padding` more tokens than its tokenizer; `files` are
    further JSON files by their stem."""
    spec = hf_json()
    spec["added_tokens"] = [
        {"id": N + i, "content": text, "special": True} for i, text in enumerate(SPECIAL)
    ]
    vocab_size = CONFIG.vocab_size + padding
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size,
        "hidden_size": CONFIG.dim, "intermediate_size": CONFIG.ffn_dim,
        "num_hidden_layers": CONFIG.n_layers, "num_attention_heads": CONFIG.n_heads,
        "num_key_value_heads": CONFIG.n_kv_heads, "head_dim": CONFIG.head_dim,
        "max_position_embeddings": CONFIG.context, "rms_norm_eps": CONFIG.norm_eps,
        "rope_theta": CONFIG.rope_theta, "tie_word_embeddings": False,
    }  # fmt: skip
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[3]}
    folder.mkdir(exist_ok=True)
    for stem, content in {
        "config": config, "tokenizer": spec, "tokenizer_config": names, **files,
    }.items():  # fmt: skip
        (folder / f"{stem}.json").write_text(json.dumps(content))
    tensors = {native_name(name, "hf"): tensor for name, tensor in random_tensors().items()}
    for name in (native_name("embed", "hf"), native_name("output", "hf")):
        tensors[name] = np.pad(tensors[name], ((0, padding), (0, 0)), constant_values=0.1)
    (folder / "model.safetensors").write_bytes(_safetensors(tensors))
    return folder


def _safetensors(tensors: dict[str, npt.NDArray[np.float32]]) -> bytes:
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
