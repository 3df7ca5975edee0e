"""The update as the formulas have it: one row after another, one token of the ring after another.

Slow on purpose, on the host, in float64. It shares nothing with what it is the measure of.
"""

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cache_update.api import State


def cache_update(
    state: State,
    k_t: Float[Array, "seats K H"],
    v_t: Float[Array, "seats K H"],
    decision: Float[Array, "seats K"],
    omega: Float[Array, "seats K"],
    *,
    first: Int[Array, ""],
    active: Bool[Array, " seats"],
    position: Int[Array, " seats"],
    page_ids: Int[Array, "seats K"],
    offsets: Int[Array, "seats K"],
    frequencies: Float[Array, " H//2"],
    unlimited: bool,
) -> State:
    """Update row by row; see `api.cache_update` for the contract."""
    arrays = (k_t, v_t, decision, omega, first, active, position, page_ids, offsets, frequencies)

    def update(state, *arrays):
        return _update(State(*(np.array(x) for x in state)), *map(np.asarray, arrays), unlimited)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return jax.pure_callback(update, shapes, state, *arrays)


def _update(state, k_t, v_t, decision, omega, first, active, position, pages, offsets, freq, sums):
    P = state.k_pages.shape[0]
    for seat, head in np.ndindex(decision.shape):
        if not active[seat]:
            continue
        row = seat, int(first) + head
        tokens = _tokens(state, row, sums) if decision[seat, head] else []
        new = (float(omega[seat, head]), k_t[seat, head], v_t[seat, head])
        count = int(state.count[row]) + 1 if decision[seat, head] else 1
        _keep(state, row, new, count, sums)
        tokens.append(new)
        total = sum(weight for weight, _, _ in tokens)
        key, value = (
            sum(token[0] * token[i].astype(np.float64) for token in tokens) / total for i in (1, 2)
        )
        page, offset = pages[seat, head], offsets[seat, head]
        if 0 <= page < P:
            # The angle is float32 by contract: at position 5,000 that is 3e-4 radians coarse.
            key = _rotated(key.astype(k_t.dtype), np.float32(position[seat]) * freq)
            state.k_pages[page, offset] = key.astype(k_t.dtype).astype(state.k_pages.dtype)
            state.v_pages[page, offset] = value.astype(state.v_pages.dtype)
    return state


def _tokens(state, row, sums):
    """Tokens of the row's segment that an average with the next one counts: (weight, key, value).

    Of unlimited sums the one is as if of a single token.
    """
    W, count = state.weights.shape[-1], int(state.count[row])
    newest = range(count - 1, max(count - W, -1), -1) if not sums else range(min(count, 1))
    tokens = []
    for entry in (m % W for m in newest):
        weight = float(state.weights[row][entry])
        tokens.append((weight, *(x[row][entry] / weight for x in (state.keys, state.values))))
    return tokens


def _keep(state, row, new, count, sums):
    """Put the token into the ring, or add it to the sums; a segment's first empties it."""
    weight, key, value = new
    entry = 0 if sums else (count - 1) % state.weights.shape[-1]
    entries = (state.weights, weight), (state.keys, weight * key.astype(np.float64))
    for ring, of_token in (*entries, (state.values, weight * value.astype(np.float64))):
        if count == 1:
            ring[row] = 0
        ring[row][entry] = ring[row][entry] + of_token if sums else of_token
    state.count[row] = count


def _rotated(key, angles):
    x = key.astype(np.float64)
    x[-1] = 0
    pairs = x[: x.size // 2] + 1j * x[x.size // 2 :]
    pairs = pairs * np.exp(1j * angles.astype(np.float64))
    x = np.concatenate([pairs.real, pairs.imag])
    x[-1] = 0
    return x
