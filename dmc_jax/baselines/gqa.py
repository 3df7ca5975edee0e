"""Grouped-query attention made from a multi-head model (Ainslie et al. 2023, arXiv 2305.13245).

The uptraining baseline: the same cache size as DMC at ratio K / K', fixed for every token and head.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from dmc_jax.config import ModelConfig
from dmc_jax.errors import UserError
from dmc_jax.model.llama import layer_stacks


def mean_pool_kv_heads(
    params: Any, config: ModelConfig, kv_heads: int | tuple[int, ...]
) -> tuple[Any, ModelConfig]:
    """Average groups of neighbouring KV heads; what to train on afterwards (section 2.1).

    Query head n reads KV head n // G before and after, so it reads the mean of its old group.

    Args:
        params: of a model, as `init_params` shapes them.
        config: its sizes.
        kv_heads: wanted number K', for all layers or for each; divides every layer's K.

    Returns:
        (parameters, sizes) of the model with fewer KV heads.

    Raises:
        UserError: a number that does not divide a layer's KV heads, or another number of layers.
    """
    wanted = dataclasses.replace(config, kv_heads=kv_heads)
    pairs = zip(config.kv_heads_by_layer, wanted.kv_heads_by_layer, strict=True)
    for layer, (old, new) in enumerate(pairs):
        if old % new:
            raise UserError(
                f"{old} KV heads of layer {layer} cannot be averaged into {new}: choose a divisor "
                f"of {old}"
            )
    layers = [
        _pool_layer(layer, heads)
        for layer, heads in zip(_unstack(params, config), wanted.kv_heads_by_layer, strict=True)
    ]
    # Layers that differed may be equal now, so that their stacks become one.
    stacks = {
        f"run_{index}": jax.tree.map(lambda *x: jnp.stack(x), *layers[first : first + length])
        for index, (first, length, _) in enumerate(layer_stacks(wanted))
    }
    others = {name: leaf for name, leaf in params.items() if not name.startswith("run_")}
    return {**others, **stacks}, wanted


def _unstack(params: Any, config: ModelConfig) -> list[Any]:
    """The parameters of every layer."""
    return [
        jax.tree.map(operator.itemgetter(i), params[f"run_{index}"])
        for index, (_, length, _) in enumerate(layer_stacks(config))
        for i in range(length)
    ]


def _pool_layer(layer: Any, kv_heads: int) -> Any:
    """A layer whose kernels [D, K, H] of keys and values are averaged to [D, K', H]."""

    def pooled(kernel):
        D, K, H = kernel.shape
        return kernel.reshape(D, kv_heads, K // kv_heads, H).mean(axis=2)

    return {**layer, **{name: {"kernel": pooled(layer[name]["kernel"])} for name in ("k", "v")}}
