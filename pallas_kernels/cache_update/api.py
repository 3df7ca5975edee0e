"""One contract for what a layer does to its cache when every sequence reads a token.

A sequence has a seat in the batch; a row is one KV head of one sequence (of one layer). Where
tokens are merged, its newest slot is open: a token either joins it or takes the next slot, as the
last channel of its key says. What the open slot holds is the weighted average of the last W tokens
of its segment, with weights from the last channel of the queries; they are kept in a ring. Else
every token takes the next slot. Keys and queries are rotated where the token stands.

Plain JAX can do this too, and XLA makes several kernels of it. That form is the caller's own and is
not repeated here: `choose` says whether to take it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from pallas_kernels import target
from pallas_kernels.cache_update import settings
from pallas_kernels.contract import FLOATS, check_groups, check_pools
from pallas_kernels.implementations import XLA, Implementations

__all__ = ["IMPLEMENTATIONS", "XLA", "Segment", "State", "cache_update", "choose", "unavailable"]

IMPLEMENTATIONS = Implementations("cache_update", ("reference", "triton"))
unavailable = IMPLEMENTATIONS.unavailable


class Segment(NamedTuple):
    """What rows remember of the tokens in their open slots.

    Token m of a row's segment is in ring entry m % W as key, value and weight; entries that no
    token of the segment is in are zero. With an unlimited window the only entry is the average of
    all tokens, in float32, and the sum of their weights.
    """

    keys: Float[Array, "seats R W H"]  # in the dtype of tokens, as the next
    values: Float[Array, "seats R W H"]
    weights: Float[Array, "seats R W"]  # float32
    count: Int[Array, "seats R"]  # tokens in the segment


class State(NamedTuple):
    """What an update changes. R counts the rows of all layers of a sequence."""

    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"]
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"]
    lengths: Int[Array, "seats R"]  # slots in use; ~n of a row of n that had no page for one more
    segment: Segment | None  # None: nothing is merged
    k_scale: Float[Array, "P page"] | None = None  # of int8, see `quantisation`
    v_scale: Float[Array, "P page"] | None = None


def cache_update(
    state: State,
    q: Float[Array, "seats N H"],
    k_t: Float[Array, "seats K H"],
    v_t: Float[Array, "seats K H"],
    *,
    page_table: Int[Array, "seats R maxp"],
    first: int | Int[Array, ""],
    active: Bool[Array, " seats"],
    position: Int[Array, " seats"],
    frequencies: Float[Array, " H//2"],
    channel: float | Float[Array, ""] = 1.0,
    threshold: float | Float[Array, ""] | Float[Array, " seats"] = 0.0,
    offset: float = 0.0,
    eps: float = 0.0,
    window: int | None = None,
    implementation: str,
) -> tuple[Float[Array, "seats N H"], State]:
    """Append or merge a token into the rows of one layer, and write their open slots to the pages.

    A token joins the open slot of a row that has a segment where `k_t[-1] - offset > threshold`. It
    weighs `sigmoid(mean of q[-1] + offset) + eps`, the mean over the queries of the row. Works
    eagerly and under jit, with every array traced. Under jit nothing of the state is copied that is
    not used again; nothing but what changes is written.

    Args:
        state: before the token.
        q, k_t, v_t: the token's queries, key and value, unrotated, float32 or bfloat16.
        page_table: of all rows. A row's slot s is in page `page_table[row, s // page]`; where that
            is negative, or past the table, a row that takes the slot gets the length ~n for its n.
        first: row of the layer's first KV head; its rows are `first` to `first + K - 1`.
        active: sequences that read a token; the rows of the others stay as they are.
        position: of the token, which its row's key and queries are rotated at.
        frequencies: rotary, float32, radians per token, of the pairs (f, f + H/2); angles are
            float32 too.
        channel: factor on the last channel of keys and queries, before the rotation and after it.
        threshold: as above; of all sequences, or one each.
        offset, eps: as above.
        window: W; None or 0: unlimited.
        implementation: one of `IMPLEMENTATIONS.names`; it never falls back to another.

    Returns:
        (the queries, rotated, in their dtype; those of sequences that are not active mean nothing;
        the state after the token). Averages are float32, rounded to the dtype of `k_t` before the
        rotation of keys and after it, to that of the pages last; for int8 quantised anew, whatever
        the slot held.

    Raises:
        ValueError: an unknown implementation, or shapes or dtypes that break the contract.
        RuntimeError: an implementation that cannot run on this machine, and why.
    """
    module = IMPLEMENTATIONS.load(implementation)
    _validate(state, q, k_t, v_t, window, page_table, frequencies)
    seats = k_t.shape[:1]
    if jnp.shape(threshold) not in ((), seats):
        raise ValueError(f"threshold must be a number or {seats}, got {jnp.shape(threshold)}")
    return module.cache_update(
        *(state, q, k_t, v_t),
        page_table=page_table,
        first=jnp.asarray(first, jnp.int32),
        active=active,
        position=position,
        frequencies=frequencies,
        channel=jnp.asarray(channel, jnp.float32),
        threshold=jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), seats),
        offset=offset,
        eps=eps,
        unlimited=not window,
    )


def choose(implementation: str | None) -> str:
    """Name what to update a cache with: `XLA`, or an implementation that can run here.

    Args:
        implementation: `XLA`, one of `IMPLEMENTATIONS.names`, or None: on a GPU the form that is
            kept as the fastest there, where it can run; elsewhere `XLA`, the caller's own.

    Raises:
        ValueError, RuntimeError: as `cache_update`.
    """
    fastest = settings.fastest_form(target.current().kind)
    return IMPLEMENTATIONS.choose(implementation, on_gpu=(fastest,))


def _validate(state, q, k_t, v_t, window, page_table, frequencies) -> None:
    named = {
        "q": (q, "seats N H"),
        "k_t": (k_t, "seats K H"),
        "k_pages": (state.k_pages, "P page H"),
        "page_table": (page_table, "seats R maxp"),
    }
    for name, (array, axes) in named.items():
        if array.ndim != 3:
            raise ValueError(f"{name} must be [{axes}], got shape {tuple(array.shape)}")
    seats, K, H = k_t.shape
    N, R, W = q.shape[1], page_table.shape[1], window or 1
    expected = {
        "q": (q, (seats, N, H), (k_t.dtype,)),
        "k_t": (k_t, (seats, K, H), FLOATS),
        "v_t": (v_t, (seats, K, H), (k_t.dtype,)),
        "k_pages": (state.k_pages, (*state.k_pages.shape[:2], H), (*FLOATS, jnp.int8)),
        "v_pages": (state.v_pages, state.k_pages.shape, (state.k_pages.dtype,)),
        "lengths": (state.lengths, (seats, R), (jnp.int32,)),
        "page_table": (page_table, (seats, R, page_table.shape[2]), (jnp.int32,)),
        "frequencies": (frequencies, (H // 2,), (jnp.float32,)),
    }
    if state.segment is not None:
        tokens = k_t.dtype if window else jnp.float32
        expected |= {
            "keys": (state.segment.keys, (seats, R, W, H), (tokens,)),
            "values": (state.segment.values, (seats, R, W, H), (tokens,)),
            "weights": (state.segment.weights, (seats, R, W), (jnp.float32,)),
            "count": (state.segment.count, (seats, R), (jnp.int32,)),
        }
    for name, (array, shape, dtypes) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tuple(array.shape)}")
        if array.dtype not in dtypes:
            allowed = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise ValueError(f"{name} must be {allowed}, got {array.dtype}")
    check_pools(state.k_pages, state.v_pages, state.k_scale, state.v_scale)
    if H % 2:
        raise ValueError(f"H must be even for the rotation, got {H}")
    if K > R:
        raise ValueError(f"a layer of K = {K} rows does not fit into the R = {R} of the state")
    check_groups({"N": N, "K": K})
