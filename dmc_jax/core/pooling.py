"""What a slot holds: the weighted average of its segment, in three forms that give the same.

pool         all tokens at once, in training and evaluation
merge_step   one token, in decoding
pool_chunk   many tokens after others, in prefill
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

# Tokens per block of the banded product that pools them.
_POOL_BLOCK = 16


def pool(
    x: Float[Array, "B S K H"],
    alpha: Float[Array, "B S K"],
    omega: Float[Array, "B S K"],
    window: int | None,
) -> Float[Array, "B S K H"]:
    """Pool the state of the open slot after every token, all tokens at once.

        coef(i, j) = alpha_{j+1} ... alpha_i
        y_i = sum_j coef(i, j) omega_j x_j / sum_j coef(i, j) omega_j      over the last W tokens j

    That is a weighted mean of the last W tokens with weights [B, S, K, W], so a banded matrix
    product at cost O(S W); with an unlimited window O(S log S), by an associative scan of the
    recurrence `s_i = alpha_i s_{i-1} + omega_i x_i`.

    Args:
        x: keys or values before rotation.
        alpha: merge probability or 0/1 decision of each token, 0 at document starts; alpha_0
            counts as 0.
        omega: importance of each token.
        window: W >= 1 tokens; None or 0 is unlimited.

    Returns:
        The pooled states in the dtype of `x`, computed in float32.
    """
    if window == 1:
        return x
    alpha = jnp.where(jnp.arange(x.shape[1])[:, None] == 0, 0.0, alpha)
    if not window:
        weighted = omega[..., None] * x.astype(jnp.float32)
        total, weighted = _running_sum(alpha, omega), _running_sum(alpha[..., None], weighted)
        return (weighted / total[..., None]).astype(x.dtype)
    weights = _pooling_weights(alpha, omega, min(window, x.shape[1]))
    return _banded_product(weights, x.astype(jnp.float32)).astype(x.dtype)


def _pooling_weights(alpha: Array, omega: Array, window: int) -> Float[Array, "B S K W"]:
    """Weight of token i - W + 1 + w in the state of token i; they add up to 1 over w."""
    weights = [coef * _ago(omega, m) for m, coef in enumerate(_coefficients(alpha, window))]
    stacked = jnp.stack(weights[::-1], axis=-1)
    return stacked / stacked.sum(axis=-1, keepdims=True)


def _coefficients(alpha: Array, window: int) -> Iterator[Float[Array, "B S K"]]:
    """coef(i, i - m) of every token i, for m from 0 to W - 1."""
    coef = jnp.ones_like(alpha)
    yield coef
    for m in range(1, window):
        coef = coef * _ago(alpha, m - 1)
        yield coef


def _ago(x: Array, m: int) -> Array:
    """Entry i of the result is entry i - m of `x`, 0 before the first."""
    return jnp.pad(x, [(0, 0), (m, 0), (0, 0)])[:, : x.shape[1]]


def tokens_in(alpha: Float[Array, "B S K"], window: int | None) -> Float[Array, "B S K"]:
    """Count the tokens in the state of the open slot after every token: `sum_j coef(i, j)`.

    Args:
        alpha: as in `pool`, 0 at document starts; between 0 and 1 they count parts of tokens.
        window: as there.
    """
    if not window:
        return _running_sum(alpha, jnp.ones_like(alpha))
    return sum(_coefficients(alpha, min(window, alpha.shape[1])))


def _banded_product(weights: Float[Array, "B S K W"], x: Float[Array, "B S K H"]) -> Array:
    """`y_i = sum_w weights[i, w] x[i - W + 1 + w]`, as small dense products.

    Blocks of b >= W - 1 tokens read themselves and the end of the block before, as matrix
    products: W shifted multiply-adds would pass over all of x W times.
    """
    B, S, K, W = weights.shape
    b = max(_POOL_BLOCK, W - 1)
    pad = [(0, 0), (0, -S % b), (0, 0), (0, 0)]
    weights, x = jnp.pad(weights, pad), jnp.pad(x, pad)
    n = x.shape[1] // b
    x = x.reshape(B, n, b, K, -1)
    before = jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])[:, :-1, b - W + 1 :]
    seen = jnp.concatenate([before, x], axis=2)  # [B, n, W-1+b, K, H]
    # Row t of a block's band holds its W weights from column t on: pad each row to W + b and read
    # the same memory in rows of one less, which moves every row right by one more.
    band = weights.reshape(B, n, b, K, W).transpose(0, 1, 3, 2, 4)
    band = jnp.pad(band, [(0, 0)] * 4 + [(0, b)]).reshape(B, n, K, b * (W + b))
    band = band[..., : b * (W + b - 1)].reshape(B, n, K, b, W + b - 1)
    y = jnp.einsum("BnKts,BnsKH->BntKH", band, seen, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(B, n * b, K, -1)[:, :S]


def _running_sum(decay: Array, x: Array) -> Array:
    """`s_i = decay_i s_{i-1} + x_i` along axis 1."""

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (jnp.broadcast_to(decay, x.shape), x), axis=1)[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OpenSegment:
    """The newest slot of every row while it still grows: its last W tokens and their weights.

    A ring rather than running sums: the average is recomputed from the ring at every step, so
    nothing is ever subtracted and no error accumulates. Tokens are there as they came, in their
    dtype, which is half the memory of float32 products with their weights. Of an unlimited window
    one entry stands for all tokens: their average, in float32, with the sum of their weights.
    """

    keys: Float[Array, "*rows W H"]
    values: Float[Array, "*rows W H"]
    weights: Float[Array, "*rows W"]  # float32
    count: Int[Array, "*rows"]  # tokens in the segment; 0 before the first


def empty_segment(
    rows: tuple[int, ...], head_dim: int, window: int | None, dtype: DTypeLike
) -> OpenSegment:
    """Make an open segment without tokens, which are of a dtype; what comes first is appended."""
    ring, dtype = (*rows, window or 1), dtype if window else jnp.float32
    return OpenSegment(
        keys=jnp.zeros((*ring, head_dim), dtype),
        values=jnp.zeros((*ring, head_dim), dtype),
        weights=jnp.zeros(ring),
        count=jnp.zeros(rows, jnp.int32),
    )


def merge_step(
    open_segment: OpenSegment,
    k_t: Float[Array, "*rows H"],
    v_t: Float[Array, "*rows H"],
    decision: Float[Array, "*rows"],
    omega: Float[Array, "*rows"],
    window: int | None,
) -> tuple[OpenSegment, Float[Array, "*rows H"], Float[Array, "*rows H"]]:
    """Append or merge one token into each row's open segment (the step form of `pool`).

    Args:
        open_segment: state before the token.
        k_t, v_t: the token's unrotated key and value.
        decision: 1 merges, 0 closes the segment and opens a new one. The first token of a row opens
            one whatever it says.
        omega: the token's importance.
        window: W, as given to `empty_segment`.

    Returns:
        (state after it, averaged key, averaged value), float32.
    """
    W = window or 1
    merge = jnp.where(open_segment.count > 0, decision, 0.0)
    kept = open_segment.count * merge.astype(jnp.int32)  # tokens that the new one joins
    newest = jnp.arange(W) == (kept % W)[..., None]  # [*rows, W]: the ring entry it takes
    omega = omega.astype(jnp.float32)
    old = open_segment.weights * merge[..., None]
    weights = jnp.where(newest, omega[..., None], old) if window else old
    total = weights.sum(axis=-1) if window else old[..., 0] + omega

    def updated(ring: Array, token: Array) -> tuple[Array, Array]:
        """The ring with the token, emptied first where it opens a slot; and its average."""
        ring = jnp.where(merge[..., None, None] > 0, ring, jnp.zeros((), ring.dtype))
        if window:
            ring = jnp.where(newest[..., None], token[..., None, :].astype(ring.dtype), ring)
        average = (weights[..., None] * ring.astype(jnp.float32)).sum(axis=-2)
        if window:
            return ring, average / total[..., None]
        average = (average + omega[..., None] * token.astype(jnp.float32)) / total[..., None]
        return average[..., None, :], average

    keys, key = updated(open_segment.keys, k_t)
    values, value = updated(open_segment.values, v_t)
    weights = weights if window else total[..., None]
    return OpenSegment(keys, values, weights, count=kept + 1), key, value


def pool_chunk(
    open_segment: OpenSegment,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    decisions: Float[Array, "B T K"],
    omega: Float[Array, "B T K"],
    counts: Int[Array, " B"],
    window: int | None,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"], Bool[Array, "B T K"], OpenSegment]:
    """Pool the state of the open slot after every token, begun before the chunk or in it.

    It is `pool` over the chunk with what the open segment remembers in front: its last W - 1
    tokens, or for an unlimited window one token that stands for all.

    Args:
        open_segment: rows (B, K), before the chunk.
        k, v: unrotated.
        decisions: 1 merges, 0 appends. The first token of a row without a segment appends whatever
            it says.
        omega: importance of each token.
        counts: tokens of each row that are not padding.
        window: W, as given to `empty_segment`.

    Returns:
        (averaged keys, averaged values, float32; which tokens merge; the open segment after the
        chunk's last real token).
    """
    B, T, K, H = k.shape
    x = jnp.concatenate([k, v], axis=-1).astype(jnp.float32)  # [B, T, K, 2H]
    merges = decisions.at[:, 0].multiply((open_segment.count > 0).astype(decisions.dtype))

    tokens, weight, joins = _remembered(open_segment, window)  # [B, E, K, ...]
    before = jnp.where(weight > 0, weight, 1.0)  # an absent token counts, but nothing joins it
    together = functools.partial(jnp.concatenate, axis=1)
    tokens = together([tokens, x])
    states = pool(tokens, together([joins, merges]), together([before, omega]), window)
    states = states[:, weight.shape[1] :]
    after = _open_after(open_segment, tokens, together([weight, omega]), merges, counts, window)
    return states[..., :H], states[..., H:], merges > 0, after


def _remembered(
    segment: OpenSegment, window: int | None
) -> tuple[Float[Array, "B E K both"], Float[Array, "B E K"], Float[Array, "B E K"]]:
    """An open segment as E tokens: [key | value], weight, and whether it is a merge.

    What the segment does not have has weight 0.
    """
    both = jnp.concatenate([segment.keys, segment.values], axis=-1).astype(jnp.float32)
    weights = segment.weights  # [B, K, W], and both [B, K, W, 2H]
    if window:
        # Token m of the segment is in ring entry m % W; these are its last W - 1.
        token = segment.count[..., None] - (window - 1) + jnp.arange(window - 1)  # [B, K, E]
        entry = token % window
        both = jnp.take_along_axis(both, entry[..., None], axis=2)
        weights = jnp.where(token >= 0, jnp.take_along_axis(weights, entry, axis=2), 0.0)
        both = jnp.where(token[..., None] >= 0, both, 0.0)
        joins = (token >= 1).astype(jnp.float32)
    else:
        joins = jnp.zeros_like(weights)
    return both.swapaxes(1, 2), weights.swapaxes(1, 2), joins.swapaxes(1, 2)


def _open_after(segment, tokens, weights, merges, counts, window) -> OpenSegment:
    """The open segment after the last real token of the chunk.

    Args:
        segment: before the chunk, rows (B, K).
        tokens, weights: [B, E + T, K, ...], the remembered ones and the chunk's.
        merges: 0/1 [B, T, K].
        counts: tokens of the chunk, [B].
        window: W.
    """
    T, H = merges.shape[1], segment.keys.shape[-1]
    E, counts = weights.shape[1] - T, counts[:, None]
    token = jnp.arange(T)[:, None]
    opens = (merges == 0) & (token < counts[..., None])
    newest = jnp.where(opens, token, -1).max(axis=1)  # [B, K]: opened the segment; -1: an older did
    count = jnp.where(newest >= 0, counts - newest, segment.count + counts)
    if window:
        # Ring entry r holds the newest token m of the segment with m % W = r.
        age = (count[..., None] - 1 - jnp.arange(window)) % window  # [B, K, W]
        index = (E + counts[..., None] - 1 - age).swapaxes(1, 2)  # [B, W, K]
        there = (age < count[..., None]).swapaxes(1, 2)
        tokens = jnp.take_along_axis(tokens, index[..., None], axis=1, mode="clip")
        weights = jnp.take_along_axis(weights, index, axis=1, mode="clip")
        tokens, weights = jnp.where(there[..., None], tokens, 0.0), jnp.where(there, weights, 0)
    else:
        index = jnp.arange(-E, T)[:, None]
        inside = (index < counts[..., None]) & ((newest < 0)[:, None] | (index >= newest[:, None]))
        weights = jnp.where(inside, weights, 0.0)
        total = weights.sum(axis=1, keepdims=True)
        tokens = (weights[..., None] * tokens).sum(axis=1, keepdims=True) / total[..., None]
        weights = total
    tokens = tokens.swapaxes(1, 2).astype(segment.keys.dtype)  # [B, K, W, 2H]
    after = OpenSegment(tokens[..., :H], tokens[..., H:], weights.swapaxes(1, 2), count)

    def unless_nothing_came(new, old):
        return jnp.where((counts > 0)[(..., *(None,) * (new.ndim - 2))], new, old)

    return jax.tree.map(unless_nothing_came, after, segment)
