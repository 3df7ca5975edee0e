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

from pallas_kernels.cache_update.api import Segment, State

_NOT_PAGES = (-1, -(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A decoding step of one layer.

    Attributes:
        seats: sequences.
        rows: R, of all layers.
        heads: K of the layer.
        window: W; None: unlimited; 0: nothing is merged.
        width: H.
        queries: a row.
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
    queries: int = 1
    pages: str = "float32"
    tokens: str = "float32"

    def __str__(self) -> str:
        sizes = f"{self.seats}x{self.heads}of{self.rows}-W{self.window}"
        sizes += f"-G{self.queries}-H{self.width}"
        return f"{sizes}-page{self.page}-{self.tokens}-in-{self.pages}"


class Inputs(NamedTuple):
    """The state, the token's q, k and v, and the named arguments of `cache_update`."""

    state: State
    token: tuple[jax.Array, jax.Array, jax.Array]
    others: dict[str, Any]


def make_inputs(workload: Workload, seed: int = 0) -> Inputs:
    """Draw a step."""
    rng = np.random.default_rng(seed)
    seats, R, K, H = workload.seats, workload.rows, workload.heads, workload.width
    W, page, maxp = workload.window or 1, workload.page, 3
    count = rng.integers(0, 2 * W + 2, (seats, R), np.int32)
    count[rng.random(count.shape) < 0.2] = 0
    full = np.arange(W) < count[..., None]  # [seats, R, W]
    weights = np.where(full, rng.uniform(0.1, 1.0, full.shape), 0)
    keys, values = (
        np.where(full[..., None], rng.normal(size=(*full.shape, H)), 0) for _ in range(2)
    )
    # A row with a segment has a slot; some rows stand at the end of a page, or of the table.
    lengths = rng.integers(1, maxp * page, (seats, R), np.int32)
    at_end = rng.random(lengths.shape) < 0.3
    lengths[at_end] = page * rng.integers(1, maxp + 1, int(at_end.sum()))
    first = int(rng.integers(0, R - K + 1))
    lengths[0, first] = page  # and its token appends, see below: so one row at least is refused
    P = lengths.size * maxp
    table = rng.permutation(P).astype(np.int32).reshape(seats, R, maxp)
    lost = rng.random(lengths.shape) < 0.2
    lost[0], lost[1:2] = True, False
    # Such a row has no page for one more slot; what lies past the next page may be any number.
    entry = np.arange(maxp)
    table[lost[..., None] & (entry >= -(-lengths // page)[..., None])] = -1
    beyond = entry > (lengths // page)[..., None]
    table[beyond] = rng.choice((-1, -(2**31), 2**31 - 1), int(beyond.sum()))
    active = rng.random(seats) < 0.8
    active[:2], active[2:][-1:] = True, False
    quantised = workload.pages == "int8"
    empty = jnp.full((P, page, H), 99 if quantised else jnp.nan, workload.pages)
    scales = [jnp.full((P, page), jnp.nan, workload.tokens)] * 2 if quantised else []
    tokens = workload.tokens if workload.window else jnp.float32
    segment = Segment(
        *(jnp.asarray(x, tokens) for x in (keys, values)),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(count),
    )
    merges = workload.window != 0
    state = State(empty, empty, jnp.asarray(lengths), segment if merges else None, *scales)
    others = {
        "page_table": jnp.asarray(table),
        "first": first,
        "active": jnp.asarray(active),
        "position": jnp.asarray(rng.integers(0, 5000, seats), jnp.int32),
        "frequencies": 1e4 ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H),
        "channel": 0.0 if merges else 1.0,
        "threshold": jnp.linspace(-1.5, 1.0, seats),
        "offset": 0.5,
        "eps": 2**-7,
        "window": workload.window,
    }
    q = rng.normal(size=(seats, K * workload.queries, H))
    k_t, v_t = rng.normal(size=(2, seats, K, H))
    k_t[0, 0, -1] = -9
    return Inputs(state, tuple(jnp.asarray(x, workload.tokens) for x in (q, k_t, v_t)), others)


# What every implementation must get right: windows that wrap, that are no power of two, that take
# several tiles; heads that are no power of two; every pair of dtypes.
CORRECTNESS = (
    Workload(3, 5, 2, 12, 64, 16, 4),
    Workload(2, 2, 2, 1, 16, 8),
    Workload(4, 3, 1, 2, 80, 8, 2, "bfloat16", "bfloat16"),
    Workload(2, 4, 3, None, 64, 16, 1, "bfloat16", "float32"),
    Workload(3, 4, 2, None, 16, 8, 3, "float32", "bfloat16"),
    Workload(2, 3, 2, 16, 128, 64, 1, "bfloat16", "bfloat16"),
    Workload(3, 3, 3, 37, 24, 8),
    Workload(3, 5, 2, 0, 64, 16, 2),
    Workload(3, 2, 2, 0, 80, 8, 1, "bfloat16", "bfloat16"),
    Workload(3, 5, 2, 12, 64, 16, 4, "int8"),
    Workload(2, 3, 2, None, 80, 8, 1, "int8", "bfloat16"),
    Workload(3, 2, 2, 0, 24, 8, 2, "int8"),
)
