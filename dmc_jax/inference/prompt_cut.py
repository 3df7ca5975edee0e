"""The end of a prompt in a cache, where a policy may keep some of its slots and give up the rest.

Prompts are read in chunks, and a chunk may go beyond the end of one. In every layer, once a chunk
is in the pages and its queries have attended to all of them, the observers, which are the last
tokens of a prompt, tell the policy what they attend to. Where a prompt ends, the slots that stay
move together, the pages behind them go back to the free list, and the queries of tokens after the
end attend once more.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.inference.chunk_attention import attend_pages, attention_to_slots
from dmc_jax.inference.paged_cache import PagedCache, pages_of, put_rows, take_rows
from dmc_jax.policies.policy import Edit, Policy

_BLOCK = 128  # slots that move at a time


def cut_prompts(
    out: Float[Array, "B T N H"],
    q: Float[Array, "B T N H"],
    edits: Edit,
    slot: Int[Array, "B K T"],
    cache: PagedCache,
    policy: Policy,
    *,
    prompt: Int[Array, " B"],
    counts: Int[Array, " B"],
    first: int | Array,
    seats: Int[Array, " B"],
) -> tuple[Float[Array, "B T N H"], PagedCache]:
    """Let observers of a chunk vote, and cut the rows whose prompt ends in it.

    Args:
        out: of the chunk's attention, as if nothing were cut.
        q: queries, rotated.
        edits: of the chunk, without `until`.
        slot: that each token wrote to.
        cache: with the chunk.
        policy: of the layer and the seats.
        prompt: tokens from the chunk's first to the end of the prompt; 0 or less: it was before.
        counts: tokens that are not padding.
        first: row of the layer's first KV head.
        seats: the seat of each row of the batch.

    Returns:
        (the output of attention, the cache).
    """
    T, K = q.shape[1], slot.shape[1]

    def of_layer(x):
        return take_rows(x, first, K, seats)

    observer = prompt[:, None] - policy.observers + jnp.arange(policy.observers)  # [B, W]
    there = (observer >= 0) & (observer < counts[:, None])
    observer = jnp.clip(observer, 0, T - 1)
    newest = jnp.take_along_axis(slot, observer[:, None], axis=2)
    weights = attention_to_slots(
        jnp.take_along_axis(q, observer[..., None, None], axis=1),
        jnp.where(there[:, None], newest, -1),
        *(cache, first, seats),
    )
    lengths, state = of_layer(cache.lengths), jax.tree.map(of_layer, cache.state)
    state = policy.observe(state, weights, lengths)
    cache = dataclasses.replace(
        cache, state=jax.tree.map(lambda x, new: put_rows(x, new, first, seats), cache.state, state)
    )
    ends = (prompt > 0) & (prompt <= counts)
    everything = jnp.broadcast_to(True, jax.eval_shape(policy.kept, state).shape)
    kept = jax.lax.cond(ends.any(), policy.kept, lambda _: everything, state)
    cache, lost = keep_slots(cache, kept, ends, first, seats)

    late = ends[:, None] & (jnp.arange(T) >= prompt[:, None])  # [B, T]

    def attend_again():
        now = jnp.maximum(slot - lost[..., None], 0)
        again = attend_pages(q, edits.key, edits.value, now, cache, first, seats)
        return jnp.where(late[..., None, None], again, out)

    return jax.lax.cond(late.any(), attend_again, lambda: out), cache


def keep_slots(
    cache: PagedCache,
    kept: Bool[Array, "B K S"],
    cut: Bool[Array, " B"],
    first: int | Array,
    seats: Int[Array, " B"],
) -> tuple[PagedCache, Int[Array, "B K"]]:
    """Let rows have some of their slots only, in order, and take back the pages that they spare.

    Args:
        cache: the cache.
        kept: slots that stay.
        cut: sequences of which this is so; rows of the others stay as they are.
        first: row of the layer's first KV head.
        seats: of the sequences.

    Returns:
        (the cache, how many slots each row lost).
    """
    K, page = kept.shape[1], cache.pages.page_size
    table, lengths = (take_rows(x, first, K, seats) for x in (cache.page_table, cache.lengths))
    maxp, pages = table.shape[2], max(1, _BLOCK // page)
    room = -(-maxp // pages) * pages * page  # in whole blocks
    old = jnp.arange(room)
    kept = jnp.pad(kept, [(0, 0), (0, 0), (0, max(0, room - kept.shape[2]))])[..., :room]
    kept &= (old < lengths[..., None]) & cut[:, None, None]
    new = jnp.cumsum(kept, axis=2) - 1
    moves = kept & (new < old)

    def address(slots, where):  # page P is written nowhere
        ids = jnp.take_along_axis(table, jnp.minimum(slots // page, maxp - 1), axis=2)
        return jnp.where(where, ids, cache.pages.count), slots % page

    def move(j, pool):  # down, the lowest first: nothing is written over that is still to be read
        begin, width = j * pages * page, pages * page
        slots = jnp.broadcast_to(begin + jnp.arange(width), (*lengths.shape, width))
        to, where = (jax.lax.dynamic_slice_in_dim(x, begin, width, axis=2) for x in (new, moves))
        source, target = address(slots, where), address(to, where)
        # As they are stored: what was rounded once is not rounded again.
        return jax.tree.map(
            lambda x: x.at[target].set(x.at[source].get(mode="clip"), mode="drop"), pool
        )

    last = jnp.where(moves, old, -1).max()
    pool = jax.lax.fori_loop(0, pages_of(last + 1, pages * page), move, cache.pages)

    left = jnp.where(cut[:, None], kept.sum(axis=2, dtype=jnp.int32), lengths)
    entry = jnp.arange(maxp)
    spare = (entry >= pages_of(left, page)[..., None]) & (
        entry < pages_of(lengths, page)[..., None]
    )
    spare = spare.reshape(-1)
    place = jnp.where(spare, cache.free_count + jnp.cumsum(spare) - 1, cache.pages.count)
    held = pages_of(cache.lengths.at[seats].get(mode="clip"), page).sum(axis=1)
    cut_seat = jnp.where(cut, seats, cache.failed.size)
    cache = dataclasses.replace(
        cache,
        pages=pool,
        lengths=put_rows(cache.lengths, left, first, seats),
        free_pages=cache.free_pages.at[place].set(table.reshape(-1), mode="drop"),
        free_count=cache.free_count + spare.sum(dtype=jnp.int32),
        most_pages=cache.most_pages.at[cut_seat].max(held, mode="drop"),
    )
    return cache, lengths - left
