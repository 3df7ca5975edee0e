"""Decode attention in plain XLA, with work in proportion to the live tokens.

Gathering every row to the length of the longest would give the compression back. Instead the rows
are cut into items of some 64 slots, and a loop whose trip count is known only at run time takes 64
items a step, whatever rows they belong to:

    item      0    1    2    3    4  |  5    6    7 ...
    row       0    0    0    1    3  |  3    3    4 ...     (row 2 is empty)

A step gathers the pages of its items, computes each item's softmax on its own, and merges what
belongs to one row by log-sum-exp (the partial sums of FlashDecoding). Items are in row order, so
only the last row of a step can go on in the next: its partial sum is all that the loop carries.

One page a step would need no gather, but pays the cost of a loop step for every page and keeps
one core busy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped, UInt16

# Larger items waste more on rows that end inside one; smaller ones mean more merging. Measured
# with H = 64: 4096 slots a step (1 MiB of float32 keys) is as good as any for 32 to 2048 rows.
_ITEM_SLOTS = 64
_STEP_SLOTS = 4096

# A finite stand-in for minus infinity: an item past the last is masked as a whole.
_MASKED = -1e30


class _Partial(NamedTuple):
    """Softmax over some of a row's slots: its value is weighted / total; the first axis is n."""

    row: Int[Array, "n"]  # R where it belongs to no row
    peak: Float[Array, "n G"]  # largest score
    total: Float[Array, "n G"]  # sum of exp(score - peak)
    weighted: Float[Array, "n G H"]  # sum of exp(score - peak) * value


@jax.jit
def decode_attention(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    scale: float | Float[Array, ""],
    mass: tuple[UInt16[Array, "P page"], Float[Array, "R"]] | None = None,
    scales: tuple[Float[Array, "P page"], Float[Array, "P page"]] | None = None,
) -> Float[Array, "R G H"]:
    """Attend 64 items a step; see `api.decode_attention` for the contract."""
    pools = k_pages, v_pages, scales
    return _decode(q, pools, page_table, lengths, scale, mass, scored=False)[0]


@jax.jit
def decode_attention_and_weights(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    scale: float | Float[Array, ""],
    scales: tuple[Float[Array, "P page"], Float[Array, "P page"]] | None = None,
) -> tuple[Float[Array, "R G H"], Float[Array, "R G S"]]:
    """Keep the scores of all items; see `api.decode_attention_and_weights` for the contract."""
    pools = k_pages, v_pages, scales
    out, scores = _decode(q, pools, page_table, lengths, scale, None, scored=True)
    live = scores != _MASKED  # NaN is live
    peak = scores.max(axis=(1, 3), keepdims=True)
    weights = jnp.where(live, jnp.exp(scores - peak), 0.0)  # [R, items, G, slots]
    total = weights.sum(axis=(1, 3), keepdims=True)
    weights = jnp.where(total > 0, weights / total, 0.0).swapaxes(1, 2)
    capacity = page_table.shape[1] * k_pages.shape[1]
    return out, weights.reshape(*q.shape[:2], -1)[..., :capacity]


def _decode(q, pools, page_table, lengths, scale, mass, *, scored: bool):
    """Attend; where `scored`, keep the scores [R, items, G, slots], which else are None."""
    R, G, H = q.shape
    page = pools[0].shape[1]
    item_pages = max(1, _ITEM_SLOTS // page)
    item_slots = item_pages * page
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % item_pages)))
    table = table.reshape(R, -1, item_pages)  # [R, items of a full row, item_pages]
    n = min(max(1, _STEP_SLOTS // item_slots), R * table.shape[1])
    items = -(-lengths // item_slots)  # [R]
    ends = jnp.cumsum(items)

    def step(i, carry):
        out, scores, unfinished = carry
        item = i * n + jnp.arange(n, dtype=jnp.int32)
        row = jnp.searchsorted(ends, item, side="right").astype(jnp.int32)  # R past the last item
        known = jnp.minimum(row, R - 1)
        index = item - (ends - items)[known]  # of the item in its row
        live = jnp.arange(item_slots) < (lengths[known] - index * item_slots)[:, None]
        pages = table.at[known, index].get(mode="clip")  # [n, item_pages]
        keys, values, scales = jax.tree.map(lambda pool: _gather(pool, pages), pools)
        bias = None
        if mass is not None:
            tokens, gamma = mass
            bias = gamma[known][:, None] * jnp.log(_gather(tokens, pages))
        queries = q[known].astype(jnp.float32) * scale
        partial, scores_i = _attend(queries, keys, values, live, row, bias, scales)
        if scored:
            scores = scores.at[row, index].set(scores_i, mode="drop")
        merged, last = _merge_rows(
            jax.tree.map(lambda *x: jnp.concatenate(x), unfinished, partial), R
        )
        # An unfinished row is written too; the next step writes over it.
        value = merged.weighted / merged.total[..., None]
        out = out.at[merged.row].set(value, mode="drop")
        unfinished = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, last, 1), merged)
        return out, scores, unfinished

    nothing = _Partial(
        row=jnp.full(1, R, jnp.int32),
        peak=jnp.full((1, G), _MASKED),
        total=jnp.zeros((1, G)),
        weighted=jnp.zeros((1, G, H)),
    )
    steps = -(-ends[-1] // n)
    # Float32 until the end: the CPU scatters bfloat16 by widening and narrowing all of `out`.
    out = jnp.zeros(q.shape, jnp.float32)
    scores = jnp.full((R, table.shape[1], G, item_slots), _MASKED) if scored else None
    out, scores, _ = jax.lax.fori_loop(0, steps, step, (out, scores, nothing))
    return out.astype(q.dtype), scores


def _gather(
    pool: Shaped[Array, "P page *any"], pages: Int[Array, "n item_pages"]
) -> Float[Array, "n slots *any"]:
    """Read the pages of every item as float32; "clip" because unused entries may be anything."""
    # XLA for CPU (seen in jax 0.10.2) widens a bfloat16 operand before it gathers, and as the pool
    # is the same in every step, moves that float32 copy of the whole pool in front of the loop.
    # Behind this barrier the pool seems to change with the step: only what is read gets widened.
    pool, pages = jax.lax.optimization_barrier((pool, pages))
    rows = pool.at[pages].get(mode="clip").astype(jnp.float32)
    return rows.reshape(pages.shape[0], -1, *pool.shape[2:])


def _attend(
    q: Float[Array, "n G H"],
    keys: Float[Array, "n slots H"],
    values: Float[Array, "n slots H"],
    live: Bool[Array, "n slots"],
    row: Int[Array, "n"],
    bias: Float[Array, "n slots"] | None,
    scales: tuple[Float[Array, "n slots"], Float[Array, "n slots"]] | None,
) -> tuple[_Partial, Float[Array, "n G slots"]]:
    """Attend over each item on its own; also its scores."""
    # Dead slots may hold NaN, and 0 * NaN is NaN: a zero weight is no mask.
    values = jnp.where(live[..., None], values, 0.0)
    scores = jnp.einsum("nGH,nSH->nGS", q, keys, precision="highest")
    if scales is not None:
        scores *= scales[0][:, None]
    if bias is not None:
        scores += bias[:, None]
    scores = jnp.where(live[:, None, :], scores, _MASKED)
    peak = scores.max(axis=-1)
    weights = jnp.exp(scores - peak[..., None])
    of_values = weights
    if scales is not None:
        of_values = weights * jnp.where(live, scales[1], 0.0)[:, None]
    weighted = jnp.einsum("nGS,nSH->nGH", of_values, values, precision="highest")
    return _Partial(row, peak, weights.sum(axis=-1), weighted), scores


def _merge_rows(partial: _Partial, R: int) -> tuple[_Partial, Int[Array, ""]]:
    """Merge neighbours of one row; return as many entries, and the index of the last in use.

    Sums go by scatter, not by a 0/1 matrix: a NaN in one row must not reach another. Entries not
    in use have row R (and NaN from 0 / 0 later on), and nobody reads them.
    """
    n = partial.row.size
    begins = partial.row[1:] != partial.row[:-1]
    group = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(begins, dtype=jnp.int32)])

    def gathered(x):
        return jax.ops.segment_sum(x, group, n, indices_are_sorted=True)

    peak = jax.ops.segment_max(partial.peak, group, n, indices_are_sorted=True)
    shrink = jnp.exp(partial.peak - peak[group])
    merged = _Partial(
        row=jnp.full(n, R, jnp.int32).at[group].set(partial.row),
        peak=peak,
        total=gathered(shrink * partial.total),
        weighted=gathered(shrink[..., None] * partial.weighted),
    )
    return merged, group[-1]
