"""Rotary position embedding, rotate-half over the whole head (Su et al. 2021, arXiv 2104.09864)."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the slow rotary frequencies (its four published numbers)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> Float[Array, " H//2"]:
    """List the angular frequencies in radians per token: `theta^(-2f/H)` for f = 0 .. H/2 - 1.

    Args:
        head_dim: H, even.
        theta: the base (10,000 in Llama 2, 500,000 in Llama 3).
        scaling: Llama 3.1's rule: wavelengths longer than `original_length / low_freq_factor` are
            divided by `factor`, those shorter than `original_length / high_freq_factor` are kept,
            and the ones between are interpolated.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head width, got {head_dim}")
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_length * frequencies / (2 * math.pi)  # over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(
    x: Float[Array, "B T heads H"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " H//2"],
) -> Float[Array, "B T heads H"]:
    """Rotate the pairs (f, f + H/2) of every head by `position * frequency`.

    Angles, sines and the rotation itself are float32 whatever the dtype of `x` (a bfloat16 angle is
    off by radians beyond position 1,000); the result has the dtype of `x`.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
