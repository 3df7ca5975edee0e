"""Causal attention with a key bias in Triton, forward and backward, for training on NVIDIA GPUs.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) with what DMC needs inside: a bias of every key, the
newest tokens that it spares, or gives another, and keys of certain ages only. With scores to base
2, so that softmax takes one `exp2` each,

    s_ij = FACTOR q_i . k_j + bias_j [i - j >= spared]       p_ij = 2^(s_ij - lse_i)

    dv_j    = sum_i p_ij do_i                       ds_ij = p_ij (do_i . v_j - delta_i)
    dk_j    = scale sum_i ds_ij q_i                 delta_i = do_i . o_i - dlse_i
    dq_i    = scale sum_j ds_ij k_j                 dbias_j = sum_{i - j >= spared} ds_ij

for first <= i - j < until in the document of i: from its first token, `starts[i]`, to the one
before `ends[i]`. Loops visit such blocks only, those near the diagonal apart: elsewhere nothing is
masked or spared.

A program adds up what it writes, in one order: nothing is added to by two, and results repeat bit
for bit. Queries that share a KV head take turns in the program of its keys.

Memory is linear in the length: what the backward pass keeps is the output and a log-sum-exp per
query.
"""

import functools
import math
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels import target
from pallas_kernels.causal_attention.plan import document_bounds
from pallas_kernels.causal_attention.settings import FLOAT32, Blocks, Settings, settings_for
from pallas_kernels.triton_call import launch, unavailable

__all__ = ["causal_attention", "unavailable"]

_LOG2_E = math.log2(math.e)

# The least rows that tensor cores take.
_LEAST = 16

# A finite stand-in for minus infinity: a block may be masked as a whole, and inf - inf is NaN. What
# such a block adds to a row's sums is wiped out by the row's own key, which is always visible.
_MASKED = tl.constexpr(-1e30)


@triton.jit
@no_type_check
def attend(
    q_ptr,  # [B, T, N, H]
    k_ptr,  # [B, T, K, H]
    v_ptr,
    bias_ptr,  # [B, K, T], float32, to base 2
    spared_ptr,  # likewise, while a key is spared; means nothing without OTHER
    starts_ptr,  # [B, T]
    out_ptr,  # [B, T, N, H]
    lse_ptr,  # [B, N, T], float32, to base 2
    FACTOR: tl.constexpr,  # scale / ln 2
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,  # H, padded to a power of two
    QUERIES: tl.constexpr,  # a block: a multiple of KEYS
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,  # compute in float32; else in bfloat16, with sums in float32
    SPARED: tl.constexpr,
    OTHER: tl.constexpr,  # spared keys have a bias too
    FIRST: tl.constexpr,
    UNTIL: tl.constexpr,  # 0: there is none
    BAND: tl.constexpr,  # more keys or queries to treat as on the diagonal, whole blocks of them
):
    """One program per block of queries and head; the last blocks, which see most, come first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // N
    n = tl.program_id(1) % N
    kv = n // (N // K)
    dtype: tl.constexpr = tl.float32 if WIDEN else tl.bfloat16
    # Three products of truncated float32 add up to nearly all of its precision.
    precision: tl.constexpr = "tf32x3" if WIDEN else "tf32"
    tokens = tl.cast(b, tl.int64) * T
    h = tl.arange(0, WIDTH)[None, :]
    t = block * QUERIES + tl.arange(0, QUERIES)
    at = (t * N + n)[:, None] * H + h
    # Not `&`: in interpreted kernels it is wrong for masks that broadcast, in some versions.
    real = tl.where((t < T)[:, None], h < H, False)
    q = tl.load(q_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
    first = tl.load(starts_ptr + tokens + t, mask=t < T, other=0)
    peak = tl.full([QUERIES], _MASKED, tl.float32)
    total = tl.full([QUERIES], 0.0, tl.float32)
    weighted = tl.full([QUERIES, WIDTH], 0.0, tl.float32)
    for diagonal in tl.static_range(2):
        begin = tl.load(starts_ptr + tokens + block * QUERIES) // KEYS * KEYS
        near = tl.maximum(begin, block * QUERIES - BAND)
        if diagonal:
            begin = near
            end = tl.minimum(block * QUERIES + QUERIES - FIRST, T)
        elif UNTIL:
            end = begin
        else:
            end = near
        for start in tl.range(begin, end, KEYS):
            s = start + tl.arange(0, KEYS)
            at_s = (s * K + kv)[:, None] * H + h
            real_s = tl.where((s < T)[:, None], h < H, False)
            keys = tl.load(k_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
            values = tl.load(v_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
            bias = tl.load(bias_ptr + (tokens * K + kv * T) + s, mask=s < T, other=0.0)[None, :]
            visible = s[None, :] >= first[:, None]
            if diagonal:
                own = t[:, None] - s[None, :]
                other = 0.0
                if OTHER:
                    of_keys = (tokens * K + kv * T) + s
                    other = tl.load(spared_ptr + of_keys, mask=s < T, other=0.0)[None, :]
                bias = tl.where(own < SPARED, other, bias)
                visible = tl.where(own >= FIRST, visible, False)
                if UNTIL:
                    visible = tl.where(own < UNTIL, visible, False)
            scores = tl.dot(q, tl.trans(keys), input_precision=precision) * FACTOR + bias
            scores = tl.where(visible, scores, _MASKED)
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            weighted = tl.dot(
                weights.to(dtype), values, weighted * shrink[:, None], input_precision=precision
            )
            peak = higher
    lse = peak + tl.log2(total)
    out = weighted / total[:, None]
    if FIRST:
        sees = peak > _MASKED / 2
        lse = tl.where(sees, lse, float("-inf"))
        out = tl.where(sees[:, None], out, 0.0)
    tl.store(lse_ptr + (tokens * N + n * T) + t, lse, mask=t < T)
    tl.store(out_ptr + tokens * N * H + at, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
@no_type_check
def key_gradients(
    q_ptr,  # [B, T, N, H]
    k_ptr,  # [B, T, K, H]
    v_ptr,
    bias_ptr,  # [B, K, T], float32, to base 2
    spared_ptr,  # likewise, while a key is spared; means nothing without OTHER
    starts_ptr,  # [B, T]
    ends_ptr,  # [B, T]
    lse_ptr,  # [B, N, T], float32, to base 2
    delta_ptr,  # [B, N, T], float32
    d_out_ptr,  # [B, T, N, H]
    dk_ptr,  # [B, T, K, H]
    dv_ptr,
    dbias_ptr,  # [B, K, T], float32, of the natural bias
    dspared_ptr,  # likewise; means nothing without OTHER
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,  # a block: a multiple of QUERIES
    WIDEN: tl.constexpr,
    SPARED: tl.constexpr,
    OTHER: tl.constexpr,
    FIRST: tl.constexpr,
    UNTIL: tl.constexpr,
    BAND: tl.constexpr,
):
    """One program per block of keys and KV head; the first blocks, seen by most, come first."""
    begin_s = tl.program_id(0) * KEYS
    b = tl.program_id(1) // K
    kv = tl.program_id(1) % K
    dtype: tl.constexpr = tl.float32 if WIDEN else tl.bfloat16
    precision: tl.constexpr = "tf32x3" if WIDEN else "tf32"
    tokens = tl.cast(b, tl.int64) * T
    h = tl.arange(0, WIDTH)[None, :]
    s = begin_s + tl.arange(0, KEYS)
    at_s = (s * K + kv)[:, None] * H + h
    real_s = tl.where((s < T)[:, None], h < H, False)
    keys = tl.load(k_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
    values = tl.load(v_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
    at_bias = (tokens * K + kv * T) + s
    bias = tl.load(bias_ptr + at_bias, mask=s < T, other=0.0)[:, None]
    other = 0.0
    if OTHER:
        other = tl.load(spared_ptr + at_bias, mask=s < T, other=0.0)[:, None]
        dspared = tl.full([KEYS], 0.0, tl.float32)
    last = tl.load(ends_ptr + tokens + tl.minimum(begin_s + KEYS, T) - 1)
    dk = tl.full([KEYS, WIDTH], 0.0, tl.float32)
    dv = tl.full([KEYS, WIDTH], 0.0, tl.float32)
    dbias = tl.full([KEYS], 0.0, tl.float32)
    for n in tl.range(kv * (N // K), (kv + 1) * (N // K), num_stages=1):
        for diagonal in tl.static_range(2):
            begin = begin_s + KEYS + BAND
            if diagonal:
                end = tl.minimum(begin, T)
                begin = begin_s + FIRST // QUERIES * QUERIES
            elif UNTIL:
                end = begin
            else:
                end = last
            for start in tl.range(begin, end, QUERIES):
                t = start + tl.arange(0, QUERIES)
                at = (t * N + n)[:, None] * H + h
                real = tl.where((t < T)[:, None], h < H, False)
                q = tl.load(q_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
                d_out = tl.load(d_out_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
                of_row = (tokens * N + n * T) + t
                # So queries past the last have weights of 2^-inf.
                lse = tl.load(lse_ptr + of_row, mask=t < T, other=float("inf"))[None, :]
                delta = tl.load(delta_ptr + of_row, mask=t < T, other=0.0)[None, :]
                first = tl.load(starts_ptr + tokens + t, mask=t < T, other=0)
                visible = s[:, None] >= first[None, :]
                scores = tl.dot(keys, tl.trans(q), input_precision=precision) * FACTOR - lse
                if diagonal:
                    own = t[None, :] - s[:, None]
                    scores += tl.where(own < SPARED, other, bias)
                    visible = tl.where(own >= FIRST, visible, False)
                    if UNTIL:
                        visible = tl.where(own < UNTIL, visible, False)
                else:
                    scores += bias
                weights = tl.where(visible, tl.exp2(scores), 0.0)
                dv = tl.dot(weights.to(dtype), d_out, dv, input_precision=precision)
                d_weights = tl.dot(values, tl.trans(d_out), input_precision=precision)
                d_scores = weights * (d_weights - delta)
                dk = tl.dot(d_scores.to(dtype), q, dk, input_precision=precision)
                if diagonal:
                    # The same for 1, but for fewer registers.
                    spares = own == 0 if SPARED == 1 else own < SPARED
                    if OTHER:
                        dspared += tl.sum(tl.where(spares, d_scores, 0.0), 1)
                    d_scores = tl.where(spares, 0.0, d_scores)
                dbias += tl.sum(d_scores, 1)
    tl.store(dk_ptr + tokens * K * H + at_s, (SCALE * dk).to(dk_ptr.dtype.element_ty), mask=real_s)
    tl.store(dv_ptr + tokens * K * H + at_s, dv.to(dv_ptr.dtype.element_ty), mask=real_s)
    tl.store(dbias_ptr + at_bias, dbias, mask=s < T)
    if OTHER:
        tl.store(dspared_ptr + at_bias, dspared, mask=s < T)


@triton.jit
@no_type_check
def query_gradients(
    q_ptr,  # [B, T, N, H]
    k_ptr,  # [B, T, K, H]
    v_ptr,
    bias_ptr,  # [B, K, T], float32, to base 2
    spared_ptr,  # likewise, while a key is spared; means nothing without OTHER
    starts_ptr,  # [B, T]
    lse_ptr,  # [B, N, T], float32, to base 2
    delta_ptr,  # [B, N, T], float32
    d_out_ptr,  # [B, T, N, H]
    dq_ptr,  # [B, T, N, H]
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,  # a block: a multiple of KEYS
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
    SPARED: tl.constexpr,
    OTHER: tl.constexpr,
    FIRST: tl.constexpr,
    UNTIL: tl.constexpr,
    BAND: tl.constexpr,
):
    """One program per block of queries and head, as in `attend`."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // N
    n = tl.program_id(1) % N
    kv = n // (N // K)
    dtype: tl.constexpr = tl.float32 if WIDEN else tl.bfloat16
    precision: tl.constexpr = "tf32x3" if WIDEN else "tf32"
    tokens = tl.cast(b, tl.int64) * T
    h = tl.arange(0, WIDTH)[None, :]
    t = block * QUERIES + tl.arange(0, QUERIES)
    at = (t * N + n)[:, None] * H + h
    real = tl.where((t < T)[:, None], h < H, False)
    q = tl.load(q_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
    d_out = tl.load(d_out_ptr + tokens * N * H + at, mask=real, other=0.0).to(dtype)
    of_row = (tokens * N + n * T) + t
    lse = tl.load(lse_ptr + of_row, mask=t < T, other=float("inf"))[:, None]
    delta = tl.load(delta_ptr + of_row, mask=t < T, other=0.0)[:, None]
    first = tl.load(starts_ptr + tokens + t, mask=t < T, other=0)
    dq = tl.full([QUERIES, WIDTH], 0.0, tl.float32)
    for diagonal in tl.static_range(2):
        begin = tl.load(starts_ptr + tokens + block * QUERIES) // KEYS * KEYS
        near = tl.maximum(begin, block * QUERIES - BAND)
        if diagonal:
            begin = near
            end = tl.minimum(block * QUERIES + QUERIES - FIRST, T)
        elif UNTIL:
            end = begin
        else:
            end = near
        for start in tl.range(begin, end, KEYS):
            s = start + tl.arange(0, KEYS)
            at_s = (s * K + kv)[:, None] * H + h
            real_s = tl.where((s < T)[:, None], h < H, False)
            keys = tl.load(k_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
            values = tl.load(v_ptr + tokens * K * H + at_s, mask=real_s, other=0.0).to(dtype)
            bias = tl.load(bias_ptr + (tokens * K + kv * T) + s, mask=s < T, other=0.0)[None, :]
            visible = s[None, :] >= first[:, None]
            if diagonal:
                own = t[:, None] - s[None, :]
                other = 0.0
                if OTHER:
                    of_keys = (tokens * K + kv * T) + s
                    other = tl.load(spared_ptr + of_keys, mask=s < T, other=0.0)[None, :]
                bias = tl.where(own < SPARED, other, bias)
                visible = tl.where(own >= FIRST, visible, False)
                if UNTIL:
                    visible = tl.where(own < UNTIL, visible, False)
            scores = tl.dot(q, tl.trans(keys), input_precision=precision) * FACTOR + bias
            weights = tl.where(visible, tl.exp2(scores - lse), 0.0)
            d_weights = tl.dot(d_out, tl.trans(values), input_precision=precision)
            d_scores = (weights * (d_weights - delta)).to(dtype)
            dq = tl.dot(d_scores, keys, dq, input_precision=precision)
    tl.store(dq_ptr + tokens * N * H + at, (SCALE * dq).to(dq_ptr.dtype.element_ty), mask=real)


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
