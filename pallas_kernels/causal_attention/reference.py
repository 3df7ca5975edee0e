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
    spared_bias: Float[Array, "B T K"] | None = None,
    first: int = 0,
    until: int | None = None,
    with_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend over all scores at once; see `api.causal_attention` for the contract."""
    T, N = q.shape[1:3]
    share = N // k.shape[2]
    wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    wide_k, wide_v = (jnp.repeat(x, share, axis=2) for x in (wide_k, wide_v))
    scores = scale * jnp.einsum("BTNH,BSNH->BNTS", wide_q, wide_k, precision="highest")
    own = jnp.arange(T)[:, None] - jnp.arange(T)
    for given, due in ((key_bias, own >= spared), (spared_bias, own < spared)):
        if given is not None:
            bias = jnp.repeat(given.astype(jnp.float32), share, axis=2).transpose(0, 2, 1)
            scores += jnp.where(due, bias[:, :, None, :], 0.0)
    visible = ((own >= first) & (own < (T if until is None else until)))[None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    # A query that sees nothing weighs nothing, and -inf - -inf is NaN.
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0.0, lse))
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, wide_v, precision="highest")
    out = out.astype(q.dtype)
    return (out, lse[..., 0].transpose(0, 2, 1)) if with_lse else out
