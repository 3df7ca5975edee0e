"""Causal attention with a key bias in Triton: how the kernels of `kernels.py` are called.

Memory is linear in the length: what the backward pass keeps is the output and a log-sum-exp per
query.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import target
from pallas_kernels.causal_attention.kernels import attend, key_gradients, query_gradients
from pallas_kernels.causal_attention.plan import document_bounds
from pallas_kernels.causal_attention.settings import FLOAT32, Blocks, Settings, settings_for
from pallas_kernels.triton_call import launch, unavailable

__all__ = ["causal_attention", "unavailable"]

_LOG2_E = math.log2(math.e)

# The least rows that tensor cores take.
_LEAST = 16


class _How(NamedTuple):
    """What is settled when a call is traced."""

    scale: float
    spared: int
    first: int
    until: int | None
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
    spared: int = 1,
    spared_bias: Float[Array, "B T K"] | None = None,
    first: int = 0,
    until: int | None = None,
    with_lse: bool = False,
    settings: Settings | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend; see `api.causal_attention` for the contract.

    Args:
        settings: to try others than the kept ones, which tuning does.

    Raises:
        ValueError: a sequence of 2**31 elements or more.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    dtype = jnp.promote_types(q.dtype, k.dtype)
    if settings is None:
        settings = settings_for(target.current().kind) if dtype == jnp.bfloat16 else FLOAT32
    how = _How(
        *(float(scale), spared, first, until),
        settings,
        target.current().capability,
        launch,
    )
    if key_bias is None:
        key_bias = jnp.zeros((B, T, K), jnp.float32)
    starts, ends = document_bounds(segment_ids, (B, T))
    bias, other = (
        None if x is None else _LOG2_E * x.astype(jnp.float32).transpose(0, 2, 1)
        for x in (key_bias, spared_bias)
    )
    if T * N * H >= 2**31:
        raise ValueError(f"q has {T * N * H} elements a sequence, expected fewer than 2**31")
    out, lse = _attend(q, k, v, bias, other, starts, ends, how)
    return (out, lse) if with_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q, k, v, bias, other, starts, ends, how):
    return _forward(q, k, v, bias, other, starts, ends, how)[0]


@functools.partial(jax.jit, static_argnames="how")
def _forward(q, k, v, bias, other, starts, ends, how):
    B, T, N, H = q.shape
    blocks = how.settings.forward
    out, lse = how.launch(
        attend,
        *(q, k, v, bias, bias if other is None else other, starts),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype), _of_rows(q)),
        grid=(-(-T // blocks.queries), B * N),
        **_options(blocks, how),
        **_constants(q, k, other, blocks, how),
    )
    natural = lse.transpose(0, 2, 1) / _LOG2_E
    return (out, natural), (q, k, v, bias, other, starts, ends, out, lse)


@functools.partial(jax.jit, static_argnames="how")
def _backward(how, residuals, gradients):
    q, k, v, bias, other, starts, ends, out, lse = residuals
    d_out, d_lse = gradients
    B, T, N, H = q.shape
    K = k.shape[2]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, T, N]
    delta = (delta - d_lse).transpose(0, 2, 1)
    spared = bias if other is None else other
    blocks = how.settings.key_gradients
    dk, dv, dbias, dother = how.launch(
        key_gradients,
        *(q, k, v, bias, spared, starts, ends, lse, delta, d_out),
        # The last is not written where there is no other bias.
        out=tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x in (k, v, bias, bias[:1, :1, :1] if other is None else other)
        ),
        grid=(-(-T // blocks.keys), B * K),
        **_options(blocks, how),
        **_constants(q, k, other, blocks, how),
        SCALE=how.scale,
    )
    blocks = how.settings.query_gradients
    (dq,) = how.launch(
        query_gradients,
        *(q, k, v, bias, spared, starts, lse, delta, d_out),
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(-(-T // blocks.queries), B * N),
        **_options(blocks, how),
        **_constants(q, k, other, blocks, how),
        SCALE=how.scale,
    )
    # The kernels' bias is to base 2, and the gradient theirs of the natural one.
    dother = None if other is None else dother / _LOG2_E
    return dq, dk, dv, dbias / _LOG2_E, dother, None, None


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


def _constants(q, k, other, blocks: Blocks, how: _How) -> dict:
    ages = {"first": how.first, "until": how.until, "other": other is not None}
    return constants(q, k, how.scale, blocks, how.spared, **ages)


def constants(
    q,
    k,
    scale: float,
    blocks: Blocks,
    spared: int = 1,
    *,
    other: bool = False,
    first: int = 0,
    until: int | None = None,
) -> dict:
    """The compile-time arguments of `attend`, which the gradients' take too."""
    step = min(blocks.queries, blocks.keys)  # what a loop goes by; the other is a multiple of it
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
        "SPARED": spared,
        "OTHER": other,
        "FIRST": first,
        "UNTIL": until or 0,
        "BAND": -(-(max(spared, first, until or 0) - 1) // step) * step,
    }
