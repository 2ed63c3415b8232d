"""Loading tensor by tensor: what each weight is made of, what is given back, what it takes."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_models import CONFIG, random_tensors

from pronk.backends import reference
from pronk.backends.select import select_backend
from pronk.checkpoints.checkpoint import Checkpoint, Stored
from pronk.checkpoints.names import native_name
from pronk.core.config import ModelConfig
from pronk.core.errors import UserError
from pronk.engine.load import load_model, need_of, use_threads, weight_bytes
from pronk.model.rope import rope_table

TIED = replace(CONFIG, tied_embeddings=True)


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    try:
        return select_backend(request.param)
    except UserError as error:
        pytest.skip(str(error))


class Watched:
    """A model in memory that books which tensors are read and released, in order."""

    def __init__(self, config: ModelConfig, halved: Collection[str] = ()) -> None:
        """`halved` tensors are stored in F16, all others in F32."""
        self.log: list[str] = []
        self.tensors = random_tensors(config)
        self._halved = halved
        stored = {native_name(name, "gguf"): self._stored(name) for name in self.tensors}
        self.checkpoint = Checkpoint(Path("watched"), "gguf", config, {}, stored, [])

    def _stored(self, name: str) -> Stored:
        kind = "F16" if name in self._halved else "F32"
        dtype = np.float16 if name in self._halved else np.float32
        raw = np.atleast_2d(self.tensors[name]).astype(dtype).view(np.uint8)

        def read() -> tuple[Any, Callable[[], None]]:
            self.log.append(f"read {name}")
            return raw, lambda: self.log.append(f"release {name}")

        return Stored(kind, self.tensors[name].shape, raw.nbytes, read)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_weights_are_stacked_and_tied(config: ModelConfig) -> None:
    watched = Watched(config)
    weights = load_model(watched.checkpoint, reference, n_positions=50)
    tensors = watched.tensors
    for i, layer in enumerate(weights.layers):
        part = {name: tensors[f"layers.{i}.{name}"] for name in ("wq", "wk", "wv", "wo", "w_gate",
                "w_up", "w_down", "attn_norm", "ffn_norm")}  # fmt: skip
        qkv = np.concatenate([part["wq"], part["wk"], part["wv"]])
        np.testing.assert_array_equal(layer.wqkv, qkv)
        np.testing.assert_array_equal(
            layer.w_gate_up, np.concatenate([part["w_gate"], part["w_up"]])
        )
        for name in ("wo", "w_down", "attn_norm", "ffn_norm"):
            np.testing.assert_array_equal(getattr(layer, name), part[name])
    np.testing.assert_array_equal(weights.norm, tensors["norm"])
    np.testing.assert_array_equal(
        weights.output, tensors["embed" if config.tied_embeddings else "output"]
    )
    ids = np.array([3, 0, 3], np.int32)
    np.testing.assert_array_equal(reference.embed(ids, weights.embed), tensors["embed"][ids])
    np.testing.assert_array_equal(weights.cos_sin, rope_table(config, 50))


def test_each_weight_is_released_before_the_next_is_read(ops: ModuleType) -> None:
    """All but the embedding table, which stays in its file."""
    watched = Watched(CONFIG)
    load_model(watched.checkpoint, ops, n_positions=8)
    held: set[str] = set()
    most = 0
    for line in watched.log:
        action, name = line.split()
        if action == "read":
            held.add(name)
            most = max(most, len(held - {"embed"}))
        else:
            held.remove(name)
    assert held == {"embed"}
    assert most == 3  # q, k and v are one weight


def test_progress_counts_bytes_up_to_the_whole_file(ops: ModuleType) -> None:
    for config in (CONFIG, TIED):
        checkpoint = Watched(config).checkpoint
        calls: list[tuple[int, int]] = []
        load_model(
            checkpoint, ops, n_positions=8,
            progress=lambda done, total, what, calls=calls: calls.append((done, total)),
        )  # fmt: skip
        assert calls == sorted(calls)
        assert calls[-1] == (checkpoint.nbytes, checkpoint.nbytes)
        assert len(calls) > 2 * config.n_layers


def test_weight_bytes_are_those_that_are_made() -> None:
    for config in (CONFIG, TIED):
        checkpoint = Watched(config).checkpoint
        weights = load_model(checkpoint, reference, n_positions=8)
        made = [weights.output]
        for layer in weights.layers:
            made += [layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down]
        assert weight_bytes(checkpoint, reference) == sum(weight.nbytes for weight in made)


def test_weight_bytes_ask_the_backend_for_each_kind(ops: ModuleType) -> None:
    asked: list[tuple[str, int, int]] = []

    class Ops:
        def packed_bytes(self, kind: str, rows: int, cols: int) -> int:
            asked.append((kind, rows, cols))
            return int(ops.packed_bytes(kind, rows, cols))

    counting: Any = Ops()
    watched = Watched(CONFIG, halved={"layers.1.w_down", "embed"})
    total = weight_bytes(watched.checkpoint, counting)
    assert watched.log == [], "nothing has to be read for that"
    assert total == sum(ops.packed_bytes(*each) for each in asked)
    assert ("F32", CONFIG.vocab_size, CONFIG.dim) in asked
    assert ("F16", CONFIG.dim, CONFIG.ffn_dim) in asked
    assert sum(kind == "F16" for kind, _, _ in asked) == 1
    assert len(asked) == 7 * CONFIG.n_layers + 1


def test_without_a_wish_the_threads_are_those_that_the_backend_finds_best() -> None:
    told: list[int] = []

    class Ops:
        def default_threads(self) -> int:
            return 6

        def set_threads(self, n: int) -> None:
            told.append(n)

    ops: Any = Ops()
    assert (use_threads(ops, None), use_threads(ops, 2)) == (6, 2)
    assert told == [6, 2]


def test_the_need_of_a_checkpoint() -> None:
    checkpoint = Watched(CONFIG).checkpoint
    need = need_of(checkpoint, reference, token_budget=7, max_batch=3)
    assert (need.config, need.token_budget, need.max_batch) == (CONFIG, 7, 3)
    assert need.weights == weight_bytes(checkpoint, reference)
    assert need.kv_bytes(5, "int8") == reference.kv_bytes(CONFIG, 5, "int8")
