"""Inputs for tests of attention over pages: a chunk of prompts, made as unpleasant as a real one.

Rows hold slots from before the chunk, and differ in how many tokens take a new one. Pages lie in
random order over the pool; whatever is no live slot of the layer holds NaN, rows of other layers
included; unused entries of the page table hold numbers that are no page at all. The second sequence
ends in padding, the third was refused pages, and the last of four has a seat that the cache lacks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_NOT_PAGES = (-1, -(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A chunk in one layer.

    Attributes:
        batch: sequences, B.
        length: tokens of each, T.
        heads: query heads, N.
        kv_heads: K.
        width: head width, H.
        page: slots a page.
        before: slots that a row may hold before the chunk.
        dtype: of queries.
        pool: dtype of the pages.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    page: int
    before: int
    dtype: str = "float32"
    pool: str = "float32"

    def __str__(self) -> str:
        sizes = f"B{self.batch}-T{self.length}-N{self.heads}-K{self.kv_heads}-H{self.width}"
        return f"{sizes}-page{self.page}-after{self.before}-{self.dtype}-in-{self.pool}"


class Inputs(NamedTuple):
    """The positional arguments of `prefill_attention`, and `first`."""

    arrays: tuple[
        Float[Array, "B T N H"],
        Float[Array, "B T K H"],
        Float[Array, "B T K H"],
        Int[Array, "B K T"],
        Float[Array, "P page H"],
        Float[Array, "P page H"],
        Int[Array, "seats R maxp"],
        Int[Array, "seats R"],
        Int[Array, " B"],
    ]
    first: Any  # int32 []


def make_inputs(workload: Workload, seed: int = 0) -> Inputs:
    """Draw a chunk of a layer in the middle of three."""
    rng = np.random.default_rng(seed)
    B, T, K, page = workload.batch, workload.length, workload.kv_heads, workload.page
    before = rng.integers(0, workload.before + 1, (B, K, 1))
    opens = rng.random((B, K, T)) < rng.uniform(0.1, 1.0, (B, K, 1))
    opens[..., 0] |= before[..., 0] == 0
    slot = before - 1 + np.cumsum(opens, axis=2)
    lengths = slot.max(axis=2) + 1
    slot[1:2, :, T // 2 :] = 0  # padding
    lengths[2:3] = before[2:3, :, 0]  # refused
    seats = rng.permutation(B)
    slot[3:][-1:] = 0
    seats[3:][-1:] = B

    pages_of = -(-lengths // page)
    pool_pages = int(pages_of.sum()) + 2
    maxp = int(pages_of.max()) + 1
    table = rng.choice((*_NOT_PAGES, pool_pages), (B, 3 * K, maxp)).astype(np.int32)
    of_all = rng.integers(0, maxp * page, table.shape[:2], np.int32)
    shuffled, live = rng.permutation(pool_pages), np.zeros((pool_pages, page), bool)
    for b, head in np.ndindex(B, K):
        if seats[b] < B:
            count, length = pages_of[b, head], lengths[b, head]
            mine, shuffled = shuffled[:count], shuffled[count:]
            table[seats[b], K + head, :count] = mine
            of_all[seats[b], K + head] = length
            live[mine] = (np.arange(count * page) < length).reshape(count, page)

    def normal(*sizes, dtype=workload.dtype):
        return jnp.asarray(rng.standard_normal((*sizes, workload.width)), dtype)

    pools = (
        jnp.where(live[..., None], normal(pool_pages, page, dtype=workload.pool), jnp.nan)
        for _ in range(2)
    )
    return Inputs(
        (
            normal(B, T, workload.heads),
            normal(B, T, K),
            normal(B, T, K, dtype="float32"),  # as averages are
            jnp.asarray(slot, jnp.int32),
            *pools,
            *(jnp.asarray(x, jnp.int32) for x in (table, of_all, seats)),
        ),
        jnp.int32(K),
    )


# What every implementation must get right: a single token; groups and widths that are no powers of
# two; pages smaller and larger than a block of slots; every pair of dtypes.
CORRECTNESS = (
    Workload(1, 1, 1, 1, 64, 16, 0),
    Workload(4, 40, 8, 2, 64, 16, 100),
    Workload(2, 75, 3, 3, 128, 64, 200, "bfloat16", "bfloat16"),
    Workload(3, 33, 6, 2, 24, 8, 70, "float32", "bfloat16"),
    Workload(4, 64, 4, 1, 16, 64, 20, "bfloat16", "float32"),
)
