"""Causal attention with a per-key bias that spares the newest keys: what it is, and what runs.

    score(i, j) = scale * q_i . k_j + bias_j [i - j >= spared]   for j <= i in the same document
    out_i       = sum_j softmax_j(score(i, j)) v_j

`definition` says that and no more; `causal_attention` does it in memory linear in the length.
Without a bias it is the ordinary attention of the dense model.
"""

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# A finite stand-in for minus infinity: a block may be masked as a whole, and inf - inf is NaN.
_MASKED = -1e30


def definition(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    key_bias: Float[Array, "B T K"],
    scale: float,
    segment_ids: Int[Array, "B T"],
    spared: int = 1,
) -> Float[Array, "B T K G H"]:
    """Attend as the formula has it, with all scores at once: what every implementation must equal.

    Args:
        q: queries, the G of each KV head side by side.
        k, v, key_bias, scale, segment_ids, spared: as for `causal_attention`.
    """
    earlier, due = jnp.tri(q.shape[1]), jnp.tri(q.shape[1], k=-spared)
    scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q, k)
    scores += due * key_bias.transpose(0, 2, 1)[:, :, None, None]
    visible = (earlier > 0) & (segment_ids[:, :, None] == segment_ids[:, None])
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf))
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)


@runtime_checkable
class CausalAttention(Protocol):
    """What attends: `causal_attention`, or a kernel in its place."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        key_bias: Array | None = None,
        *,
        scale: float,
        segment_ids: Array | None = None,
        spared: int = 1,
    ) -> Array:
        """Attend as `causal_attention` does."""


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    spared: int = 1,
    block: int = 256,
) -> Float[Array, "B T N H"]:
    """Attend with grouped queries; query head n reads KV head n // (N / K).

    Blocks of queries meet blocks of keys (FlashAttention, Dao et al. 2022, arXiv 2205.14135),
    forward with a running softmax and backward from the log-sum-exp, so no array of size [T, S] per
    head is ever made.

    Args:
        q, k, v: queries, keys and values of the same T tokens, already rotated.
        key_bias: added to the scores of a key for every query but those of the `spared` first
            tokens that see it, of which its own token is one.
        scale: factor on the dot products.
        segment_ids: document of every token; attention stays inside a document.
        spared: tokens for which a key has no bias, 1 or more; static.
        block: queries and keys per block. Memory grows with T * block.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.

    Raises:
        ValueError: N is not a multiple of K.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} KV heads: {N} % {K} != 0")
    if key_bias is None:
        key_bias = jnp.zeros((B, T, K), jnp.float32)
    if segment_ids is None:
        segment_ids = jnp.zeros((B, T), jnp.int32)
    block = min(block, T)
    # Padded keys come after every real query, so causality hides them.
    pad = functools.partial(_pad_tokens, amount=-T % block)
    out = _attend(
        pad(q.reshape(B, T, K, N // K, H)).transpose(0, 2, 3, 1, 4),  # [B, K, G, T, H]
        pad(k).transpose(0, 2, 1, 3),  # [B, K, S, H]
        pad(v).transpose(0, 2, 1, 3),
        pad(key_bias).transpose(0, 2, 1),  # [B, K, S]
        pad(segment_ids),
        scale,
        block,
        spared,
    )
    return out.transpose(0, 3, 1, 2, 4)[:, :T].reshape(B, T, N, H)


def _pad_tokens(x: Array, amount: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, amount)] + [(0, 0)] * (x.ndim - 2)) if amount else x


def _block(x: Array, index: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _einsum(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _scores(q_i, k_j, bias_j, segments_i, segments_j, scale, own, spared):
    """Scores of one block of queries against one block of keys [B, K, G, block, block].

    `own` is the signed distance (query index - key index): 0 on the diagonal.
    """
    scores = scale * _einsum("BKGTH,BKSH->BKGTS", q_i, k_j)
    scores += jnp.where(own < spared, 0.0, bias_j[:, :, None, None, :])
    visible = (own >= 0) & (segments_i[:, :, None] == segments_j[:, None, :])  # [B, T, S]
    return jnp.where(visible[:, None, None], scores, _MASKED)


def _distance(i, j, block: int) -> Int[Array, "block block"]:
    steps = jnp.arange(block)
    return (i - j) * block + steps[:, None] - steps[None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, bias, segment_ids, scale, block, spared):
    return _attend_forward(q, k, v, bias, segment_ids, scale, block, spared)[0]


def _attend_forward(q, k, v, bias, segment_ids, scale, block, spared):
    B, K, G, T, H = q.shape

    def query_block(i):
        q_i, segments_i = _block(q, i, block, 3), _block(segment_ids, i, block, 1)

        def key_block(j, carry):
            largest, total, weighted = carry
            k_j, v_j, bias_j = (_block(x, j, block, 2) for x in (k, v, bias))
            segments_j = _block(segment_ids, j, block, 1)
            scores = _scores(
                q_i, k_j, bias_j, segments_i, segments_j, scale, _distance(i, j, block), spared
            )
            new_largest = jnp.maximum(largest, scores.max(axis=-1))
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            weighted = weighted * shrink[..., None]
            weighted += _einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v_j)
            return new_largest, total * shrink + weights.sum(axis=-1), weighted

        start = (
            jnp.full((B, K, G, block), _MASKED),
            jnp.zeros((B, K, G, block)),
            jnp.zeros((B, K, G, block, H)),
        )
        largest, total, weighted = jax.lax.fori_loop(0, i + 1, key_block, start)
        return (weighted / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    out, log_total = jax.lax.map(query_block, jnp.arange(T // block))
    out = jnp.moveaxis(out, 0, 3).reshape(q.shape)
    log_total = jnp.moveaxis(log_total, 0, 3).reshape(B, K, G, T)
    return out, (q, k, v, bias, segment_ids, out, log_total)


def _attend_backward(scale, block, spared, residuals, d_out):
    """Gradients from the saved output and log-sum-exp; one pass over keys, queries inside."""
    q, k, v, bias, segment_ids, out, log_total = residuals
    B, K, G, T, H = q.shape
    blocks = T // block
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, K, G, T]

    def key_block(dq, j):
        k_j, v_j, bias_j = (_block(x, j, block, 2) for x in (k, v, bias))
        segments_j = _block(segment_ids, j, block, 1)

        def query_block(i, carry):
            dq, dk_j, dv_j, dbias_j = carry
            q_i, d_out_i, log_total_i, delta_i = (
                _block(x, i, block, 3) for x in (q, d_out, log_total, delta)
            )
            own = _distance(i, j, block)
            segments_i = _block(segment_ids, i, block, 1)
            scores = _scores(q_i, k_j, bias_j, segments_i, segments_j, scale, own, spared)
            weights = jnp.exp(scores - log_total_i[..., None])
            dv_j += _einsum("BKGTS,BKGTH->BKSH", weights.astype(d_out.dtype), d_out_i)
            d_weights = _einsum("BKGTH,BKSH->BKGTS", d_out_i, v_j)
            d_scores = weights * (d_weights - delta_i[..., None])
            dbias_j += jnp.sum(jnp.where(own < spared, 0.0, d_scores), axis=(2, 3))
            d_scores = (scale * d_scores).astype(q.dtype)
            dk_j += _einsum("BKGTS,BKGTH->BKSH", d_scores, q_i)
            dq_i = _block(dq, i, block, 3) + _einsum("BKGTS,BKSH->BKGTH", d_scores, k_j)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, 3)
            return dq, dk_j, dv_j, dbias_j

        start = jnp.zeros((B, K, block, H)), jnp.zeros((B, K, block, H)), jnp.zeros((B, K, block))
        dq, dk_j, dv_j, dbias_j = jax.lax.fori_loop(j, blocks, query_block, (dq, *start))
        return dq, (dk_j, dv_j, dbias_j)

    dq, by_block = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(blocks))
    dk, dv, dbias = (
        jnp.moveaxis(x, 0, 2).reshape(like.shape).astype(like.dtype)
        for x, like in zip(by_block, (k, v, bias), strict=True)
    )
    return dq.astype(q.dtype), dk, dv, dbias, None


_attend.defvjp(_attend_forward, _attend_backward)
