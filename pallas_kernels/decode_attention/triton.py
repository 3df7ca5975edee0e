"""Decode attention in Triton, for NVIDIA GPUs: reads every live slot once, and little else.

Two kernels. In the first, a fixed number of programs share the blocks of all rows evenly (see
`plan`). A program goes through its items, pieces of rows, and takes an item block by block:

    page ids  ->  keys, values [block, H]  ->  scores [G, block]  ->  running softmax [G, H]

The compiler turns the loop over blocks into a pipeline: page ids two turns ahead, keys and values
by 16-byte copies into shared memory one or two turns ahead of their use. The G queries of a row
are padded to 16, the least that tensor cores take. That is no waste where memory is the limit:
tensor cores do the padded product with fewer instructions than a sum over G = 1 takes, since that
would have to widen every element first.

An item's result is its own softmax and its log-sum-exp (to base 2). The second kernel joins the
items of each row: o = sum_i 2^(l_i - m) o_i / sum_i 2^(l_i - m), with m the largest l_i, as in
FlashDecoding.
"""

import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels import target
from pallas_kernels.decode_attention import gpu
from pallas_kernels.decode_attention.plan import Plan
from pallas_kernels.decode_attention.settings import Settings, settings_for
from pallas_kernels.triton_call import launch, unavailable

__all__ = ["decode_attention", "plan_rows", "unavailable"]


@triton.jit
@no_type_check
def attend_items(
    q_ptr,  # [R, G, H]
    k_ptr,  # [P, PAGE, H]
    v_ptr,
    table_ptr,  # [R, MAXP]
    lengths_ptr,  # [R]
    factor_ptr,  # [1]
    row_ptr,  # [items]; these four are the plan's
    begin_ptr,
    end_ptr,
    of_program_ptr,  # [programs + 1]
    out_ptr,  # [items, G, H], float32
    lse_ptr,  # [items, G], float32, to base 2
    G: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    MAXP: tl.constexpr,
    QUERIES: tl.constexpr,  # G and H, padded to powers of two
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # slots at a time
    WIDEN: tl.constexpr,  # compute in float32; else in bfloat16, with sums in float32
):
    """One program per stretch of the plan; item i goes to out[i] and lse[i]."""
    program = tl.program_id(0)
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
        row = tl.load(row_ptr + item).to(tl.int64)
        begin = tl.load(begin_ptr + item)
        # The plan may have been made for rows that did not grow after all.
        end = tl.minimum(tl.load(end_ptr + item), tl.load(lengths_ptr + row))
        q = tl.load(q_ptr + row * (G * H) + g * H + h, mask=real, other=0.0).to(dtype)
        peak = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.full([QUERIES], 0.0, tl.float32)
        weighted = tl.full([QUERIES, WIDTH], 0.0, tl.float32)
        for start in tl.range(begin, end, BLOCK):
            slot = start + block
            live = slot < end
            page = tl.load(table_ptr + row * MAXP + slot // PAGE, mask=live, other=0)
            at = page.to(tl.int64) * (PAGE * H) + (slot % PAGE) * H
            mask = live[:, None]
            if WIDTH != H:
                mask = tl.where(mask, h < H, False)
            # Dead slots may hold NaN, and 0 * NaN is NaN: they are not read at all.
            keys = tl.load(k_ptr + at[:, None] + h, mask=mask, other=0.0).to(dtype)
            values = tl.load(v_ptr + at[:, None] + h, mask=mask, other=0.0).to(dtype)
            scores = tl.dot(q, tl.trans(keys), input_precision=precision) * factor
            scores = tl.where(live[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            weighted = tl.dot(
                weights.to(dtype), values, weighted * shrink[:, None], input_precision=precision
            )
            peak = higher
        of_item = tl.cast(item, tl.int64) * G
        tl.store(lse_ptr + of_item + g, (peak + tl.log2(total))[:, None], mask=g < G)
        total = tl.where(total == 0.0, 1.0, total)  # where nothing was live
        tl.store(out_ptr + of_item * H + g * H + h, weighted / total[:, None], mask=real)


@triton.jit
@no_type_check
def join_items(
    partial_ptr,  # [items, G, H], float32
    lse_ptr,  # [items, G], float32, to base 2
    of_row_ptr,  # [R + 1], the plan's
    out_ptr,  # [R, G, H]
    G: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,  # H, padded to a power of two
    QUERIES: tl.constexpr,  # a program
    ITEMS: tl.constexpr,  # at a time
):
    """One program per row and `QUERIES` queries."""
    row = tl.program_id(0)
    g = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    h = tl.arange(0, WIDTH)
    real = tl.where((g < G)[:, None], (h < H)[None, :], False)
    first = tl.load(of_row_ptr + row)
    end = tl.load(of_row_ptr + row + 1)
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
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"],
    v_pages: Float[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    scale: float,
    plan: Plan | None = None,
    settings: Settings | None = None,
) -> Float[Array, "R G H"]:
    """Attend as planned; see `api.decode_attention` for the contract.

    Args:
        settings: to try others than the kept ones, which tuning does.
    """
    settings = settings or settings_for("triton", target.current().kind)
    return _attend(
        *(q, k_pages, v_pages, page_table, lengths, jnp.asarray(scale, jnp.float32)),
        gpu.plan_rows(settings, lengths, k_pages) if plan is None else plan,
        settings=settings,
        capability=target.current().capability,
        launch=launch,
    )


def plan_rows(
    lengths: Int[Array, "R"], k_pages: Float[Array, "P page H"], settings: Settings | None = None
) -> Plan:
    """Make the plan that suits this pool on this device.

    Args:
        settings: as for `decode_attention`, which must be given the same.
    """
    settings = settings or settings_for("triton", target.current().kind)
    return gpu.plan_rows(settings, lengths, k_pages)


@functools.partial(jax.jit, static_argnames=("settings", "capability", "launch"))
def _attend(q, k_pages, v_pages, page_table, lengths, scale, plan, *, settings, capability, launch):
    R, G, H = q.shape
    items = plan.row.size
    joining = join_constants(q, plan)
    partial, lse = launch(
        attend_items,
        *(q, k_pages, v_pages, page_table, lengths),
        (scale * gpu.LOG2_E).reshape(1),
        *(plan.row, plan.begin, plan.end, plan.of_program),
        out=(
            jax.ShapeDtypeStruct((items, G, H), jnp.float32),
            jax.ShapeDtypeStruct((items, G), jnp.float32),
        ),
        grid=(plan.of_program.size - 1,),
        num_warps=settings.warps,
        num_stages=settings.stages,
        capability=capability,
        **attend_constants(q, k_pages, page_table, plan.block),
    )
    (out,) = launch(
        join_items,
        *(partial, lse, plan.of_row),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(R, -(-G // joining["QUERIES"])),
        num_warps=gpu.JOIN_WARPS,
        num_stages=1,
        capability=capability,
        **joining,
    )
    return out


def attend_constants(q: Any, k_pages: Any, page_table: Any, block: int) -> dict[str, Any]:
    """The compile-time arguments of `attend_items` for arrays of these shapes and dtypes."""
    _, G, H = q.shape
    return {
        "G": G,
        "H": H,
        "PAGE": k_pages.shape[1],
        "MAXP": page_table.shape[1],
        "QUERIES": gpu.padded_queries(G),
        "WIDTH": gpu.padded_width(H),
        "BLOCK": block,
        "WIDEN": gpu.widens(q, k_pages),
    }


def join_constants(q: Any, plan: Plan) -> dict[str, Any]:
    """The compile-time arguments of `join_items` for these shapes."""
    _, G, H = q.shape
    items, queries = gpu.joined_at_a_time(plan, G, H)
    return {
        "G": G,
        "H": H,
        "WIDTH": gpu.padded_width(H),
        "QUERIES": queries,
        "ITEMS": items,
    }
