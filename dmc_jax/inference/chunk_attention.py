"""Attention of a chunk of tokens over pages, in blocks: XLA's forms, and the choice of a kernel.

A query sees what its own token wrote, and of everything else what is there when its token is read.
Where tokens write to the newest slot or to a new one, those are the slots before its own, which the
pages hold when the chunk is written (`attend_pages`). Where they write over older slots, pages have
to be read before, and the chunk's own writes beside them (`attend_until`).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.inference.paged_cache import PagedCache, pages_of, take_rows
from dmc_jax.inference.pages import Pages
from dmc_jax.policies.policy import Edit
from pallas_kernels.prefill_attention.api import XLA, choose, prefill_attention

# Queries and slots per block.
_QUERY_BLOCK = 128
_SLOT_BLOCK = 128


def attend_pages(
    q: Float[Array, "B T N H"],
    own_k: Float[Array, "B T K H"],
    own_v: Float[Array, "B T K H"],
    slot: Int[Array, "B K T"],
    cache: PagedCache,
    first: int | Array,
    seats: Int[Array, " B"],
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attend over the slots before a token's own, from the pages, and over what the token wrote.

    XLA's form lets blocks of queries meet blocks of slots with a running softmax. Each block of
    queries stops at the last slot that any of its rows can see, so the loop is as short as the
    cache is compressed. A GPU would ask the host at every turn of it: it has a kernel.

    Args:
        q: queries, rotated.
        own_k, own_v: what each token wrote, keys rotated.
        slot: which slot that is; the query sees those before it.
        cache: holds those slots already.
        first: row of the layer's first KV head.
        seats: the seat of each row of the batch.
        implementation: of `prefill_attention`, or "xla"; None: the fastest here.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.
    """
    implementation = choose(implementation)
    if implementation != XLA:
        return prefill_attention(
            *(q, own_k, own_v, slot, cache.pages.k, cache.pages.v),
            *(cache.page_table, cache.lengths, seats),
            first=first,
            scale=q.shape[-1] ** -0.5,
            implementation=implementation,
        )
    B, T, N, H = q.shape
    K = own_k.shape[2]
    block = math.gcd(T, _QUERY_BLOCK)
    table = take_rows(cache.page_table, first, K, seats)
    lengths = take_rows(cache.lengths, first, K, seats)

    def blocks(x, axis):  # [..., T, ...] -> [T / b, ..., b, ...]
        x = x.reshape(*x.shape[:axis], T // block, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    queries = q.reshape(B, T, K, N // K, H)
    out = jax.lax.map(
        lambda x: _attend_block(*x, table, lengths, cache.pages),
        (blocks(queries, 1), blocks(own_k, 1), blocks(own_v, 1), blocks(slot, 2)),
    )  # [T / b, B, K, G, b, H]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, N, H)


def _attend_block(
    q: Float[Array, "B b K G H"],
    own_k: Float[Array, "B b K H"],
    own_v: Float[Array, "B b K H"],
    slot: Int[Array, "B K b"],
    table: Int[Array, "B K maxp"],
    lengths: Int[Array, "B K"],
    pool: Pages,
) -> Float[Array, "B K G b H"]:
    """Attend with one block of queries; see `attend_pages`."""
    page = pool.page_size
    pages = max(1, _SLOT_BLOCK // page)  # per block of slots
    table = jnp.pad(table, [(0, 0), (0, 0), (0, -table.shape[2] % pages)])

    def meet_slots(j, carry):
        ids = jax.lax.dynamic_slice_in_dim(table, j * pages, pages, axis=2)
        keys, values = pool.read(ids)  # [B, K, s, H]
        index = j * pages * page + jnp.arange(pages * page)
        # 0 * NaN is NaN, and what no row uses may hold it: a zero weight is no mask.
        values = jnp.where((index < lengths[..., None])[..., None], values, 0)
        return _meet(carry, q, keys, values, index < slot[..., None], pool.dtype)

    # Slots 0 to slot - 1 are in this many blocks.
    steps = pages_of(jnp.minimum(slot.max(), lengths.max()), pages * page)
    start = _own(q, own_k, own_v, pool.dtype)
    return _result(jax.lax.fori_loop(0, steps, meet_slots, start), q.dtype)


def attend_until(
    q: Float[Array, "B T N H"],
    edits: Edit,
    real: Bool[Array, "B T"],
    cache: PagedCache,
    first: int | Array,
    seats: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Attend over the slots that are not written over yet, and over what the chunk wrote so far.

    Args:
        q: queries, rotated.
        edits: of the chunk, with `until`.
        real: tokens that are not padding.
        cache: as it was before the chunk.
        first: row of the layer's first KV head.
        seats: the seat of each row of the batch.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.
    """
    B, T, N, H = q.shape
    K, page, pool = edits.key.shape[2], cache.pages.page_size, cache.pages
    pages = max(1, _SLOT_BLOCK // page)  # per block of slots
    table, lengths = (take_rows(x, first, K, seats) for x in (cache.page_table, cache.lengths))
    table = jnp.pad(table, [(0, 0), (0, 0), (0, -table.shape[2] % pages)])
    rows = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    slot = jnp.where(real[:, None], edits.slot, table.shape[2] * page)
    never = jnp.full((B, K, table.shape[2] * page), T, jnp.int32)
    gone = never.at[(*rows, slot)].min(jnp.arange(T), mode="drop")  # first token to write there
    keys, values = (x.transpose(0, 2, 1, 3).astype(pool.dtype) for x in (edits.key, edits.value))
    block = math.gcd(T, _QUERY_BLOCK)
    steps = pages_of(lengths.max(), pages * page)

    def attend_block(i):
        t = i * block + jnp.arange(block)
        q_i, own_k, own_v = (
            jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)
            for x in (q.reshape(B, T, K, N // K, H), edits.key, edits.value)
        )

        def meet_slots(j, carry):
            ids = jax.lax.dynamic_slice_in_dim(table, j * pages, pages, axis=2)
            old_keys, old_values = pool.read(ids)
            index = j * pages * page + jnp.arange(pages * page)
            live = index < lengths[..., None]
            # 0 * NaN is NaN, and what no row uses may hold it: a zero weight is no mask.
            old_values = jnp.where(live[..., None], old_values, 0)
            there = jax.lax.dynamic_slice_in_dim(gone, j * pages * page, pages * page, axis=2)
            seen = live[:, :, None] & (there[:, :, None] > t[:, None])
            return _meet(carry, q_i, old_keys, old_values, seen, pool.dtype)

        s = jnp.arange(T)
        seen = (s < t[:, None]) & (edits.until[:, :, None] > t[:, None])  # [B, K, b, T]
        start = _own(q_i, own_k, own_v, pool.dtype)
        start = _meet(start, q_i, keys, values, seen, pool.dtype)
        return _result(jax.lax.fori_loop(0, steps, meet_slots, start), q.dtype)

    out = jax.lax.map(attend_block, jnp.arange(T // block))  # [T / b, B, K, G, b, H]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, N, H)


# ---- a running softmax: peak and total [B, K, G, b], weighted sum [B, K, G, b, H] ---------------


def _own(q, own_k, own_v, dtype):
    """Begin with a token's own state, which it would read from a page: rounded as pages are."""
    own_k, own_v = own_k.astype(dtype), own_v.astype(dtype)
    own = q.shape[-1] ** -0.5 * _einsum("BTKGH,BTKH->BKGT", q, own_k)
    value = own_v.astype(jnp.float32).transpose(0, 2, 1, 3)[:, :, None]  # [B, K, 1, b, H]
    return own, jnp.ones_like(own), jnp.broadcast_to(value, (*own.shape, q.shape[-1]))


def _meet(carry, q, keys, values, seen, dtype):
    """Let queries meet keys and values [B, K, S, H] where `seen` [B, K, b, S]."""
    peak, total, weighted = carry
    seen = seen[:, :, None]
    scores = q.shape[-1] ** -0.5 * _einsum("BTKGH,BKSH->BKGTS", q, keys)
    new_peak = jnp.maximum(peak, jnp.where(seen, scores, -jnp.inf).max(axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0.0)
    shrink = jnp.exp(peak - new_peak)
    weighted = weighted * shrink[..., None]
    narrow = weights.astype(jnp.promote_types(q.dtype, dtype))
    weighted += _einsum("BKGTS,BKSH->BKGTH", narrow, values)
    return new_peak, total * shrink + weights.sum(axis=-1), weighted


def _result(carry, dtype):
    _, total, weighted = carry
    return (weighted / total[..., None]).astype(dtype)


def _einsum(equation, one, other):
    dtype = jnp.promote_types(one.dtype, other.dtype)
    return jnp.einsum(
        equation,
        *(one.astype(dtype), other.astype(dtype)),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
