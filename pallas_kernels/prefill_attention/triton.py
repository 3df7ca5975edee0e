"""Attention of a chunk over pages in Triton, for NVIDIA GPUs.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) over pages, with a score more: that of a token's own
state, which the running softmax begins with. A program has a block of tokens and all query heads
that share a KV head, so that it reads keys and values for all of them at once. It goes through the
slots that any of its tokens sees, and stops there: the loop is as short as the row is compressed.

    page ids  ->  keys, values [slots, H]  ->  scores [queries, slots]  ->  softmax [queries, H]
"""

import functools
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels import target
from pallas_kernels.prefill_attention.settings import FLOAT32, Settings, settings_for
from pallas_kernels.triton_call import launch, unavailable

__all__ = ["prefill_attention", "unavailable"]

# The least columns that tensor cores take.
_LEAST = 16


@triton.jit
@no_type_check
def attend(
    q_ptr,  # [B, T, N, H]
    own_k_ptr,  # [B, T, K, H]
    own_v_ptr,
    slot_ptr,  # [B, K, T]
    k_ptr,  # [P, PAGE, H]
    v_ptr,
    table_ptr,  # [seats, R, maxp]
    lengths_ptr,  # [seats, R]
    seats_ptr,  # [B]
    sizes_ptr,  # [4]: T, R, maxp, first; no other of these compiles the kernel anew
    k_scale_ptr,  # [P, PAGE]; this and the next mean nothing without SCALED
    v_scale_ptr,
    out_ptr,  # [B, T, N, H]
    FACTOR: tl.constexpr,  # scale / ln 2
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,  # H, padded to a power of two
    QUERIES: tl.constexpr,  # G times as many tokens, and padding
    SLOTS: tl.constexpr,  # a block
    WIDEN: tl.constexpr,  # compute in float32; else in bfloat16, with sums in float32
    SCALED: tl.constexpr,  # keys and values of pages are int8
):
    """One program per block of tokens and row; the last blocks, which see most, come first."""
    TOKENS: tl.constexpr = QUERIES // G
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // K
    head = tl.program_id(1) % K
    T, R = tl.load(sizes_ptr), tl.load(sizes_ptr + 1)
    maxp, first = tl.load(sizes_ptr + 2), tl.load(sizes_ptr + 3)
    dtype: tl.constexpr = tl.float32 if WIDEN else tl.bfloat16
    # Three products of truncated float32 add up to nearly all of its precision.
    precision: tl.constexpr = "tf32x3" if WIDEN else "tf32"
    row = tl.load(seats_ptr + b).to(tl.int64) * R + first + head
    length = tl.minimum(tl.load(lengths_ptr + row), maxp * PAGE)
    tokens = tl.cast(b, tl.int64) * T

    i = tl.arange(0, QUERIES)
    t = block * TOKENS + i // G
    # Not `&`: in interpreted kernels it is wrong for masks that broadcast, in some versions.
    there = tl.where(i < TOKENS * G, t < T, False)
    slot = tl.load(slot_ptr + tokens * K + head * T + t, mask=there, other=0)
    slot = tl.minimum(slot, length)

    h = tl.arange(0, WIDTH)[None, :]
    real = tl.where(there[:, None], h < H, False)
    at = (t * (K * G) + head * G + i % G)[:, None] * H + h
    q = tl.load(q_ptr + tokens * (K * G * H) + at, mask=real, other=0.0).to(dtype)
    own = (t * K + head)[:, None] * H + h
    own_k = tl.load(own_k_ptr + tokens * (K * H) + own, mask=real, other=0.0)
    own_v = tl.load(own_v_ptr + tokens * (K * H) + own, mask=real, other=0.0)
    if not SCALED:  # else they are rounded already
        own_k = own_k.to(k_ptr.dtype.element_ty)
        own_v = own_v.to(v_ptr.dtype.element_ty)
    peak = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1) * FACTOR
    total = tl.full([QUERIES], 1.0, tl.float32)
    weighted = own_v.to(tl.float32)

    end = tl.max(slot, 0)
    for start in tl.range(0, end, SLOTS):
        s = start + tl.arange(0, SLOTS)
        live = s < end
        page = tl.load(table_ptr + row * maxp + s // PAGE, mask=live, other=0)
        at_s = page.to(tl.int64) * (PAGE * H) + (s % PAGE) * H
        mask = live[:, None]
        if WIDTH != H:
            mask = tl.where(mask, h < H, False)
        # Dead slots may hold NaN, and 0 * NaN is NaN: they are not read at all.
        keys = tl.load(k_ptr + at_s[:, None] + h, mask=mask, other=0.0).to(dtype)
        values = tl.load(v_ptr + at_s[:, None] + h, mask=mask, other=0.0).to(dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision=precision) * FACTOR
        if SCALED:
            of_slot = page.to(tl.int64) * PAGE + s % PAGE
            k_scale = tl.load(k_scale_ptr + of_slot, mask=live, other=0.0).to(tl.float32)
            v_scale = tl.load(v_scale_ptr + of_slot, mask=live, other=0.0).to(tl.float32)
            scores *= k_scale[None, :]
        scores = tl.where(s[None, :] < slot[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if SCALED:
            weights *= v_scale[None, :]
        weighted = tl.dot(
            weights.to(dtype), values, weighted * shrink[:, None], input_precision=precision
        )
        peak = higher
    out = weighted / total[:, None]
    tl.store(out_ptr + tokens * (K * G * H) + at, out.to(out_ptr.dtype.element_ty), mask=real)


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
    first: Int[Array, ""],
    scale: float,
    scales: tuple[Float[Array, "P page"], Float[Array, "P page"]] | None = None,
    settings: Settings | None = None,
) -> Float[Array, "B T N H"]:
    """Attend; see `api.prefill_attention` for the contract.

    Args:
        settings: to try others than the usual ones.

    Raises:
        ValueError: a sequence of 2**31 elements or more.
    """
    B, T, N, H = q.shape
    if T * N * H >= 2**31:
        raise ValueError(f"q has {T * N * H} elements a sequence, expected fewer than 2**31")
    kind = target.current().kind
    return _attend(
        *(q, own_k, own_v, slot, k_pages, v_pages, page_table, lengths, seats, first, scales),
        scale=float(scale),
        settings=settings or (FLOAT32 if _widens(q, k_pages) else settings_for(kind)),
        capability=target.current().capability,
        launch=launch,
    )


@functools.partial(jax.jit, static_argnames=("scale", "settings", "capability", "launch"))
def _attend(*arrays, scale, settings, capability, launch):
    *arrays, first, scales = arrays
    q, own_k, _, _, k_pages, _, page_table, *_ = arrays
    B, T, N, _ = q.shape
    K = own_k.shape[2]
    fixed = constants(q, own_k, k_pages, scale, settings)
    sizes = jnp.stack([jnp.asarray(x, jnp.int32) for x in (T, *page_table.shape[1:], first)])
    (out,) = launch(
        attend,
        *arrays,
        *(sizes, *((sizes, sizes) if scales is None else scales)),  # without: what is not read
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(-(-T // (fixed["QUERIES"] // fixed["G"])), B * K),
        num_warps=settings.warps,
        num_stages=settings.stages,
        capability=capability,
        **fixed,
    )
    return out


def constants(q: Any, own_k: Any, k_pages: Any, scale: float, settings: Settings) -> dict[str, Any]:
    """The compile-time arguments of `attend` for arrays of these shapes and dtypes."""
    _, _, N, H = q.shape
    K = own_k.shape[2]
    return {
        "FACTOR": scale * math.log2(math.e),
        "K": K,
        "G": N // K,
        "H": H,
        "PAGE": k_pages.shape[1],
        "WIDTH": max(_LEAST, _power_of_two(H)),
        "QUERIES": max(settings.queries, _power_of_two(N // K)),
        "SLOTS": settings.slots,
        "WIDEN": _widens(q, k_pages),
        "SCALED": k_pages.dtype == jnp.int8,
    }


def _widens(q: Any, k_pages: Any) -> bool:
    return jnp.promote_types(q.dtype, k_pages.dtype) != jnp.bfloat16


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
