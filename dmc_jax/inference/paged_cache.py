"""Keys and values in pages that every row takes and gives back on its own, all on the device.

A row is one KV head of one layer of one sequence. What it keeps of its tokens, a `policies.policy`
says; so rows differ in length, and each holds as many pages of the common pool as its own slots
need. Free pages are a stack; pages are handed out by prefix sums over what the rows ask for, so
nothing here waits for the host. Three facts hold after every function, and the tests check them:

    a row of n slots owns the first ceil(n / page) entries of its page table;
    a page is owned by one row, or lies in `free_pages[:free_count]` once;
    a write without a page goes nowhere, and its seat is marked in `failed`.
"""

import dataclasses

import jax
import jax.numpy as jnp
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


def init(
    config: ModelConfig,
    policy: Policy,
    *,
    seats: int,
    pages: int,
    page_size: int,
    max_length: int,
    dtype: jnp.dtype,
) -> PagedCache:
    """Allocate an empty cache.

    Args:
        config: gives R and H.
        policy: of the rows.
        seats: sequences that the cache holds at a time.
        pages: P, in the pool.
        page_size: slots per page, a power of two.
        max_length: tokens that a sequence may come to, whose slots size the page tables.
        dtype: of keys and values in the pages, float32 or bfloat16.

    Raises:
        UserError: a size below 1, or what `empty_pages` refuses.
    """
    for name, size in (("seats", seats), ("max_length", max_length)):
        if size < 1:
            raise UserError(f"cache: {name} must be 1 or more, got {size}")
    pool = empty_pages(pages, page_size, config.head_dim, dtype)
    rows, longest = (seats, config.kv_rows), policy.most_slots(max_length)
    return PagedCache(
        pages=pool,
        page_table=jnp.zeros((*rows, pages_of(longest, page_size)), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        state=policy.start(rows, config.head_dim),
        position=jnp.zeros(seats, jnp.int32),
        free_pages=jnp.arange(pages, dtype=jnp.int32),
        free_count=jnp.int32(pages),
        failed=jnp.zeros(seats, bool),
    )


# ---- the rows of one layer --------------------------------------------------------------------


def first_rows(config: ModelConfig) -> Int[Array, " L"]:
    """Number the first row of every layer."""
    return jnp.cumsum(jnp.array((0, *config.kv_heads_by_layer[:-1]), jnp.int32))


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


def pages_of(slots: int | Array, page_size: int) -> int | Array:
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


def write(
    cache: PagedCache,
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    slots: Int[Array, "B K T"],
    where: Bool[Array, "B K T"],
    first: int | Array,
    *,
    seats: Int[Array, " B"] | None = None,
) -> PagedCache:
    """Put keys and values into slots that their rows have.

    Args:
        cache: the cache.
        keys, values: what the slots shall hold, keys rotated.
        slots: of each row, all different where they are written.
        where: which to write; the others go nowhere.
        first: row of the layer's first KV head.
        seats: that the rows belong to; None: all.
    """
    at = places(cache, slots, where, first, seats)
    return dataclasses.replace(cache, pages=cache.pages.write(at, keys, values))


def places(
    cache: PagedCache,
    slots: Int[Array, "B K T"],
    where: Bool[Array, "B K T"],
    first: int | Array,
    seats: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, "B K T"], Int[Array, "B K T"]]:
    """Find the pages of some slots, and where in them; page P, which nobody has, of the others."""
    P, page = cache.pages.count, cache.pages.page_size
    everyone = jnp.arange(slots.shape[0]) if seats is None else seats
    rows, heads = _row_indices(first, slots.shape[1], everyone)
    pages = cache.page_table.at[rows[..., None], heads[:, None], slots // page].get(mode="clip")
    return jnp.where(where, pages, P), slots % page


def free(cache: PagedCache, leaving: Bool[Array, " seats"]) -> PagedCache:
    """Empty some seats: their pages go back to the free list, the next sequence starts afresh.

    Args:
        cache: the cache.
        leaving: seats to empty; those that are empty already may be among them.
    """
    P, page = cache.pages.count, cache.pages.page_size
    entries = jnp.arange(cache.page_table.shape[2])
    owned = (entries < pages_of(cache.lengths, page)[..., None]) & leaving[:, None, None]
    owned = owned.reshape(-1)
    place = jnp.where(owned, cache.free_count + jnp.cumsum(owned) - 1, P)  # place P is dropped

    def emptied(x):
        # Not a product: what is left of a sequence with NaN must not reach the next one.
        return jnp.where(leaving[(..., *(None,) * (x.ndim - 1))], jnp.zeros((), x.dtype), x)

    return dataclasses.replace(
        cache,
        lengths=emptied(cache.lengths),
        state=jax.tree.map(emptied, cache.state),
        position=emptied(cache.position),
        free_pages=cache.free_pages.at[place].set(cache.page_table.reshape(-1), mode="drop"),
        free_count=cache.free_count + owned.sum(dtype=jnp.int32),
        failed=emptied(cache.failed),
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
