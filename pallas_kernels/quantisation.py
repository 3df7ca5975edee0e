"""Keys and values as int8 with a scale of their own: what pages of int8 hold, in plain JAX."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

_MOST = 127  # of int8; -128 is not used, so that x and -x are held alike


def quantise(
    x: Float[Array, "*n H"], dtype: DTypeLike
) -> tuple[Int8[Array, "*n H"], Float[Array, "*n"]]:
    """Round every vector to 255 equal steps between plus and minus its largest entry.

    That is symmetric absmax quantisation: x = scale * int8, off by half a step at most, which is
    1/254 of the largest entry. A vector of zeros has the scale 0, one with NaN a scale of NaN.

    Args:
        x: keys or values.
        dtype: of scales; steps are counted in scales so rounded.

    Returns:
        (steps, scale).
    """
    x = x.astype(jnp.float32)
    scale = (jnp.abs(x).max(axis=-1) / _MOST).astype(dtype)
    step = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
    return jnp.clip(jnp.round(x / step), -_MOST, _MOST).astype(jnp.int8), scale


def dequantise(steps: Int8[Array, "*n H"], scale: Float[Array, "*n"]) -> Float[Array, "*n H"]:
    """Give back what `quantise` rounded, in the dtype of the scales."""
    return steps.astype(scale.dtype) * scale[..., None]


def rounded(x: Float[Array, "*n H"], dtype: DTypeLike) -> Float[Array, "*n H"]:
    """Round vectors as `quantise` does, and give them back in the dtype of scales."""
    return dequantise(*quantise(x, dtype))
