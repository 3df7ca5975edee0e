"""The pool of pages that keys and values lie in: the one place that knows how they are stored.

Pages of int8 have a scale for every key and every value. A slot is rounded anew each time that it
is written, also the newest one of a row that merges: there the average is taken of what the policy
remembers of the open segment, unrounded, and never of what a page holds. So a slot of many tokens
is off by one rounding, as a slot of one is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, UInt16

from dmc_jax.errors import UserError
from pallas_kernels.decode_attention.api import SMALLEST_PAGE
from pallas_kernels.quantisation import dequantise, quantise, rounded

KV_DTYPES = ("float32", "bfloat16", "int8")  # of keys and values in pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """P pages of slots; every array has the axis of pages first. Kernels are handed the arrays."""

    # Rotated, each key at the position of its newest token.
    k: Float[Array, "P page H"] | Int8[Array, "P page H"]
    v: Float[Array, "P page H"] | Int8[Array, "P page H"]
    tokens: UInt16[Array, "P page"] | None = None  # in each slot, where a policy asks for them
    k_scale: Float[Array, "P page"] | None = None  # of each key, and of each value, in int8
    v_scale: Float[Array, "P page"] | None = None

    @property
    def count(self) -> int:
        """P."""
        return self.k.shape[0]

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return self.k.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """Of a key or value that was read."""
        return (self.k if self.k_scale is None else self.k_scale).dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all pages; also where only their shapes are known."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: the keys and the values of its slots, and what is kept beside them."""
        return self.nbytes // self.count

    def read(
        self, ids: Int[Array, "*rows n"]
    ) -> tuple[Float[Array, "*rows slots H"], Float[Array, "*rows slots H"]]:
        """Read the slots of some pages, in order.

        Args:
            ids: pages; a number outside the pool reads some page of it.

        Returns:
            (keys, values).
        """
        keys, values = _gather(self.k, ids), _gather(self.v, ids)
        if self.k_scale is None:
            return keys, values
        scales = _gather(self.k_scale, ids), _gather(self.v_scale, ids)
        return dequantise(keys, scales[0]), dequantise(values, scales[1])

    def read_tokens(self, ids: Int[Array, "*rows n"]) -> UInt16[Array, "*rows slots"]:
        """Read how many tokens the slots of some pages hold, in order.

        Args:
            ids: as for `read`.
        """
        return _gather(self.tokens, ids)

    def rounded(self, x: Float[Array, "*n H"]) -> Float[Array, "*n H"]:
        """Round keys or values as one that is read from a slot was."""
        return x.astype(self.dtype) if self.k_scale is None else rounded(x, self.dtype)

    def write(
        self,
        at: tuple[Int[Array, "*n"], Int[Array, "*n"]],
        keys: Float[Array, "*n H"],
        values: Float[Array, "*n H"],
        tokens: Int[Array, "*n"] | None = None,
    ) -> "Pages":
        """Put keys and values into slots, rounded to what a page can hold.

        Args:
            at: pages, and slots in them, no two alike; page P is written nowhere.
            keys, values: what the slots shall hold, keys rotated.
            tokens: whose they are, where pages say that; more than two bytes can hold are as many
                as these can.
        """
        new = {"k": keys, "v": values}
        if self.k_scale is not None:
            new["k"], new["k_scale"] = quantise(keys, self.dtype)
            new["v"], new["v_scale"] = quantise(values, self.dtype)
        if self.tokens is not None:
            new["tokens"] = jnp.minimum(tokens, jnp.iinfo(self.tokens.dtype).max)

        def written(pool, x):
            return pool.at[at].set(x.astype(pool.dtype), mode="drop")

        return dataclasses.replace(
            self, **{name: written(getattr(self, name), x) for name, x in new.items()}
        )

    def take(self, ids: Int[Array | np.ndarray, " n"]) -> "Pages":
        """Copy whole pages out."""
        return jax.tree.map(lambda x: x[ids], self)

    def put(self, ids: Int[Array | np.ndarray, " n"], pages: "Pages") -> "Pages":
        """Copy whole pages in; page P is written nowhere."""
        return jax.tree.map(lambda x, new: x.at[ids].set(new, mode="drop"), self, pages)


def empty_pages(
    count: int,
    page_size: int,
    head_dim: int,
    dtype: DTypeLike,
    *,
    counted: bool = False,
    scale: DTypeLike = jnp.float32,
) -> Pages:
    """Allocate a pool.

    Args:
        count: P.
        page_size: slots per page, a power of two.
        head_dim: H.
        dtype: of keys and values, one of `KV_DTYPES`.
        counted: whether slots say how many tokens they hold.
        scale: dtype of the scales of int8, and so of what is read.

    Raises:
        UserError: no page, a page size that is no power of two of 8 or more, another dtype.
    """
    if count < 1:
        raise UserError(f"cache: pages must be 1 or more, got {count}")
    if page_size < SMALLEST_PAGE or page_size & (page_size - 1):
        raise UserError(
            f"cache: page_size must be a power of two, {SMALLEST_PAGE} or more, got {page_size}"
        )
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in KV_DTYPES:
        raise UserError(f"cache: expected dtype {' or '.join(KV_DTYPES)}, got {name}")
    slots = (count, page_size)
    return Pages(
        *(jnp.zeros((*slots, head_dim), name) for _ in range(2)),
        jnp.ones(slots, jnp.uint16) if counted else None,
        *(jnp.zeros(slots, scale) if name == "int8" else None for _ in range(2)),
    )


def _gather(pool: Array, ids: Array) -> Array:
    # XLA for CPU widens a bfloat16 pool before it gathers, and would do that once for the whole
    # pool, in front of a loop. Behind this barrier only what is read gets widened.
    pool, ids = jax.lax.optimization_barrier((pool, ids))
    slots = pool.at[ids].get(mode="clip")  # [*rows, n, page, *any]
    return slots.reshape(*ids.shape[:-1], -1, *pool.shape[2:])
