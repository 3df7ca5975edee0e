"""Splits rows of uneven length into even work, on the device.

Rows of very different lengths leave a GPU waiting for the longest of them. Here all rows are laid
end to end as one line of blocks, the line is cut into one stretch for each program, equal to
within one block, and a stretch is cut again wherever a row ends inside it:

    rows        |--- 0 ---|1|------------ 3 ------------|- 4 -|     (row 2 is empty)
    programs    |----- 0 -----|----- 1 -----|----- 2 -----|-- 3 --|
    items       |    0    |1|2|      3      |    4      | 5 |  ...

Those pieces are the work items: a program's items follow one another, and so do a row's. Every cut
is the end of a row or of a program, hence at most R + programs - 1 items, which is static. The sums
are linear in R + programs and made of scans and scatters alone, so that nothing waits for the host.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Which program attends to which slots of which row.

    A plan serves every call with these rows and no greater lengths: a slot past a row's length is
    masked by whoever uses the plan. So one made for a decoding step ahead of it, for lengths that
    may or may not grow by a slot, holds for the whole step. Those of several layers are one, with
    an axis of layers.
    """

    row: Int[Array, "*L items"]  # of each item; nothing is said about those past the last
    begin: Int[Array, "*L items"]  # first slot, a multiple of `block`
    end: Int[Array, "*L items"]  # one past the last slot; `begin` where there is no item
    of_program: Int[Array, "*L programs+1"]  # program p has items of_program[p] to [p + 1]
    of_row: Int[Array, "*L R+1"]  # row r has items of_row[r] to of_row[r + 1]
    layer: int | Int[Array, ""] = 0  # whose plan is meant, of those of several layers
    block: int = dataclasses.field(metadata={"static": True}, kw_only=True)


@functools.partial(jax.jit, static_argnames=("block", "programs"))
def make_plan(lengths: Int[Array, " R"], *, block: int, programs: int) -> Plan:
    """Cut rows into items so that every program gets as many blocks as any other, or one more.

    To plan all layers of a model at once, `jax.vmap` this over lengths [L, R].

    Args:
        lengths: int32, slots of each row, 0 or more.
        block: slots that are worked on at a time; only a row's end, or a multiple of it, is cut.
        programs: that share the work.

    Returns:
        The plan. An empty row has no item; with fewer blocks than programs some have none.

    Raises:
        ValueError: no rows, or a block or number of programs below 1.
    """
    if lengths.ndim != 1 or lengths.size == 0:
        raise ValueError(f"lengths must be [R] with R >= 1, got shape {tuple(lengths.shape)}")
    if block < 1 or programs < 1:
        raise ValueError(f"block and programs must be >= 1, got {block} and {programs}")
    blocks = -(-lengths // block)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)  # of the rows on the line of blocks
    starts = ends - blocks
    share, longer = jnp.divmod(ends[-1], programs)  # the first `longer` programs get share + 1

    def cut(program):  # where a program's stretch begins
        return program * share + jnp.minimum(program, longer)

    def program_at(position):
        behind = position - cut(longer)  # how far behind the last of the longer stretches
        return jnp.where(
            behind < 0, position // (share + 1), longer + behind // jnp.maximum(share, 1)
        )

    first = program_at(starts)
    items = jnp.where(blocks > 0, program_at(ends - 1) - first + 1, 0)
    of_row = _sums_before(items)

    # An item's row is the last that begins at or before it; an empty row begins with the next.
    index = jnp.arange(lengths.size + programs - 1, dtype=jnp.int32)
    begins = jnp.zeros(index.size + 1, jnp.int32).at[of_row[:-1]].add(1)
    row = jnp.cumsum(begins, dtype=jnp.int32)[: index.size] - 1
    used = index < of_row[-1]
    program = jnp.where(used, first[row] + index - of_row[row], programs)  # `programs`: nobody
    begin = jnp.maximum(cut(program) - starts[row], 0) * block
    end = jnp.minimum((cut(program + 1) - starts[row]) * block, lengths[row])
    loads = jnp.zeros(programs, jnp.int32).at[program].add(1, mode="drop")
    return Plan(
        row=row,
        begin=jnp.where(used, begin, 0),
        end=jnp.where(used, end, 0),
        of_program=_sums_before(loads),
        of_row=of_row,
        block=block,
    )


def _sums_before(x: Int[Array, " n"]) -> Int[Array, " n+1"]:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(x, dtype=jnp.int32)])
