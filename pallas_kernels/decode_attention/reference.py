"""Decode attention as the formula has it: one row after another, every page of its table, float32.

Slow on purpose. It shares nothing with the implementations that it is the measure of.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.jit
def decode_attention(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"],
    v_pages: Float[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    scale: float | Float[Array, ""],
) -> Float[Array, "R G H"]:
    """Attends row by row; see `api.decode_attention` for the contract."""
    _, page, H = k_pages.shape

    def one_row(row):
        q_row, pages, length = row  # [G, H], [maxp], []
        live = jnp.arange(pages.size * page) < length  # [S]
        keys = k_pages[pages].reshape(-1, H).astype(jnp.float32)
        values = v_pages[pages].reshape(-1, H).astype(jnp.float32)
        values = jnp.where(live[:, None], values, 0.0)  # 0 * NaN is NaN: a zero weight is no mask
        scores = scale * jnp.matmul(q_row.astype(jnp.float32), keys.T, precision="highest")
        scores = jnp.where(live, scores, -jnp.inf)
        weights = jnp.where(live, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
        out = jnp.matmul(weights, values, precision="highest") / weights.sum(axis=-1, keepdims=True)
        return jnp.where(length > 0, out, 0.0).astype(q_row.dtype)

    return jax.lax.map(one_row, (q, page_table, lengths))
