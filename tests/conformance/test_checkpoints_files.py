"""Model files written by other people's code are read by ours, and the other way round."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pronk.backends.formats import KINDS, dequantize
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.export import GgufWriter, TensorSpec
from pronk.checkpoints.names import native_name, tensor_names, tensor_shape
from pronk.checkpoints.open import open_checkpoint
from pronk.core.config import ModelConfig, RopeScaling

CONFIG = ModelConfig(
    dim=256, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=32, ffn_dim=512, vocab_size=300,
    context=8192,
)  # fmt: skip


def numbers(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    raw = checkpoint.get(name)
    return dequantize(raw.kind, raw.data)


# GGUF and the `gguf` package.


def test_their_gguf_is_read_by_ours(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG.context)
    writer.add_embedding_length(CONFIG.dim)
    writer.add_block_count(CONFIG.n_layers)
    writer.add_feed_forward_length(CONFIG.ffn_dim)
    writer.add_head_count(CONFIG.n_heads)
    writer.add_head_count_kv(CONFIG.n_kv_heads)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_token_list([f"t{n}" for n in range(CONFIG.vocab_size)])
    writer.add_add_bos_token(True)
    # Every kind that the peer can write, in turn; raw random blocks for what it cannot encode.
    kinds = [kind for kind in KINDS if kind not in ("F32", "F16")]
    written = {}
    for number, name in enumerate(tensor_names(CONFIG)):
        rows, columns = tensor_shape(name, CONFIG)
        native = native_name(name, "gguf")
        if rows == 1:
            written[name] = rng.normal(size=(1, columns)).astype(np.float32)
            writer.add_tensor(native, written[name][0])
            continue
        kind = kinds[number % len(kinds)]
        blocks = rng.integers(0, 256, (rows, KINDS[kind].row_bytes(columns)), np.uint8)
        written[name] = dequantize(kind, blocks)
        writer.add_tensor(native, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.n_kv_heads == CONFIG.n_kv_heads
        assert checkpoint.config.vocab_size == CONFIG.vocab_size
        assert checkpoint.metadata["tokenizer.ggml.tokens"][-1] == "t299"
        assert checkpoint.metadata["tokenizer.ggml.add_bos_token"] is True
        for name, weights in written.items():
            np.testing.assert_array_equal(numbers(checkpoint, name), weights)


def test_our_gguf_is_read_by_theirs(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "ours.gguf"
    rng = np.random.default_rng(1)
    keys = {
        "general.architecture": "llama", "a.int": 7, "a.big": 1 << 40, "a.negative": -3,
        "a.float": 0.5, "a.bool": True, "a.strings": ["x", "", "é"], "a.ints": [1, -1],
        "a.floats": [0.25, 2.0],
    }  # fmt: skip
    specs = [TensorSpec(kind, kind, (3, 512)) for kind in KINDS] + [TensorSpec("v", "F32", (5,))]
    data = [rng.integers(0, 256, spec.nbytes, np.uint8) for spec in specs]
    with GgufWriter(path, keys, specs) as out:
        for raw in data:
            out.write([raw])
    reader = gguf.GGUFReader(path)
    assert {key: reader.get_field(key).contents() for key in keys} == keys
    assert [tensor.name for tensor in reader.tensors] == [spec.name for spec in specs]
    for tensor, spec, raw in zip(reader.tensors, specs, data, strict=True):
        assert tensor.tensor_type.name == spec.kind
        assert tuple(tensor.shape[::-1]) == spec.shape
        np.testing.assert_array_equal(np.ascontiguousarray(tensor.data).view(np.uint8).ravel(), raw)


def test_smollm2_equals_the_peer(smollm2_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(smollm2_path)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    with open_checkpoint(smollm2_path) as checkpoint:
        assert len(checkpoint.names()) == len(theirs)
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"):
            assert checkpoint.metadata[key] == reader.get_field(key).contents()
        for name in checkpoint.names():
            tensor = theirs[native_name(name, "gguf")]
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(numbers(checkpoint, name), np.atleast_2d(expected))


# Hugging Face folders and transformers.


def hf_model(tied: bool, rope: dict[str, Any]) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=96, vocab_size=100, max_position_embeddings=256,
            rms_norm_eps=1e-5, tie_word_embeddings=tied, rope_parameters=rope,
        )
    )  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", [LLAMA3, DEFAULT], ids=["llama3", "default"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_by_transformers(
    tmp_path: Path, tied: bool, rope: dict[str, Any], dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    model = hf_model(tied, rope).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    state = {name: w.float().numpy() for name, w in model.state_dict().items()}
    with open_checkpoint(tmp_path) as checkpoint:
        config = checkpoint.config
        assert (config.rope_theta, config.tied_embeddings) == (rope["rope_theta"], tied)
        assert config.rope_scaling == (RopeScaling() if rope is LLAMA3 else None)
        for name in checkpoint.names():
            expected = np.atleast_2d(state[native_name(name, "hf")])
            if name.endswith(("wq", "wk")):
                # Hugging Face's converter, backwards.
                heads = len(expected) // config.head_dim
                expected = (
                    expected.reshape(heads, 2, config.head_dim // 2, -1)
                    .swapaxes(1, 2)
                    .reshape(expected.shape)
                )
            np.testing.assert_array_equal(numbers(checkpoint, name), expected)


def test_permuted_rows_rotate_alike(tmp_path: Path) -> None:
    """Attention scores with our rows and Meta's pairs equal those of transformers, which rotates
    halves: what the permutation is for."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    model = hf_model(False, LLAMA3)
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 9, 64)
    attention = model.model.layers[1].self_attn
    cos, sin = model.model.rotary_emb(x, torch.arange(9)[None] * 17)
    with torch.no_grad():
        q, k = (
            project(x).view(1, 9, -1, 16).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )
        q, k = modeling.apply_rotary_pos_emb(q, k, cos, sin)
        theirs = (q @ k.repeat_interleave(2, dim=1).transpose(2, 3))[0].numpy()
    angles = torch.polar(torch.ones(9, 8), torch.atan2(sin[0, :, :8], cos[0, :, :8])).numpy()
    with open_checkpoint(tmp_path) as checkpoint:
        rotated = []
        for name in ("layers.1.wq", "layers.1.wk"):
            rows = x[0].numpy() @ numbers(checkpoint, name).T
            pairs = rows.reshape(9, -1, 8, 2)
            rotated.append((pairs[..., 0] + 1j * pairs[..., 1]) * angles[:, None])
    q_thk, k_tgk = rotated
    ours = np.einsum("thk,shk->hts", q_thk, k_tgk.repeat(2, axis=1).conj()).real
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# Meta folders and torch.


def meta_state(model: Any) -> dict[str, Any]:
    """A transformers model under Meta's names, in Meta's row order."""
    state, config = model.state_dict(), model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    renamed = {}
    for layer_name in tensor_names(OF_HF):
        hf = native_name(layer_name, "hf")
        w = state[hf]
        n_heads = heads.get(hf.split(".")[-2])
        if n_heads:
            w = w.view(n_heads, 2, 8, 64).transpose(1, 2).reshape(w.shape)
        renamed[native_name(layer_name, "meta")] = w.contiguous()
    return renamed


OF_HF = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=100,
    context=131_072, rope_scaling=RopeScaling(),
)  # fmt: skip


def write_meta(folder: Path, shards: list[dict[str, Any]]) -> Path:
    torch = pytest.importorskip("torch")
    params = {
        "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100,
        "multiple_of": 32, "ffn_dim_multiplier": 0.5, "norm_eps": 1e-5, "rope_theta": 500_000.0,
        "use_scaled_rope": True,
    }  # fmt: skip
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    return folder


def cut(state: dict[str, Any], count: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, w in state.items():
        axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        parts = [w] * count if w.ndim == 1 else w.chunk(count, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 2])
def test_saved_by_torch(tmp_path: Path, dtype: str, count: int) -> None:
    """A .pth equals torch.load of it, and the same model in a Hugging Face folder."""
    torch = pytest.importorskip("torch")
    model = hf_model(False, LLAMA3).to(getattr(torch, dtype))
    state = meta_state(model)
    folder = write_meta(tmp_path / "meta", cut(state, count))
    loaded = torch.load(folder / "consolidated.00.pth", weights_only=True)
    model.save_pretrained(tmp_path / "hf")
    with open_checkpoint(folder) as ours, open_checkpoint(tmp_path / "hf") as hf:
        assert ours.config == OF_HF
        assert ours.names() == hf.names()
        for name in ours.names():
            native = native_name(name, "meta")
            if count == 1 or name.endswith("norm"):
                expected = np.atleast_2d(loaded[native].float().numpy())
                np.testing.assert_array_equal(numbers(ours, name), expected)
            np.testing.assert_array_equal(ours.get(name).data, hf.get(name).data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_ways_to_save(tmp_path: Path, protocol: int) -> None:
    """A whole state_dict with its attributes, parameters, views of one storage, each pickle
    protocol."""
    torch = pytest.importorskip("torch")
    state = meta_state(hf_model(False, LLAMA3))
    folder = write_meta(tmp_path / "meta", [state])
    module = torch.nn.Module()
    for number, w in enumerate(state.values()):
        module.register_parameter(str(number), torch.nn.Parameter(w))
    saved = module.state_dict(keep_vars=True)
    for name, number in zip(state, list(saved), strict=True):
        saved[name] = saved.pop(number)
    both = torch.cat([state["layers.0.feed_forward.w1.weight"],
                      state["layers.0.feed_forward.w3.weight"]], dim=1)  # fmt: skip
    saved["layers.0.feed_forward.w1.weight"] = both[:, :64]
    saved["layers.0.feed_forward.w3.weight"] = both[:, 64:]
    torch.save(saved, folder / "consolidated.00.pth", pickle_protocol=protocol)
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            expected = np.atleast_2d(state[native_name(name, "meta")].numpy())
            np.testing.assert_array_equal(numbers(checkpoint, name), expected)


def test_tied_by_torch(tmp_path: Path) -> None:
    """torch.save writes a tensor that has two names once; ours sees that it is one."""
    state = meta_state(hf_model(False, LLAMA3))
    state["output.weight"] = state["tok_embeddings.weight"]
    with open_checkpoint(write_meta(tmp_path / "meta", [state])) as checkpoint:
        assert checkpoint.config.tied_embeddings


def test_old_torch_format(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from pronk.core.errors import CheckpointError

    state = meta_state(hf_model(False, LLAMA3))
    folder = write_meta(tmp_path / "meta", [state])
    torch.save(state, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="an old pickle that is no zip"):
        open_checkpoint(folder)
