"""What the GPU kernels have in common: padded sizes and their plan.

Both split rows by a `plan`, let each program attend to its items, and join the items of a row.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import target
from pallas_kernels.decode_attention.plan import Plan, make_plan
from pallas_kernels.decode_attention.settings import Settings

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x LOG2_E), and exp2 is one instruction

# The least rows and columns that tensor cores take of a left operand.
_LEAST_QUERIES = 16
_LEAST_WIDTH = 16

# What joins items: partial results that a program holds at a time, 32 in a thread, and items.
JOIN_WARPS = 4
_JOINED_VALUES = 4096
_MOST_JOINED_ITEMS = 16


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
    rows, programs = plan.of_row.size - 1, plan.of_program.size - 1
    items = min(_power_of_two(programs // rows + 2), _MOST_JOINED_ITEMS)
    queries = max(_JOINED_VALUES // (items * padded_width(H)), 1)
    return items, min(queries, _power_of_two(G))


def widens(q: Any, k_pages: Any) -> bool:
    """Whether the kernels compute in float32, and not in bfloat16 with float32 sums."""
    return jnp.promote_types(q.dtype, k_pages.dtype) == jnp.float32


def plan_rows(
    settings: Settings, lengths: Int[Array, "R"], k_pages: Float[Array, "P page H"]
) -> Plan:
    """Make the plan that suits some settings, a pool and the present device."""
    return make_plan(
        lengths,
        block=settings.block(padded_width(k_pages.shape[-1]), k_pages.dtype.itemsize),
        programs=target.current().cores * settings.programs_per_core,
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
