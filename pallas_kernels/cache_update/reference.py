"""The update as the formulas have it: one row after another, one token of the ring after another.

Slow on purpose, on the host, in float64. It shares nothing with what it is the measure of.
"""

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cache_update.api import State


def cache_update(
    state: State,
    q: Float[Array, "seats N H"],
    k_t: Float[Array, "seats K H"],
    v_t: Float[Array, "seats K H"],
    *,
    page_table: Int[Array, "seats R maxp"],
    first: Int[Array, ""],
    active: Bool[Array, " seats"],
    position: Int[Array, " seats"],
    frequencies: Float[Array, " H//2"],
    channel: Float[Array, ""],
    threshold: Float[Array, ""],
    offset: float,
    eps: float,
    unlimited: bool,
) -> tuple[Float[Array, "seats N H"], State]:
    """Update row by row; see `api.cache_update` for the contract."""
    arrays = (q, k_t, v_t, page_table, first, active, position, frequencies, channel, threshold)

    def update(state, *arrays):
        state = jax.tree.map(lambda x: np.array(x), state)
        return _update(state, *map(np.asarray, arrays), offset, eps, unlimited)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, state))
    return jax.pure_callback(update, shapes, state, *arrays)


def _update(
    state, q, k_t, v_t, table, first, active, position, freq, channel, threshold, offset, eps, sums
):
    page, K = state.k_pages.shape[1], k_t.shape[1]
    rotated = np.zeros_like(q)
    for seat, head in np.ndindex(k_t.shape[:2]):
        if not active[seat]:
            continue
        row = seat, int(first) + head
        # The angle is float32 by contract: at position 5,000 that is 3e-4 radians coarse.
        turn = np.float32(position[seat]) * freq, float(channel)
        queries = slice(head * q.shape[1] // K, (head + 1) * q.shape[1] // K)
        rotated[seat, queries] = [_rotated(x, *turn) for x in q[seat, queries]]
        length, key, value = int(state.lengths[row]), k_t[seat, head], v_t[seat, head]
        joins = False
        if state.segment is not None:
            logit = q[seat, queries, -1].astype(np.float32).mean() + np.float32(offset)
            weight = 1 / (1 + np.exp(-np.float64(logit))) + eps
            above = key[-1].astype(np.float32) - np.float32(offset) > threshold
            joins = above and state.segment.count[row] > 0
            key, value = _joined(state.segment, row, (weight, key, value), joins, sums)
        slot = length - joins
        entry = slot // page
        if entry >= table.shape[2] or table[row][entry] < 0:
            state.lengths[row] = ~length
            continue
        state.lengths[row] = slot + 1
        to = table[row][entry], slot % page
        state.k_pages[to] = _rotated(key.astype(k_t.dtype), *turn).astype(state.k_pages.dtype)
        state.v_pages[to] = value.astype(state.v_pages.dtype)
    return rotated, state


def _joined(segment, row, new, joins, sums):
    """Put a token into the row's segment; the key and value of its slot then."""
    tokens = _tokens(segment, row, sums) if joins else []
    _keep(segment, row, new, int(segment.count[row]) + 1 if joins else 1, sums)
    tokens.append(new)
    total = sum(weight for weight, _, _ in tokens)
    return (sum(token[0] * token[i].astype(np.float64) for token in tokens) / total for i in (1, 2))


def _tokens(segment, row, sums):
    """Tokens of the row's segment that an average with the next one counts: (weight, key, value).

    Of unlimited sums the one is as if of a single token.
    """
    W, count = segment.weights.shape[-1], int(segment.count[row])
    newest = range(count - 1, max(count - W, -1), -1) if not sums else range(min(count, 1))
    tokens = []
    for entry in (m % W for m in newest):
        weight = float(segment.weights[row][entry])
        tokens.append((weight, *(x[row][entry] / weight for x in (segment.keys, segment.values))))
    return tokens


def _keep(segment, row, new, count, sums):
    """Put the token into the ring, or add it to the sums; a segment's first empties it."""
    weight, key, value = new
    entry = 0 if sums else (count - 1) % segment.weights.shape[-1]
    entries = (segment.weights, weight), (segment.keys, weight * key.astype(np.float64))
    for ring, of_token in (*entries, (segment.values, weight * value.astype(np.float64))):
        if count == 1:
            ring[row] = 0
        ring[row][entry] = ring[row][entry] + of_token if sums else of_token
    segment.count[row] = count


def _rotated(x, angles, channel):
    """Turn a head of a dtype by angles, its last channel scaled before and after; in that dtype."""
    turned = x.astype(np.float64)
    turned[-1] *= channel
    pairs = turned[: x.size // 2] + 1j * turned[x.size // 2 :]
    pairs = pairs * np.exp(1j * angles.astype(np.float64))
    turned = np.concatenate([pairs.real, pairs.imag])
    turned[-1] *= channel
    return turned.astype(x.dtype)
