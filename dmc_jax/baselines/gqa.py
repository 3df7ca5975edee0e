"""Grouped-query attention made of a model with more KV heads (Ainslie et al. 2023, 2305.13245).

The uptraining baseline: the same cache size as DMC at ratio K / K', fixed for every token and head.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmc_jax.config import ModelConfig
from dmc_jax.model.kv_heads import fewer_kv_heads, share_heads
from dmc_jax.model.llama import layer_stacks


def mean_pool_kv_heads(
    params: Any, config: ModelConfig, kv_heads: int | tuple[int, ...]
) -> tuple[Any, ModelConfig]:
    """Average groups of neighbouring KV heads; what to train on afterwards (section 2.1).

    Args:
        params: of a model, as `init_params` shapes them.
        config: its sizes.
        kv_heads: wanted number K', for all layers or for each; a divisor of N, at most the layer's.

    Returns:
        (parameters, sizes) of the model with fewer KV heads.

    Raises:
        UserError: as in `fewer_kv_heads`.
    """
    wanted = fewer_kv_heads(config, kv_heads)
    return _with_kv_heads(params, config, wanted), wanted


def repeat_kv_heads(
    params: Any, config: ModelConfig, kv_heads: tuple[int, ...]
) -> tuple[Any, ModelConfig]:
    """Give layers more KV heads by repeating them, which changes no output.

    Args:
        params: of a model, as `init_params` shapes them.
        config: its sizes.
        kv_heads: of every layer, a multiple of what it has.

    Returns:
        (parameters, sizes); what came in where they are the same.
    """
    if kv_heads == config.kv_heads_by_layer:
        return params, config
    wanted = dataclasses.replace(config, kv_heads=kv_heads)
    return _with_kv_heads(params, config, wanted), wanted


def tie_kv_heads(params: Any, config: ModelConfig, kv_heads: tuple[int, ...]) -> Any:
    """Make KV heads equal instead of fewer: what `mean_pool_kv_heads` computes, in the old shapes.

    One compiled program so measures every choice of numbers of heads.

    Args:
        params: of a model, as `init_params` shapes them.
        config: its sizes.
        kv_heads: how many different heads each layer shall have; divides what it has.

    Returns:
        Parameters of the same shapes. All but keys' and values' kernels are those that came in.
    """
    tied = dict(params)
    for index, (first, length, _) in enumerate(layer_stacks(config)):
        stack, counts = params[f"run_{index}"], kv_heads[first : first + length]
        kernels = {name: {"kernel": _tied(stack[name]["kernel"], counts)} for name in ("k", "v")}
        tied[f"run_{index}"] = {**stack, **kernels}
    return tied


def _tied(kernels: Any, kv_heads: tuple[int, ...]) -> Array:
    """Kernels [layers, D, K, H] of which every layer has so many different heads."""
    layers = zip(jnp.asarray(kernels), kv_heads, strict=True)
    return jnp.stack([share_heads(share_heads(x, new), x.shape[1]) for x, new in layers])


def _with_kv_heads(params: Any, config: ModelConfig, wanted: ModelConfig) -> Any:
    """Parameters for sizes that differ in their KV heads alone."""
    layers = [
        _of_layer(layer, heads)
        for layer, heads in zip(_unstack(params, config), wanted.kv_heads_by_layer, strict=True)
    ]
    # Layers that differed may be equal now, so that their stacks become one.
    stacks = {
        f"run_{index}": jax.tree.map(lambda *x: jnp.stack(x), *layers[first : first + length])
        for index, (first, length, _) in enumerate(layer_stacks(wanted))
    }
    others = {name: leaf for name, leaf in params.items() if not name.startswith("run_")}
    return {**others, **stacks}


def _unstack(params: Any, config: ModelConfig) -> list[Any]:
    """The parameters of every layer."""
    return [
        jax.tree.map(operator.itemgetter(i), params[f"run_{index}"])
        for index, (_, length, _) in enumerate(layer_stacks(config))
        for i in range(length)
    ]


def _of_layer(layer: Any, kv_heads: int) -> Any:
    """A layer whose kernels [D, K, H] of keys and values become [D, K', H]."""
    kernels = {
        name: {"kernel": share_heads(jnp.asarray(layer[name]["kernel"]), kv_heads)}
        for name in ("k", "v")
    }
    return {**layer, **kernels}
