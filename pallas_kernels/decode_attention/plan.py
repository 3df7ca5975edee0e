"""Splits rows of uneven length into even work, on the device.

Rows of very different lengths leave a GPU waiting for the longest of them. Here all rows are laid
end to end as one line of blocks, the line is cut into one stretch for each program, equal to
within one block, and a stretch is cut again wherever a row ends inside it:

    rows        |--- 0 ---|1|------------ 3 ------------|- 4 -|     (row 2 is empty)
    programs    |----- 0 -----|----- 1 -----|----- 2 -----|-- 3 --|
    items       |    0    |1|2|      3      |    4      | 5 |  ...

Those pieces are the work items: a program's items follow one another, and so do a row's. Every cut
is the end of a row or of a program, hence at most R + programs - 1 items, which is static. A kernel
makes the plan of a layer in one program, which goes over the rows twice: all layers at once.
"""

import functools
import math
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Int

from pallas_kernels import triton_call
from pallas_kernels.decode_attention.api import Plan

# Rows at a time, at most, two in a thread: four take all of its registers. And warps.
MOST_ROWS = 1024
WARPS = 16


@triton.jit
@no_type_check
def plan_layer(
    lengths_ptr,  # [layers, rows]
    rows_ptr,  # [1]
    row_ptr,  # [layers, items]
    begin_ptr,
    end_ptr,
    of_program_ptr,  # [layers, PROGRAMS + 1]
    of_row_ptr,  # [layers, rows + 1]
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,  # at a time, a power of two
    ENDS: tl.constexpr,  # PROGRAMS + 1, padded to a power of two
):
    """One program per layer."""
    layer = tl.program_id(0)
    rows = tl.load(rows_ptr)
    most = rows + PROGRAMS - 1
    lengths_ptr += layer * rows
    row_ptr += layer * most
    begin_ptr += layer * most
    end_ptr += layer * most
    of_program_ptr += layer * (PROGRAMS + 1)
    of_row_ptr += layer * (rows + 1)
    column = tl.arange(0, ROWS)

    total = 0
    for start in tl.range(0, rows, ROWS, num_stages=1):
        length = tl.load(lengths_ptr + start + column, mask=start + column < rows, other=0)
        total += tl.sum((length + BLOCK - 1) // BLOCK, 0)
    # The first `longer` stretches have share + 1 blocks, the others share.
    share = total // PROGRAMS
    longer = total % PROGRAMS
    others = longer * (share + 1)  # where those begin
    least = tl.maximum(share, 1)

    before = 0  # blocks of the rows before
    items = 0  # of theirs
    for start in tl.range(0, rows, ROWS, num_stages=1):
        row = start + column
        length = tl.load(lengths_ptr + row, mask=row < rows, other=0)
        blocks = (length + BLOCK - 1) // BLOCK
        ends = before + tl.cumsum(blocks, 0)
        starts = ends - blocks
        first = starts // (share + 1)
        first = tl.where(starts < others, first, longer + (starts - others) // least)
        last = (ends - 1) // (share + 1)
        last = tl.where(ends <= others, last, longer + (ends - 1 - others) // least)
        count = tl.where(blocks > 0, last - first + 1, 0)
        item = items + tl.cumsum(count, 0) - count
        tl.store(of_row_ptr + row, item, mask=row < rows)
        for piece in tl.range(0, tl.max(count, 0), num_stages=1):
            program = first + piece
            begin = program * share + tl.minimum(program, longer) - starts
            end = (begin + share + (program < longer).to(tl.int32)) * BLOCK
            there = piece < count
            tl.store(row_ptr + item + piece, row, mask=there)
            tl.store(begin_ptr + item + piece, tl.maximum(begin, 0) * BLOCK, mask=there)
            tl.store(end_ptr + item + piece, tl.minimum(end, length), mask=there)
            begins = tl.where(there, begin >= 0, False)
            tl.store(of_program_ptr + program, item + piece, mask=begins)
        before += tl.sum(blocks, 0)
        items += tl.sum(count, 0)

    tl.store(of_row_ptr + rows, items)
    program = tl.arange(0, ENDS)
    begin = program * share + tl.minimum(program, longer)
    idle = tl.where(program <= PROGRAMS, begin >= total, False)
    tl.store(of_program_ptr + program, tl.full([ENDS], 0, tl.int32) + items, mask=idle)
    nothing = tl.full([ROWS], 0, tl.int32)
    for start in tl.range(items, most, ROWS, num_stages=1):
        item = start + column
        tl.store(row_ptr + item, nothing, mask=item < most)
        tl.store(begin_ptr + item, nothing, mask=item < most)
        tl.store(end_ptr + item, nothing, mask=item < most)


@functools.partial(jax.jit, static_argnames=("block", "programs", "capability", "launch"))
def make_plan(
    lengths: Int[Array, "*L R"],
    *,
    block: int,
    programs: int,
    capability: int,
    launch: Callable = triton_call.launch,
) -> Plan:
    """Cut rows into items so that every program gets as many blocks as any other, or one more.

    Args:
        lengths: int32, slots of each row, 0 or more; those of several layers are planned at once.
        block: slots that are worked on at a time; only a row's end, or a multiple of it, is cut.
        programs: that share the work of a layer.
        capability: to compile for, 90 for compute capability 9.0.
        launch: calls the kernel.

    Returns:
        The plan. An empty row has no item; with fewer blocks than programs some have none.

    Raises:
        ValueError: no rows, or a block or number of programs below 1.
    """
    if lengths.ndim == 0 or lengths.size == 0:
        raise ValueError(f"lengths must be [*L, R] with R >= 1, got shape {tuple(lengths.shape)}")
    if block < 1 or programs < 1:
        raise ValueError(f"block and programs must be >= 1, got {block} and {programs}")
    *layers, R = lengths.shape
    items = R + programs - 1
    row, begin, end, of_program, of_row = launch(
        plan_layer,
        *(lengths, jnp.full(1, R, jnp.int32)),
        out=tuple(
            jax.ShapeDtypeStruct((*layers, n), jnp.int32)
            for n in (items, items, items, programs + 1, R + 1)
        ),
        grid=(math.prod(layers),),
        num_warps=WARPS,
        num_stages=1,
        capability=capability,
        **plan_constants(R, block, programs),
    )
    return Plan(row, begin, end, of_program, of_row, block=block)


def plan_constants(R: int, block: int, programs: int) -> dict[str, int]:
    """The compile-time arguments of `plan_layer` for so many rows."""
    return {
        "BLOCK": block,
        "PROGRAMS": programs,
        "ROWS": min(triton.next_power_of_2(R), MOST_ROWS),
        "ENDS": triton.next_power_of_2(programs + 1),
    }
