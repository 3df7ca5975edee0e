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
    threshold: Float[Array, " seats"],
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
    state,
    q,
    k_t,
    v_t,
    table,
    first,
    active,
    position,
    freq,
    channel,
    threshold,
    offset,
    eps,
    unlimited,
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
            above = key[-1].astype(np.float32) - np.float32(offset) > threshold[seat]
            joins = above and state.segment.count[row] > 0
            key, value = _joined(state.segment, row, (weight, key, value), joins, unlimited)
        slot = length - joins
        entry = slot // page
        if entry >= table.shape[2] or table[row][entry] < 0:
            state.lengths[row] = ~length
            continue
        state.lengths[row] = slot + 1
        to = table[row][entry], slot % page
        key = _rotated(key.astype(k_t.dtype), *turn)
        _put(state.k_pages, state.k_scale, to, key)
        _put(state.v_pages, state.v_scale, to, value)
    return rotated, state


def _put(pages, scales, to, x):
    """Write a key or a value to a slot."""
    if scales is not None:
        scales[to] = np.abs(x.astype(np.float64)).max() / 127
        x = np.rint(x.astype(np.float64) / max(np.float64(scales[to]), 2.0**-126)).clip(-127, 127)
    pages[to] = x.astype(pages.dtype)


def _joined(segment, row, new, joins, unlimited):
    """Put a token into the row's segment; the key and value of its slot then."""
    tokens = [*(_tokens(segment, row, unlimited) if joins else []), new]
    total = sum(weight for weight, _, _ in tokens)
    average = [sum(x[0] * x[i].astype(np.float64) for x in tokens) / total for i in (1, 2)]
    entry = (total, *average) if unlimited else new
    _keep(segment, row, entry, int(segment.count[row]) + 1 if joins else 1)
    return average


def _tokens(segment, row, unlimited):
    """Tokens of the row's segment that an average with the next one counts: (weight, key, value).

    With an unlimited window one stands for all.
    """
    W, count = segment.weights.shape[-1], int(segment.count[row])
    newest = range(count - 1, max(count - W, -1), -1) if not unlimited else range(min(count, 1))
    rings = [segment.weights[row].astype(np.float64), segment.keys[row], segment.values[row]]
    return [tuple(ring[m % W].copy() for ring in rings) for m in newest]


def _keep(segment, row, new, count):
    """Put the token into the ring, which a segment's first empties."""
    for ring, of_token in zip((segment.weights, segment.keys, segment.values), new, strict=True):
        if count == 1:
            ring[row] = 0
        ring[row][(count - 1) % ring.shape[2]] = of_token
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
