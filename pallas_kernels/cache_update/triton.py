"""The update in Triton, for NVIDIA GPUs: one launch, one program per row, everything in place.

Memory is what it costs, and most of that is the ring, so of it no more is touched than must be. A
row that appends reads nothing of it, and zeroes the entries that its last segment has used. One
that merges reads the entries that its segment has used, and writes one. (XLA reads and writes all
W entries of all rows.)

    ring[used], token -> new ring entry          [W, H] -> [H], twice: keys and values
    sum of the ring / sum of weights -> average  -> key rotated at the token -> page

Cosines and sines come from XLA, in the very bits that rotate the queries: they are the same for all
heads and layers of a step, and exact ones take a kernel a detour through memory for large angles.
"""

import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import target
from pallas_kernels.cache_update.api import State
from pallas_kernels.cache_update.settings import SETTINGS, Settings
from pallas_kernels.triton_call import launch, unavailable

__all__ = ["cache_update", "unavailable"]

_LEAST_WIDTH = 16


@triton.jit
@no_type_check
def update_rows(
    k_pages_before,  # these six are the last six: see `launch`
    v_pages_before,
    keys_before,
    values_before,
    weights_before,
    count_before,
    k_ptr,  # [seats, K, H]
    v_ptr,
    decision_ptr,  # [seats, K], float32
    omega_ptr,
    page_ptr,  # [seats, K]
    offset_ptr,
    active_ptr,  # [seats], int32
    cos_ptr,  # [seats, H / 2], float32
    sin_ptr,
    first_ptr,  # [1]
    k_pages_ptr,  # [P, PAGE, H]
    v_pages_ptr,
    keys_ptr,  # [seats, R, W, H], float32
    values_ptr,
    weights_ptr,  # [seats, R, W], float32
    count_ptr,  # [seats, R]
    P: tl.constexpr,
    PAGE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    H: tl.constexpr,
    SUMS: tl.constexpr,  # an unlimited window: the ring's one entry is added to
    HALF: tl.constexpr,  # H / 2, padded to a power of two
    ENTRIES: tl.constexpr,  # of the ring at a time, a power of two
):
    """Program i updates row `first + i % K` of sequence `i // K`."""
    of_layer = tl.program_id(0)
    seat = of_layer // K
    # All that needs no other first: a load that stands behind a store waits for it.
    active = tl.load(active_ptr + seat)
    first = tl.load(first_ptr)
    decision = tl.load(decision_ptr + of_layer)
    omega = tl.load(omega_ptr + of_layer)
    page = tl.load(page_ptr + of_layer)
    offset = tl.load(offset_ptr + of_layer)
    if active == 0:
        return
    row = seat.to(tl.int64) * R + first + of_layer % K
    count = tl.load(count_ptr + row)
    kept = tl.where(decision != 0.0, count, 0)  # tokens that it joins
    newest = 0 if SUMS else kept % W  # the ring entry that it takes
    used = tl.minimum(kept, W)
    stale = tl.where(kept == 0, tl.minimum(count, W), 0)

    # Both halves of a head side by side, each padded: channels f and f + H / 2 rotate as a pair.
    column = tl.arange(0, 2 * HALF)
    pair = column % HALF
    h = tl.where(column < HALF, pair, pair + H // 2)
    real = pair < H // 2
    token = of_layer.to(tl.int64) * H
    new_key = omega * tl.load(k_ptr + token + h, mask=real, other=0.0).to(tl.float32)
    new_value = omega * tl.load(v_ptr + token + h, mask=real, other=0.0).to(tl.float32)

    f = tl.arange(0, HALF)
    angles = seat.to(tl.int64) * (H // 2)
    cos = tl.load(cos_ptr + angles + f, mask=f < H // 2, other=0.0)
    sin = tl.load(sin_ptr + angles + f, mask=f < H // 2, other=0.0)

    # Addresses within a row take 32 bits, so half the registers.
    weights_ptr += row * W
    keys_ptr += row * W * H
    values_ptr += row * W * H
    key = tl.full([2 * HALF], 0.0, tl.float32)
    value = tl.full([2 * HALF], 0.0, tl.float32)
    total = 0.0
    for start in tl.range(0, W, ENTRIES, num_stages=1):
        entry = start + tl.arange(0, ENTRIES)
        tile = entry[:, None] * H + h[None, :]
        # Not `&`: in interpreted kernels it is wrong for masks that broadcast, in some versions.
        read = tl.where(entry < used, True if SUMS else entry != newest, False)
        reads = tl.where(read[:, None], real[None, :], False)
        total += tl.sum(tl.load(weights_ptr + entry, mask=read, other=0.0), 0)
        key += tl.sum(tl.load(keys_ptr + tile, mask=reads, other=0.0), 0)
        value += tl.sum(tl.load(values_ptr + tile, mask=reads, other=0.0), 0)
        clear = tl.where(entry < stale, entry != newest, False)
        clears = tl.where(clear[:, None], real[None, :], False)
        zeros = tl.full([ENTRIES, 2 * HALF], 0.0, tl.float32)
        tl.store(weights_ptr + entry, tl.full([ENTRIES], 0.0, tl.float32), mask=clear)
        tl.store(keys_ptr + tile, zeros, mask=clears)
        tl.store(values_ptr + tile, zeros, mask=clears)
    total += omega
    key += new_key
    value += new_value
    # Every warp must have read what one of them writes now.
    tl.debug_barrier()
    tl.store(count_ptr + row, kept + 1)
    tl.store(weights_ptr + newest, total if SUMS else omega)
    tl.store(keys_ptr + newest * H + h, key if SUMS else new_key, mask=real)
    tl.store(values_ptr + newest * H + h, value if SUMS else new_value, mask=real)

    has_page = tl.where(page >= 0, page < P, False)
    to = page.to(tl.int64) * (PAGE * H) + offset * H
    total = tl.full([2 * HALF], 0.0, tl.float32) + total
    tl.store(
        v_pages_ptr + to + h,
        tl.div_rn(value, total).to(v_pages_ptr.dtype.element_ty),
        mask=tl.where(real, has_page, False),
    )
    # Rounded as the token is, and the channel that speaks of merging takes no part in attention.
    key = tl.div_rn(key, total).to(k_ptr.dtype.element_ty).to(tl.float32)
    key = tl.where(h == H - 1, 0.0, key)
    left, right = tl.split(tl.trans(tl.reshape(key, [2, HALF])))
    turned_left = (left * cos - right * sin).to(k_ptr.dtype.element_ty)
    turned_right = right * cos + left * sin
    turned_right = tl.where(f == H // 2 - 1, 0.0, turned_right).to(k_ptr.dtype.element_ty)
    writes = tl.where(f < H // 2, has_page, False)
    to_left = k_pages_ptr + to + f
    tl.store(to_left, turned_left.to(k_pages_ptr.dtype.element_ty), mask=writes)
    tl.store(to_left + H // 2, turned_right.to(k_pages_ptr.dtype.element_ty), mask=writes)


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
    settings: Settings | None = None,
) -> State:
    """Update all rows at once; see `api.cache_update` for the contract.

    Args:
        settings: to try others than the usual ones.
    """
    return _update(
        *(state, k_t, v_t, decision, omega, first, active, position, page_ids, offsets),
        frequencies,
        unlimited=unlimited,
        settings=settings or SETTINGS,
        capability=target.current().capability,
        launch=launch,
    )


@functools.partial(jax.jit, static_argnames=("unlimited", "settings", "capability", "launch"))
def _update(
    state,
    k_t,
    v_t,
    decision,
    omega,
    first,
    active,
    position,
    page_ids,
    offsets,
    frequencies,
    *,
    unlimited,
    settings,
    capability,
    launch,
):
    angles = position[:, None].astype(jnp.float32) * frequencies  # [seats, H/2]
    constants = update_constants(state, k_t, unlimited, settings)
    after = launch(
        update_rows,
        *(*state, k_t, v_t, decision, omega, page_ids, offsets, active.astype(jnp.int32)),
        *(jnp.cos(angles), jnp.sin(angles), first.reshape(1)),
        out=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state),
        in_place={i: i for i in range(len(state))},
        grid=(k_t.shape[0] * k_t.shape[1],),
        num_warps=warps_for(constants, settings),
        num_stages=1,
        capability=capability,
        **constants,
    )
    return State(*after)


def update_constants(state: State, k_t: Any, unlimited: bool, settings: Settings) -> dict[str, Any]:
    """The compile-time arguments of `update_rows` for arrays of these shapes."""
    P, page, H = state.k_pages.shape
    R, W = state.keys.shape[1:3]
    return {
        "P": P,
        "PAGE": page,
        "R": R,
        "K": k_t.shape[1],
        "W": W,
        "H": H,
        "SUMS": unlimited,
        "HALF": max(triton.next_power_of_2(H), _LEAST_WIDTH) // 2,
        "ENTRIES": min(triton.next_power_of_2(W), settings.entries),
    }


def warps_for(constants: dict[str, Any], settings: Settings) -> int:
    """Warps a program, for the size of its tile."""
    return max(constants["ENTRIES"] * 2 * constants["HALF"] // settings.tile_per_warp, 1)
