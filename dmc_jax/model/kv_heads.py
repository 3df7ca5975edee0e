"""Models with fewer KV heads than they were trained with: grouped-query attention."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmc_jax.config import ModelConfig
from dmc_jax.errors import UserError


def share_heads(x: Float[Array, "..."], kv_heads: int, axis: int = -2) -> Float[Array, "..."]:
    """Average KV heads into fewer, or repeat them into more.

    Of N query heads, head n reads KV head n // (N / K), before and after. A new head is the mean of
    those that its queries read, each as often as it is read, which is the mean of neighbours where
    K' divides K (Ainslie et al. 2023, arXiv 2305.13245, section 2.1). More heads that are read so
    are repeated ones, and nothing changes.

    Args:
        x: an axis of K heads among others, such as a kernel [D, K, H].
        kv_heads: wanted number K'; a divisor of N, as K is.
        axis: of the heads.

    Returns:
        `x` with K' heads, in its dtype.
    """
    axis %= x.ndim
    common = math.lcm(x.shape[axis], kv_heads)
    repeated = jnp.repeat(x, common // x.shape[axis], axis=axis)
    grouped = (*x.shape[:axis], kv_heads, common // kv_heads, *x.shape[axis + 1 :])
    return repeated.reshape(grouped).mean(axis=axis + 1)


def fewer_kv_heads(config: ModelConfig, kv_heads: int | tuple[int, ...]) -> ModelConfig:
    """Sizes of a model whose KV heads are averaged into fewer.

    Args:
        config: of the model.
        kv_heads: wanted number K', for all layers or for each.

    Raises:
        UserError: more than a layer has, a number that does not divide the query heads, or another
            number of layers.
    """
    wanted = dataclasses.replace(config, kv_heads=kv_heads).kv_heads_by_layer
    for layer, (old, new) in enumerate(zip(config.kv_heads_by_layer, wanted, strict=True)):
        if new > old:
            raise UserError(
                f"{old} KV heads of layer {layer} cannot be averaged into {new}: choose a divisor "
                f"of the {config.heads} query heads, {old} at most"
            )
    return dataclasses.replace(config, kv_heads=wanted[0] if len({*wanted}) == 1 else wanted)
