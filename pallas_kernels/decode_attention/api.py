"""One contract for every implementation of decode attention over pages.

A row is one KV head of one sequence (of one layer); its G query heads share its keys and values.
Every row has its own length and its own list of pages, so a cache whose heads are compressed
unevenly needs no padding to the longest row.

An implementation takes the arguments after they were validated. One that splits its work by a plan
has `plan_rows`, one that can give the weights too has `decode_attention_and_weights`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.plan import Plan
from pallas_kernels.implementations import Implementations

IMPLEMENTATIONS = Implementations("decode_attention", ("reference", "xla", "triton", "pallas_gpu"))
unavailable = IMPLEMENTATIONS.unavailable

SMALLEST_PAGE = 8

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def decode_attention(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"],
    v_pages: Float[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    *,
    scale: float,
    implementation: str | None = None,
    plan: Plan | None = None,
) -> Float[Array, "R G H"]:
    """Softmax attention of G queries a row over the first `lengths[r]` slots of that row.

    Slot s of row r is in page `page_table[r, s // page]` at `s % page`. Works eagerly and under
    jit, with every array traced.

    Args:
        q: queries, float32 or bfloat16.
        k_pages, v_pages: the pool, float32 or bfloat16. Pages and slots that no row uses may hold
            anything, NaN included.
        page_table: int32. Entries past a row's last page may be any number at all; those before
            must name a page of the pool.
        lengths: int32, slots in use; a row of length 0 gives zeros. Values outside
            [0, maxp * page] count as the nearest one inside: under jit they cannot be refused.
        scale: factor on the dot products.
        implementation: as for `choose`; the machine is asked while tracing.
        plan: of `plan_decode_attention` for these rows, with lengths no less than `lengths`; None:
            an implementation that works by a plan makes its own.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.

    Raises:
        ValueError: an unknown implementation, a plan for other rows or for an implementation
            without plans, or shapes or dtypes that break the contract.
        RuntimeError: an implementation that cannot run on this machine, and why.
    """
    name = choose(implementation)
    module = IMPLEMENTATIONS.load(name)
    arguments = _validated(q, k_pages, v_pages, page_table, lengths, scale)
    if plan is None:
        return module.decode_attention(*arguments)
    if not hasattr(module, "plan_rows"):
        raise ValueError(f"implementation {name!r} of decode_attention works without a plan")
    if plan.of_row.shape != (q.shape[0] + 1,):
        raise ValueError(
            f"the plan must be for R = {q.shape[0]} rows as in q,"
            f" got one with of_row of shape {tuple(plan.of_row.shape)}, which is [R + 1]"
        )
    return module.decode_attention(*arguments, plan)


def decode_attention_and_weights(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"],
    v_pages: Float[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "R G H"], Float[Array, "R G maxp*page"]]:
    """Attend as `decode_attention` does, and say how much each query attended to each slot.

    Args:
        q, k_pages, v_pages, page_table, lengths, scale: as for `decode_attention`.
        implementation: a name in `IMPLEMENTATIONS`; None: "xla".

    Returns:
        (the attention output, the weights in float32: they add up to 1 over a row's slots, and are
        0 beyond them).

    Raises:
        ValueError: as `decode_attention`; or an implementation that cannot give the weights.
        RuntimeError: an implementation that cannot run on this machine, and why.
    """
    name = "xla" if implementation is None else implementation
    module = IMPLEMENTATIONS.load(name)
    if not hasattr(module, "decode_attention_and_weights"):
        raise ValueError(
            f"implementation {name!r} of decode_attention cannot give the weights: take 'xla'"
        )
    return module.decode_attention_and_weights(
        *_validated(q, k_pages, v_pages, page_table, lengths, scale)
    )


def plan_decode_attention(
    lengths: Int[Array, "*layers R"],
    k_pages: Float[Array, "P page H"],
    *,
    longest: int,
    implementation: str | None = None,
) -> Plan | None:
    """Split the work of `decode_attention` ahead of it, for many layers at once.

    The arrays of the plan have the leading axes of `lengths`: a layer's plan is its slice.

    Args:
        lengths: int32, slots of each row. Where a step appends a slot to some rows and not to
            others, and one plan shall serve both, count the slot in: more is no error.
        k_pages: the pool; only its shape and dtype matter.
        longest: slots that a row has room for, which is maxp * page: lengths count as no more.
        implementation: as for `decode_attention`.

    Returns:
        The plan; None where the implementation works without one.

    Raises:
        ValueError, RuntimeError: as `decode_attention`.
    """
    module = IMPLEMENTATIONS.load(choose(implementation))
    if not hasattr(module, "plan_rows"):
        return None

    def plan(lengths):
        return module.plan_rows(lengths, k_pages)

    for _ in lengths.shape[:-1]:
        plan = jax.vmap(plan)
    return plan(jnp.clip(lengths, 0, longest))


def choose(implementation: str | None) -> str:
    """Name the implementation that runs: the one that is asked for, else the fastest here.

    Args:
        implementation: one of `IMPLEMENTATIONS.names`, which never falls back to another; None: on
            a GPU "triton" with jax-triton and "pallas_gpu" without, elsewhere "xla".

    Raises:
        ValueError, RuntimeError: as `decode_attention`.
    """
    return IMPLEMENTATIONS.choose(implementation, on_gpu=("triton", "pallas_gpu"))


def _validated(q, k_pages, v_pages, page_table, lengths, scale) -> tuple:
    """Check the arguments of an implementation, and make them so."""
    _validate(q, k_pages, v_pages, page_table, lengths)
    capacity = page_table.shape[1] * k_pages.shape[1]
    return q, k_pages, v_pages, page_table, jnp.clip(jnp.asarray(lengths), 0, capacity), scale


def _validate(q, k_pages, v_pages, page_table, lengths) -> None:
    arrays = {
        "q": (q, "R G H"),
        "k_pages": (k_pages, "P page H"),
        "v_pages": (v_pages, "P page H"),
        "page_table": (page_table, "R maxp"),
        "lengths": (lengths, "R"),
    }
    sizes: dict[str, tuple[str, int]] = {}  # axis -> who said so first, and what
    for name, (array, axes) in arrays.items():
        if array.ndim != len(axes.split()):
            raise ValueError(f"{name} must be [{axes}], got shape {tuple(array.shape)}")
        for axis, size in zip(axes.split(), array.shape, strict=True):
            first, expected = sizes.setdefault(axis, (name, size))
            if size != expected:
                raise ValueError(
                    f"{name} must be [{axes}] with {axis} = {expected} as in {first},"
                    f" got shape {tuple(array.shape)}"
                )
            if size == 0:
                raise ValueError(f"{name} is empty: {axis} = 0 in shape {tuple(array.shape)}")
    page = k_pages.shape[1]
    if page < SMALLEST_PAGE or page & (page - 1):
        raise ValueError(f"page must be a power of two >= {SMALLEST_PAGE}, got {page}")
    for name in ("q", "k_pages", "v_pages"):
        if arrays[name][0].dtype not in DTYPES:
            raise ValueError(f"{name} must be float32 or bfloat16, got {arrays[name][0].dtype}")
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(f"k_pages is {k_pages.dtype} but v_pages {v_pages.dtype}: must be equal")
    for name in ("page_table", "lengths"):
        if arrays[name][0].dtype != jnp.int32:
            raise ValueError(f"{name} must be int32, got {arrays[name][0].dtype}")
