"""One contract for every implementation of decode attention over pages.

A row is one KV head of one sequence (of one layer); its G query heads share its keys and values.
Every row has its own length and its own list of pages, so a cache whose heads are compressed
unevenly needs no padding to the longest row.

An implementation takes the arguments after they were validated. One that splits its work by a plan
has `plan_rows`, and finds its rows among those of all layers; the others get them cut out. One that
can give the weights too has `decode_attention_and_weights`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt16

from pallas_kernels.contract import FLOATS, check_axes, check_dtypes, check_pools
from pallas_kernels.implementations import Implementations

IMPLEMENTATIONS = Implementations("decode_attention", ("reference", "xla", "triton", "tpu"))
unavailable = IMPLEMENTATIONS.unavailable

SMALLEST_PAGE = 8


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


def decode_attention(
    q: Float[Array, "rows G H"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "*seats R maxp"],
    lengths: Int[Array, "*seats R"],
    *,
    scale: float,
    first: int | Int[Array, ""] = 0,
    implementation: str | None = None,
    plan: Plan | None = None,
    tokens: UInt16[Array, "P page"] | None = None,
    gamma: Float[Array, " rows"] | None = None,
    k_scale: Float[Array, "P page"] | None = None,
    v_scale: Float[Array, "P page"] | None = None,
) -> Float[Array, "rows G H"]:
    """Softmax attention of G queries a row over the first `lengths[r]` slots of that row.

    Slot s of row r is in page `page_table[r, s // page]` at `s % page`. Where slots stand for
    `tokens`, `gamma[r] log tokens` is added to their scores. Works eagerly and under jit, with
    every array traced.

    Args:
        q: queries, float32 or bfloat16.
        k_pages, v_pages: the pool, float32, bfloat16, or int8 with scales. Pages and slots that no
            row uses may hold anything, NaN included.
        page_table: int32, of these rows, or with an axis of sequences of the rows of all layers:
            then q has the rows of one layer, those of the first sequence first. Entries past a
            row's last page may be any number at all; those before must name a page of the pool.
        lengths: int32, slots in use; a row of length 0 gives zeros. Values outside
            [0, maxp * page] count as the nearest one inside: under jit they cannot be refused.
        scale: factor on the dot products.
        first: with all layers' rows, the layer's first.
        implementation: as for `choose`; the machine is asked while tracing.
        plan: of `plan_decode_attention` for these rows, with lengths no less than `lengths`; None:
            an implementation that works by a plan makes its own.
        tokens: in every slot of the pool, 1 or more where it is used.
        gamma: of every row; with `tokens`, or both None.
        k_scale, v_scale: of int8, by what a slot's key and its value are multiplied, float32 or
            bfloat16; see `quantisation`. None: the pool is not int8.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.

    Raises:
        ValueError: an unknown implementation, a plan for other rows or for an implementation
            without plans, or shapes or dtypes that break the contract.
        RuntimeError: an implementation that cannot run on this machine, and why.
    """
    name = choose(implementation)
    module = IMPLEMENTATIONS.load(name)
    _validate(q, k_pages, v_pages, page_table, lengths)
    mass = _mass(q, k_pages, tokens, gamma)
    scales = check_pools(k_pages, v_pages, k_scale, v_scale)
    if page_table.ndim == 2:
        page_table, lengths = page_table[None], lengths[None]
    if not hasattr(module, "plan_rows"):
        if plan is not None:
            raise ValueError(f"implementation {name!r} of decode_attention works without a plan")
        table, lengths = (rows_of(x, first, q.shape[0]) for x in (page_table, lengths))
        lengths = _clip(lengths, table, k_pages)
        return module.decode_attention(q, k_pages, v_pages, table, lengths, scale, mass, scales)
    if plan is None:
        lengths = _clip(lengths, page_table, k_pages)
    elif plan.of_row.shape[-1] != q.shape[0] + 1:
        raise ValueError(
            f"the plan must be for R = {q.shape[0]} rows as in q,"
            f" got one with of_row of shape {tuple(plan.of_row.shape)}, which is [R + 1]"
        )
    # A plan's lengths are clipped, and none is exceeded.
    return module.decode_attention(
        q, k_pages, v_pages, page_table, lengths, scale, plan, mass, scales, first=first
    )


def rows_of(
    x: Int[Array, "seats R *any"], first: int | Array, rows: int
) -> Int[Array, "rows *any"]:
    """Cut the rows of a layer, from `first` on, out of those of all layers."""
    x = jax.lax.dynamic_slice_in_dim(x, first, rows // x.shape[0], axis=1)
    return x.reshape(rows, *x.shape[2:])


def decode_attention_and_weights(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    *,
    scale: float,
    implementation: str | None = None,
    k_scale: Float[Array, "P page"] | None = None,
    v_scale: Float[Array, "P page"] | None = None,
) -> tuple[Float[Array, "R G H"], Float[Array, "R G maxp*page"]]:
    """Attend as `decode_attention` does, and say how much each query attended to each slot.

    Args:
        q, k_pages, v_pages, page_table, lengths, scale: as for `decode_attention`.
        k_scale, v_scale: likewise.
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
    _validate(q, k_pages, v_pages, page_table, lengths)
    scales = check_pools(k_pages, v_pages, k_scale, v_scale)
    lengths = _clip(lengths, page_table, k_pages)
    return module.decode_attention_and_weights(
        q, k_pages, v_pages, page_table, lengths, scale, scales
    )


def plan_decode_attention(
    lengths: Int[Array, "*L R"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    *,
    longest: int,
    implementation: str | None = None,
) -> Plan | None:
    """Split the work of `decode_attention` ahead of it, for many layers at once.

    The arrays of the plan have the leading axis of `lengths`; its field `layer` says whose it is.

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

    return module.plan_rows(jnp.clip(lengths, 0, longest), k_pages)


def choose(implementation: str | None) -> str:
    """Name the implementation that runs: the one that is asked for, else the fastest here.

    Args:
        implementation: one of `IMPLEMENTATIONS.names`, which never falls back to another; None: on
            an NVIDIA GPU "triton" where jax-triton is installed, elsewhere "xla", on a TPU too:
            "tpu" runs where it is asked for, until someone has timed it on one.

    Raises:
        ValueError, RuntimeError: as `decode_attention`.
    """
    return IMPLEMENTATIONS.choose(implementation, on_gpu=("triton",))


def _clip(lengths, page_table, k_pages):
    """Bring lengths between 0 and the slots that the page table has room for."""
    return jnp.clip(jnp.asarray(lengths), 0, page_table.shape[-1] * k_pages.shape[1])


def _mass(q, k_pages, tokens, gamma) -> tuple[Array, Array] | None:
    """What implementations take: (tokens, gamma), or None."""
    if (tokens is None) != (gamma is None):
        raise ValueError("tokens and gamma go together: give both, or none")
    if tokens is None:
        return None
    check_axes(
        {
            "q": (q, "rows G H"),
            "k_pages": (k_pages, "P page H"),
            "tokens": (tokens, "P page"),
            "gamma": (gamma, "rows"),
        }
    )
    check_dtypes({"tokens": tokens}, jnp.uint16)
    check_dtypes({"gamma": gamma}, jnp.float32)
    return tokens, gamma


def _validate(q, k_pages, v_pages, page_table, lengths) -> None:
    whole = page_table.ndim == 3
    check_axes(
        {
            "q": (q, "rows G H" if whole else "R G H"),
            "k_pages": (k_pages, "P page H"),
            "v_pages": (v_pages, "P page H"),
            "page_table": (page_table, "seats R maxp" if whole else "R maxp"),
            "lengths": (lengths, "seats R" if whole else "R"),
        }
    )
    if whole and (q.shape[0] % lengths.shape[0] or q.shape[0] > lengths.size):
        raise ValueError(
            f"q must have as many rows of each of the {lengths.shape[0]} sequences, and no more"
            f" than their {lengths.shape[1]}; it has {q.shape[0]} in all"
        )
    page = k_pages.shape[1]
    if page < SMALLEST_PAGE or page & (page - 1):
        raise ValueError(f"page must be a power of two >= {SMALLEST_PAGE}, got {page}")
    check_dtypes({"q": q}, *FLOATS)
    check_dtypes({"page_table": page_table, "lengths": lengths}, jnp.int32)
