"""Decode attention as the formula has it: one row after another, every page of its table, float32.

Slow on purpose. It shares nothing with the implementations that it is the measure of.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt16


@jax.jit
def decode_attention(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    scale: float | Float[Array, ""],
    mass: tuple[UInt16[Array, "P page"], Float[Array, "R"]] | None = None,
    scales: tuple[Float[Array, "P page"], Float[Array, "P page"]] | None = None,
) -> Float[Array, "R G H"]:
    """Attend row by row; see `api.decode_attention` for the contract."""
    return _attend(q, k_pages, v_pages, page_table, lengths, scale, mass, scales)[0]


@jax.jit
def decode_attention_and_weights(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    scale: float | Float[Array, ""],
    scales: tuple[Float[Array, "P page"], Float[Array, "P page"]] | None = None,
) -> tuple[Float[Array, "R G H"], Float[Array, "R G S"]]:
    """Attend row by row; see `api.decode_attention_and_weights` for the contract."""
    return _attend(q, k_pages, v_pages, page_table, lengths, scale, None, scales)


def _attend(q, k_pages, v_pages, page_table, lengths, scale, mass, scales):
    _, page, H = k_pages.shape
    if scales is not None:
        k_pages, v_pages = (
            pool.astype(jnp.float32) * of_slots.astype(jnp.float32)[..., None]
            for pool, of_slots in zip((k_pages, v_pages), scales, strict=True)
        )

    def one_row(row):
        q_row, pages, length, gamma = row  # [G, H], [maxp], [], []
        live = jnp.arange(pages.size * page) < length  # [S]
        keys = k_pages[pages].reshape(-1, H).astype(jnp.float32)
        values = v_pages[pages].reshape(-1, H).astype(jnp.float32)
        values = jnp.where(live[:, None], values, 0.0)  # 0 * NaN is NaN: a zero weight is no mask
        scores = scale * jnp.matmul(q_row.astype(jnp.float32), keys.T, precision="highest")
        if mass is not None:
            scores += gamma * jnp.log(mass[0][pages].reshape(-1).astype(jnp.float32))
        scores = jnp.where(live, scores, -jnp.inf)
        weights = jnp.where(live, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
        weights = jnp.where(length > 0, weights / weights.sum(axis=-1, keepdims=True), 0.0)
        out = jnp.matmul(weights, values, precision="highest")
        return out.astype(q_row.dtype), weights

    return jax.lax.map(one_row, (q, page_table, lengths, None if mass is None else mass[1]))
