"""Names, shapes and the rotary permutation."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from checkpoint_files import CONFIG, half_split

from pronk.checkpoints.names import (
    is_ignored,
    native_name,
    rotated_heads,
    tensor_names,
    tensor_shape,
    to_half_split,
    to_interleaved,
)


def test_native_names() -> None:
    assert native_name("embed", "hf") == "model.embed_tokens.weight"
    assert native_name("layers.11.w_up", "meta") == "layers.11.feed_forward.w3.weight"
    assert native_name("layers.11.w_down", "gguf") == "blk.11.ffn_down.weight"
    assert native_name("layers.0.ffn_norm", "hf") == (
        "model.layers.0.post_attention_layernorm.weight"
    )


@pytest.mark.parametrize("fmt", ["gguf", "hf", "meta"])
def test_native_names_are_distinct(fmt: str) -> None:
    names = list(tensor_names(CONFIG))
    assert len(names) == 9 * CONFIG.n_layers + 3
    assert len({native_name(name, fmt) for name in names}) == len(names)  # type: ignore[arg-type]


def test_shapes_add_up_to_the_parameters() -> None:
    shapes = [tensor_shape(name, CONFIG) for name in tensor_names(CONFIG)]
    assert sum(rows * columns for rows, columns in shapes) == CONFIG.n_params


def test_tied_models_have_no_output() -> None:
    assert "output" not in list(tensor_names(replace(CONFIG, tied_embeddings=True)))


def test_names_of_an_absurd_model_come_one_at_a_time() -> None:
    absurd = replace(CONFIG, n_layers=1 << 60)
    assert list(islice(tensor_names(absurd), 2)) == ["embed", "layers.0.attn_norm"]


def test_ignored() -> None:
    assert is_ignored("rope_freqs.weight", "gguf")
    assert is_ignored("rope.freqs", "meta")
    assert is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq", "hf")
    assert not is_ignored("rope.freqs.bias", "meta")
    assert not is_ignored("blk.0.attn_q.bias", "gguf")


def test_only_queries_and_keys_are_rotated() -> None:
    heads = {name: rotated_heads(name, CONFIG) for name in tensor_names(CONFIG)}
    assert heads["layers.1.wq"] == 4
    assert heads["layers.1.wk"] == 2
    assert sum(heads.values()) == 2 * (4 + 2)


def test_permutation() -> None:
    """Row 2j of a head is row j of Hugging Face's, row 2j + 1 is row j + K/2."""
    rows = np.arange(16, dtype=np.uint8)[:, None].repeat(3, axis=1)
    assert to_interleaved(rows, 2)[:, 0].tolist() == [
        0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,
    ]  # fmt: skip
    np.testing.assert_array_equal(to_half_split(to_interleaved(rows, 2), 2), rows)
    expected = half_split(rows.astype(np.float32), 2)
    np.testing.assert_array_equal(to_half_split(rows, 2), expected)
