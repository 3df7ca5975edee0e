"""Causal attention with a key bias from its definition: all scores at once, in float32.

It shares nothing with the kernels that it is the measure of.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    spared: int = 1,
) -> Float[Array, "B T N H"]:
    """Attend over all scores at once; see `api.causal_attention` for the contract."""
    T, N = q.shape[1:3]
    share = N // k.shape[2]
    wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    wide_k, wide_v = (jnp.repeat(x, share, axis=2) for x in (wide_k, wide_v))
    scores = scale * jnp.einsum("BTNH,BSNH->BNTS", wide_q, wide_k, precision="highest")
    own = jnp.arange(T)[:, None] - jnp.arange(T)
    if key_bias is not None:
        bias = jnp.repeat(key_bias.astype(jnp.float32), share, axis=2).transpose(0, 2, 1)
        scores += jnp.where(own < spared, 0.0, bias[:, :, None, :])
    visible = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, wide_v, precision="highest")
    return out.astype(q.dtype)
