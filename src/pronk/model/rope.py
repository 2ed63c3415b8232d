"""Rotary position tables: the angle of every position and frequency of a model.

Sources: Meta's `precompute_freqs_cis` and `apply_scaling` (llama-models, model.py); GGUF's
`rope_freqs.weight` holds the divisor of each frequency and is used as it is.

Everything is rounded to float32 where Meta's and Hugging Face's code round: one unit in the last
place of a frequency is an angle of 0.006 at position 100,000.
"""

import math

import numpy as np

from pronk.backends.protocol import F32
from pronk.core.config import ModelConfig, RopeScaling


def llama3_frequencies(freqs: F32, scaling: RopeScaling) -> F32:
    """Stretches the long wavelengths of `freqs` (radians per position, `[K/2]`)."""
    wavelengths = np.float32(2 * math.pi) / freqs
    # 0 where a wavelength is to be stretched fully, 1 where it is kept, linear in between
    keep = (
        np.float32(scaling.original_context) / wavelengths - np.float32(scaling.low_freq_factor)
    ) / (np.float32(scaling.high_freq_factor - scaling.low_freq_factor))
    stretched = freqs / np.float32(scaling.factor)
    blended = (1 - keep) * stretched + keep * freqs
    return np.where(keep <= 0, stretched, np.where(keep >= 1, freqs, blended))


def rope_frequencies(config: ModelConfig) -> F32:
    """Radians per position of each rotary pair, float32 `[K/2]`."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # the power itself in double precision: correctly rounded, as torch's is and NumPy's is not
    powers = np.power(config.rope_theta, exponents.astype(np.float64))
    freqs = np.float32(1) / powers.astype(np.float32)
    if config.rope_scaling is not None:
        return llama3_frequencies(freqs, config.rope_scaling)
    if config.rope_divisors is not None:
        divisors: F32 = np.asarray(config.rope_divisors, dtype=np.float32)
        return freqs / divisors
    return freqs


def rope_table(config: ModelConfig, n_positions: int) -> F32:
    """Cosine and sine of every angle, float32 `[n_positions, K/2, 2]`."""
    angles: F32 = np.arange(n_positions, dtype=np.float32)[:, None] * rope_frequencies(config)
    table: F32 = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return table
