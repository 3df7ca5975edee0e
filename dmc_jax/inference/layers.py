"""A forward pass as a few small programs: one for each kind of layer, run for every such layer.

A program for the whole model takes a minute of CPU time to compile where it has thirty layers; that
of one layer takes a thirtieth. The price is a launch per layer, which many tokens at a time, or a
CPU, do not notice. The results are those of `model.llama.forward`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.losses import Prediction
from dmc_jax.model.llama import Attend, Block, RMSNorm, layer_stacks


def run_layers(
    params: Mapping[str, Any],
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "B T"],
    state: Any,
    *,
    make_attend: Callable[..., Attend],
    inputs: Mapping[str, Any],
    dtype: str,
) -> tuple[Float[Array, "B T D"], Any]:
    """Run tokens through all layers. Not under `jit`.

    Args:
        params: of `init_params` or, faster, `unstack_layers`.
        config: their sizes.
        tokens: ids in [0, V).
        state: threaded through the layers' attention; given up.
        make_attend: makes the attention function, called with `config` and `inputs`. It stands for
            itself in the programs' names: give a function of a module.
        inputs: arrays, the same for every layer.
        dtype: of activations and products.

    Returns:
        (the residual stream after the last layer, the state).
    """
    x = _embed(params["embedding"], tokens, dtype)
    inputs = jax.device_put(inputs)  # once, and not for every layer
    kind = {"config": config, "make_attend": make_attend}
    for stack, (first, length, kv_heads) in enumerate(layer_stacks(config)):
        for i in range(length):
            own = params.get(f"layer_{first + i}")
            weights = params[f"run_{stack}"] if own is None else own
            index = np.int32(i) if own is None else None
            layer = np.int32(first + i)
            x, state = _run_layer(
                weights, index, layer, x, state, inputs, kv_heads=kv_heads, **kind
            )
    return x, state


def logits_of(
    params: Mapping[str, Any], config: ModelConfig, x: Float[Array, "B D"]
) -> Float[Array, "B V"]:
    """Compute logits from the residual stream after the last layer.

    Args:
        params: of the model.
        config: its sizes.
        x: at some tokens.
    """
    matrix = params["embedding" if config.tied_embeddings else "head"]
    return _head(params["final_norm"], matrix, x, config)


@functools.partial(jax.jit, static_argnames="dtype")
def _embed(embedding, tokens, dtype):
    return embedding.astype(dtype)[tokens]


@functools.partial(
    jax.jit, static_argnames=("config", "kv_heads", "make_attend"), donate_argnames=("x", "state")
)
def _run_layer(weights, index, layer, x, state, inputs, *, config, kv_heads, make_attend):
    """Run one layer; `index` is that of its weights in their stack, None where they have none."""
    if index is not None:
        weights = jax.tree.map(lambda leaf: leaf[index], weights)
    block = Block(config, kv_heads, make_attend(config, **inputs), None, index is not None)
    return block.apply({"params": weights}, (x, state), layer)[0]


@functools.partial(jax.jit, static_argnames="config")
def _head(norm, matrix, x, config):
    x = RMSNorm(config.norm_eps).apply({"params": norm}, x[:, None])
    return Prediction(x, matrix, config.tied_embeddings).logits[:, 0]
