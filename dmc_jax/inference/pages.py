"""The pool of pages that keys and values lie in: the one place that knows how they are stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt16

from dmc_jax.errors import UserError
from pallas_kernels.decode_attention.api import DTYPES, SMALLEST_PAGE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """P pages of slots; every array has the axis of pages first. Kernels are handed the arrays."""

    k: Float[Array, "P page H"]  # rotated, each key at the position of its newest token
    v: Float[Array, "P page H"]
    tokens: UInt16[Array, "P page"] | None = None  # in each slot, where a policy asks for them

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
        return self.k.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all pages; also where only their shapes are known."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: the keys and the values of its slots, and how many tokens they hold."""
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
        return _gather(self.k, ids), _gather(self.v, ids)

    def read_tokens(self, ids: Int[Array, "*rows n"]) -> UInt16[Array, "*rows slots"]:
        """Read how many tokens the slots of some pages hold, in order.

        Args:
            ids: as for `read`.
        """
        return self.tokens.at[ids].get(mode="clip").reshape(*ids.shape[:-1], -1)

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
        counts = self.tokens
        if counts is not None:
            most = jnp.iinfo(counts.dtype).max
            tokens = jnp.minimum(tokens, most).astype(counts.dtype)
            counts = counts.at[at].set(tokens, mode="drop")
        return Pages(
            self.k.at[at].set(keys.astype(self.k.dtype), mode="drop"),
            self.v.at[at].set(values.astype(self.v.dtype), mode="drop"),
            counts,
        )

    def take(self, ids: Int[Array | np.ndarray, " n"]) -> "Pages":
        """Copy whole pages out."""
        return jax.tree.map(lambda x: x[ids], self)

    def put(self, ids: Int[Array | np.ndarray, " n"], pages: "Pages") -> "Pages":
        """Copy whole pages in; page P is written nowhere."""
        return jax.tree.map(lambda x, new: x.at[ids].set(new, mode="drop"), self, pages)


def empty_pages(
    count: int, page_size: int, head_dim: int, dtype: DTypeLike, *, counted: bool = False
) -> Pages:
    """Allocate a pool.

    Args:
        count: P.
        page_size: slots per page, a power of two.
        head_dim: H.
        dtype: of keys and values, float32 or bfloat16.
        counted: whether slots say how many tokens they hold.

    Raises:
        UserError: no page, a page size that is no power of two of 8 or more, another dtype.
    """
    if count < 1:
        raise UserError(f"cache: pages must be 1 or more, got {count}")
    if page_size < SMALLEST_PAGE or page_size & (page_size - 1):
        raise UserError(
            f"cache: page_size must be a power of two, {SMALLEST_PAGE} or more, got {page_size}"
        )
    if jnp.dtype(dtype) not in DTYPES:
        raise UserError(f"cache: expected dtype float32 or bfloat16, got {jnp.dtype(dtype)}")
    pool = (count, page_size, head_dim)
    tokens = jnp.ones(pool[:2], jnp.uint16) if counted else None
    return Pages(jnp.zeros(pool, dtype), jnp.zeros(pool, dtype), tokens)


def _gather(pool: Array, ids: Array) -> Array:
    # XLA for CPU widens a bfloat16 pool before it gathers, and would do that once for the whole
    # pool, in front of a loop. Behind this barrier only what is read gets widened.
    pool, ids = jax.lax.optimization_barrier((pool, ids))
    slots = pool.at[ids].get(mode="clip")  # [*rows, n, page, H]
    return slots.reshape(*ids.shape[:-1], -1, pool.shape[-1])
