"""Keys and values in pages that every row takes and gives back on its own, all on the device.

A row is one KV head of one layer of one sequence. What it keeps of its tokens, a `policies.policy`
says; so rows differ in length, and each holds as many pages of the common pool as its own slots
need. Free pages are a stack; pages are handed out by prefix sums over what the rows ask for, so
nothing here waits for the host. Three facts hold after every function but `grant`, and the tests
check them:

    a row of n slots owns the first ceil(n / page) entries of its page table;
    a page is owned by one row, or lies in `free_pages[:free_count]` once; where there are
    `references`, it may be owned by more, none of which writes to it any more (`kept_rows`);
    a write without a page goes nowhere, and its seat is marked in `failed`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.errors import UserError
from dmc_jax.inference.pages import Pages, empty_pages
from dmc_jax.policies.policy import Policy, State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of the sequences in `seats`, after `position` tokens each.

    R counts the KV heads of all layers in order, so layers may differ in how many they have. What
    pages hold beyond a row's length, and table entries beyond its pages, mean nothing.
    """

    pages: Pages
    page_table: Int[Array, "seats R maxp"]
    lengths: Int[Array, "seats R"]  # slots in use
    state: State  # of the policy, what rows (seats, R) remember beside their slots
    position: Int[Array, " seats"]  # tokens read so far, which is where the next one stands
    free_pages: Int[Array, " P"]  # a stack, of which the first `free_count` count
    free_count: Int[Array, ""]
    failed: Bool[Array, " seats"]  # lacked a page: what it holds is void, until it is freed
    most_pages: Int[Array, " seats"]  # that a sequence had when it gave some back; 0 before
    references: Int[Array, " P"] | None = None  # owners beyond the first; None: there are none


def init(
    config: ModelConfig,
    policy: Policy,
    *,
    seats: int,
    pages: int,
    page_size: int,
    max_length: int,
    dtype: DTypeLike,
    tokens: DTypeLike = jnp.float32,
) -> PagedCache:
    """Allocate an empty cache.

    Args:
        config: gives R and H.
        policy: of the rows.
        seats: sequences that the cache holds at a time.
        pages: P, in the pool.
        page_size: slots per page, a power of two.
        max_length: tokens that a sequence may come to, whose slots size the page tables.
        dtype: of keys and values in the pages, one of `pages.KV_DTYPES`.
        tokens: dtype in which the policy remembers tokens: that of the forward pass, or wider. Keys
            and values in int8 are read as such, too.

    Raises:
        UserError: a size below 1, or what `empty_pages` refuses.
    """
    for name, size in (("seats", seats), ("max_length", max_length)):
        if size < 1:
            raise UserError(f"cache: {name} must be 1 or more, got {size}")
    counted = policy.gamma is not None
    pool = empty_pages(pages, page_size, config.head_dim, dtype, counted=counted, scale=tokens)
    rows, longest = (seats, config.kv_rows), policy.most_slots(max_length)
    return PagedCache(
        pages=pool,
        page_table=jnp.zeros((*rows, pages_of(longest, page_size)), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        state=policy.start(rows, config.head_dim, tokens, longest),
        position=jnp.zeros(seats, jnp.int32),
        free_pages=jnp.arange(pages, dtype=jnp.int32),
        free_count=jnp.int32(pages),
        failed=jnp.zeros(seats, bool),
        most_pages=jnp.zeros(seats, jnp.int32),
    )


def widen(cache: PagedCache, policy: Policy, max_length: int) -> PagedCache:
    """Give page tables, and what rows remember of each slot, room for longer sequences.

    Args:
        cache: given up. Not under jit.
        policy: that it was made for.
        max_length: tokens that a sequence may come to, no fewer than before.
    """
    rows, longest = cache.lengths.shape, policy.most_slots(max_length)
    table = *rows, pages_of(longest, cache.pages.page_size)
    state = jax.eval_shape(
        lambda: policy.start(rows, cache.pages.k.shape[-1], cache.pages.dtype, longest)
    )
    return dataclasses.replace(
        cache,
        page_table=fitted(cache.page_table, table),
        state=jax.tree.map(lambda x, wide: fitted(x, wide.shape), cache.state, state),
    )


def fitted(x: Array, shape: tuple[int, ...]) -> Array:
    """Cut every axis to a size, or fill it up with zeros."""
    x = x[tuple(map(slice, shape))]
    return jnp.pad(x, [(0, size - had) for size, had in zip(shape, x.shape, strict=True)])


# ---- the rows of one layer --------------------------------------------------------------------


def take_rows(
    x: Array, first: int | Array, heads: int, seats: Int[Array, " B"] | None = None
) -> Array:
    """Take rows `first` to `first + heads` of an array [seats, R, ...]: [B, K, ...].

    Args:
        x: a field of the cache with a row axis.
        first: row of the layer's first KV head.
        heads: K of the layer.
        seats: to read, any number outside reads some other one; None: all.
    """
    x = jax.lax.dynamic_slice_in_dim(x, first, heads, axis=1)
    return x if seats is None else x.at[seats].get(mode="clip")


def put_rows(
    x: Array, new: Array, first: int | Array, seats: Int[Array, " B"] | None = None
) -> Array:
    """Write rows [B, K, ...] back; of seats outside the cache nothing is."""
    if seats is None:
        return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=1)
    return x.at[_row_indices(first, new.shape[1], seats)].set(new, mode="drop")


def _row_indices(first, heads: int, seats: Array) -> tuple[Array, Array]:
    return seats[:, None], first + jnp.arange(heads)


def pages_of(slots: int | Array | np.ndarray, page_size: int) -> int | Array | np.ndarray:
    """Count the pages that so many slots take."""
    return -(-slots // page_size)


# ---- taking pages, writing, giving back -------------------------------------------------------


def reserve(
    cache: PagedCache,
    wanted: Int[Array, "B K"],
    first: int | Array = 0,
    *,
    seats: Int[Array, " B"] | None = None,
    most: int = 1,
) -> tuple[PagedCache, Bool[Array, "B K"]]:
    """Make rows `wanted` slots long, with pages from the free list.

    Rows are served in order, those of the first seat first, each with all it wants or nothing.
    A row that goes without keeps its length, and its seat is marked as failed. That is so too
    where `wanted` exceeds the page table.

    Args:
        cache: the cache.
        wanted: new lengths, none below the row's present one. The new slots must be written next.
        first: row of the layer's first KV head.
        seats: that `wanted` speaks of; None: all. Those outside the cache must want what they have.
        most: new pages that a row may want at most; static.

    Returns:
        (the cache, which rows are as long as wanted).
    """
    page, maxp = cache.pages.page_size, cache.page_table.shape[2]
    B, K = wanted.shape
    lengths = take_rows(cache.lengths, first, K, seats)
    have = pages_of(lengths, page)
    need = pages_of(wanted, page) - have
    possible = (need <= most) & (wanted <= maxp * page)
    # Cumulated demand: the rows whose end lies within the free pages are a prefix of the needy.
    ends = jnp.cumsum(jnp.where(possible, need, 0).reshape(-1)).reshape(B, K)
    granted = possible & ((need == 0) | (ends <= cache.free_count))

    new = jnp.arange(most)
    pages = cache.free_pages.at[(cache.free_count - ends)[..., None] + new].get(mode="clip")
    used = granted[..., None] & (new < need[..., None])  # [B, K, most]
    entry = jnp.where(used, have[..., None] + new, maxp)  # maxp is dropped
    everyone = jnp.arange(B) if seats is None else seats
    rows, heads = _row_indices(first, K, everyone)
    refused = ~granted.all(axis=1)
    cache = dataclasses.replace(
        cache,
        page_table=cache.page_table.at[rows[..., None], heads[:, None], entry].set(
            pages, mode="drop"
        ),
        lengths=put_rows(cache.lengths, jnp.where(granted, wanted, lengths), first, seats),
        free_count=cache.free_count - jnp.where(granted & (need > 0), ends, 0).max(),
        failed=cache.failed.at[jnp.where(refused, everyone, cache.failed.size)].set(
            True, mode="drop"
        ),
    )
    return cache, granted


class Granted(NamedTuple):
    """What `grant` set aside for some rows, and how long they were."""

    lengths: Int[Array, "B K"]
    pages: Int[Array, "B K"]  # -1 where a row needs none, or there was none


def grant(
    cache: PagedCache,
    active: Bool[Array, " B"],
    first: int | Array = 0,
    *,
    heads: int | None = None,
    seats: Int[Array, " B"] | None = None,
) -> tuple[PagedCache, Granted]:
    """Set pages aside for rows that are about to read a token, for all layers at once.

    Which rows take a slot more is known only in their layers. So every row whose pages are full
    gets a page in its table ahead, or -1 where the free list is used up; rows of the first seat
    come first. Until `settle` has taken back what was not needed, nothing else may take pages.

    Args:
        cache: the cache.
        active: sequences that read a token.
        first: row of the layer's first KV head.
        heads: K of the layer; None: the rows of all layers.
        seats: of the sequences; None: all. Those outside the cache must not be active.

    Returns:
        (the cache, what `settle` needs).
    """
    page, maxp = cache.pages.page_size, cache.page_table.shape[2]
    heads = cache.lengths.shape[1] if heads is None else heads
    lengths = take_rows(cache.lengths, first, heads, seats)
    full = active[:, None] & (lengths % page == 0) & (lengths < maxp * page)
    ends = jnp.cumsum(full.reshape(-1)).reshape(full.shape)
    pages = cache.free_pages.at[cache.free_count - ends].get(mode="clip")
    pages = jnp.where(full & (ends <= cache.free_count), pages, -1)
    everyone = jnp.arange(full.shape[0]) if seats is None else seats
    rows, of_layer = _row_indices(first, heads, everyone)
    entry = jnp.where(full, lengths // page, maxp)  # maxp is dropped
    table = cache.page_table.at[rows, of_layer, entry].set(pages, mode="drop")
    return dataclasses.replace(cache, page_table=table), Granted(lengths, pages)


def settle(
    cache: PagedCache,
    granted: Granted,
    first: int | Array = 0,
    *,
    seats: Int[Array, " B"] | None = None,
) -> PagedCache:
    """Take back what rows did not need of `grant`, once all of them have read their token.

    A row that found no page for its slot has the length ~n for its n. It keeps that n, and its seat
    is marked as failed.

    Args:
        cache: with the lengths after the token.
        granted: from `grant`.
        first, seats: as for `grant`.
    """
    heads = granted.pages.shape[1]
    lengths = take_rows(cache.lengths, first, heads, seats)
    refused = lengths < 0
    lengths = jnp.where(refused, ~lengths, lengths)
    back = (granted.pages >= 0) & (lengths == granted.lengths)
    base = cache.free_count - (granted.pages >= 0).sum(dtype=jnp.int32)
    place = base + jnp.cumsum(back.reshape(-1)).reshape(back.shape) - 1
    place = jnp.where(back, place, cache.pages.count)  # is dropped
    everyone = jnp.arange(back.shape[0]) if seats is None else seats
    failed = jnp.where(refused.any(axis=1), everyone, cache.failed.size)
    return dataclasses.replace(
        cache,
        lengths=put_rows(cache.lengths, lengths, first, seats),
        free_pages=cache.free_pages.at[place].set(granted.pages, mode="drop"),
        free_count=base + back.sum(dtype=jnp.int32),
        failed=cache.failed.at[failed].set(True, mode="drop"),
    )


def write(
    cache: PagedCache,
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    slots: Int[Array, "B K T"],
    where: Bool[Array, "B K T"],
    first: int | Array,
    *,
    seats: Int[Array, " B"] | None = None,
    tokens: Int[Array, "B K T"] | None = None,
) -> PagedCache:
    """Put keys and values into slots that their rows have.

    Args:
        cache: the cache.
        keys, values: what the slots shall hold, keys rotated.
        slots: of each row, all different where they are written.
        where: which to write; the others go nowhere.
        first: row of the layer's first KV head.
        seats: that the rows belong to; None: all.
        tokens: that the slots stand for, where the policy has a `gamma`.
    """
    pages = _page_ids(cache, slots, first, seats)
    at = jnp.where(where, pages, cache.pages.count), slots % cache.pages.page_size
    return dataclasses.replace(cache, pages=cache.pages.write(at, keys, values, tokens))


def owned(
    cache: PagedCache,
    slots: Int[Array, "B K"],
    first: int | Array,
    seats: Int[Array, " B"] | None = None,
) -> Bool[Array, "B K"]:
    """Say which rows have a page for a slot, which is none past their next, after `grant`."""
    return _page_ids(cache, slots[..., None], first, seats)[..., 0] >= 0


def _page_ids(cache, slots, first, seats) -> Int[Array, "B K T"]:
    """Look up the pages of slots; -1 where the table ends before."""
    everyone = jnp.arange(slots.shape[0]) if seats is None else seats
    rows, heads = _row_indices(first, slots.shape[1], everyone)
    entry = slots // cache.pages.page_size
    of_row = jnp.clip(rows, 0, cache.lengths.shape[0] - 1)
    return cache.page_table.at[of_row[..., None], heads[:, None], entry].get(
        mode="fill", fill_value=-1
    )


def free(cache: PagedCache, leaving: Bool[Array, " seats"]) -> PagedCache:
    """Empty some seats: their pages go back to the free list, the next sequence starts afresh.

    Args:
        cache: the cache.
        leaving: seats to empty; those that are empty already may be among them.
    """
    owned = owned_entries(cache, cache.page_table, cache.lengths) & leaving[:, None, None]
    cache = give_back(cache, cache.page_table, owned)

    def emptied(x):
        # Not a product: what is left of a sequence with NaN must not reach the next one.
        return jnp.where(leaving[(..., *(None,) * (x.ndim - 1))], jnp.zeros((), x.dtype), x)

    return dataclasses.replace(
        cache,
        lengths=emptied(cache.lengths),
        state=jax.tree.map(emptied, cache.state),
        position=emptied(cache.position),
        failed=emptied(cache.failed),
        most_pages=emptied(cache.most_pages),
    )


def owned_entries(
    cache: PagedCache, table: Int[Array, "*rows maxp"], lengths: Int[Array, "*rows"]
) -> Bool[Array, "*rows maxp"]:
    """Say which entries of page tables are pages of their rows."""
    return jnp.arange(table.shape[-1]) < pages_of(lengths, cache.pages.page_size)[..., None]


def give_back(
    cache: PagedCache, table: Int[Array, "*rows maxp"], owned: Bool[Array, "*rows maxp"]
) -> PagedCache:
    """Let rows give up the pages of some entries; those that no other row has are free then."""
    P, ids, owned = cache.pages.count, table.reshape(-1), owned.reshape(-1)
    if cache.references is not None:
        owners = jnp.zeros_like(cache.references).at[jnp.where(owned, ids, P)].add(1, mode="drop")
        ids, owned = jnp.arange(P, dtype=jnp.int32), owners > cache.references
        left = jnp.where(owned, 0, cache.references - owners)
        cache = dataclasses.replace(cache, references=left)
    place = jnp.where(owned, cache.free_count + jnp.cumsum(owned) - 1, P)  # place P is dropped
    return dataclasses.replace(
        cache,
        free_pages=cache.free_pages.at[place].set(ids, mode="drop"),
        free_count=cache.free_count + owned.sum(dtype=jnp.int32),
    )


# ---- what it takes ----------------------------------------------------------------------------


def pages_for_one_token(cache: PagedCache) -> Int[Array, " seats"]:
    """Count the pages that one more token of each sequence takes at most.

    With as many free pages as all that read one may take, the next step cannot run out of them.
    """
    page, maxp = cache.pages.page_size, cache.page_table.shape[2]
    grows = (cache.lengths % page == 0) & (cache.lengths < maxp * page)
    return grows.sum(axis=1, dtype=jnp.int32)


def bytes_live(cache: PagedCache) -> int:
    """Count the bytes of pages that some row owns. Reads the device: not under jit."""
    return (cache.pages.count - int(cache.free_count)) * cache.pages.page_bytes


def bytes_reserved(cache: PagedCache) -> int:
    """Count the bytes of all arrays of the cache: the pool, page tables, the policy's state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
