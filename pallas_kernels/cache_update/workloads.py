"""Inputs for tests of the cache update: a step in the middle of decoding, made unpleasant.

Segments are of all lengths, so that rings are empty, partly full and wrapped; some sequences do not
read (the last of three or more), some rows have no page to write to. What is in the pages already
is NaN.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cache_update.api import State

_NOT_PAGES = (-1, -(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A decoding step of one layer.

    Attributes:
        seats: sequences.
        rows: R, of all layers.
        heads: K of the layer.
        window: W; None: unlimited.
        width: H.
        page: slots a page.
        pages: dtype of the pages.
        tokens: dtype of the token.
    """

    seats: int
    rows: int
    heads: int
    window: int | None
    width: int
    page: int
    pages: str = "float32"
    tokens: str = "float32"

    def __str__(self) -> str:
        sizes = f"{self.seats}x{self.heads}of{self.rows}-W{self.window}-H{self.width}"
        return f"{sizes}-page{self.page}-{self.tokens}-in-{self.pages}"


class Inputs(NamedTuple):
    """The state, the token's four arrays, and the named arguments of `cache_update`."""

    state: State
    token: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    others: dict[str, Any]


def make_inputs(workload: Workload, seed: int = 0) -> Inputs:
    """Draw a step."""
    rng = np.random.default_rng(seed)
    seats, R, K, H = workload.seats, workload.rows, workload.heads, workload.width
    W = workload.window or 1
    P = seats * K + 2
    count = rng.integers(0, 2 * W + 2, (seats, R), np.int32)
    count[rng.random(count.shape) < 0.2] = 0
    full = np.arange(W) < count[..., None]  # [seats, R, W]
    weights = np.where(full, rng.uniform(0.1, 1.0, full.shape), 0)
    keys, values = (
        np.where(full[..., None], rng.normal(size=(*full.shape, H)), 0) for _ in range(2)
    )
    k_t, v_t = rng.normal(size=(2, seats, K, H))
    page_ids = rng.permutation(P).astype(np.int32)[: seats * K].reshape(seats, K)
    lost = rng.random(page_ids.shape) < 0.2
    lost[0, 0], lost[1:2] = True, False
    page_ids[lost] = rng.choice((*_NOT_PAGES, P), int(lost.sum()))
    active = rng.random(seats) < 0.8
    active[:2], active[2:][-1:] = True, False
    empty = jnp.full((P, workload.page, H), jnp.nan, workload.pages)
    state = State(
        *(empty, empty),
        *(jnp.asarray(x, jnp.float32) for x in (keys, values, weights)),
        jnp.asarray(count),
    )
    others = {
        "first": int(rng.integers(0, R - K + 1)),
        "active": jnp.asarray(active),
        "position": jnp.asarray(rng.integers(0, 5000, seats), jnp.int32),
        "page_ids": jnp.asarray(page_ids),
        "offsets": jnp.asarray(rng.integers(0, workload.page, (seats, K)), jnp.int32),
        "frequencies": 1e4 ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H),
        "window": workload.window,
    }
    token = (
        *(jnp.asarray(x, workload.tokens) for x in (k_t, v_t)),
        jnp.asarray(rng.random((seats, K)) < 0.6, jnp.float32),
        jnp.asarray(rng.uniform(0.1, 1.0, (seats, K)), jnp.float32),
    )
    return Inputs(state, token, others)


# What every implementation must get right: windows that wrap, that are no power of two, that take
# several tiles; heads that are no power of two; every pair of dtypes.
CORRECTNESS = (
    Workload(3, 5, 2, 12, 64, 16),
    Workload(2, 2, 2, 1, 16, 8),
    Workload(4, 3, 1, 2, 80, 8, "bfloat16", "bfloat16"),
    Workload(2, 4, 3, None, 64, 16, "bfloat16", "float32"),
    Workload(3, 4, 2, None, 16, 8, "float32", "bfloat16"),
    Workload(2, 3, 2, 16, 128, 64, "bfloat16", "bfloat16"),
    Workload(3, 3, 3, 37, 24, 8),
)
