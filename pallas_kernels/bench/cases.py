"""What `bench` times: rows of a decoding step of one layer, as pages and padded.

All is made on the device, since gigabytes of random numbers take the host minutes. Pages of a row
lie all over the pool; what no row uses holds NaN, and table entries past a row's pages any number.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention.workloads import ragged_lengths
from pallas_kernels.timing import COLD_BYTES, buffers_for

DTYPE = jnp.bfloat16
MB = 10**6

# The longest of uneven rows over their mean. Their spread lets about one row in 150 come to that
# without the cut; the shortest are some 1/25 of the mean.
UNEVEN, _SPREAD = 10, 1.0

_STRAY_ENTRY = 2**31 - 1

# XLA takes minutes to compile 32 calls of dense attention. Of 8 MB that is twice any L2 of today.
_MOST_PADDED = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One decoding step of one layer.

    Attributes:
        lengths: even: all rows are equally long; uneven: the longest is 10 times the mean; empty:
            no row has a slot.
        live_bytes: keys and values that there are to read, to within a slot a row.
        page: slots.
        width: head width, H.
        queries: query heads a row, G.
    """

    lengths: str
    live_bytes: int
    page: int
    width: int
    queries: int

    @property
    def slot_bytes(self) -> int:
        """Of a key and a value."""
        return 2 * self.width * jnp.dtype(DTYPE).itemsize

    @property
    def rows(self) -> int:
        """More rows where there is more to read, each of some hundred slots, as in decoding."""
        return int(np.clip(2 ** round(np.log2(self.live_bytes / MB) * 0.6 + 5), 16, 2048))

    def row_lengths(self) -> np.ndarray:
        """Slots of every row, int32 [R]."""
        mean = max(round(self.live_bytes / self.slot_bytes / self.rows), 1)
        if self.lengths == "uneven":
            drawn = ragged_lengths(self.rows, mean=mean, longest=UNEVEN * mean, spread=_SPREAD)
            lengths = np.array(drawn, np.int32)
            # Equal in bytes to even rows, and as uneven as it says whatever was drawn.
            lengths[lengths.argmax()] = UNEVEN * mean
            spare = lengths.sum() - mean * self.rows
            order = np.argsort(lengths)[self.rows // 2 : self.rows * 9 // 10]
            lengths[order] -= np.int32(spare // order.size)
            return np.maximum(lengths, 1)
        return np.full(self.rows, mean if self.lengths == "even" else 0, np.int32)


class Pages(NamedTuple):
    """A case as pages: what all calls read from, and a page table for every set."""

    q: Float[Array, "R G H"]
    k_pages: Float[Array, "P page H"]
    v_pages: Float[Array, "P page H"]
    lengths: Int[Array, " R"]
    tables: list[Int[Array, "R maxp"]]


def make_pages(case: Case, cold_bytes: int = COLD_BYTES) -> Pages:
    """Make as many sets of pages, in one pool, as it takes to read from memory and not a cache.

    Args:
        case: gives the sizes.
        cold_bytes: to read before the same again.
    """
    rng = np.random.default_rng(0)
    lengths = case.row_lengths()
    pages_of = -(-lengths // case.page)
    sets = buffers_for(case.live_bytes, cold_bytes)
    each = int(pages_of.sum())
    pool = max(sets * each, 1) + 1  # one page that no row has
    shuffled = rng.permutation(pool).astype(np.int32)
    live = np.zeros((pool, case.page), bool)
    tables = []
    entry = np.arange(max(pages_of.max(), 1))
    starts = np.cumsum(pages_of) - pages_of
    used = entry < pages_of[:, None]  # [R, maxp]
    of_slot = np.arange(case.page) < (lengths[:, None] - entry * case.page)[..., None]
    for first in range(0, sets * each, each) if each else [0]:
        at = np.where(used, first + starts[:, None] + entry, 0)
        table = np.where(used, shuffled[at], _STRAY_ENTRY).astype(np.int32)
        live[table[used]] = of_slot[used]
        tables.append(jnp.asarray(table))
    keys = jax.random.split(jax.random.key(0), 3)
    live = jnp.asarray(live)
    k_pages, v_pages = (_pool(key, live, case.width) for key in keys[:2])
    q = jax.random.normal(keys[2], (case.rows, case.queries, case.width), DTYPE)
    return jax.block_until_ready(Pages(q, k_pages, v_pages, jnp.asarray(lengths), tables))


@functools.partial(jax.jit, static_argnames="width")
def _pool(key: Array, live: Bool[Array, "P page"], width: int) -> Float[Array, "P page H"]:
    return jnp.where(live[..., None], jax.random.normal(key, (*live.shape, width), DTYPE), jnp.nan)


def make_padded(pages: Pages, cold_bytes: int = COLD_BYTES) -> list[tuple[Array, Array]]:
    """The same keys and values with every row padded to the longest, [R, S, H] each, zeros there.

    As many sets as it takes, up to 16; fewer than those of pages where padding makes them larger.
    """
    longest = max(int(pages.lengths.max()), 1)
    R, _, H = pages.q.shape
    sets = buffers_for(R * longest * 2 * H * pages.k_pages.dtype.itemsize, cold_bytes)
    return [
        tuple(_padded(pool, table, pages.lengths, longest) for pool in pages[1:3])
        for table in pages.tables[: min(sets, _MOST_PADDED)]
    ]


@functools.partial(jax.jit, static_argnames="longest")
def _padded(pool, table, lengths, longest):
    slots = pool.at[table].get(mode="clip").reshape(table.shape[0], -1, pool.shape[-1])
    live = jnp.arange(longest) < lengths[:, None]
    return jnp.where(live[..., None], slots[:, :longest], 0)
