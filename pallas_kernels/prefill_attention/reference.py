"""Attention of a chunk over pages as the formula has it: row by row, all scores at once, float32.

Slow on purpose. It shares nothing with the kernel that it is the measure of.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8


@functools.partial(jax.jit, static_argnames="scale")
def prefill_attention(
    q: Float[Array, "B T N H"],
    own_k: Float[Array, "B T K H"],
    own_v: Float[Array, "B T K H"],
    slot: Int[Array, "B K T"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "seats R maxp"],
    lengths: Int[Array, "seats R"],
    seats: Int[Array, " B"],
    *,
    first: Int[Array, ""],
    scale: float,
    scales: tuple[Float[Array, "P page"], Float[Array, "P page"]] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend row by row; see `api.prefill_attention` for the contract."""
    B, T, N, H = q.shape
    K = own_k.shape[2]
    if scales is not None:
        k_pages, v_pages = (
            pool.astype(jnp.float32) * of_slots.astype(jnp.float32)[..., None]
            for pool, of_slots in zip((k_pages, v_pages), scales, strict=True)
        )  # as which each token's own are rounded already

    def wide(x):
        return x.astype(jnp.float32)

    def one_row(index):
        b, head = index // K, index % K
        at = seats[b], first + head
        keys, values = (wide(pool[page_table[at]]).reshape(-1, H) for pool in (k_pages, v_pages))
        S = keys.shape[0]
        keys, values = (  # then each token's own, which is column S + t
            jnp.concatenate([slots, wide(own[b, :, head].astype(k_pages.dtype))])
            for slots, own in ((keys, own_k), (values, own_v))
        )
        before = jnp.arange(S) < jnp.minimum(slot[b, head], lengths[at])[:, None]  # [T, S]
        seen = jnp.concatenate([before, jnp.eye(T, dtype=bool)], axis=1)
        # 0 * NaN is NaN: a zero weight is no mask.
        values = jnp.where(seen.any(axis=0)[:, None], values, 0.0)
        queries = wide(q[b]).reshape(T, K, N // K, H)[:, head]
        scores = scale * jnp.einsum("TGH,SH->GTS", queries, keys, precision="highest")
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("GTS,SH->TGH", weights, values, precision="highest")

    out = jax.lax.map(one_row, jnp.arange(B * K))  # [B K, T, G, H]
    return out.reshape(B, K, T, -1, H).swapaxes(1, 2).reshape(q.shape).astype(q.dtype)
