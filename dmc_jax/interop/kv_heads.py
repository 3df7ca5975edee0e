"""Grouped-query attention of a checkpoint of any format, tensor by tensor."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dmc_jax.errors import UserError
from dmc_jax.interop.parameters import Place, places
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.model.kv_heads import fewer_kv_heads, share_heads
from dmc_jax.policies.dense import Dense


def with_kv_heads(source: Source, kv_heads: int | tuple[int, ...]) -> Source:
    """Average a model's KV heads into fewer; what to train on afterwards.

    Args:
        source: a dense model.
        kv_heads: wanted number, for all layers or for each.

    Returns:
        The same with fewer; gates of the old heads stay behind.

    Raises:
        UserError: a model that merges, or as in `fewer_kv_heads`.
    """
    if not isinstance(source.policy, Dense):
        raise UserError(
            f"{source.path} merges, and an average of its heads would decide by nothing: average "
            "those of the model from before its retrofit, and retrofit what comes out"
        )
    config = fewer_kv_heads(source.config, kv_heads)
    table = places(config)
    tensors = {name: _averaged(tensor, table[name]) for name, tensor in source.tensors.items()}
    notes = source.notes
    if source.gates is not None:
        notes += ("its gates are for the KV heads that it had, and stay behind",)
    return dataclasses.replace(source, config=config, tensors=tensors, gates=None, notes=notes)


def _averaged(tensor: Tensor, place: Place) -> Tensor:
    if tensor.shape == place.foreign_shape:  # no key or value, or as many heads as before
        return tensor
    D, K, H = place.shape

    def read() -> np.ndarray:
        heads = jnp.asarray(tensor.read().reshape(-1, H, D))
        return np.asarray(share_heads(heads, K, axis=0)).reshape(place.foreign_shape)

    return dataclasses.replace(tensor, shape=place.foreign_shape, read=read)
