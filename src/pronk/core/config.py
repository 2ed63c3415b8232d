"""The shape of a Llama model, independent of any file format.

Checkpoint readers build a `ModelConfig` from their own metadata; everything above reads only this.
"""

import math
from dataclasses import dataclass

from pronk.core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1 frequency scaling (`apply_scaling` in Meta's model.py).

    Wavelengths longer than `original_context / low_freq_factor` are stretched by `factor`, those
    shorter than `original_context / high_freq_factor` are kept, those between are blended.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.low_freq_factor > 0 and self.original_context > 0):
            raise CheckpointError(f"rope scaling: factors must be positive, got {self}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"rope scaling: high_freq_factor {self.high_freq_factor} must exceed"
                f" low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a Llama model. Letters: D dim, H n_heads, G n_kv_heads, K head_dim, F ffn_dim,
    V vocab_size."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context: int
    """Positions the model was trained for; a run may ask for fewer, not for more."""
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    rope_divisors: tuple[float, ...] | None = None
    """Explicit divisor of each of the K/2 rotary frequencies (GGUF's `rope_freqs.weight`, or a
    linear scaling). Excludes `rope_scaling`."""
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim",
                     "vocab_size", "context"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"model config: {name} must be a positive integer, got {value!r}"
                )
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"model config: n_heads {self.n_heads} is no multiple of"
                f" n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"model config: head_dim {self.head_dim} is odd")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise CheckpointError(f"model config: {name} must be positive, got {value!r}")
        if self.rope_divisors is not None:
            if self.rope_scaling is not None:
                raise CheckpointError(
                    "model config: rope_scaling and rope_divisors exclude each other"
                )
            if len(self.rope_divisors) != self.head_dim // 2:
                raise CheckpointError(
                    f"model config: {len(self.rope_divisors)} rope divisors,"
                    f" head_dim {self.head_dim} needs {self.head_dim // 2}"
                )

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def n_params(self) -> int:
        """Weights of the model, a tied embedding counted once."""
        attention = self.head_dim * self.dim * 2 * (self.n_heads + self.n_kv_heads)
        layer = attention + 3 * self.ffn_dim * self.dim + 2 * self.dim
        tables = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        return self.n_layers * layer + tables + self.dim
