"""The Llama forward pass, read top to bottom.

It knows no backend, no file format and no batch policy: `ops` computes, `Batch` says where the
packed rows belong. Source: Meta's model.py (llama-models) and The Llama 3 Herd of Models, section
3.2. Letters as in `backends/protocol.py`.
"""

from dataclasses import dataclass
from typing import Any

from pronk.backends.protocol import I32, Batch, KvLayer, Ops, Stack, Weight
from pronk.core.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. q, k, v and gate, up are stacked along their outputs at load."""

    attn_norm: Any  # [D]
    wqkv: Weight  # [(H + 2G) K, D]
    wo: Weight  # [D, H K]
    ffn_norm: Any  # [D]
    w_gate_up: Weight  # [2F, D]
    w_down: Weight  # [D, F]


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A model's weights as handles of one backend."""

    embed: Weight  # [V, D], read by row
    layers: list[LayerWeights]
    norm: Any  # [D]
    output: Weight  # [V, D]; made from the embedding where the two are tied
    cos_sin: Any  # [positions, K/2, 2]
    stack: Stack | None = None  # the layers and the norm in one call, on a backend that has it


def forward(
    ops: Ops,
    config: ModelConfig,
    weights: LlamaWeights,
    ids_T: I32,
    batch: Batch,
    kv: list[KvLayer] | None,
    rows_R: I32 | None = None,
) -> Any:
    """Logits `[R, V]` of the wanted rows (all rows without `rows_R`), float32.

    With `kv` (one layer each) keys and values of the new rows are stored and earlier ones read;
    without, each sequence of the batch sees only its own rows.
    """
    hidden_RD = forward_hidden(ops, config, weights, ids_T, batch, kv, rows_R)
    return ops.linear(hidden_RD, weights.output)


def forward_hidden(
    ops: Ops,
    config: ModelConfig,
    weights: LlamaWeights,
    ids_T: I32,
    batch: Batch,
    kv: list[KvLayer] | None,
    rows_R: I32 | None = None,
) -> Any:
    """The normalized hidden states `[R, D]` that the output layer reads."""
    eps = config.norm_eps
    residual_TD = ops.embed(ids_T, weights.embed)
    if weights.stack is not None and kv is not None:
        return weights.stack(residual_TD, batch, kv, rows_R)
    x_TD = ops.rms_norm(residual_TD, weights.layers[0].attn_norm, eps)
    for i, layer in enumerate(weights.layers):
        o_TE = attention(ops, config, layer, x_TD, weights.cos_sin, batch, kv[i] if kv else None)
        if rows_R is not None and i + 1 == len(weights.layers):  # only the wanted rows go on
            o_TE, residual_TD = ops.take_rows(o_TE, rows_R), ops.take_rows(residual_TD, rows_R)
        attn_TD = ops.linear(o_TE, layer.wo)
        x_TD, residual_TD = ops.rms_norm(attn_TD, layer.ffn_norm, eps, residual_TD)
        mlp_TD = ops.linear(ops.swiglu(ops.linear(x_TD, layer.w_gate_up)), layer.w_down)
        if i + 1 < len(weights.layers):
            x_TD, residual_TD = ops.rms_norm(
                mlp_TD, weights.layers[i + 1].attn_norm, eps, residual_TD
            )
    x_RD, _ = ops.rms_norm(mlp_TD, weights.norm, eps, residual_TD)
    return x_RD


def attention(
    ops: Ops,
    config: ModelConfig,
    layer: LayerWeights,
    x_TD: Any,
    cos_sin: Any,
    batch: Batch,
    kv: KvLayer | None,
) -> Any:
    """Grouped-query attention of one block before its output projection, `[T, H K]`."""
    n_rows, H, G, K = len(x_TD), config.n_heads, config.n_kv_heads, config.head_dim
    qkv = ops.linear(x_TD, layer.wqkv)
    q_THK = qkv[:, : H * K].reshape(n_rows, H, K)
    k_TGK = qkv[:, H * K : (H + G) * K].reshape(n_rows, G, K)
    v_TGK = qkv[:, (H + G) * K :].reshape(n_rows, G, K)
    q_THK, k_TGK = ops.rope(q_THK, k_TGK, cos_sin, batch.positions_T)
    o_THK = ops.attention(q_THK, k_TGK, v_TGK, kv, batch)
    return o_THK.reshape(n_rows, H * K)
