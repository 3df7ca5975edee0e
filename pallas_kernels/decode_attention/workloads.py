"""Inputs for tests and benchmarks of decode attention, made as unpleasant as a real cache.

Every row's pages lie in random order over the pool; whatever no row uses holds NaN; unused entries
of the page table hold ids of other rows' pages and numbers that are no page at all.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Pages that belong to no row; at least one, so that a stray read finds poison.
_SPARE_PAGES = 3

_NOT_PAGES = (-1, -(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A decoding step.

    Attributes:
        name: appears in test ids and tables.
        lengths: slots in use of every row, so it says how many rows there are.
        queries: query heads a row, G.
        width: head width, H.
        page: slots a page.
        dtype: of queries and pool.
        longest: slots that the page table has room for in a row; None is the longest of `lengths`.
    """

    name: str
    lengths: tuple[int, ...]
    queries: int
    width: int
    page: int
    dtype: str = "float32"
    longest: int | None = None

    def __str__(self) -> str:
        return f"{self.name}-G{self.queries}-H{self.width}-page{self.page}-{self.dtype}"


class Inputs(NamedTuple):
    """The positional arguments of `decode_attention`."""

    q: Float[Array, "R G H"]
    k_pages: Float[Array, "P page H"]
    v_pages: Float[Array, "P page H"]
    page_table: Int[Array, "R maxp"]
    lengths: Int[Array, "R"]


def ragged_lengths(
    rows: int, *, mean: int, longest: int, spread: float = 0.6, seed: int = 0
) -> tuple[int, ...]:
    """Draw lengths from a log-normal distribution, cut at 1 and `longest`, with the given mean.

    Args:
        rows: how many to draw.
        mean: of the drawn lengths, reached to within one slot by scaling them.
        longest: no row is longer.
        spread: standard deviation of the logarithm. 0.6 puts one row in six below 0.46 times the
            mean and one in six above 1.5 times.
        seed: of the draw.

    Raises:
        ValueError: a mean outside [1, longest].
    """
    if not 1 <= mean <= longest:
        raise ValueError(f"the mean length must be in [1, {longest}], got {mean}")
    drawn = np.random.default_rng(seed).lognormal(0.0, spread, rows)
    scale = mean / drawn.mean()
    # Cutting at `longest` lowers the mean, so scaling takes a few rounds.
    for _ in range(50):
        scale *= mean / np.clip(drawn * scale, 1, longest).mean()
    return tuple(int(length) for length in np.clip(drawn * scale, 1, longest).round())


def make_inputs(workload: Workload, seed: int = 0) -> Inputs:
    """Make normal queries, keys and values, shuffled pages, and poison wherever nothing lives."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(workload.lengths, np.int32)
    page, rows = workload.page, lengths.size
    pages_of = -(-lengths // page)
    longest = max(lengths) if workload.longest is None else workload.longest
    pool_pages = int(pages_of.sum()) + _SPARE_PAGES
    shuffled = rng.permutation(pool_pages).astype(np.int32)
    table = rng.integers(0, pool_pages, (rows, max(1, -(-longest // page))), np.int32)
    stray = rng.random(table.shape) < 0.5
    table[stray] = rng.choice((*_NOT_PAGES, pool_pages), int(stray.sum()))
    live = np.zeros((pool_pages, page), bool)
    starts = np.cumsum(pages_of) - pages_of
    for row, (length, start, count) in enumerate(zip(lengths, starts, pages_of, strict=True)):
        table[row, :count] = shuffled[start : start + count]
        live[table[row, :count]] = (np.arange(count * page) < length).reshape(count, page)

    def pool():
        values = rng.standard_normal((pool_pages, page, workload.width), np.float32)
        return jnp.asarray(np.where(live[..., None], values, np.nan), workload.dtype)

    q = rng.standard_normal((rows, workload.queries, workload.width), np.float32)
    return jax.block_until_ready(
        Inputs(
            jnp.asarray(q, workload.dtype), pool(), pool(), jnp.asarray(table), jnp.asarray(lengths)
        )
    )


def _workload(name, lengths, queries, width, page, **other) -> Workload:
    return Workload(name, tuple(lengths), queries, width, page, **other)


# What every implementation must get right. Together they cover every page size, G and H.
CORRECTNESS = (
    _workload("ragged", ragged_lengths(12, mean=300, longest=2000), 4, 64, 16),
    _workload("ragged", ragged_lengths(12, mean=300, longest=2000), 1, 128, 64),
    _workload("ragged", ragged_lengths(24, mean=200, longest=2000, spread=1.2), 8, 32, 8),
    _workload("ragged", ragged_lengths(12, mean=500, longest=2000), 4, 128, 32, dtype="bfloat16"),
    _workload("boundaries", (0, 1, 7, 8, 9, 15, 16, 17, 0, 63, 64, 65, 0), 4, 32, 8),
    _workload("boundaries", (0, 63, 64, 65, 127, 128, 129, 1, 4096, 0), 8, 64, 64),
    _workload("boundaries", (31, 32, 33, 0, 64, 0, 0, 2048), 4, 64, 32, dtype="bfloat16"),
    _workload("one_long", (3, 1, 2500, *[5] * 40), 4, 64, 16),
    _workload("one_long", (*[2] * 90, 9000), 1, 32, 64),
    _workload("many_short", tuple(i % 20 for i in range(300)), 1, 32, 16),
    _workload("all_empty", (0, 0, 0), 4, 64, 16),
    _workload("single", (1,), 8, 128, 128),
    _workload("roomy_table", (40, 0, 7), 4, 64, 8, longest=3000),
)
