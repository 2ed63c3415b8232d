"""Reads a LoRA adapter as PEFT saves it: a folder with adapter_config.json and
adapter_model.safetensors.

An adapter adds s B A to linear weights (Hu et al. 2021): A `[rank, inputs]`, B `[outputs, rank]`,
s = alpha / rank, or alpha / sqrt(rank) where it is rank-stabilized (Kalajdzievski 2023). What else
an adapter_config.json may ask for and would change the result is refused by name, unknown options
among it: PEFT has a dozen that change the forward pass. Source: LoraConfig and LoraLayer of
huggingface/peft 0.21.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from pronk.backends.formats import dequantize
from pronk.backends.protocol import F32
from pronk.checkpoints.checkpoint import Stored
from pronk.checkpoints.fields import Fields, brief
from pronk.checkpoints.mapped import MappedFile, quoted, read_json
from pronk.checkpoints.names import native_name, rotated_heads, tensor_shape
from pronk.checkpoints.safetensors import read_header
from pronk.core.config import ModelConfig
from pronk.core.errors import CheckpointError

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PARTS: Final = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
"""The linear weights of a layer: what an adapter may adapt."""

_KINDS: Final = ("F32", "F16", "BF16")

_NEUTRAL: Final[Mapping[str, Any]] = {"bias": "none"}
"""Options that change the result; any other is neutral where it is absent, null, false or empty."""

_READ: Final = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
})  # fmt: skip
_HARMLESS: Final = frozenset({
    # where it comes from, how it was trained, how the values were initialized
    "auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type",
    "inference_mode", "lora_dropout", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
    "runtime_config",
})  # fmt: skip
_PLAIN_STARTS: Final = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to initialize an adapter that leave the model's own weights alone. The others (PiSSA, OLoRA,
CorDA, LoftQ, LoRA-GA) move a part of them into the adapter, so it fits only what they left."""

_TENSOR: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<prefix>model\.)?(?P<weight>layers\.\d{1,6}\.\w+\.\w+)"
    r"\.lora_(?P<matrix>[AB])(?:\.default)?\.weight"
)
_PATTERN: Final = re.compile(r"(?:[\w|^$-]|\\?\.|\\d|(?P<repeat>\.[*+]|\\d\+))*")
_MOST_PATTERNS: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One of the two of a linear weight, still in its file."""

    name: str
    module: str
    """What the adapter calls the linear weight; its patterns are about these names."""
    stored: Stored


@dataclass(frozen=True, slots=True)
class _Pair:
    a: _Matrix
    b: _Matrix
    rank: int
    scale: float


class AdapterFolder:
    """An opened adapter. Opening checks names, shapes and options against the model's `config` and
    reads no weights; `read` gives those of one linear weight."""

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        """CheckpointError for anything that is missing, malformed, unknown or unsupported."""
        self.path, self.config = Path(path), config
        if not self.path.is_dir():
            raise CheckpointError(
                f"{str(path)!a}: no such folder; an adapter is a PEFT folder with {CONFIG_FILE} and"
                f" {WEIGHTS_FILE}"
            )
        fields = Fields(self.path / CONFIG_FILE, read_json(self.path / CONFIG_FILE))
        _refuse_variants(fields)
        if not (self.path / WEIGHTS_FILE).exists() and (self.path / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{self.path}: adapter_model.bin is a pickle, which is not read; save the adapter"
                f" as {WEIGHTS_FILE}"
            )
        self._file = MappedFile(self.path / WEIGHTS_FILE)
        try:
            self._pairs = _pairs(self._file, fields, config)
            _check_targets(fields, config, self._file.path, self._pairs)
        except BaseException:
            self._file.close()
            raise

    @property
    def ranks(self) -> dict[str, int]:
        """Canonical names of the linear weights that it adapts, and the rank of each."""
        return {name: pair.rank for name, pair in self._pairs.items()}

    def read(self, name: str) -> tuple[F32, F32]:
        """A `[rank, inputs]` and s B `[outputs, rank]` of a linear weight, rows in Pronk's order.
        CheckpointError where they hold what is no finite number."""
        pair = self._pairs[name]
        a, b = _values(pair.a.stored), _values(pair.b.stored)
        with np.errstate(over="ignore"):
            b *= np.float32(pair.scale)
        for matrix, values in ((pair.a, a), (pair.b, b)):
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"{self._file.path}: tensor {quoted(matrix.name)} has values that are not"
                    " finite"
                )
        return a, b

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _values(stored: Stored) -> F32:
    """A copy."""
    rows, release = stored.read()
    values = np.array(dequantize(stored.kind, rows), dtype=np.float32)
    release()
    return values


def _refuse_variants(fields: Fields) -> None:
    path, values = fields.path, fields.values
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {brief(kind)}; only 'LORA' is supported")
    start = values.get("init_lora_weights")
    if start is not None and start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {brief(start)}, an adapter that belongs to changed"
            " weights of the model; save it with path_initial_model_for_weight_conversion"
        )
    for key, value in values.items():
        neutral = _NEUTRAL.get(key, False)
        if key in _READ or key in _HARMLESS or value == neutral or value in (None, [], {}):
            continue
        raise CheckpointError(
            f"{path}: {quoted(key)} is {brief(value)}; only {brief(neutral)} is supported"
        )


def _pairs(file: MappedFile, fields: Fields, config: ModelConfig) -> dict[str, _Pair]:
    """By canonical name, in the order of the model."""
    by_native = {native_name(name, "hf"): name for name in _adaptable(config)}
    found: dict[str, dict[str, _Matrix]] = {}
    for tensor_name, tensor in read_header(file).items():
        match = _TENSOR.fullmatch(tensor_name)
        native = f"{match['prefix'] or 'model.'}{match['weight']}.weight" if match else ""
        name = by_native.get(native)
        if match is None or name is None:
            raise CheckpointError(
                f"{file.path}: tensor {quoted(tensor_name)} is no LoRA matrix of a linear weight in"
                f" a Llama model of {config.n_layers} layers; only those are supported"
            )
        matrices, letter = found.setdefault(name, {}), match["matrix"]
        if letter in matrices:
            raise CheckpointError(
                f"{file.path}: tensors {quoted(tensor_name)} and {quoted(matrices[letter].name)}"
                " are the same matrix"
            )
        heads = rotated_heads(name, config) if letter == "B" else 0
        module = (match["prefix"] or "") + match["weight"]
        matrices[letter] = _Matrix(tensor_name, module, tensor.stored(heads))
    if not found:
        raise CheckpointError(f"{file.path}: it has no tensors; an adapter needs at least two")
    scaling = _Scaling(fields)
    return {
        name: _pair(file.path, scaling, found[name], tensor_shape(name, config))
        for name in _adaptable(config)
        if name in found
    }


def _adaptable(config: ModelConfig) -> Iterator[str]:
    for layer in range(config.n_layers):
        for part in PARTS:
            yield f"layers.{layer}.{part}"


def _pair(
    path: Path, scaling: "_Scaling", matrices: Mapping[str, _Matrix], shape: tuple[int, int]
) -> _Pair:
    module = next(iter(matrices.values())).module
    for letter in "AB":
        if letter not in matrices:
            raise CheckpointError(f"{path}: lora_{letter} of {module} is missing")
    rank = scaling.rank(module)
    for letter, expected in (("A", [rank, shape[1]]), ("B", [shape[0], rank])):
        matrix = matrices[letter]
        if list(matrix.stored.shape) != expected:
            raise CheckpointError(
                f"{path}: tensor {quoted(matrix.name)} has shape"
                f" {brief(list(matrix.stored.shape))}, the model and rank {rank} ask for {expected}"
            )
        if matrix.stored.kind not in _KINDS:
            raise CheckpointError(
                f"{path}: tensor {quoted(matrix.name)} is stored as {matrix.stored.kind}, which is"
                f" not supported (supported: {', '.join(_KINDS)})"
            )
    return _Pair(matrices["A"], matrices["B"], rank, scaling.scale(module, rank))


class _Scaling:
    """Rank and scale of each module, as adapter_config.json gives them."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._rank = fields.integer("r")
        self._alpha = fields.number("lora_alpha")
        self._stabilized = fields.boolean("use_rslora", False)
        self._ranks = _patterns(fields, "rank_pattern")
        self._alphas = _patterns(fields, "alpha_pattern")

    def rank(self, module: str) -> int:
        key = _first_match(self._ranks, module)
        name = "r" if key is None else f"rank_pattern[{quoted(key)}]"
        value = self._rank if key is None else self._inner("rank_pattern").integer(key)
        if value < 1:
            raise CheckpointError(f"{self._fields.path}: {name} must be at least 1, got {value}")
        return value

    def scale(self, module: str, rank: int) -> float:
        key = _first_match(self._alphas, module)
        alpha = self._alpha if key is None else self._inner("alpha_pattern").number(key)
        return alpha / (math.sqrt(rank) if self._stabilized else rank)

    def _inner(self, key: str) -> Fields:
        return Fields(self._fields.path, self._fields.values[key])


def _patterns(fields: Fields, key: str) -> dict[str, re.Pattern[str]]:
    """The regular expressions of `rank_pattern` or `alpha_pattern`, compiled. They come from a
    stranger: what could take forever to match is refused."""
    values = fields.get(key, {})
    if not isinstance(values, dict) or len(values) > _MOST_PATTERNS:
        raise CheckpointError(
            f"{fields.path}: {key} must be an object of at most {_MOST_PATTERNS} entries, got"
            f" {brief(values)}"
        )
    for pattern in values:
        tame = len(pattern) <= 200 and _PATTERN.fullmatch(pattern)
        if not tame or len(re.findall(r"[*+]", pattern)) > 2:
            raise CheckpointError(
                f"{fields.path}: {key} has {quoted(pattern)}; only names with ^ $ | . \\d and at"
                " most two repetitions (.* .+ \\d+) are supported"
            )
    return {pattern: re.compile(rf"(.*\.)?({pattern})$") for pattern in values}


def _first_match(patterns: Mapping[str, re.Pattern[str]], module: str) -> str | None:
    """The key of the first pattern that a module's name ends with: PEFT's rule."""
    return next((key for key, pattern in patterns.items() if pattern.match(module)), None)


def _check_targets(
    fields: Fields, config: ModelConfig, weights: Path, found: Collection[str]
) -> None:
    """Every module that the options select must have its tensors, and no other. A selection by
    regular expression is not evaluated: there the tensors alone count."""
    targets, excluded = _selection(fields, "target_modules"), _selection(fields, "exclude_modules")
    layers = _layers(fields)
    if targets is None or excluded is None:
        return
    for name in ("lm_head", "embed_tokens"):
        if name in targets:
            raise CheckpointError(
                f"{fields.path}: target_modules has {name!r}; only linear weights of the layers are"
                " supported"
            )
    for name in _adaptable(config):
        module = native_name(name, "hf").removesuffix(".weight")
        endings = _endings(module)
        here = module in targets or not layers or int(name.split(".")[1]) in layers
        wanted = here and bool(endings & targets) and not endings & excluded
        if wanted != (name in found):
            what = "has no tensors for" if wanted else "has tensors for"
            which = "is" if wanted else "is not"
            raise CheckpointError(
                f"{weights}: it {what} {module}, which {which} among the target_modules of"
                f" {fields.path.name}"
            )


def _layers(fields: Fields) -> set[int]:
    """`layers_to_transform`; without, and where it is empty, all layers are meant."""
    value = fields.values.get("layers_to_transform")
    layers = [value] if type(value) is int else value or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise CheckpointError(
            f"{fields.path}: layers_to_transform must be a layer or a list of layers, got"
            f" {brief(value)}"
        )
    return set(layers)


def _selection(fields: Fields, key: str) -> set[str] | None:
    """Names of modules, whole or their ends; None where a regular expression stands for them, or,
    as for target_modules, nothing."""
    value = fields.values.get(key)
    if value == "all-linear" and key == "target_modules":
        parts = (native_name(f"layers.0.{part}", "hf") for part in PARTS)
        return {part.split(".")[-2] for part in parts}
    if value is None:
        return None if key == "target_modules" else set()
    if isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{fields.path}: {key} must be a list of names, got {brief(value)}")
    return set(value)


def _endings(module: str) -> set[str]:
    """ "a.b.c", "b.c" and "c" for "a.b.c"."""
    words = module.split(".")
    return {".".join(words[i:]) for i in range(len(words))}
