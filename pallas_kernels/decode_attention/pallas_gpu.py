"""Decode attention in Pallas, through its Triton lowering: for a GPU without jax-triton.

The same two kernels and the same plan as in `triton`, where the reasons stand. Pallas does not say
how a product of float32 shall be split, so with a float32 pool this is exact and slow; pools in use
are bfloat16.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import target
from pallas_kernels.decode_attention import gpu
from pallas_kernels.decode_attention.plan import Plan
from pallas_kernels.decode_attention.settings import Settings, settings_for


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
    settings = settings or settings_for("pallas_gpu", target.current().kind)
    return _attend(
        *(q, k_pages, v_pages, page_table, lengths, jnp.asarray(scale, jnp.float32)),
        gpu.plan_rows(settings, lengths, k_pages) if plan is None else plan,
        settings=settings,
        launch=launch,
    )


def plan_rows(
    lengths: Int[Array, "R"], k_pages: Float[Array, "P page H"], settings: Settings | None = None
) -> Plan:
    """Make the plan that suits this pool on this device.

    Args:
        settings: as for `decode_attention`, which must be given the same.
    """
    settings = settings or settings_for("pallas_gpu", target.current().kind)
    return gpu.plan_rows(settings, lengths, k_pages)


def unavailable() -> str | None:
    """Say why this cannot run here; None where it can."""
    device = target.current()
    if device.platform != "gpu":
        return f"it needs a GPU, and JAX runs on {device.kind!r} ({device.platform}) here"
    try:
        import jax.experimental.pallas.triton  # noqa: F401
    except ImportError as error:
        return f"this version of JAX has no Triton lowering of Pallas: {error}"
    return None


def launch(
    kernel: Callable,
    *inputs: Array,
    out: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
) -> tuple[Array, ...]:
    """Call a Pallas kernel whose references are whole arrays.

    Args:
        kernel: takes references to its inputs, then to its outputs.
        *inputs: arrays.
        out: of the outputs.
        grid: programs.
        num_warps: per program.
        num_stages: of the software pipeline.
    """
    # Here, not above: jax may drop it, and nothing else should fail then.
    from jax.experimental.pallas import triton as plt

    # Which of the GPU lowerings is the default has changed between versions: these say Triton.
    parameters = plt.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, out_shape=out, grid=grid, compiler_params=parameters)(*inputs)


def _attend_items(*refs, block: int, page: int, queries: int, width: int, dtype: jnp.dtype) -> None:
    """One program per stretch of the plan; item i goes to out[i] and lse[i]."""
    from jax.experimental.pallas import triton as plt

    q, k_pages, v_pages, table, lengths, factor, row_of, begin_of, end_of, of_program = refs[:10]
    out, lse = refs[10:]
    _, G, H = q.shape
    program = pl.program_id(0)
    g = jax.lax.broadcasted_iota(jnp.int32, (queries, width), 0)
    h = jax.lax.broadcasted_iota(jnp.int32, (queries, width), 1)
    real = (g < G) & (h < H)
    query = jnp.arange(queries)
    column = jax.lax.broadcasted_iota(jnp.int32, (block, width), 1)
    dot = functools.partial(plt.dot, precision="highest" if dtype == jnp.float32 else None)

    def attend_item(item, _):
        row = row_of[item]
        begin = begin_of[item]
        # The plan may have been made for rows that did not grow after all.
        end = jnp.minimum(end_of[item], lengths[row])
        q_row = plt.load(q.at[row, g, h], mask=real, other=0.0).astype(dtype)

        def attend_block(i, carry):
            peak, total, weighted = carry
            slot = begin + i * block + jnp.arange(block)
            live = slot < end
            ids = plt.load(table.at[row, slot // page], mask=live, other=0)
            mask = live[:, None] & (column < H)
            # Dead slots may hold NaN, and 0 * NaN is NaN: they are not read at all.
            keys, values = (
                plt.load(
                    pool.at[ids[:, None], (slot % page)[:, None], column], mask=mask, other=0.0
                ).astype(dtype)
                for pool in (k_pages, v_pages)
            )
            scores = dot(q_row, keys, trans_b=True) * factor[0]
            scores = jnp.where(live[None, :], scores, -jnp.inf)
            higher = jnp.maximum(peak, scores.max(axis=1))
            shrink = jnp.exp2(peak - higher)
            weights = jnp.exp2(scores - higher[:, None])
            total = total * shrink + weights.sum(axis=1)
            weighted = weighted * shrink[:, None] + dot(weights.astype(dtype), values)
            return higher, total, weighted

        start = (
            jnp.full(queries, -jnp.inf, jnp.float32),
            jnp.zeros(queries, jnp.float32),
            jnp.zeros((queries, width), jnp.float32),
        )
        blocks = (jnp.maximum(end - begin, 0) + block - 1) // block
        peak, total, weighted = jax.lax.fori_loop(0, blocks, attend_block, start)
        plt.store(lse.at[item, query], peak + jnp.log2(total), mask=query < G)
        total = jnp.where(total == 0.0, 1.0, total)  # where nothing was live
        plt.store(out.at[item, g, h], weighted / total[:, None], mask=real)

    jax.lax.fori_loop(of_program[program], of_program[program + 1], attend_item, None)


def _join_items(partial, lse, of_row, out, *, width: int, queries: int, items: int) -> None:
    """One program per row and `queries` queries."""
    from jax.experimental.pallas import triton as plt

    _, G, H = out.shape
    row = pl.program_id(0)
    g = pl.program_id(1) * queries + jax.lax.broadcasted_iota(jnp.int32, (queries, width), 0)
    h = jax.lax.broadcasted_iota(jnp.int32, (queries, width), 1)
    real = (g < G) & (h < H)
    query = pl.program_id(1) * queries + jnp.arange(queries)
    first, end = of_row[row], of_row[row + 1]

    def join(i, carry):
        peak, total, weighted = carry
        item = first + i * items + jnp.arange(items)
        live = (item < end)[:, None]
        known = live & (query < G)[None, :]
        lses = plt.load(lse.at[item[:, None], query[None, :]], mask=known, other=-jnp.inf)
        values = plt.load(
            partial.at[item[:, None, None], g[None], h[None]],
            mask=live[:, :, None] & real[None],
            other=0.0,
        )
        higher = jnp.maximum(peak, lses.max(axis=0))
        # Items without a live slot have minus infinity, and -inf - -inf is NaN.
        finite = jnp.where(higher == -jnp.inf, 0.0, higher)
        shrink = jnp.exp2(peak - finite)
        weights = jnp.exp2(lses - finite[None, :])
        total = total * shrink + weights.sum(axis=0)
        weighted = weighted * shrink[:, None] + (weights[:, :, None] * values).sum(axis=0)
        return higher, total, weighted

    start = (
        jnp.full(queries, -jnp.inf, jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.zeros((queries, width), jnp.float32),
    )
    _, total, weighted = jax.lax.fori_loop(0, (end - first + items - 1) // items, join, start)
    value = weighted / jnp.where(total == 0.0, 1.0, total)[:, None]
    plt.store(out.at[row, g, h], value.astype(out.dtype), mask=real)


@functools.partial(jax.jit, static_argnames=("settings", "launch"))
def _attend(q, k_pages, v_pages, page_table, lengths, scale, plan, *, settings, launch):
    R, G, H = q.shape
    width, items = gpu.padded_width(H), plan.row.size
    joined, queries = gpu.joined_at_a_time(plan, G, H)
    partial, lse = launch(
        functools.partial(
            _attend_items,
            block=plan.block,
            page=k_pages.shape[1],
            queries=gpu.padded_queries(G),
            width=width,
            dtype=jnp.dtype(jnp.float32 if gpu.widens(q, k_pages) else jnp.bfloat16),
        ),
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
    )
    (out,) = launch(
        functools.partial(_join_items, width=width, queries=queries, items=joined),
        *(partial, lse, plan.of_row),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(R, -(-G // queries)),
        num_warps=gpu.JOIN_WARPS,
        num_stages=1,
    )
    return out
