"""Attention of a chunk of tokens over pages, in blocks: XLA's forms, and the choice of a kernel.

A query sees what its own token wrote, and of everything else what is there when its token is read.
Where tokens write to the newest slot or to a new one, those are the slots before its own, which the
pages hold when the chunk is written (`attend_pages`). Where they write over older slots, pages have
to be read before, and the chunk's own writes beside them (`attend_until`).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.core.delayed import slot_mass
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
            k_scale=cache.pages.k_scale,
            v_scale=cache.pages.v_scale,
        )
    K = own_k.shape[2]
    table, lengths = (take_rows(x, first, K, seats) for x in (cache.page_table, cache.lengths))
    own_k, own_v = cache.pages.rounded(own_k), cache.pages.rounded(own_v)

    def attend(q, own_k, own_v, slot):  # of a block of queries
        carry = _own(q, own_k, own_v)
        end = jnp.minimum(slot.max(), lengths.max())

        def seen(index):
            return index < slot[..., None]

        return _result(_meet_pages(carry, q, table, lengths, end, seen, cache.pages), q.dtype)

    return _in_blocks(attend, q, (own_k, own_v), (slot,))


def attend_until(
    q: Float[Array, "B T N H"],
    edits: Edit,
    real: Bool[Array, "B T"],
    cache: PagedCache,
    first: int | Array,
    seats: Int[Array, " B"],
    gamma: Float[Array, " K"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend over the slots that are not written over yet, and over what the chunk wrote so far.

    Args:
        q: queries, rotated.
        edits: of the chunk, with `until`.
        real: tokens that are not padding.
        cache: as it was before the chunk.
        first: row of the layer's first KV head.
        seats: the seat of each row of the batch.
        gamma: of the policy, for which edits have `tokens`.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.
    """
    (B, T, K, _), dtype = edits.key.shape, cache.pages.dtype
    table, lengths = (take_rows(x, first, K, seats) for x in (cache.page_table, cache.lengths))
    slots = table.shape[2] * cache.pages.page_size
    rows = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    edits, n = edits.side_by_side(), len(edits.writes())
    real, writer = jnp.tile(real, n)[:, None], jnp.tile(jnp.arange(T), n)
    there = edits.slot >= 0
    slot = jnp.where(real & there, edits.slot, slots)
    never = jnp.full((B, K, slots), T, jnp.int32)
    gone = never.at[(*rows, slot)].min(writer, mode="drop")  # first token to write there
    states = [cache.pages.rounded(x) for x in (edits.key, edits.value)]
    keys, values = (x.transpose(0, 2, 1, 3) for x in states)
    until = jnp.where(there, edits.until, -1)
    # Of what its own token wrote, a query begins with the first.
    since = writer + (jnp.arange(n * T) < T)
    order = jnp.broadcast_to(jnp.arange(T), (B, K, T))
    mass = None if gamma is None else slot_mass(edits.tokens, gamma[:, None])

    def attend(q, own_k, own_v, t, *own_mass):  # of a block of queries, t its tokens
        t = t[..., None]
        written = (since <= t) & (until[:, :, None] > t)  # [B, K, b, n T]
        carry = _own(q, own_k, own_v, *own_mass)
        carry = _meet(carry, q, keys, values, written, dtype, mass)

        def seen(index):
            return gone.at[..., index].get(mode="clip")[:, :, None] > t

        carry = _meet_pages(carry, q, table, lengths, lengths.max(), seen, cache.pages, gamma)
        return _result(carry, q.dtype)

    of_rows = (order,) if mass is None else (order, mass[..., :T])
    return _in_blocks(attend, q, [x[:, :T] for x in states], of_rows)


def attention_to_slots(
    q: Float[Array, "B W N H"],
    newest: Int[Array, "B K W"],
    cache: PagedCache,
    first: int | Array,
    seats: Int[Array, " B"],
) -> Float[Array, "B K G S"]:
    """Sum what some queries attend to, slot by slot.

    Args:
        q: queries, rotated.
        newest: slot that each sees, as it sees all before; -1: it does not count.
        cache: holds those slots.
        first: row of the layer's first KV head.
        seats: the seat of each row of the batch.

    Returns:
        The sums of weights of every query head, for as many slots as page tables have room for.
    """
    (B, W, N, H), K = q.shape, newest.shape[1]
    table, lengths = (take_rows(x, first, K, seats) for x in (cache.page_table, cache.lengths))
    slots = table.shape[2] * cache.pages.page_size
    table, pages = _in_whole_blocks(table, cache.pages)
    width = pages * cache.pages.page_size
    q = q.reshape(B, W, K, N // K, H)

    def scores(j):
        keys, _ = cache.pages.read(jax.lax.dynamic_slice_in_dim(table, j * pages, pages, axis=2))
        index = j * width + jnp.arange(width)
        seen = (index < lengths[..., None])[:, :, None] & (index <= newest[..., None])
        of_keys = H**-0.5 * _einsum("BTKGH,BKSH->BKGTS", q, keys)
        return jnp.where(seen[:, :, None], of_keys, -jnp.inf)

    def add_up(j, total):
        return jnp.logaddexp(total, jax.nn.logsumexp(scores(j), axis=-1))

    def weigh(j, weights):
        some = scores(j)
        some = jnp.where(some > -jnp.inf, jnp.exp(some - total[..., None]), 0.0).sum(axis=3)
        return jax.lax.dynamic_update_slice_in_dim(weights, some, j * width, axis=3)

    blocks = pages_of(jnp.minimum(newest + 1, lengths[..., None]).max(), width)
    total = jnp.full((B, K, N // K, W), -jnp.inf)
    total = jax.lax.fori_loop(0, blocks, add_up, total)
    nothing = jnp.zeros((B, K, N // K, table.shape[2] * cache.pages.page_size))
    return jax.lax.fori_loop(0, blocks, weigh, nothing)[..., :slots]


def _in_whole_blocks(table: Int[Array, "B K maxp"], pool: Pages) -> tuple[Array, int]:
    """Pad page tables to whole blocks of slots; also the pages of a block."""
    pages = max(1, _SLOT_BLOCK // pool.page_size)
    return jnp.pad(table, [(0, 0), (0, 0), (0, -table.shape[2] % pages)]), pages


def _in_blocks(attend, q, of_tokens, of_rows) -> Float[Array, "B T N H"]:
    """Attend with a block of queries at a time.

    Args:
        attend: of a block: queries [B, b, K, G, H] and parts of the following -> [B, K, G, b, H].
        q: all queries [B, T, N, H].
        of_tokens: arrays [B, T, K, H].
        of_rows: arrays [B, K, T].
    """
    (B, T, N, H), K = q.shape, of_tokens[0].shape[2]
    block = math.gcd(T, _QUERY_BLOCK)

    def blocks(x, axis):  # [..., T, ...] -> [T / b, ..., b, ...]
        x = x.reshape(*x.shape[:axis], T // block, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    parts = [blocks(x, 1) for x in (q.reshape(B, T, K, N // K, H), *of_tokens)]
    parts += [blocks(x, 2) for x in of_rows]
    out = jax.lax.map(lambda x: attend(*x), parts)  # [T / b, B, K, G, b, H]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, N, H)


# ---- a running softmax: peak and total [B, K, G, b], weighted sum [B, K, G, b, H] ---------------


def _own(q, own_k, own_v, mass=None):
    """Begin with a token's own state, which it would read from a page: rounded as pages are.

    `mass` is added to its score, [B, K, b].
    """
    own = q.shape[-1] ** -0.5 * _einsum("BTKGH,BTKH->BKGT", q, own_k)
    if mass is not None:
        own += mass[:, :, None]
    value = own_v.astype(jnp.float32).transpose(0, 2, 1, 3)[:, :, None]  # [B, K, 1, b, H]
    return own, jnp.ones_like(own), jnp.broadcast_to(value, (*own.shape, q.shape[-1]))


def _meet(carry, q, keys, values, seen, dtype, mass=None):
    """Let queries meet keys and values [B, K, S, H] where `seen` [B, K, b, S].

    `mass` is added to the scores of keys, [B, K, S].
    """
    peak, total, weighted = carry
    seen = seen[:, :, None]
    scores = q.shape[-1] ** -0.5 * _einsum("BTKGH,BKSH->BKGTS", q, keys)
    if mass is not None:
        scores += mass[:, :, None, None]
    new_peak = jnp.maximum(peak, jnp.where(seen, scores, -jnp.inf).max(axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0.0)
    shrink = jnp.exp(peak - new_peak)
    weighted = weighted * shrink[..., None]
    narrow = weights.astype(jnp.promote_types(q.dtype, dtype))
    weighted += _einsum("BKGTS,BKSH->BKGTH", narrow, values)
    return new_peak, total * shrink + weights.sum(axis=-1), weighted


def _meet_pages(
    carry,
    q: Float[Array, "B b K G H"],
    table: Int[Array, "B K maxp"],
    lengths: Int[Array, "B K"],
    end: Int[Array, ""],
    seen: Callable[[Array], Array],
    pool: Pages,
    gamma: Float[Array, " K"] | None = None,
):
    """Let queries meet the slots before `end`, where `seen` of their numbers [s], [B, K, b, s]."""
    page = pool.page_size
    table, pages = _in_whole_blocks(table, pool)

    def meet_slots(j, carry):
        ids = jax.lax.dynamic_slice_in_dim(table, j * pages, pages, axis=2)
        keys, values = pool.read(ids)  # [B, K, s, H]
        index = j * pages * page + jnp.arange(pages * page)
        live = index < lengths[..., None]
        # 0 * NaN is NaN, and what no row uses may hold it: a zero weight is no mask.
        values = jnp.where(live[..., None], values, 0)
        mass = None if gamma is None else slot_mass(pool.read_tokens(ids), gamma[:, None])
        return _meet(carry, q, keys, values, live[:, :, None] & seen(index), pool.dtype, mass)

    return jax.lax.fori_loop(0, pages_of(end, pages * page), meet_slots, carry)


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
