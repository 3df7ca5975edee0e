"""Causal attention with a key bias in Triton, forward and backward, for training on NVIDIA GPUs.

The contract is that of `reference.causal_attention`; the algorithm stands in `kernels`. Memory is
linear in the length: what the backward pass keeps is the output and a log-sum-exp per query.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import target
from pallas_kernels.causal_attention import kernels
from pallas_kernels.causal_attention.reference import validate
from pallas_kernels.causal_attention.settings import FLOAT32, Blocks, Settings, settings_for
from pallas_kernels.triton_call import launch, unavailable

__all__ = ["causal_attention", "unavailable"]

_LOG2_E = math.log2(math.e)

# The least rows that tensor cores take.
_LEAST = 16


class _How(NamedTuple):
    """What is settled when a call is traced."""

    scale: float
    settings: Settings
    capability: int | None
    launch: object


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    settings: Settings | None = None,
) -> Float[Array, "B T N H"]:
    """Attends; see `reference.causal_attention` for the contract.

    Args:
        settings: to try others than the kept ones, which tuning does.

    Raises:
        ValueError: shapes or dtypes that break the contract.
    """
    validate(q, k, v, key_bias, segment_ids)
    B, T, N, H = q.shape
    K = k.shape[2]
    dtype = jnp.promote_types(q.dtype, k.dtype)
    if settings is None:
        settings = settings_for(target.current().kind) if dtype == jnp.bfloat16 else FLOAT32
    how = _How(
        float(scale),
        settings,
        target.current().capability,
        launch,
    )
    if key_bias is None:
        key_bias = jnp.zeros((B, T, K), jnp.float32)
    starts, ends = document_bounds(segment_ids, (B, T))
    bias = _LOG2_E * key_bias.astype(jnp.float32).transpose(0, 2, 1)
    if T * N * H >= 2**31:
        raise ValueError(f"q has {T * N * H} elements a sequence, expected fewer than 2**31")
    return _attend(q, k, v, bias, starts, ends, how)


def document_bounds(
    segment_ids: Int[Array, "B T"] | None, shape: tuple[int, int]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First token of each token's document, and one past the last.

    Args:
        segment_ids: documents, each in one piece; None: all is one.
        shape: (B, T).
    """
    B, T = shape
    if segment_ids is None:
        return jnp.zeros(shape, jnp.int32), jnp.full(shape, T, jnp.int32)
    index = jnp.arange(T, dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # [B, T - 1]
    starts = jnp.pad(jnp.where(changes, index[1:], 0), [(0, 0), (1, 0)])
    ends = jnp.pad(jnp.where(changes, index[1:], T), [(0, 0), (0, 1)], constant_values=T)
    return jax.lax.cummax(starts, axis=1), jax.lax.cummin(ends, axis=1, reverse=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, bias, starts, ends, how):
    return _forward(q, k, v, bias, starts, ends, how)[0]


@functools.partial(jax.jit, static_argnames="how")
def _forward(q, k, v, bias, starts, ends, how):
    B, T, N, H = q.shape
    blocks = how.settings.forward
    out, lse = how.launch(
        kernels.attend,
        *(q, k, v, bias, starts),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype), _of_rows(q)),
        grid=(-(-T // blocks.queries), B * N),
        **_options(blocks, how),
        **constants(q, k, how.scale, blocks),
    )
    return out, (q, k, v, bias, starts, ends, out, lse)


@functools.partial(jax.jit, static_argnames="how")
def _backward(how, residuals, d_out):
    q, k, v, bias, starts, ends, out, lse = residuals
    B, T, N, H = q.shape
    K = k.shape[2]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, T, N]
    delta = delta.transpose(0, 2, 1)
    blocks = how.settings.key_gradients
    dk, dv, dbias = how.launch(
        kernels.key_gradients,
        *(q, k, v, bias, starts, ends, lse, delta, d_out),
        out=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v, bias)),
        grid=(-(-T // blocks.keys), B * K),
        **_options(blocks, how),
        **constants(q, k, how.scale, blocks),
        SCALE=how.scale,
    )
    blocks = how.settings.query_gradients
    (dq,) = how.launch(
        kernels.query_gradients,
        *(q, k, v, bias, starts, lse, delta, d_out),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(-(-T // blocks.queries), B * N),
        **_options(blocks, how),
        **constants(q, k, how.scale, blocks),
        SCALE=how.scale,
    )
    # The kernels' bias is to base 2, and the gradient theirs of the natural one.
    return dq, dk, dv, dbias / _LOG2_E, None, None


_attend.defvjp(_forward, _backward)


def _of_rows(q: Array) -> jax.ShapeDtypeStruct:
    B, T, N, _ = q.shape
    return jax.ShapeDtypeStruct((B, N, T), jnp.float32)


def _options(blocks: Blocks, how: _How) -> dict:
    return {
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "capability": how.capability,
    }


def constants(q, k, scale: float, blocks: Blocks) -> dict:
    """The compile-time arguments of `kernels.attend`, which the gradients' take too."""
    _, T, N, H = q.shape
    return {
        "FACTOR": scale * _LOG2_E,
        "T": T,
        "N": N,
        "K": k.shape[2],
        "H": H,
        "WIDTH": max(1 << (H - 1).bit_length(), _LEAST),
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
        "WIDEN": jnp.promote_types(q.dtype, k.dtype) != jnp.bfloat16,
    }
