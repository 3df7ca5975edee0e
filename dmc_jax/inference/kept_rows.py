"""The rows of a sequence after some of its tokens, kept so that others can go on from there.

Slots that are closed never change. So a page without an open slot and without room is shared: it
has an owner more, whom `PagedCache.references` counts. The others, a page or two of most rows, are
copied, when rows are kept and again when a sequence goes on from them. Nobody ever writes to a page
that has two owners.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dmc_jax.inference.paged_cache import PagedCache, fitted, give_back, owned_entries
from dmc_jax.policies.policy import Policy, State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptRows:
    """All rows of one sequence, which own pages of the pool as those of a seat do."""

    page_table: Int[Array, "R maxp"]
    lengths: Int[Array, " R"]
    state: State  # of the policy, of rows (R,)
    position: Int[Array, ""]  # tokens read


def with_references(cache: PagedCache) -> PagedCache:
    """Let the pages of an empty cache have several owners."""
    return dataclasses.replace(cache, references=jnp.zeros(cache.pages.count, jnp.int32))


@functools.partial(jax.jit, donate_argnames="cache")
def keep(
    cache: PagedCache, policy: Policy, seat: Int[Array, ""]
) -> tuple[PagedCache, KeptRows, Int[Array, " 2"]]:
    """Keep the rows of a seat as they are now; its sequence goes on.

    Args:
        cache: with references; given up.
        policy: that it was made for, one that `branches`.
        seat: of a sequence that did not fail.

    Returns:
        (the cache, the rows, how many pages they share and how many they have for themselves). Both
        are -1, and nothing is kept, where there are too few free pages.
    """
    of_seat = cache.page_table, cache.lengths, cache.state, cache.position
    table, lengths, state, position = jax.tree.map(lambda x: x[seat], of_seat)
    cache, table, counts = _branched(cache, policy, table, lengths, state)
    return cache, KeptRows(table, lengths, state, position), counts


@functools.partial(jax.jit, donate_argnames="cache")
def put(
    cache: PagedCache, policy: Policy, kept: KeptRows, seat: Int[Array, ""]
) -> tuple[PagedCache, Int[Array, " 2"]]:
    """Let a seat go on from what was kept.

    Args:
        cache: given up.
        policy: as for `keep`.
        kept: of this cache.
        seat: empty.

    Returns:
        (the cache, pages as for `keep`); without enough of them the seat stays empty.
    """
    table = fitted(kept.page_table, cache.page_table.shape[1:])  # there may be room for more now
    cache, table, counts = _branched(cache, policy, table, kept.lengths, kept.state)
    filled = jnp.where(counts[0] >= 0, seat, cache.failed.size)  # which is dropped
    put_row = functools.partial(
        jax.tree.map, lambda x, row: x.at[filled].set(row.astype(x.dtype), mode="drop")
    )
    cache = dataclasses.replace(
        cache,
        page_table=put_row(cache.page_table, table),
        lengths=put_row(cache.lengths, kept.lengths),
        state=put_row(cache.state, kept.state),
        position=put_row(cache.position, kept.position),
    )
    return cache, counts


@functools.partial(jax.jit, donate_argnames="cache")
def drop(cache: PagedCache, kept: KeptRows) -> PagedCache:
    """Give up what was kept, once."""
    return give_back(cache, kept.page_table, owned_entries(cache, kept.page_table, kept.lengths))


@jax.jit
def pages_of_seats(cache: PagedCache) -> Int[Array, ""]:
    """Count the pages that sequences own, each once."""
    owned = owned_entries(cache, cache.page_table, cache.lengths)
    ids = jnp.where(owned, cache.page_table, cache.pages.count)
    there = jnp.zeros(cache.pages.count, bool).at[ids].set(True, mode="drop")
    return there.sum(dtype=jnp.int32)


def _branched(
    cache: PagedCache,
    policy: Policy,
    table: Int[Array, "R maxp"],
    lengths: Int[Array, " R"],
    state: State,
) -> tuple[PagedCache, Int[Array, "R maxp"], Int[Array, " 2"]]:
    """Make one more owner of some rows: share what is closed, copy the rest, or do nothing.

    Returns:
        (the cache, the new owner's page table, pages shared and copied, or -1 where too few are
        free).
    """
    P, (R, maxp) = cache.pages.count, table.shape
    entries = _open_entries(policy, cache.pages.page_size, maxp, lengths, state)
    copied = entries < maxp
    ends = jnp.cumsum(copied.reshape(-1), dtype=jnp.int32).reshape(copied.shape)
    enough = ends[-1, -1] <= cache.free_count
    copied &= enough
    new = cache.free_pages.at[cache.free_count - ends].get(mode="clip")
    old = jnp.take_along_axis(table, jnp.minimum(entries, maxp - 1), axis=1)
    target = jnp.where(copied, new, P).reshape(-1)  # page P is written nowhere
    pages = cache.pages.put(target, cache.pages.take(old.reshape(-1)))

    at = jnp.arange(R)[:, None], entries  # maxp is dropped
    shared: Bool[Array, "R maxp"] = owned_entries(cache, table, lengths) & enough
    shared = shared.at[at].set(False, mode="drop")
    owners = cache.references.at[jnp.where(shared, table, P)].add(1, mode="drop")
    cache = dataclasses.replace(
        cache,
        pages=pages,
        references=owners,
        free_count=cache.free_count - copied.sum(dtype=jnp.int32),
    )
    counts = jnp.stack([shared.sum(dtype=jnp.int32), copied.sum(dtype=jnp.int32)])
    return cache, table.at[at].set(new, mode="drop"), jnp.where(enough, counts, -1)


def _open_entries(policy, page_size, maxp, lengths, state) -> Int[Array, "R n"]:
    """List the entries of page tables whose pages may be written to, each once; maxp: none."""
    room = jnp.where(lengths % page_size > 0, lengths - 1, -1)  # beside it there is some
    slots = jnp.concatenate([policy.open_slots(state, lengths), room[:, None]], axis=1)
    there = (slots >= 0) & (slots < lengths[:, None])
    entries = jnp.sort(jnp.where(there, slots // page_size, maxp), axis=1)
    again = entries == jnp.pad(entries[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    return jnp.where(again, maxp, entries)
