"""Decode attention in Pallas, for TPUs: reads every live page once, whatever the rows' lengths.

The blocks of all rows form one line, empty rows left out, that one core goes along. While it
attends to a block, the pages of the next three and the page ids of the fourth are on their way, no
matter whose rows they are: a short row costs no wait of its own.

    HBM    page ids  -> SMEM                            the block after those
           pages     -> VMEM, a ring of four blocks     up to three blocks ahead
    core   scores [queries, block] -> running softmax [queries, H], float32

Lengths lie in SMEM as a whole. Page tables may be larger than it and stay in HBM, from where 128
ids, one line of memory, are copied a block. Of a block only the pages in use are copied, each by a
transfer of its own: a TPU wants pages of 64 slots and more. The G queries of a row are padded to 8,
the sublanes of a register. Where H is a multiple of 128, a register's lanes, the pool is read where
it lies; for others XLA lays it out in its own way and copies it whole in every call.

JAX ships paged attention for TPUs too. `paged_attention` copies the pages behind a row's last as
well, whatever their ids, lets NaN through from slots that no row uses, rounds float32 keys and
values to bfloat16, and wants the whole page table in SMEM. `ragged_paged_attention` wants keys and
values in one pool.

No TPU has run this. It is tested interpreted, and compiled for TPUs that were not there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8, UInt16

from pallas_kernels import target

_SUBLANES = 8
_IDS = 128  # in a line of the page table
_BUFFERS = 4
# A program has so many rows: the next one's queries are copied meanwhile, which is not for nothing.
_ROWS = 8
# Three blocks of bfloat16 with H = 128 on their way are 768 KB, about what a v5e's memory gives in
# a microsecond, the time that it takes to answer.
_BLOCK_SLOTS = 512

# Where `state` keeps what: the next block to fetch, and how many were fetched and attended to.
_ROW, _BLOCK, _FETCHED, _ATTENDED = range(4)


def unavailable() -> str | None:
    """Say why this cannot run here; None where it can."""
    device = target.current()
    if device.platform != "tpu":
        return f"it needs a TPU, and JAX runs on {device.kind!r} ({device.platform}) here"
    return None


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
    """Attend block by block; see `api.decode_attention` for the contract.

    Raises:
        ValueError: pages of int8.
    """
    if scales is not None:
        raise ValueError(
            "implementation 'tpu' of decode_attention does not read pages of int8: take 'xla'"
        )
    R, G, H = q.shape
    page = k_pages.shape[1]
    pages = min(_IDS, max(1, _BLOCK_SLOTS // page), pl.next_power_of_2(page_table.shape[1]))
    # Float32 whatever the dtype: in registers of bfloat16 8 rows are half a tile.
    padded = jnp.pad(q.astype(jnp.float32), ((0, -R % _ROWS), (0, -G % _SUBLANES), (0, 0)))
    rows = padded.shape[0]
    lengths = jnp.pad(lengths, (0, rows + 1 - R))  # the last is nobody's
    # The first row from r on that is not empty.
    live_from = jax.lax.cummin(
        jnp.where(lengths > 0, jnp.arange(rows + 1, dtype=jnp.int32), rows), reverse=True
    )
    # Of an axis before the last two a single line can be copied.
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % _IDS))).reshape(-1, 1, _IDS)
    of_program = pl.BlockSpec((_ROWS, *padded.shape[1:]), lambda i, *_: (i, 0, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    kernel, more, of_more = _without_bias, (), []
    if mass is not None:
        bias = _bias(page_table, *mass, pages=pages, rows=rows)
        kernel, more = _attend_rows, (bias,)
        of_more = [pl.BlockSpec((_ROWS, *bias.shape[1:]), lambda i, *_: (i, 0, 0, 0))]
    out = pl.pallas_call(
        functools.partial(
            kernel,
            lines=table.shape[0] // R,
            dtype=jnp.promote_types(q.dtype, k_pages.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows // _ROWS,),
            in_specs=[of_program, in_hbm, in_hbm, in_hbm, *of_more],
            out_specs=of_program,
            scratch_shapes=[
                pltpu.VMEM((_BUFFERS, pages, page, H), k_pages.dtype),
                pltpu.VMEM((_BUFFERS, pages, page, H), k_pages.dtype),
                pltpu.SMEM((1, _IDS), jnp.int32),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((_BUFFERS,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        # In order, on one core: what was fetched ahead is the next program's.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="decode_attention",
    )(
        *(lengths, live_from, jnp.asarray(scale, jnp.float32)[None]),
        *(padded, table, k_pages, v_pages, *more),
    )
    return out[:R, :G].astype(q.dtype)


def _bias(page_table, tokens, gamma, *, pages, rows) -> Float[Array, "rows blocks 1 slots"]:
    """What the tokens of every slot add to its score; of slots that no row uses it is anything.

    A page's counts are too few to be copied by themselves: XLA gathers those of whole tables.
    """
    R, maxp = page_table.shape
    table = jnp.pad(page_table, ((0, rows - R), (0, -maxp % pages)))
    counts = tokens.at[table.reshape(rows, -1, 1, pages)].get(mode="clip")
    counts = counts.reshape(*counts.shape[:3], -1).astype(jnp.float32)
    return jnp.pad(gamma, (0, rows - R))[:, None, None, None] * jnp.log(counts)


def _without_bias(lengths, live_from, scale, q, table, k_pages, v_pages, *others, **sizes):
    arrays = lengths, live_from, scale, q, table, k_pages, v_pages
    _attend_rows(*arrays, None, *others, **sizes)


def _attend_rows(
    lengths,  # [rows + 1], SMEM
    live_from,  # [rows + 1], SMEM
    scale,  # [1], SMEM
    q,  # [_ROWS, queries, H], this program's
    table,  # [R * lines, 1, _IDS], HBM
    k_pages,  # [P, page, H], HBM
    v_pages,
    bias,  # [_ROWS, blocks, 1, slots], this program's, or None
    out,  # [_ROWS, queries, H]
    keys,  # [_BUFFERS, pages, page, H]
    values,
    ids,  # [1, _IDS], SMEM
    state,  # [4], SMEM
    pages_copied,  # a semaphore a buffer
    ids_copied,
    *,
    lines: int,  # of a row in the table
    dtype,  # to compute in, with sums in float32
):
    """One program per `_ROWS` rows; what lies in scratch memory outlives it."""
    rows = lengths.shape[0] - 1
    _, pages, page, H = keys.shape
    slots = pages * page
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def pages_of(row, block):
        return pl.cdiv(jnp.minimum(lengths[row] - block * slots, slots), page)

    def ids_copy(row, block):
        return pltpu.make_async_copy(table.at[row * lines + block * pages // _IDS], ids, ids_copied)

    def page_copies(page_id, buffer, i):
        return [
            pltpu.make_async_copy(pool.at[page_id], kept.at[buffer, i], pages_copied.at[buffer])
            for pool, kept in ((k_pages, keys), (v_pages, values))
        ]

    def go_to(row, block):
        state[_ROW], state[_BLOCK] = row, block

        @pl.when(row < rows)
        def _():
            ids_copy(row, block).start()

    def fetch():
        """Have the next block copied, then the page ids of the one after it."""
        row, block = state[_ROW], state[_BLOCK]

        @pl.when(row < rows)
        def _():
            buffer = state[_FETCHED] % _BUFFERS
            state[_FETCHED] += 1
            ids_copy(row, block).wait()

            @pl.loop(0, pages_of(row, block))
            def _(i):
                for copy in page_copies(ids[0, (block * pages + i) % _IDS], buffer, i):
                    copy.start()

            more = (block + 1) * slots < lengths[row]
            go_to(jnp.where(more, row, live_from[row + 1]), jnp.where(more, block + 1, 0))

    def fetched(row, block):
        """Wait for the block that was fetched first, and take it out of its buffer."""
        buffer = state[_ATTENDED] % _BUFFERS
        state[_ATTENDED] += 1

        @pl.loop(0, pages_of(row, block))
        def _(i):
            for copy in page_copies(0, buffer, i):  # from wherever, it waits for as many bytes
                copy.wait()

        return keys[buffer].reshape(slots, H), values[buffer].reshape(slots, H)

    @pl.when(pl.program_id(0) == 0)
    def _():
        state[_FETCHED], state[_ATTENDED] = 0, 0
        go_to(live_from[0], 0)
        for _ in range(_BUFFERS - 1):
            fetch()

    @pl.loop(0, _ROWS)
    def _(r):
        row = pl.program_id(0) * _ROWS + r
        query = q[r].astype(dtype)

        def attend(block, carry):
            peak, total, weighted = carry
            fetch()
            k, v = fetched(row, block)
            live = lengths[row] - block * slots
            scores = jax.lax.dot_general(
                *(query, k.astype(dtype), (((1,), (1,)), ((), ()))),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores *= scale[0]
            if bias is not None:
                scores += bias[r, block]
            scores = jnp.where(slot < live, scores, -jnp.inf)
            # Dead slots may hold NaN, and 0 * NaN is NaN: a zero weight is no mask.
            slot = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v = jnp.where(slot < live, v.astype(jnp.float32), 0.0).astype(dtype)
            higher = jnp.maximum(peak, scores.max(axis=1, keepdims=True))
            shrink = jnp.exp(peak - higher)
            weights = jnp.exp(scores - higher)
            total = total * shrink + weights.sum(axis=1, keepdims=True)
            weighted = weighted * shrink + jnp.dot(
                weights.astype(dtype), v, precision=precision, preferred_element_type=jnp.float32
            )
            return higher, total, weighted

        peak = jnp.full((q.shape[1], 1), -jnp.inf, jnp.float32)
        nothing = peak, jnp.zeros_like(peak), jnp.zeros(q.shape[1:], jnp.float32)
        blocks = pl.cdiv(lengths[row], slots)
        _, total, weighted = jax.lax.fori_loop(0, blocks, attend, nothing)
        out[r] = weighted / jnp.where(total == 0.0, 1.0, total)  # 0: an empty row
