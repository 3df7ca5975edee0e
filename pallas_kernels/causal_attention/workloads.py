"""Inputs for tests of causal attention: documents of all lengths, keys all but superseded."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Workload:
    """Attention of one layer.

    Attributes:
        batch: sequences, B.
        length: tokens of each, T.
        heads: query heads, N.
        kv_heads: K.
        width: head width, H.
        dtype: of queries, keys and values.
        documents: whether a sequence has several.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    dtype: str = "float32"
    documents: bool = True

    def __str__(self) -> str:
        sizes = f"B{self.batch}-T{self.length}-N{self.heads}-K{self.kv_heads}-H{self.width}"
        return f"{sizes}-{self.dtype}{'-documents' * self.documents}"


class Inputs(NamedTuple):
    """The positional arguments of `causal_attention`, its documents, and a cotangent."""

    arrays: tuple[
        Float[Array, "B T N H"],
        Float[Array, "B T K H"],
        Float[Array, "B T K H"],
        Float[Array, "B T K"],
    ]
    segment_ids: Int[Array, "B T"] | None
    d_out: Float[Array, "B T N H"]


def make_inputs(workload: Workload, seed: int = 0) -> Inputs:
    """Draw normal queries, keys and values, and biases of which every fourth hides its key."""
    B, T, N, K = workload.batch, workload.length, workload.heads, workload.kv_heads
    keys = jax.random.split(jax.random.key(seed), 6)
    q, d_out = (
        jax.random.normal(key, (B, T, N, workload.width), workload.dtype) for key in keys[:2]
    )
    k, v = (jax.random.normal(key, (B, T, K, workload.width), workload.dtype) for key in keys[2:4])
    bias = jax.random.uniform(keys[4], (B, T, K), minval=-4.0, maxval=0.0)
    bias = jnp.where(bias < -3.0, -50_000.0, bias)
    starts = jax.random.bernoulli(keys[5], 0.06, (B, T))
    segment_ids = jnp.cumsum(starts, axis=1) if workload.documents else None
    return Inputs((q, k, v, bias), segment_ids, d_out)


# What every implementation must get right: a single token, lengths and widths that are no multiples
# of a block, both dtypes, shared and own KV heads.
CORRECTNESS = (
    Workload(1, 1, 1, 1, 16, documents=False),
    Workload(2, 75, 4, 2, 24),
    Workload(1, 64, 2, 2, 16, documents=False),
    Workload(1, 70, 3, 1, 32, "bfloat16"),
)
