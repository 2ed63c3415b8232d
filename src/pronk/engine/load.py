"""From an opened checkpoint to what the engine runs: weights of a backend, a tokenizer, and the
sampling values that the model's makers recommend."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pronk.backends.protocol import KvDtype, Ops, RawTensor
from pronk.checkpoints.checkpoint import Checkpoint
from pronk.checkpoints.layouts import LayoutCache
from pronk.checkpoints.mapped import read_json
from pronk.core.config import ModelConfig
from pronk.core.errors import CheckpointError, UserError
from pronk.core.progress import Progress, silent
from pronk.core.switches import switch
from pronk.engine.memory import Need
from pronk.model.llama import LayerWeights, LlamaWeights
from pronk.model.rope import rope_table

if TYPE_CHECKING:
    from pronk.text.tokenizer import Tokenizer


class LoadOps(Ops, Protocol):
    """A backend that tells the sizes of what it would make."""

    def packed_bytes(self, kind: str, rows: int, cols: int) -> int:
        """Bytes of a linear weight once it is loaded."""
        ...

    def kv_bytes(self, config: ModelConfig, n_blocks: int, dtype: KvDtype) -> int:
        """Bytes of the KV cache of all layers."""
        ...


MERGED = {"wqkv": ("wq", "wk", "wv"), "wo": ("wo",), "w_gate_up": ("w_gate", "w_up"),
          "w_down": ("w_down",)}  # fmt: skip
"""The linear weights of a layer, and the tensors that each is stacked from."""


class _Loader:
    """Hands tensors to a backend one after another, and their file pages back to the system, so
    that no more than one weight is in memory twice. Weights that lie packed on the disk come from
    there."""

    def __init__(
        self, checkpoint: Checkpoint, ops: Ops, packed: LayoutCache | None, progress: Progress
    ) -> None:
        self._checkpoint, self._ops, self._progress = checkpoint, ops, progress
        self._packed = packed
        self._done = 0

    def weight(self, *names: str) -> Any:
        if self._packed and (weight := self._packed.get(names)) is not None:
            self._tell(sum(self._checkpoint.stored_bytes(name) for name in names))
            return weight
        tensors = [self._checkpoint.get(name) for name in names]
        weight = self._ops.make_weight(tensors)
        self._book(tensors)
        if self._packed:
            self._packed.add(names, weight)
        return weight

    def table(self, name: str) -> Any:
        """Read by row, so not released: it may stay in the file."""
        return self._ops.make_table(self._checkpoint.get(name))

    def vector(self, name: str) -> Any:
        tensor = self._checkpoint.get(name)
        vector = self._ops.make_vector(tensor)
        self._book([tensor])
        return vector

    def layer(self, i: int) -> LayerWeights:
        linear = {
            name: self.weight(*(f"layers.{i}.{part}" for part in parts))
            for name, parts in MERGED.items()
        }
        norms = {name: self.vector(f"layers.{i}.{name}") for name in ("attn_norm", "ffn_norm")}
        return LayerWeights(**linear, **norms)

    def _book(self, tensors: Iterable[RawTensor]) -> None:
        nbytes = 0
        for tensor in tensors:
            nbytes += tensor.data.nbytes
            tensor.release()
        self._tell(nbytes)

    def _tell(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(min(self._done, self._checkpoint.nbytes), self._checkpoint.nbytes, "loading")


def load_model(
    checkpoint: Checkpoint,
    ops: Ops,
    *,
    n_positions: int,
    fused: bool | None = None,
    layout_cache: bool | None = None,
    progress: Progress = silent,
) -> LlamaWeights:
    """All weights of a checkpoint as handles of a backend, and rotary angles of `n_positions`.

    `fused`: whether the layers run as the one call that some backends have; None: where there is
    one, unless the environment variable PRONK_FUSED is 0. `layout_cache`: whether packed weights
    are kept on disk and mapped by later starts; None: if PRONK_LAYOUT_CACHE is 1. Progress is in
    bytes of the checkpoint. UserError where one of the variables is neither 0 nor 1."""
    config = checkpoint.config
    if layout_cache is None:
        layout_cache = switch("PRONK_LAYOUT_CACHE", default=False)
    if fused is None:
        fused = switch("PRONK_FUSED", default=True)
    packed = _layout_cache(checkpoint, ops, progress) if layout_cache else None
    loader = _Loader(checkpoint, ops, packed, progress)
    weights = LlamaWeights(
        embed=loader.table("embed"),
        layers=[loader.layer(i) for i in range(config.n_layers)],
        norm=loader.vector("norm"),
        output=loader.weight("embed" if config.tied_embeddings else "output"),
        cos_sin=ops.from_host(rope_table(config, n_positions)),
    )
    make_stack = getattr(ops, "make_stack", None)
    if make_stack is not None and fused:
        stack = make_stack(config, weights.layers, weights.norm, weights.cos_sin)
        weights = replace(weights, stack=stack)
    progress(checkpoint.nbytes, checkpoint.nbytes, "loading")
    if packed:
        packed.save(progress)
    return weights


def _layout_cache(checkpoint: Checkpoint, ops: Ops, progress: Progress) -> LayoutCache | None:
    try:
        return LayoutCache(checkpoint, ops)
    except UserError as error:
        progress(0, 0, f"no layout cache: {error}")
        return None


def weight_bytes(checkpoint: Checkpoint, ops: LoadOps) -> int:
    """Bytes that the weights of a checkpoint take on a backend. The embedding table does not
    count: it stays in its file."""
    config = checkpoint.config
    names = [f"layers.{i}.{part}" for i in range(config.n_layers) for part in _LINEAR]
    names.append("embed" if config.tied_embeddings else "output")
    return sum(ops.packed_bytes(checkpoint.kind(n), *checkpoint.shape(n)) for n in names)


_LINEAR = tuple(part for parts in MERGED.values() for part in parts)


def need_of(checkpoint: Checkpoint, ops: LoadOps, *, token_budget: int, max_batch: int) -> Need:
    """What it takes to run a checkpoint on a backend."""
    return Need(
        checkpoint.config,
        weights=weight_bytes(checkpoint, ops),
        kv_bytes=lambda n_blocks, dtype: ops.kv_bytes(checkpoint.config, n_blocks, dtype),
        token_budget=token_budget,
        max_batch=max_batch,
    )


def use_threads(ops: Ops, threads: int | None) -> int:
    """The number of threads of a run: `threads`, or without it all that this process may use. The
    backend hears of it at once, since loading uses them, too."""
    n = ops.default_threads() if threads is None else threads
    ops.set_threads(n)
    return n


def load_tokenizer(checkpoint: Checkpoint) -> "Tokenizer":
    """The tokenizer that lies in or beside a checkpoint. Raises CheckpointError without one."""
    from pronk.text import tokenizer

    path = checkpoint.path
    if checkpoint.format == "gguf":
        return tokenizer.tokenizer_from_gguf(checkpoint.metadata)
    if checkpoint.format == "hf":
        return tokenizer.tokenizer_from_hf(path)
    return tokenizer.tokenizer_from_meta(path / "tokenizer.model")


_HF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_GGUF_SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
                  "penalty_repeat": "repetition_penalty"}  # fmt: skip


def recommended_sampling(checkpoint: Checkpoint) -> dict[str, float | int]:
    """The sampling values that come with a model, by the names of SamplingParams: those of
    generation_config.json, or the `general.sampling.*` keys of a GGUF; often none."""
    if checkpoint.format == "gguf":
        stored = {f"general.sampling.{key}": name for key, name in _GGUF_SAMPLING.items()}
        return _numbers(checkpoint.path, checkpoint.metadata, stored)
    path = checkpoint.path / "generation_config.json"
    if checkpoint.format != "hf" or not path.exists():
        return {}
    values = read_json(path)
    if values.get("do_sample") is False:
        return {"temperature": 0}
    return _numbers(path, values, {name: name for name in _HF_SAMPLING})


def _numbers(
    path: Path, values: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, float | int]:
    found = {}
    for key, name in names.items():
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: {key} is {value!r:.60}, not a number")
        found[name] = value
    return found
