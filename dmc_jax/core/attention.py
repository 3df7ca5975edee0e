"""Causal attention to keys of some age, with a bias that spares the newest: what it is, what runs.

    score(i, j) = scale * q_i . k_j + (bias_j if i - j >= spared else spared_bias_j)
                  for first <= i - j < until in the same document
    out_i       = sum_j softmax_j(score(i, j)) v_j
    lse_i       = log sum_j exp(score(i, j))

`definition` says that and no more; `causal_attention` does it in memory linear in the length.
Without a bias, from age 0 on, it is the ordinary attention of the dense model. A query that sees no
key has the output 0 and lse minus infinity. By lse two sets of keys share one softmax (`join`).
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

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
    *,
    spared_bias: Float[Array, "B T K"] | None = None,
    first: int = 0,
    until: int | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """Attend as the formula has it, with all scores at once: what every implementation must equal.

    Args:
        q: queries, the G of each KV head side by side.
        k, v, key_bias, scale, segment_ids, spared, spared_bias, first, until: as for
            `causal_attention`.

    Returns:
        (the output, lse).
    """
    age = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q, k)
    for bias, due in ((key_bias, age >= spared), (spared_bias, age < spared)):
        if bias is not None:
            scores += jnp.where(due, bias.transpose(0, 2, 1)[:, :, None, None], 0.0)
    visible = (age >= first) & (age < (q.shape[1] if until is None else until))
    visible = visible & (segment_ids[:, :, None] == segment_ids[:, None])
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v), lse.transpose(0, 3, 1, 2)


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
        spared_bias: Array | None = None,
        first: int = 0,
        until: int | None = None,
        with_lse: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Attend as `causal_attention` does."""


class _How(NamedTuple):
    """What is static."""

    scale: float
    block: int
    spared: int
    first: int
    until: int | None


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
    block: int = 256,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend with grouped queries; query head n reads KV head n // (N / K).

    Blocks of queries meet blocks of keys (FlashAttention, Dao et al. 2022, arXiv 2205.14135),
    forward with a running softmax and backward from the log-sum-exp, so no array of size [T, S] per
    head is ever made. Blocks without a key of an age that is seen are not visited.

    Args:
        q, k, v: queries, keys and values of the same T tokens, already rotated.
        key_bias: added to the scores of a key for every query but those of the `spared` first
            tokens from its own on.
        scale: factor on the dot products.
        segment_ids: document of every token; attention stays inside a document.
        spared: tokens for which a key has no bias, or another; static, as the two that follow.
        spared_bias: added to the scores of a key for the others; None: nothing is.
        first: age in tokens from which a key is seen; 0: by its own token's query.
        until: age from which it is seen no more; None: always.
        with_lse: whether to return lse too.
        block: queries and keys per block. Memory grows with T * block.

    Returns:
        The attention output in the dtype of `q`, or (it, lse); softmax and sums are float32.

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
    out, lse = _attend(
        pad(q.reshape(B, T, K, N // K, H)).transpose(0, 2, 3, 1, 4),  # [B, K, G, T, H]
        pad(k).transpose(0, 2, 1, 3),  # [B, K, S, H]
        pad(v).transpose(0, 2, 1, 3),
        pad(key_bias).transpose(0, 2, 1),  # [B, K, S]
        None if spared_bias is None else pad(spared_bias).transpose(0, 2, 1),
        pad(segment_ids),
        _How(scale, block, spared, first, until),
    )
    out = out.transpose(0, 3, 1, 2, 4)[:, :T].reshape(B, T, N, H)
    return (out, lse.transpose(0, 3, 1, 2)[:, :T].reshape(B, T, N)) if with_lse else out


def join(
    one: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
    other: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
) -> Float[Array, "B T N H"]:
    """Attend to two sets of keys in one softmax, from what each gives alone.

    Args:
        one: output and lse of a set of which every query sees a key.
        other: of a set of which it may see none.
    """
    share = jax.nn.sigmoid(other[1] - one[1])[..., None]
    return ((1 - share) * one[0] + share * other[0]).astype(one[0].dtype)


def _pad_tokens(x: Array, amount: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, amount)] + [(0, 0)] * (x.ndim - 2)) if amount else x


def _block(x: Array, index: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _einsum(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _scores(q_i, k_j, biases, segments_i, segments_j, how, own):
    """Scores of one block of queries against one block of keys [B, K, G, block, block].

    `own` is the signed distance (query index - key index): 0 on the diagonal.
    """
    bias_j, spared_bias_j = (x if x is None else x[:, :, None, None, :] for x in biases)
    scores = how.scale * _einsum("BKGTH,BKSH->BKGTS", q_i, k_j)
    scores += jnp.where(own < how.spared, 0.0 if spared_bias_j is None else spared_bias_j, bias_j)
    visible = own >= how.first
    if how.until is not None:
        visible &= own < how.until
    visible = visible & (segments_i[:, :, None] == segments_j[:, None, :])  # [B, T, S]
    return jnp.where(visible[:, None, None], scores, _MASKED)


def _blocks_apart(how: _How, blocks: int) -> tuple[int, int]:
    """How many blocks keys lie before the queries that see them: at least, and at most."""
    if how.until is None:
        return how.first // how.block, blocks
    return how.first // how.block, (how.until + how.block - 2) // how.block


def _distance(i, j, block: int) -> Int[Array, "block block"]:
    steps = jnp.arange(block)
    return (i - j) * block + steps[:, None] - steps[None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, bias, spared_bias, segment_ids, how):
    return _attend_forward(q, k, v, bias, spared_bias, segment_ids, how)[0]


def _attend_forward(q, k, v, bias, spared_bias, segment_ids, how):
    (B, K, G, T, H), block = q.shape, how.block
    nearest, farthest = _blocks_apart(how, T // block)

    def query_block(i):
        q_i, segments_i = _block(q, i, block, 3), _block(segment_ids, i, block, 1)

        def key_block(j, carry):
            largest, total, weighted = carry
            k_j, v_j = _block(k, j, block, 2), _block(v, j, block, 2)
            biases = _biases(bias, spared_bias, j, block)
            segments_j = _block(segment_ids, j, block, 1)
            scores = _scores(q_i, k_j, biases, segments_i, segments_j, how, _distance(i, j, block))
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
        begin = jnp.maximum(0, i - farthest)
        largest, total, weighted = jax.lax.fori_loop(begin, i - nearest + 1, key_block, start)
        sees = largest > _MASKED
        out = jnp.where(sees[..., None], weighted / total[..., None], 0.0).astype(q.dtype)
        return out, jnp.where(sees, largest + jnp.log(total), -jnp.inf)

    out, lse = jax.lax.map(query_block, jnp.arange(T // block))
    out = jnp.moveaxis(out, 0, 3).reshape(q.shape)
    lse = jnp.moveaxis(lse, 0, 3).reshape(B, K, G, T)
    return (out, lse), (q, k, v, bias, spared_bias, segment_ids, out, lse)


def _biases(bias, spared_bias, j, block):
    return [x if x is None else _block(x, j, block, 2) for x in (bias, spared_bias)]


def _attend_backward(how, residuals, gradients):
    """Gradients from the saved output and lse; one pass over keys, queries inside."""
    q, k, v, bias, spared_bias, segment_ids, out, lse = residuals
    d_out, d_lse = gradients
    block, blocks = how.block, q.shape[3] // how.block
    nearest, farthest = _blocks_apart(how, blocks)
    # The derivative of out and of lse with respect to a score is its weight, times what follows.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, K, G, T]
    delta -= d_lse
    lse = jnp.where(lse > -jnp.inf, lse, -_MASKED)  # who sees nothing has weights of 0

    def key_block(dq, j):
        k_j, v_j = _block(k, j, block, 2), _block(v, j, block, 2)
        biases = _biases(bias, spared_bias, j, block)
        segments_j = _block(segment_ids, j, block, 1)

        def query_block(i, carry):
            dq, dk_j, dv_j, dbias_j, dspared_j = carry
            q_i, d_out_i, lse_i, delta_i = (_block(x, i, block, 3) for x in (q, d_out, lse, delta))
            own = _distance(i, j, block)
            segments_i = _block(segment_ids, i, block, 1)
            scores = _scores(q_i, k_j, biases, segments_i, segments_j, how, own)
            weights = jnp.exp(scores - lse_i[..., None])
            dv_j += _einsum("BKGTS,BKGTH->BKSH", weights.astype(d_out.dtype), d_out_i)
            d_weights = _einsum("BKGTH,BKSH->BKGTS", d_out_i, v_j)
            d_scores = weights * (d_weights - delta_i[..., None])
            spared = own < how.spared
            dbias_j += jnp.sum(jnp.where(spared, 0.0, d_scores), axis=(2, 3))
            if dspared_j is not None:
                dspared_j += jnp.sum(jnp.where(spared, d_scores, 0.0), axis=(2, 3))
            d_scores = (how.scale * d_scores).astype(q.dtype)
            dk_j += _einsum("BKGTS,BKGTH->BKSH", d_scores, q_i)
            dq_i = _block(dq, i, block, 3) + _einsum("BKGTS,BKSH->BKGTH", d_scores, k_j)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, 3)
            return dq, dk_j, dv_j, dbias_j, dspared_j

        of_keys = [jnp.zeros(x.shape, jnp.float32) for x in (k_j, v_j)]
        of_biases = [x if x is None else jnp.zeros(x.shape, jnp.float32) for x in biases]
        end = jnp.minimum(blocks, j + farthest + 1)
        start = dq, *of_keys, *of_biases
        dq, *by_key = jax.lax.fori_loop(j + nearest, end, query_block, start)
        return dq, by_key

    dq, by_block = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(blocks))
    by_key = jax.tree.map(
        lambda x, like: jnp.moveaxis(x, 0, 2).reshape(like.shape).astype(like.dtype),
        by_block,
        [k, v, bias, spared_bias],
    )
    return dq.astype(q.dtype), *by_key, None


_attend.defvjp(_attend_forward, _attend_backward)
