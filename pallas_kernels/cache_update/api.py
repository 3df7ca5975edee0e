"""One contract for what a layer does to its cache when every sequence reads a token.

A sequence has a seat in the batch; a row is one KV head of one sequence (of one layer). Its newest
slot is open: a token either joins it or takes the next slot. What the open slot holds is the
weighted average of the last W tokens of its segment; they are kept in a ring. The averaged key is
rotated where the token stands.

Plain JAX can do this too, and XLA makes several kernels of it. That form is the caller's own and is
not repeated here: `choose` says whether to take it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import target
from pallas_kernels.cache_update import settings
from pallas_kernels.implementations import XLA, Implementations

__all__ = ["IMPLEMENTATIONS", "XLA", "State", "cache_update", "choose", "unavailable"]

IMPLEMENTATIONS = Implementations("cache_update", ("reference", "triton"))
unavailable = IMPLEMENTATIONS.unavailable

_STORED = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


class State(NamedTuple):
    """What an update changes. R counts the rows of all layers of a sequence.

    Token m of a row's segment is in ring entry m % W as weight times key, weight times value and
    weight; entries that no token of the segment is in are zero. With an unlimited window the only
    entry is the sum of all tokens.
    """

    k_pages: Float[Array, "P page H"]
    v_pages: Float[Array, "P page H"]
    keys: Float[Array, "seats R W H"]  # float32, as the next two
    values: Float[Array, "seats R W H"]
    weights: Float[Array, "seats R W"]
    count: Int[Array, "seats R"]  # tokens in the segment


def cache_update(
    state: State,
    k_t: Float[Array, "seats K H"],
    v_t: Float[Array, "seats K H"],
    decision: Float[Array, "seats K"],
    omega: Float[Array, "seats K"],
    *,
    first: int | Int[Array, ""],
    active: Bool[Array, " seats"],
    position: Int[Array, " seats"],
    page_ids: Int[Array, "seats K"],
    offsets: Int[Array, "seats K"],
    frequencies: Float[Array, " H//2"],
    window: int | None,
    implementation: str,
) -> State:
    """Append or merge a token into the rows of one layer, and write their open slots to the pages.

    Works eagerly and under jit, with every array traced. Under jit nothing of the state is copied
    that is not used again; nothing but what changes is written.

    Args:
        state: before the token.
        k_t, v_t: the token's key and value, unrotated, float32 or bfloat16.
        decision: 1 merges, 0 appends. A row without a segment appends whatever it says.
        omega: weight of the token, such that those of a segment add up to more than 0.
        first: row of the layer's first KV head; its rows are `first` to `first + K - 1`.
        active: sequences that read a token; the rows of the others stay as they are.
        position: of the token, which its row's key is rotated at.
        page_ids: page of every row's open slot after the token, no two alike at equal offsets; a
            number that is no page of the pool: the row writes to none, though its ring changes.
        offsets: of those slots in their pages.
        frequencies: rotary, float32, radians per token, of the pairs (f, f + H/2); angles are
            float32 too. The last channel speaks of merging: it is zeroed before the rotation, and
            after it.
        window: W; None or 0: unlimited.
        implementation: one of `IMPLEMENTATIONS.names`; it never falls back to another.

    Returns:
        The state after the token. Averages are float32, rounded to the dtype of `k_t` before the
        rotation of keys and after it, to that of the pages last.

    Raises:
        ValueError: an unknown implementation, or shapes or dtypes that break the contract.
        RuntimeError: an implementation that cannot run on this machine, and why.
    """
    module = IMPLEMENTATIONS.load(implementation)
    _validate(state, k_t, v_t, decision, omega, window, page_ids, offsets, frequencies)
    return module.cache_update(
        *(state, k_t, v_t, decision.astype(jnp.float32), omega.astype(jnp.float32)),
        first=jnp.asarray(first, jnp.int32),
        active=active,
        position=position,
        page_ids=page_ids,
        offsets=offsets,
        frequencies=frequencies,
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


def _validate(state, k_t, v_t, decision, omega, window, page_ids, offsets, frequencies) -> None:
    if k_t.ndim != 3 or state.keys.ndim != 4 or state.k_pages.ndim != 3:
        shapes = [tuple(x.shape) for x in (k_t, state.keys, state.k_pages)]
        raise ValueError(
            "k_t must be [seats K H], keys [seats R W H], k_pages [P page H];"
            f" got shapes {', '.join(map(str, shapes))}"
        )
    seats, K, H = k_t.shape
    R, W = state.keys.shape[1:3]
    pool = (*state.k_pages.shape[:2], H)
    expected = {
        "k_pages": (state.k_pages, pool, _STORED),
        "v_pages": (state.v_pages, pool, (state.k_pages.dtype,)),
        "keys": (state.keys, (seats, R, window or 1, H), (jnp.float32,)),
        "values": (state.values, (seats, R, window or 1, H), (jnp.float32,)),
        "weights": (state.weights, (seats, R, window or 1), (jnp.float32,)),
        "count": (state.count, (seats, R), (jnp.int32,)),
        "k_t": (k_t, (seats, K, H), _STORED),
        "v_t": (v_t, (seats, K, H), (k_t.dtype,)),
        "decision": (decision, (seats, K), None),
        "omega": (omega, (seats, K), None),
        "page_ids": (page_ids, (seats, K), (jnp.int32,)),
        "offsets": (offsets, (seats, K), (jnp.int32,)),
        "frequencies": (frequencies, (H // 2,), (jnp.float32,)),
    }
    for name, (array, shape, dtypes) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tuple(array.shape)}")
        if dtypes is not None and array.dtype not in dtypes:
            allowed = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
            raise ValueError(f"{name} must be {allowed}, got {array.dtype}")
    if H % 2:
        raise ValueError(f"H must be even for the rotation, got {H}")
    if K > R:
        raise ValueError(f"a layer of K = {K} rows does not fit into the R = {R} of the state")
