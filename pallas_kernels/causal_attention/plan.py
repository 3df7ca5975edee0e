"""Where documents begin and end: what a kernel need not visit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def document_bounds(
    segment_ids: Int[Array, "B T"] | None, shape: tuple[int, int]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Find the first token of each token's document, and one past the last.

    Args:
        segment_ids: documents, each in one piece; None: all is one.
        shape: (B, T).
    """
    B, T = shape
    if segment_ids is None:
        return jnp.zeros(shape, jnp.int32), jnp.full(shape, T, jnp.int32)
    index = jnp.arange(T, dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # [B, T - 1]
    starts = jnp.pad(jnp.where(changes, index[1:], 0), [(0, 0), (1, 0)])
    ends = jnp.pad(jnp.where(changes, index[1:], T), [(0, 0), (0, 1)], constant_values=T)
    return jax.lax.cummax(starts, axis=1), jax.lax.cummin(ends, axis=1, reverse=True)
