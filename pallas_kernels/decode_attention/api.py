"""One contract for every implementation of decode attention over pages.

A row is one KV head of one sequence (of one layer); its G query heads share its keys and values.
Every row has its own length and its own list of pages, so a cache whose heads are compressed
unevenly needs no padding to the longest row.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import reference, xla

# The name of an implementation and the function that takes the same arguments, already validated.
IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": reference.decode_attention,
    "xla": xla.decode_attention,
}

SMALLEST_PAGE = 8

_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def decode_attention(
    q: Float[Array, "R G H"],
    k_pages: Float[Array, "P page H"],
    v_pages: Float[Array, "P page H"],
    page_table: Int[Array, "R maxp"],
    lengths: Int[Array, "R"],
    *,
    scale: float,
    implementation: str | None = None,
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
        implementation: a name in `IMPLEMENTATIONS`; None takes the fastest for this machine. A
            name never falls back to another.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.

    Raises:
        ValueError: an unknown implementation, or shapes or dtypes that break the contract.
    """
    attend = IMPLEMENTATIONS[_choose(implementation)]
    _validate(q, k_pages, v_pages, page_table, lengths)
    capacity = page_table.shape[1] * k_pages.shape[1]
    lengths = jnp.clip(jnp.asarray(lengths), 0, capacity)
    return attend(q, k_pages, v_pages, page_table, lengths, scale)


def _choose(implementation: str | None) -> str:
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no implementation {implementation!r} of decode_attention;"
            f" there is {', '.join(IMPLEMENTATIONS)} (or None for the fastest)"
        )
    return implementation


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
        if arrays[name][0].dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32 or bfloat16, got {arrays[name][0].dtype}")
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(f"k_pages is {k_pages.dtype} but v_pages {v_pages.dtype}: must be equal")
    for name in ("page_table", "lengths"):
        if arrays[name][0].dtype != jnp.int32:
            raise ValueError(f"{name} must be int32, got {arrays[name][0].dtype}")
