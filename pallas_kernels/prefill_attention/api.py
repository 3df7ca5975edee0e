"""One contract for attention of a chunk of tokens over a paged cache that holds them already.

A row is one KV head of one sequence (of one layer). Every token of the chunk wrote to a slot of
each row of its sequence, to a new one or over what was in the newest. So its query sees what the
slots before that one hold now, and of its own slot what the token itself wrote: something later may
be there by now.

Plain JAX can do this too, in blocks. That form is the caller's and is not repeated here: `choose`
says whether to take it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.contract import FLOATS, check_axes, check_dtypes, check_groups, check_pools
from pallas_kernels.implementations import XLA, Implementations
from pallas_kernels.quantisation import rounded

__all__ = ["IMPLEMENTATIONS", "XLA", "choose", "prefill_attention", "unavailable"]

IMPLEMENTATIONS = Implementations("prefill_attention", ("reference", "triton"))
unavailable = IMPLEMENTATIONS.unavailable


def prefill_attention(
    q: Float[Array, "B T N H"],
    own_k: Float[Array, "B T K H"],
    own_v: Float[Array, "B T K H"],
    slot: Int[Array, "B K T"],
    k_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    v_pages: Float[Array, "P page H"] | Int8[Array, "P page H"],
    page_table: Int[Array, "seats R maxp"],
    lengths: Int[Array, "seats R"],
    seats: Int[Array, " B"],
    *,
    first: int | Int[Array, ""],
    scale: float,
    implementation: str,
    k_scale: Float[Array, "P page"] | None = None,
    v_scale: Float[Array, "P page"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention over the slots before a token's own, and over what the token wrote.

    Query head n reads KV head n // (N / K), whose slot s is in page `page_table[seat, row, s //
    page]` at `s % page`. Works eagerly and under jit, with every array traced.

    Args:
        q: queries, rotated where positions matter; float32 or bfloat16, as all of these.
        own_k, own_v: what each token wrote, keys rotated. It counts as the pool would hold it,
            rounded to the pool's dtype or quantised.
        slot: int32, where it wrote to; the token sees the slots before, none where that is 0 or
            less. Work ends at the greatest slot of neighbouring tokens, which suits slots that do
            not fall along T.
        k_pages, v_pages: the pool, which may be int8 with scales. Pages and slots that no row uses
            may hold anything, NaN included.
        page_table: int32, of the rows of all layers. Entries past a row's last page may be any
            number at all; those before must name a page of the pool.
        lengths: int32, slots in use; no token sees more, whatever its `slot` says.
        seats: int32, of each sequence; one outside the table counts as the nearest inside.
        first: row of the layer's first KV head; its rows are `first` to `first + K - 1`.
        scale: factor on the dot products.
        implementation: one of `IMPLEMENTATIONS.names`; it never falls back to another.
        k_scale, v_scale: of int8, as for `decode_attention`.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.

    Raises:
        ValueError: an unknown implementation, or shapes or dtypes that break the contract.
        RuntimeError: an implementation that cannot run on this machine, and why.
    """
    module = IMPLEMENTATIONS.load(implementation)
    _validate(q, own_k, own_v, slot, k_pages, v_pages, page_table, lengths, seats)
    scales = check_pools(k_pages, v_pages, k_scale, v_scale)
    if scales is not None:
        own_k, own_v = (rounded(own, k_scale.dtype) for own in (own_k, own_v))
    return module.prefill_attention(
        *(q, own_k, own_v, slot, k_pages, v_pages, page_table, lengths),
        jnp.clip(seats, 0, page_table.shape[0] - 1),
        first=jnp.asarray(first, jnp.int32),
        scale=scale,
        scales=scales,
    )


def choose(implementation: str | None) -> str:
    """Name who attends: `XLA`, or an implementation that can run here.

    Args:
        implementation: `XLA`, one of `IMPLEMENTATIONS.names`, or None: "triton" where it can run,
            elsewhere the caller's own form.

    Raises:
        ValueError, RuntimeError: as `prefill_attention`.
    """
    return IMPLEMENTATIONS.choose(implementation, on_gpu=("triton",))


def _validate(q, own_k, own_v, slot, k_pages, v_pages, page_table, lengths, seats) -> None:
    sizes = check_axes(
        {
            "q": (q, "B T N H"),
            "own_k": (own_k, "B T K H"),
            "own_v": (own_v, "B T K H"),
            "slot": (slot, "B K T"),
            "k_pages": (k_pages, "P page H"),
            "v_pages": (v_pages, "P page H"),
            "page_table": (page_table, "seats R maxp"),
            "lengths": (lengths, "seats R"),
            "seats": (seats, "B"),
        }
    )
    check_dtypes({"q": q, "own_k": own_k, "own_v": own_v}, *FLOATS)
    integers = {"slot": slot, "page_table": page_table, "lengths": lengths, "seats": seats}
    check_dtypes(integers, jnp.int32)
    check_groups(sizes)
    if sizes["K"] > sizes["R"]:
        raise ValueError(
            f"a layer of K = {sizes['K']} rows does not fit into the R = {sizes['R']} of the table"
        )
