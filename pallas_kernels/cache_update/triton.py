"""The update in Triton, for NVIDIA GPUs: one launch, one program per row, everything in place.

Memory is what it costs, and most of that is the ring, so of it no more is touched than must be. A
row that appends reads nothing of it, and zeroes the entries that its last segment has used. One
that merges reads the entries that its segment has used, and writes one. (XLA reads and writes all
W entries of all rows.)

    last channels of q and k -> joins? weight?   -> slot, its page
    weights * ring[used], token -> average       [W, H] -> [H], twice: keys and values
    average -> key rotated at the token          -> page
    queries -> rotated at the token

Where nothing is merged there is no ring, and the token itself goes to the page.

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
from pallas_kernels.cache_update.api import Segment, State
from pallas_kernels.cache_update.settings import SETTINGS, Settings
from pallas_kernels.triton_call import launch, unavailable

__all__ = ["cache_update", "unavailable"]

_LEAST_WIDTH = 16


@triton.jit
@no_type_check
def update_rows(
    k_pages_before,  # these nine are the last nine: see `launch`
    v_pages_before,
    lengths_before,
    keys_before,
    values_before,
    weights_before,
    count_before,
    k_scale_before,
    v_scale_before,
    token_ptr,  # [seats, K * G + 2 * K, H]: queries, keys, values
    table_ptr,  # [seats, R, maxp]
    active_ptr,  # [seats], int32
    cos_ptr,  # [seats, H / 2], float32
    sin_ptr,
    at_ptr,  # [2]: the layer's first row, maxp
    threshold_ptr,  # [seats], float32
    channel_ptr,  # [1]: the factor on the last channel, float32
    rotated_ptr,  # [seats, K * G, H]
    k_pages_ptr,  # [P, PAGE, H]
    v_pages_ptr,
    lengths_ptr,  # [seats, R]
    keys_ptr,  # [seats, R, W, H]; these four are of any shape where nothing is merged
    values_ptr,
    weights_ptr,  # [seats, R, W], float32
    count_ptr,  # [seats, R]
    k_scale_ptr,  # [P, PAGE]; these two are of any shape where pages are not int8
    v_scale_ptr,
    OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    PAGE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    H: tl.constexpr,
    MERGES: tl.constexpr,
    UNLIMITED: tl.constexpr,  # window: the ring's one entry is the average of all tokens
    SCALED: tl.constexpr,  # pages are int8
    HALF: tl.constexpr,  # H / 2, padded to a power of two
    ENTRIES: tl.constexpr,  # of the ring at a time, a power of two
):
    """Program i updates row `first + i % K` of sequence `i // K`."""
    of_layer = tl.program_id(0)
    seat = of_layer // K
    # All that needs no other first: a load that stands behind a store waits for it.
    active = tl.load(active_ptr + seat)
    first = tl.load(at_ptr)
    maxp = tl.load(at_ptr + 1)
    threshold = tl.load(threshold_ptr + seat)
    channel = tl.load(channel_ptr)
    if active == 0:
        return
    head = of_layer % K
    row = seat.to(tl.int64) * R + first + head
    length = tl.load(lengths_ptr + row)
    token_ptr += seat.to(tl.int64) * ((G + 2) * K * H)
    q_ptr = token_ptr + head * (G * H)
    k_ptr = token_ptr + (G * K + head) * H
    v_ptr = k_ptr + K * H
    rotated_ptr += of_layer.to(tl.int64) * (G * H)

    # Both halves of a head side by side, each padded: channels f and f + H / 2 rotate as a pair.
    column = tl.arange(0, 2 * HALF)
    pair = column % HALF
    h = tl.where(column < HALF, pair, pair + H // 2)
    real = pair < H // 2
    scaled = tl.where(h == H - 1, channel, 1.0)
    key = tl.load(k_ptr + h, mask=real, other=0.0).to(tl.float32)
    value = tl.load(v_ptr + h, mask=real, other=0.0).to(tl.float32)

    f = tl.arange(0, HALF)
    angles = seat.to(tl.int64) * (H // 2)
    cos = tl.load(cos_ptr + angles + f, mask=f < H // 2, other=0.0)
    sin = tl.load(sin_ptr + angles + f, mask=f < H // 2, other=0.0)

    joins = 0
    if MERGES:
        count = tl.load(count_ptr + row)
        merge = tl.load(k_ptr + H - 1).to(tl.float32) - OFFSET > threshold
        logit = 0.0
        for g in tl.static_range(G):
            logit += tl.load(q_ptr + g * H + H - 1).to(tl.float32)
        omega = 1.0 / (1.0 + tl.exp(-(logit / G + OFFSET))) + EPS
        kept = tl.where(merge, count, 0)  # tokens that it joins
        joins = (kept > 0).to(tl.int32)
        newest = 0 if UNLIMITED else kept % W  # the ring entry that it takes
        used = tl.minimum(kept, W)
        stale = tl.where(kept == 0, tl.minimum(count, W), 0)
    slot = length - joins
    entry = slot // PAGE
    page = tl.load(table_ptr + row * maxp + entry, mask=entry < maxp, other=-1)

    for g in tl.static_range(G):
        x = tl.load(q_ptr + g * H + h, mask=real, other=0.0).to(tl.float32) * scaled
        left, right = tl.split(tl.trans(tl.reshape(x, [2, HALF])))
        turned_left = (left * cos - right * sin).to(rotated_ptr.dtype.element_ty)
        turned_right = (right * cos + left * sin).to(rotated_ptr.dtype.element_ty)
        turned_right = turned_right * tl.where(f == H // 2 - 1, channel, 1.0)
        to = rotated_ptr + g * H + f
        tl.store(to, turned_left, mask=f < H // 2)
        tl.store(to + H // 2, turned_right.to(turned_left.dtype), mask=f < H // 2)

    if MERGES:
        new_key = key
        new_value = value
        # Addresses within a row take 32 bits, so half the registers.
        weights_ptr += row * W
        keys_ptr += row * W * H
        values_ptr += row * W * H
        key = tl.full([2 * HALF], 0.0, tl.float32)
        value = tl.full([2 * HALF], 0.0, tl.float32)
        total = 0.0
        for start in tl.range(0, W, ENTRIES, num_stages=1):
            at = start + tl.arange(0, ENTRIES)
            tile = at[:, None] * H + h[None, :]
            # Not `&`: interpreted, it is wrong for masks that broadcast, in some versions.
            read = tl.where(at < used, True if UNLIMITED else at != newest, False)
            reads = tl.where(read[:, None], real[None, :], False)
            weights = tl.load(weights_ptr + at, mask=read, other=0.0)
            keys = tl.load(keys_ptr + tile, mask=reads, other=0.0).to(tl.float32)
            values = tl.load(values_ptr + tile, mask=reads, other=0.0).to(tl.float32)
            total += tl.sum(weights, 0)
            key += tl.sum(weights[:, None] * keys, 0)
            value += tl.sum(weights[:, None] * values, 0)
            clear = tl.where(at < stale, at != newest, False)
            clears = tl.where(clear[:, None], real[None, :], False)
            zeros = tl.full([ENTRIES, 2 * HALF], 0.0, keys_ptr.dtype.element_ty)
            tl.store(weights_ptr + at, tl.full([ENTRIES], 0.0, tl.float32), mask=clear)
            tl.store(keys_ptr + tile, zeros, mask=clears)
            tl.store(values_ptr + tile, zeros, mask=clears)
        total += omega
        totals = tl.full([2 * HALF], 0.0, tl.float32) + total
        key = tl.div_rn(key + omega * new_key, totals)
        value = tl.div_rn(value + omega * new_value, totals)
        if UNLIMITED:
            new_key = key
            new_value = value
        # Every warp must have read what one of them writes now.
        tl.debug_barrier()
        tl.store(count_ptr + row, kept + 1)
        tl.store(weights_ptr + newest, total if UNLIMITED else omega)
        new_key = new_key.to(keys_ptr.dtype.element_ty)
        new_value = new_value.to(keys_ptr.dtype.element_ty)
        tl.store(keys_ptr + newest * H + h, new_key, mask=real)
        tl.store(values_ptr + newest * H + h, new_value, mask=real)
        # Rounded as the token is.
        key = key.to(k_ptr.dtype.element_ty).to(tl.float32)
    else:
        tl.debug_barrier()  # every warp must have read the length
    tl.store(lengths_ptr + row, tl.where(page >= 0, slot + 1, -1 - length))

    to = page.to(tl.int64) * (PAGE * H) + (slot % PAGE) * H
    if SCALED:
        of_slot = page.to(tl.int64) * PAGE + slot % PAGE
        scale = (tl.max(tl.abs(value), 0) / 127).to(v_scale_ptr.dtype.element_ty)
        tl.store(v_scale_ptr + of_slot, scale, mask=page >= 0)
        scale = scale.to(tl.float32)
        # A half goes up here, and to the even one in `quantisation`.
        value = tl.floor(value / tl.where(scale == 0, 1.0, scale) + 0.5)
        value = tl.minimum(tl.maximum(value, -127.0), 127.0)
    value = value.to(v_pages_ptr.dtype.element_ty)
    tl.store(v_pages_ptr + to + h, value, mask=tl.where(real, page >= 0, False))
    left, right = tl.split(tl.trans(tl.reshape(key * scaled, [2, HALF])))
    turned_left = (left * cos - right * sin).to(k_ptr.dtype.element_ty)
    turned_right = (right * cos + left * sin).to(k_ptr.dtype.element_ty).to(tl.float32)
    turned_right = turned_right * tl.where(f == H // 2 - 1, channel, 1.0)
    turned_right = turned_right.to(k_ptr.dtype.element_ty)
    if SCALED:
        turned_left = turned_left.to(tl.float32)
        turned_right = turned_right.to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(turned_left), 0), tl.max(tl.abs(turned_right), 0))
        scale = (most / 127).to(k_scale_ptr.dtype.element_ty)
        tl.store(k_scale_ptr + of_slot, scale, mask=page >= 0)
        scale = scale.to(tl.float32)
        step = tl.where(scale == 0, 1.0, scale)
        turned_left = tl.floor(turned_left / step + 0.5)
        turned_left = tl.minimum(tl.maximum(turned_left, -127.0), 127.0)
        turned_right = tl.floor(turned_right / step + 0.5)
        turned_right = tl.minimum(tl.maximum(turned_right, -127.0), 127.0)
    writes = tl.where(f < H // 2, page >= 0, False)
    to_left = k_pages_ptr + to + f
    tl.store(to_left, turned_left.to(k_pages_ptr.dtype.element_ty), mask=writes)
    tl.store(to_left + H // 2, turned_right.to(k_pages_ptr.dtype.element_ty), mask=writes)


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
    settings: Settings | None = None,
) -> tuple[Float[Array, "seats N H"], State]:
    """Update all rows at once; see `api.cache_update` for the contract.

    Args:
        settings: to try others than the usual ones.
    """
    return _update(
        *(state, q, k_t, v_t, page_table, first, active, position, frequencies, channel, threshold),
        offset=offset,
        eps=eps,
        unlimited=unlimited,
        settings=settings or SETTINGS,
        capability=target.current().capability,
        launch=launch,
    )


@functools.partial(
    jax.jit, static_argnames=("offset", "eps", "unlimited", "settings", "capability", "launch")
)
def _update(
    state,
    q,
    k_t,
    v_t,
    page_table,
    first,
    active,
    position,
    frequencies,
    channel,
    threshold,
    *,
    offset,
    eps,
    unlimited,
    settings,
    capability,
    launch,
):
    angles = position[:, None].astype(jnp.float32) * frequencies  # [seats, H/2]
    constants = update_constants(state, q, k_t, unlimited, settings)
    changed = *state[:3], *(state.segment or [None] * 4), state.k_scale, state.v_scale
    there = [i for i, x in enumerate(changed) if x is not None]
    changed = [jnp.zeros(1) if x is None else x for x in changed]
    rotated, *after = launch(
        update_rows,
        # Where they are parts of one product, as they are of the model, XLA finds that again.
        *(*changed, jnp.concatenate([q, k_t, v_t], axis=1)),
        *(page_table, active.astype(jnp.int32)),
        *(jnp.cos(angles), jnp.sin(angles)),
        jnp.stack([first, jnp.int32(page_table.shape[2])]),
        *(threshold, channel.reshape(1)),
        out=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *changed)),
        in_place={i: i + 1 for i in there},
        grid=(k_t.shape[0] * k_t.shape[1],),
        num_warps=warps_for(constants, settings),
        num_stages=1,
        capability=capability,
        OFFSET=offset,
        EPS=eps,
        **constants,
    )
    after = [x if i in there else None for i, x in enumerate(after)]
    segment = state.segment and Segment(*after[3:7])
    return rotated, State(*after[:3], segment, *after[7:])


def update_constants(
    state: State, q: Any, k_t: Any, unlimited: bool, settings: Settings
) -> dict[str, Any]:
    """The compile-time arguments of `update_rows` for arrays of these shapes."""
    page, H = state.k_pages.shape[1:]
    W = state.segment.keys.shape[2] if state.segment is not None else 1
    return {
        "PAGE": page,
        "R": state.lengths.shape[1],
        "K": k_t.shape[1],
        "G": q.shape[1] // k_t.shape[1],
        "W": W,
        "H": H,
        "MERGES": state.segment is not None,
        "UNLIMITED": unlimited,
        "SCALED": state.k_scale is not None,
        "HALF": max(triton.next_power_of_2(H), _LEAST_WIDTH) // 2,
        "ENTRIES": min(triton.next_power_of_2(W), settings.entries),
    }


def warps_for(constants: dict[str, Any], settings: Settings) -> int:
    """Warps a program, for the size of its tile."""
    return max(constants["ENTRIES"] * 2 * constants["HALF"] // settings.tile_per_warp, 1)
