"""One token of every sequence: attention over a `PagedCache`, and a step of the model."""

import dataclasses
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
from dmc_jax.inference.paged_cache import (
    PagedCache,
    append_or_merge,
    first_rows,
    take_rows,
)
from dmc_jax.model.llama import Attend, forward
from pallas_kernels.decode_attention.api import decode_attention, plan_decode_attention
from pallas_kernels.plan import Plan


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
