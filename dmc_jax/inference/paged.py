"""Attention over a `PagedCache`: of one token per sequence, and of many."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import (
    DMCSettings,
    hard_decisions,
    importance,
    merge_logits,
    rotate_for_attention,
)
from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.inference.cache import (
    PagedCache,
    append_or_merge,
    first_rows,
    pages_of,
    take_rows,
)
from dmc_jax.model.llama import Attend, forward
from pallas_kernels.decode_attention.api import decode_attention, plan_decode_attention
from pallas_kernels.decode_attention.plan import Plan

# Queries and slots per block of the attention of many tokens.
_QUERY_BLOCK = 128
_SLOT_BLOCK = 128


def attend_cached(
    config: ModelConfig,
    settings: DMCSettings | None,
    *,
    threshold: float | Array,
    active: Bool[Array, " slots"],
    implementation: str | None = None,
    update: str | None = None,
    plans: dict[int, Plan | None] | None = None,
) -> Attend:
    """An attention function whose state is the `PagedCache`; one token per slot, T = 1.

    Every layer adds the token to its own rows and attends over them. The position stays as it is:
    whoever calls the model moves it on once all layers have read the token.

    Args:
        config: gives the layout of the rows, the rotary base and scaling.
        settings: those that the cache was made with; None: dense.
        threshold: of hard decisions.
        active: sequences that read a token; the output of the others is zero.
        implementation: of `decode_attention`; None: the fastest here.
        update: implementation of `append_or_merge`; None: the fastest here.
        plans: of `plan_step`; None: every layer makes its own.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    offsets = first_rows(config)
    rotation = rotate if settings is None else rotate_for_attention

    def attend(q, k, v, layer, cache):
        slots, _, N, H = q.shape
        K, first = k.shape[2], offsets[layer]
        decision = omega = None
        if settings is not None:
            decision = hard_decisions(merge_logits(k, settings), threshold)[:, 0]
            omega = importance(q, K, settings)[:, 0]
        cache = append_or_merge(
            cache,
            first,
            k[:, 0],
            v[:, 0],
            decision,
            omega,
            active=active,
            settings=settings,
            frequencies=frequencies,
            implementation=update,
        )
        # Attention reads the pool after the layer wrote to it, and nothing reads it before: that
        # order lets XLA update it in place.
        lengths = take_rows(cache.lengths, first, K)
        lengths = jnp.where((active & ~cache.failed)[:, None], lengths, 0)
        out = decode_attention(
            rotation(q, cache.position[:, None], frequencies).reshape(slots * K, N // K, H),
            cache.k_pages,
            cache.v_pages,
            take_rows(cache.page_table, first, K).reshape(slots * K, -1),
            lengths.reshape(-1),
            scale=H**-0.5,
            implementation=implementation,
            plan=None if plans is None else jax.tree.map(lambda x: x[layer], plans[K]),
        )
        return out.reshape(slots, 1, N, H), cache, None

    return attend


def plan_step(
    config: ModelConfig,
    cache: PagedCache,
    active: Bool[Array, " slots"],
    implementation: str | None = None,
) -> dict[int, Plan | None]:
    """Splits the attention of all layers of a step, before the first of them.

    A row takes one slot more or none in the step; the plan counts it in.

    Args:
        config: gives the layout of the rows.
        cache: as the step finds it.
        active: sequences that read a token.
        implementation: of `decode_attention`.

    Returns:
        For each number K of KV heads that some layer has, plans with a leading axis of layers.
    """
    slots, R, maxp = cache.page_table.shape
    lengths = jnp.where((active & ~cache.failed)[:, None], cache.lengths + 1, 0)

    def plans_of(K):
        # Of a layer with other heads this reads other rows than its own; nobody uses that plan.
        rows = jnp.minimum(first_rows(config)[:, None] + jnp.arange(K), R - 1)  # [L, K]
        return plan_decode_attention(
            lengths[:, rows].swapaxes(0, 1).reshape(-1, slots * K),
            cache.k_pages,
            longest=maxp * cache.k_pages.shape[1],
            implementation=implementation,
        )

    return {K: plans_of(K) for K in set(config.kv_heads_by_layer)}


def decode_step(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    tokens: Int[Array, " slots"],
    active: Bool[Array, " slots"],
    *,
    settings: DMCSettings | None,
    threshold: float | Array = 0.0,
    dtype: str = "float32",
    implementation: str | None = None,
    update: str | None = None,
) -> tuple[PagedCache, Float[Array, "slots V"]]:
    """Read one token of every active sequence.

    Args:
        params: of `init_params` or, faster, `unstack_layers`.
        config: its sizes.
        cache: holds the tokens before.
        tokens: ids in [0, V); those of inactive slots do not matter.
        active: sequences that read a token; the others stay as they are.
        settings: those that the cache was made with.
        threshold: of hard decisions.
        dtype: of the forward pass.
        implementation: of `decode_attention`; None: the fastest here.
        update: implementation of `append_or_merge`; None: the fastest here.

    Returns:
        (the cache with the tokens, logits of the tokens after them). Both mean nothing for the
        sequences that `failed` marks, which ran out of pages, and the logits of inactive ones.
    """
    attend = attend_cached(
        *(config, settings),
        threshold=threshold,
        active=active,
        implementation=implementation,
        update=update,
        plans=plan_step(config, cache, active, implementation),
    )
    output = forward(params, config, tokens[:, None], dtype=dtype, attend=attend, state=cache)
    cache = dataclasses.replace(output.state, position=output.state.position + active)
    return cache, output.logits[:, 0]


def attend_pages(
    q: Float[Array, "B T N H"],
    own_k: Float[Array, "B T K H"],
    own_v: Float[Array, "B T K H"],
    slot: Int[Array, "B K T"],
    cache: PagedCache,
    first: Array,
    sequences: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Attention over the slots before a token's own, from the pages, and its own running state.

    Blocks of queries meet blocks of slots with a running softmax. Each block of queries stops at
    the last slot that any of its rows can see, so the loop is as short as the cache is compressed.

    Args:
        q: queries, rotated.
        own_k, own_v: states of the tokens' open slots right after each of them, keys rotated.
        slot: which slot that is; the query sees those before it.
        cache: holds those slots already.
        first: row of the layer's first KV head.
        sequences: the slot of the cache that each row of the batch is in.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.
    """
    B, T, N, H = q.shape
    K = own_k.shape[2]
    block = math.gcd(T, _QUERY_BLOCK)
    table = take_rows(cache.page_table, first, K, sequences)
    lengths = take_rows(cache.lengths, first, K, sequences)

    def blocks(x, axis):  # [..., T, ...] -> [T / b, ..., b, ...]
        x = x.reshape(*x.shape[:axis], T // block, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    queries = q.reshape(B, T, K, N // K, H)
    out = jax.lax.map(
        lambda x: _attend_block(*x, table, lengths, cache.k_pages, cache.v_pages),
        (blocks(queries, 1), blocks(own_k, 1), blocks(own_v, 1), blocks(slot, 2)),
    )  # [T / b, B, K, G, b, H]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, N, H)


def _attend_block(
    q: Float[Array, "B b K G H"],
    own_k: Float[Array, "B b K H"],
    own_v: Float[Array, "B b K H"],
    slot: Int[Array, "B K b"],
    table: Int[Array, "B K maxp"],
    lengths: Int[Array, "B K"],
    k_pages: Float[Array, "P page H"],
    v_pages: Float[Array, "P page H"],
) -> Float[Array, "B K G b H"]:
    """Attention of one block of queries; see `attend_pages`."""
    H, page = q.shape[-1], k_pages.shape[1]
    pages = max(1, _SLOT_BLOCK // page)  # per block of slots
    table = jnp.pad(table, [(0, 0), (0, 0), (0, -table.shape[2] % pages)])
    dtype = jnp.promote_types(q.dtype, k_pages.dtype)

    def einsum(equation, *operands):
        operands = (x.astype(dtype) for x in operands)
        return jnp.einsum(
            equation, *operands, precision="highest", preferred_element_type=jnp.float32
        )

    def meet_slots(j, carry):
        peak, total, weighted = carry  # [B, K, G, b] twice, [B, K, G, b, H]
        ids = jax.lax.dynamic_slice_in_dim(table, j * pages, pages, axis=2)
        keys, values = _read(k_pages, ids), _read(v_pages, ids)  # [B, K, s, H]
        index = j * pages * page + jnp.arange(pages * page)
        # 0 * NaN is NaN, and what no row uses may hold it: a zero weight is no mask.
        values = jnp.where((index < lengths[..., None])[..., None], values, 0)
        seen = (index < slot[..., None])[:, :, None]  # [B, K, 1, b, s]
        scores = H**-0.5 * einsum("BTKGH,BKSH->BKGTS", q, keys)
        new_peak = jnp.maximum(peak, jnp.where(seen, scores, -jnp.inf).max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        weighted = weighted * shrink[..., None] + einsum("BKGTS,BKSH->BKGTH", weights, values)
        return new_peak, total * shrink + weights.sum(axis=-1), weighted

    # One token at a time reads its own state from a page: rounded as pages are.
    own_k, own_v = own_k.astype(k_pages.dtype), own_v.astype(v_pages.dtype)
    own = H**-0.5 * einsum("BTKGH,BTKH->BKGT", q, own_k)
    value = own_v.astype(jnp.float32).transpose(0, 2, 1, 3)[:, :, None]  # [B, K, 1, b, H]
    start = own, jnp.ones_like(own), jnp.broadcast_to(value, (*own.shape, H))
    # Slots 0 to slot - 1 are in this many blocks.
    steps = pages_of(jnp.minimum(slot.max(), lengths.max()), pages * page)
    _, total, weighted = jax.lax.fori_loop(0, steps, meet_slots, start)
    return (weighted / total[..., None]).astype(q.dtype)


def _read(pages: Array, ids: Int[Array, "B K n"]) -> Float[Array, "B K s H"]:
    """The slots of some pages, in order."""
    # XLA for CPU widens a bfloat16 pool before it gathers, and would do that once for the whole
    # pool, in front of the loop. Behind this barrier only what is read gets widened.
    pages, ids = jax.lax.optimization_barrier((pages, ids))
    return pages.at[ids].get(mode="clip").reshape(*ids.shape[:2], -1, pages.shape[-1])
