"""Keys and values in pages that every row takes and gives back on its own, all on the device.

A row is one KV head of one layer of one sequence. Rows differ in length, since heads differ in how
much they merge: each holds as many pages of the common pool as its own slots need. Free pages are a
stack; pages are handed out by prefix sums over what the rows ask for, so nothing here waits for the
host. Three facts hold after every function, and the tests check them:

    a row of n slots owns the first ceil(n / page) entries of its page table;
    a page is owned by one row, or lies in `free_pages[:free_count]` once;
    a write without a page goes nowhere, and its sequence is marked in `failed`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import (
    DMCSettings,
    OpenSegment,
    empty_segment,
    merge_step,
    rotate_for_attention,
)
from dmc_jax.core.rope import rotate
from dmc_jax.errors import UserError
from pallas_kernels.cache_update.api import XLA, State, cache_update, choose

SMALLEST_PAGE = 8
STORAGE_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of up to `slots` sequences after `position` tokens each.

    R counts the KV heads of all layers in order, so layers may differ in how many they have. What
    pages hold beyond a row's length, and table entries beyond its pages, mean nothing.
    """

    k_pages: Float[Array, "P page H"]  # rotated, each key at the position of its newest token
    v_pages: Float[Array, "P page H"]
    page_table: Int[Array, "slots R maxp"]
    lengths: Int[Array, "slots R"]  # slots in use; the last of them is the open one
    open_segment: OpenSegment | None  # rows (slots, R), float32; None in a dense cache
    position: Int[Array, " slots"]  # tokens read so far, which is where the next one stands
    free_pages: Int[Array, " P"]  # a stack, of which the first `free_count` count
    free_count: Int[Array, ""]
    failed: Bool[Array, " slots"]  # lacked a page: what it holds is void, until it is freed


def init(
    config: ModelConfig,
    settings: DMCSettings | None,
    *,
    slots: int,
    pages: int,
    page_size: int,
    max_length: int,
    dtype: jnp.dtype,
) -> PagedCache:
    """An empty cache.

    Args:
        config: gives R and H.
        settings: gives the window; None: the dense policy, which takes a slot for every token.
        slots: sequences that the cache holds at a time.
        pages: P, in the pool.
        page_size: slots per page, a power of two.
        max_length: slots that one row may come to, which sizes the page tables. A dense row takes
            one per token.
        dtype: of keys and values in the pages, float32 or bfloat16. Merging is float32 always.

    Raises:
        UserError: a size below 1, a page size that is no power of two of 8 or more, another dtype.
    """
    for name, size in (("slots", slots), ("pages", pages), ("max_length", max_length)):
        if size < 1:
            raise UserError(f"cache: {name} must be 1 or more, got {size}")
    if page_size < SMALLEST_PAGE or page_size & (page_size - 1):
        raise UserError(
            f"cache: page_size must be a power of two, {SMALLEST_PAGE} or more, got {page_size}"
        )
    if jnp.dtype(dtype) not in STORAGE_DTYPES:
        raise UserError(f"cache: expected dtype float32 or bfloat16, got {jnp.dtype(dtype)}")
    pool = (pages, page_size, config.head_dim)
    rows = (slots, config.kv_rows)
    segment = None
    if settings is not None:
        segment = empty_segment(rows, config.head_dim, settings.window)
    return PagedCache(
        k_pages=jnp.zeros(pool, dtype),
        v_pages=jnp.zeros(pool, dtype),
        page_table=jnp.zeros((*rows, pages_of(max_length, page_size)), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        open_segment=segment,
        position=jnp.zeros(slots, jnp.int32),
        free_pages=jnp.arange(pages, dtype=jnp.int32),
        free_count=jnp.int32(pages),
        failed=jnp.zeros(slots, bool),
    )


# ---- the rows of one layer --------------------------------------------------------------------


def first_rows(config: ModelConfig) -> Int[Array, " L"]:
    """Row of every layer's first KV head."""
    return jnp.cumsum(jnp.array((0, *config.kv_heads_by_layer[:-1]), jnp.int32))


def take_rows(
    x: Array, first: int | Array, heads: int, sequences: Int[Array, " B"] | None = None
) -> Array:
    """Rows `first` to `first + heads` of an array [slots, R, ...]: [B, K, ...].

    Args:
        x: a field of the cache with a row axis.
        first: row of the layer's first KV head.
        heads: K of the layer.
        sequences: slots of the cache to read, any number outside reads some other slot; None: all.
    """
    x = jax.lax.dynamic_slice_in_dim(x, first, heads, axis=1)
    return x if sequences is None else x.at[sequences].get(mode="clip")


def put_rows(
    x: Array, new: Array, first: int | Array, sequences: Int[Array, " B"] | None = None
) -> Array:
    """The array with rows [B, K, ...] written back; of slots outside the cache nothing is."""
    if sequences is None:
        return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=1)
    return x.at[_row_indices(first, new.shape[1], sequences)].set(new, mode="drop")


def _row_indices(first, heads: int, sequences: Array) -> tuple[Array, Array]:
    return sequences[:, None], first + jnp.arange(heads)


def pages_of(slots: int | Array, page_size: int) -> int | Array:
    """Pages that so many slots take."""
    return -(-slots // page_size)


# ---- taking pages, writing, giving back -------------------------------------------------------


def reserve(
    cache: PagedCache,
    wanted: Int[Array, "B K"],
    first: int | Array = 0,
    *,
    sequences: Int[Array, " B"] | None = None,
    most: int = 1,
) -> tuple[PagedCache, Bool[Array, "B K"]]:
    """Make rows `wanted` slots long, with pages from the free list.

    Rows are served in order, those of the first sequence first, each with all it wants or nothing.
    A row that goes without keeps its length, and its sequence is marked as failed. That is so too
    where `wanted` exceeds the page table.

    Args:
        cache: the cache.
        wanted: new lengths, none below the row's present one. The new slots must be written next.
        first: row of the layer's first KV head.
        sequences: slots of the cache that `wanted` speaks of; None: all. Those outside the cache
            must want what they have.
        most: new pages that a row may want at most; static.

    Returns:
        (the cache, which rows are as long as wanted).
    """
    page, maxp = cache.k_pages.shape[1], cache.page_table.shape[2]
    B, K = wanted.shape
    lengths = take_rows(cache.lengths, first, K, sequences)
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
    everyone = jnp.arange(B) if sequences is None else sequences
    rows, heads = _row_indices(first, K, everyone)
    refused = ~granted.all(axis=1)
    cache = dataclasses.replace(
        cache,
        page_table=cache.page_table.at[rows[..., None], heads[:, None], entry].set(
            pages, mode="drop"
        ),
        lengths=put_rows(cache.lengths, jnp.where(granted, wanted, lengths), first, sequences),
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
    sequences: Int[Array, " B"] | None = None,
) -> PagedCache:
    """Put keys and values into slots that their rows have.

    Args:
        cache: the cache.
        keys, values: what the slots shall hold, keys rotated.
        slots: of each row, all different where they are written.
        where: which to write; the others go nowhere.
        first: row of the layer's first KV head.
        sequences: slots of the cache that the rows belong to; None: all.
    """
    at = _places(cache, slots, where, first, sequences)
    return dataclasses.replace(
        cache,
        k_pages=cache.k_pages.at[at].set(keys.astype(cache.k_pages.dtype), mode="drop"),
        v_pages=cache.v_pages.at[at].set(values.astype(cache.v_pages.dtype), mode="drop"),
    )


def _places(
    cache: PagedCache,
    slots: Int[Array, "B K T"],
    where: Bool[Array, "B K T"],
    first: int | Array,
    sequences: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, "B K T"], Int[Array, "B K T"]]:
    """Pages of some slots, and where in them; page P, which nobody has, is that of the others."""
    P, page, _ = cache.k_pages.shape
    everyone = jnp.arange(slots.shape[0]) if sequences is None else sequences
    rows, heads = _row_indices(first, slots.shape[1], everyone)
    pages = cache.page_table.at[rows[..., None], heads[:, None], slots // page].get(mode="clip")
    return jnp.where(where, pages, P), slots % page


def append_or_merge(
    cache: PagedCache,
    first: int | Array,
    k_t: Float[Array, "slots K H"],
    v_t: Float[Array, "slots K H"],
    decision: Float[Array, "slots K"] | None,
    omega: Float[Array, "slots K"] | None,
    *,
    active: Bool[Array, " slots"],
    settings: DMCSettings | None,
    frequencies: Float[Array, " H//2"],
    implementation: str | None = None,
) -> PagedCache:
    """Let the rows of one layer read a token: it joins the open slot, or takes the next one.

    The position stays as it is: it moves on once all layers have read the token.

    Args:
        cache: the cache.
        first: row of the layer's first KV head.
        k_t, v_t: the token's key and value, unrotated.
        decision: 1 merges, 0 appends; None where `settings` is.
        omega: the token's importance; None where `settings` is.
        active: sequences that read a token; the others, and failed ones, stay as they are.
        settings: those that the cache was made with; None: dense.
        frequencies: rotary, radians per token.
        implementation: "xla", or of `cache_update`, which takes one launch; None: the faster one
            as measured here. A dense cache is left to XLA.
    """
    K = k_t.shape[1]
    active = (active & ~cache.failed)[:, None]  # [slots, 1]
    name = choose(implementation)
    if settings is not None and name != XLA:
        token = k_t, v_t, decision, omega
        return _in_one_launch(cache, first, *token, active, settings, frequencies, name)
    if settings is None:
        key, value, opens, rotation = k_t, v_t, active, rotate
    else:
        before = jax.tree.map(lambda x: take_rows(x, first, K), cache.open_segment)
        after, key, value = merge_step(before, k_t, v_t, decision, omega, settings.window)
        opens, rotation = active & (after.count == 1), rotate_for_attention
        after = jax.tree.map(
            lambda new, old: jnp.where(active[(..., *(None,) * (new.ndim - 2))], new, old),
            after,
            before,
        )
        cache = dataclasses.replace(
            cache,
            open_segment=jax.tree.map(
                lambda x, new: put_rows(x, new, first), cache.open_segment, after
            ),
        )
    key = rotation(key[:, None].astype(k_t.dtype), cache.position[:, None], frequencies)[:, 0]
    lengths = take_rows(cache.lengths, first, K) + opens
    cache, granted = reserve(cache, lengths, first)
    return write(
        cache,
        key[:, :, None],
        value[:, :, None],
        (lengths - 1)[..., None],
        (granted & active)[..., None],
        first,
    )


def _in_one_launch(
    cache, first, k_t, v_t, decision, omega, active, settings, frequencies, implementation
) -> PagedCache:
    """`append_or_merge` by a kernel, which does all that follows when pages are reserved."""
    count = take_rows(cache.open_segment.count, first, k_t.shape[1])
    lengths = take_rows(cache.lengths, first, k_t.shape[1])
    lengths += active & ((count == 0) | (decision == 0))
    cache, granted = reserve(cache, lengths, first)
    at = _places(cache, (lengths - 1)[..., None], (granted & active)[..., None], first)
    state = cache_update(
        State(cache.k_pages, cache.v_pages, **vars(cache.open_segment)),
        *(k_t, v_t, decision, omega),
        first=first,
        active=active[:, 0],
        position=cache.position,
        page_ids=at[0][..., 0],
        offsets=at[1][..., 0],
        frequencies=frequencies,
        window=settings.window,
        implementation=implementation,
    )
    k_pages, v_pages, *segment = state
    return dataclasses.replace(
        cache, k_pages=k_pages, v_pages=v_pages, open_segment=OpenSegment(*segment)
    )


def free(cache: PagedCache, leaving: Bool[Array, " slots"]) -> PagedCache:
    """Empty some slots: their pages go back to the free list, the next sequence starts afresh.

    Args:
        cache: the cache.
        leaving: slots to empty; those that are empty already may be among them.
    """
    P, page, _ = cache.k_pages.shape
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
        open_segment=jax.tree.map(emptied, cache.open_segment),
        position=emptied(cache.position),
        free_pages=cache.free_pages.at[place].set(cache.page_table.reshape(-1), mode="drop"),
        free_count=cache.free_count + owned.sum(dtype=jnp.int32),
        failed=emptied(cache.failed),
    )


# ---- what it takes ----------------------------------------------------------------------------


def pages_for_one_token(cache: PagedCache, active: Bool[Array, " slots"]) -> Int[Array, ""]:
    """Pages that one more token of every active sequence takes at most.

    With as many free pages, the next step cannot run out of them.
    """
    full = cache.lengths % cache.k_pages.shape[1] == 0
    return (full & active[:, None]).sum(dtype=jnp.int32)


def bytes_live(cache: PagedCache) -> int:
    """Bytes of keys and values in pages that some row owns. Reads the device: not under jit."""
    pages = cache.free_pages.size - int(cache.free_count)
    page_bytes = (cache.k_pages.nbytes + cache.v_pages.nbytes) // cache.free_pages.size
    return pages * page_bytes


def bytes_reserved(cache: PagedCache) -> int:
    """Bytes of all arrays of the cache: the pool, page tables and open segments."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
