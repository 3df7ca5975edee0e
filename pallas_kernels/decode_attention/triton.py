"""Decode attention in Triton, for NVIDIA GPUs: reads every live slot once, and little else.

Two kernels. In the first, a fixed number of programs share the blocks of all rows evenly (see
`plan`). A program goes through its items, pieces of rows, and takes an item block by block:

    page ids  ->  keys, values [block, H]  ->  scores [G, block]  ->  running softmax [G, H]

The compiler turns the loop over blocks into a pipeline: page ids two turns ahead, keys and values
by 16-byte copies into shared memory one or two turns ahead of their use. The G queries of a row
are padded to 16, the least that tensor cores take. That is no waste where memory is the limit:
tensor cores do the padded product with fewer instructions than a sum over G = 1 takes, since that
would have to widen every element first.

A row that is one item is done then. Of the others, an item's result is its own softmax and its
log-sum-exp (to base 2), and the second kernel joins them: o = sum_i 2^(l_i - m) o_i / sum_i
2^(l_i - m), with m the largest l_i, as in FlashDecoding. Few rows are in several pieces, as many as
there are programs at most.

Page tables, lengths and plans are those of all layers of a step, and never copied: a kernel is told
where the rows of its layer begin.
"""

import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int, Int8, UInt16

from pallas_kernels import target
from pallas_kernels.decode_attention.api import Plan, rows_of
from pallas_kernels.decode_attention.plan import make_plan
from pallas_kernels.decode_attention.settings import Settings, settings_for
from pallas_kernels.triton_call import launch, unavailable

__all__ = ["decode_attention", "plan_rows", "unavailable"]


_LOG2_E = 1.4426950408889634  # exp(x) = exp2(x LOG2_E), and exp2 is one instruction

# The least rows and columns that tensor cores take of a left operand.
_LEAST_QUERIES = 16
_LEAST_WIDTH = 16

# What joins items: partial results that a program holds at a time, 32 in a thread, and items.
JOIN_WARPS = 4
_JOINED_VALUES = 4096
_MOST_JOINED_ITEMS = 16


@triton.jit
@no_type_check
def attend_items(
    q_ptr,  # [rows, G, H]
    k_ptr,  # [P, PAGE, H]
    v_ptr,
    table_ptr,  # [seats, R, maxp]
    lengths_ptr,  # [seats, R]
    factor_ptr,  # [1]
    at_ptr,  # [6], see `_where`
    row_ptr,  # [layers, items]; these five are the plan's
    begin_ptr,
    end_ptr,
    of_program_ptr,  # [layers, programs + 1]
    of_row_ptr,  # [layers, rows + 1]
    tokens_ptr,  # [P, PAGE], uint16; this and the next mean nothing without MASS
    gamma_ptr,  # [rows]
    k_scale_ptr,  # [P, PAGE]; this and the next mean nothing without SCALED
    v_scale_ptr,
    out_ptr,  # [rows, G, H]
    partial_ptr,  # [items, G, H], float32
    lse_ptr,  # [items, G], float32, to base 2
    K: tl.constexpr,  # rows of a sequence; dividing by what is not known takes 32 registers
    G: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,  # G and H, padded to powers of two
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # slots at a time
    WIDEN: tl.constexpr,  # compute in float32; else in bfloat16, with sums in float32
    MASS: tl.constexpr,  # scores rise by gamma log tokens
    SCALED: tl.constexpr,  # keys and values are int8
):
    """One program per stretch of the plan; item i of many goes to partial[i] and lse[i]."""
    R, first, maxp = tl.load(at_ptr), tl.load(at_ptr + 1), tl.load(at_ptr + 2)
    layer = tl.load(at_ptr + 3)
    of_items = layer * tl.load(at_ptr + 4)
    program = layer * (tl.num_programs(0) + 1) + tl.program_id(0)
    g = tl.arange(0, QUERIES)[:, None]
    h = tl.arange(0, WIDTH)[None, :]
    block = tl.arange(0, BLOCK)
    # Not `&`: in interpreted kernels it is wrong for masks that broadcast, in some versions.
    real = tl.where(g < G, h < H, False)
    dtype: tl.constexpr = tl.float32 if WIDEN else tl.bfloat16
    # Three products of truncated float32 add up to nearly all of its precision.
    precision: tl.constexpr = "tf32x3" if WIDEN else "tf32"
    factor = tl.load(factor_ptr)
    for item in tl.range(
        tl.load(of_program_ptr + program), tl.load(of_program_ptr + program + 1), num_stages=1
    ):
        row = tl.load(row_ptr + of_items + item)
        begin = tl.load(begin_ptr + of_items + item)
        kept = (row // K).to(tl.int64) * R + first + row % K
        # The plan may have been made for rows that did not grow after all.
        end = tl.minimum(tl.load(end_ptr + of_items + item), tl.load(lengths_ptr + kept))
        of_table = kept * maxp
        q = tl.load(q_ptr + row.to(tl.int64) * (G * H) + g * H + h, mask=real, other=0.0).to(dtype)
        if MASS:
            gamma = tl.load(gamma_ptr + row)
        peak = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.full([QUERIES], 0.0, tl.float32)
        weighted = tl.full([QUERIES, WIDTH], 0.0, tl.float32)
        for start in tl.range(begin, end, BLOCK):
            slot = start + block
            live = slot < end
            page = tl.load(table_ptr + of_table + slot // PAGE, mask=live, other=0)
            at = page.to(tl.int64) * (PAGE * H) + (slot % PAGE) * H
            mask = live[:, None]
            if WIDTH != H:
                mask = tl.where(mask, h < H, False)
            # Dead slots may hold NaN, and 0 * NaN is NaN: they are not read at all.
            keys = tl.load(k_ptr + at[:, None] + h, mask=mask, other=0.0).to(dtype)
            values = tl.load(v_ptr + at[:, None] + h, mask=mask, other=0.0).to(dtype)
            scores = tl.dot(q, tl.trans(keys), input_precision=precision) * factor
            of_slot = page.to(tl.int64) * PAGE + slot % PAGE
            if SCALED:
                k_scale = tl.load(k_scale_ptr + of_slot, mask=live, other=0.0).to(tl.float32)
                v_scale = tl.load(v_scale_ptr + of_slot, mask=live, other=0.0).to(tl.float32)
                scores *= k_scale[None, :]
            if MASS:
                tokens = tl.load(tokens_ptr + of_slot, mask=live, other=1).to(tl.float32)
                scores += (gamma * tl.log2(tokens))[None, :]
            scores = tl.where(live[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            if SCALED:
                weights *= v_scale[None, :]
            weighted = tl.dot(
                weights.to(dtype), values, weighted * shrink[:, None], input_precision=precision
            )
            peak = higher
        lse = (peak + tl.log2(total))[:, None]
        weighted = weighted / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: nothing was live
        of_row = layer * (tl.load(at_ptr + 5) + 1) + row
        if tl.load(of_row_ptr + of_row + 1) - tl.load(of_row_ptr + of_row) == 1:
            out = weighted.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row.to(tl.int64) * (G * H) + g * H + h, out, mask=real)
        else:
            of_item = tl.cast(item, tl.int64) * G
            tl.store(lse_ptr + of_item + g, lse, mask=g < G)
            tl.store(partial_ptr + of_item * H + g * H + h, weighted, mask=real)


@triton.jit
@no_type_check
def join_items(
    out_before,  # is the last
    partial_ptr,  # [items, G, H], float32
    lse_ptr,  # [items, G], float32, to base 2
    at_ptr,  # [6], see `_where`
    of_row_ptr,  # [layers, rows + 1], the plan's
    out_ptr,  # [rows, G, H]
    G: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,  # H, padded to a power of two
    QUERIES: tl.constexpr,  # a program
    ITEMS: tl.constexpr,  # at a time
):
    """One program per row and `QUERIES` queries; a row of one item is done already."""
    row = tl.program_id(0)
    of_row_ptr += tl.load(at_ptr + 3) * (tl.num_programs(0) + 1)
    g = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    h = tl.arange(0, WIDTH)
    real = tl.where((g < G)[:, None], (h < H)[None, :], False)
    first = tl.load(of_row_ptr + row)
    end = tl.load(of_row_ptr + row + 1)
    if end - first == 1:
        return
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.full([QUERIES], 0.0, tl.float32)
    weighted = tl.full([QUERIES, WIDTH], 0.0, tl.float32)
    for start in tl.range(first, end, ITEMS, num_stages=1):
        item = start + tl.arange(0, ITEMS)
        live = (item < end)[:, None]
        at = item.to(tl.int64)[:, None] * G + g[None, :]
        lse = tl.load(
            lse_ptr + at, mask=tl.where(live, (g < G)[None, :], False), other=float("-inf")
        )
        partial = tl.load(
            partial_ptr + at[:, :, None] * H + h[None, None, :],
            mask=tl.where(live[:, :, None], real[None, :, :], False),
            other=0.0,
        )
        higher = tl.maximum(peak, tl.max(lse, 0))
        # Items without a live slot have minus infinity, and -inf - -inf is NaN.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - finite)
        weights = tl.exp2(lse - finite[None, :])
        total = total * shrink + tl.sum(weights, 0)
        weighted = weighted * shrink[:, None] + tl.sum(weights[:, :, None] * partial, 0)
        peak = higher
    out = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
    to = (row.to(tl.int64) * G + g[:, None]) * H + h[None, :]
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=real)


def decode_attention(
    q: Float[Array, "rows G H"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "seats R maxp"],
    lengths: Int[Array, "seats R"],
    scale: float,
    plan: Plan | None = None,
    mass: tuple[UInt16[Array, "P page"], Float[Array, "rows"]] | None = None,
    scales: tuple[Float[Array, "P page"], Float[Array, "P page"]] | None = None,
    *,
    first: int | Int[Array, ""] = 0,
    settings: Settings | None = None,
) -> Float[Array, "rows G H"]:
    """Attend as planned; see `api.decode_attention` for the contract.

    Args:
        settings: to try others than the kept ones, which tuning does.
    """
    settings = settings or settings_for(target.current().kind)
    if plan is None:
        plan = plan_rows(rows_of(lengths, first, q.shape[0]), k_pages, settings)
    return _attend(
        *(q, k_pages, v_pages, page_table, lengths, jnp.asarray(scale, jnp.float32)),
        plan,
        _where(q, page_table, first, plan),
        mass,
        scales,
        settings=settings,
        capability=target.current().capability,
        launch=launch,
    )


def _where(q, page_table, first, plan) -> Int[Array, " 6"]:
    """Say where the rows of q are among all: what does not compile the kernels anew.

    Rows of a sequence in all layers, the first of this layer, pages of a row's table, the layer of
    the plan, items of a layer's plan, its rows.
    """
    _, R, maxp = page_table.shape
    numbers = R, first, maxp, plan.layer, plan.row.shape[-1], q.shape[0]
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in numbers])


def plan_rows(
    lengths: Int[Array, "*L rows"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    settings: Settings | None = None,
) -> Plan:
    """Make the plan, of one layer or of several, that suits this pool on this device.

    Args:
        settings: as for `decode_attention`, which must be given the same.
    """
    settings = settings or settings_for(target.current().kind)
    return make_plan(
        lengths,
        block=settings.block(padded_width(k_pages.shape[-1]), k_pages.dtype.itemsize),
        programs=target.current().cores * settings.programs_per_core,
        capability=target.current().capability,
        launch=launch,
    )


@functools.partial(jax.jit, static_argnames=("settings", "capability", "launch"))
def _attend(
    q,
    k_pages,
    v_pages,
    page_table,
    lengths,
    scale,
    plan,
    at,
    mass,
    scales,
    *,
    settings,
    capability,
    launch,
):
    rows, G, H = q.shape
    items, programs = plan.row.shape[-1], plan.of_program.shape[-1] - 1
    joining = join_constants(q, plan)
    factor = (scale * _LOG2_E).reshape(1)
    out, partial, lse = launch(
        attend_items,
        *(q, k_pages, v_pages, page_table, lengths),
        *(factor, at, plan.row, plan.begin, plan.end, plan.of_program, plan.of_row),
        # Without: what is not read.
        *((lengths, factor) if mass is None else mass),
        *((factor, factor) if scales is None else scales),
        out=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((items, G, H), jnp.float32),
            jax.ShapeDtypeStruct((items, G), jnp.float32),
        ),
        grid=(programs,),
        num_warps=settings.warps,
        num_stages=settings.stages,
        capability=capability,
        **attend_constants(q, k_pages, page_table, plan.block, massive=mass is not None),
    )
    (out,) = launch(
        join_items,
        *(out, partial, lse, at, plan.of_row),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        in_place={0: 0},
        grid=(rows, -(-G // joining["QUERIES"])),
        num_warps=JOIN_WARPS,
        num_stages=1,
        capability=capability,
        **joining,
    )
    return out


def attend_constants(
    q: Any, k_pages: Any, page_table: Any, block: int, *, massive: bool = False
) -> dict[str, Any]:
    """The compile-time arguments of `attend_items` for arrays of these shapes and dtypes."""
    rows, G, H = q.shape
    return {
        "K": rows // page_table.shape[0],
        "G": G,
        "H": H,
        "PAGE": k_pages.shape[1],
        "QUERIES": padded_queries(G),
        "WIDTH": padded_width(H),
        "BLOCK": block,
        "WIDEN": widens(q, k_pages),
        "MASS": massive,
        "SCALED": k_pages.dtype == jnp.int8,
    }


def join_constants(q: Any, plan: Plan) -> dict[str, Any]:
    """The compile-time arguments of `join_items` for these shapes."""
    _, G, H = q.shape
    items, queries = joined_at_a_time(plan, G, H)
    return {
        "G": G,
        "H": H,
        "WIDTH": padded_width(H),
        "QUERIES": queries,
        "ITEMS": items,
    }


def padded_queries(G: int) -> int:
    """Queries a row inside the kernels, a power of two."""
    return max(_LEAST_QUERIES, _power_of_two(G))


def padded_width(H: int) -> int:
    """Head width inside the kernels, a power of two."""
    return max(_LEAST_WIDTH, _power_of_two(H))


def joined_at_a_time(plan: Plan, G: int, H: int) -> tuple[int, int]:
    """Items and queries of a row that a program joins at a time, powers of two.

    Many rows: few items each, and so many programs that each should take all queries of its row.
    Few rows: many items each, to be read at once, by as many programs as there are queries.
    """
    rows, programs = plan.of_row.shape[-1] - 1, plan.of_program.shape[-1] - 1
    items = min(_power_of_two(programs // rows + 2), _MOST_JOINED_ITEMS)
    queries = max(_JOINED_VALUES // (items * padded_width(H)), 1)
    return items, min(queries, _power_of_two(G))


def widens(q: Any, k_pages: Any) -> bool:
    """Whether the kernels compute in float32, and not in bfloat16 with float32 sums."""
    return jnp.promote_types(q.dtype, k_pages.dtype) == jnp.float32


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
