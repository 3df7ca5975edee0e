"""One token of every sequence: attention over a `PagedCache`, and a step of the model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.inference.paged_cache import (
    Granted,
    PagedCache,
    grant,
    owned,
    put_rows,
    settle,
    take_rows,
    write,
)
from dmc_jax.model.llama import Attend, forward
from dmc_jax.policies.policy import Policy, Tokens, first_rows
from pallas_kernels.cache_update.api import XLA, State, choose
from pallas_kernels.decode_attention.api import (
    Plan,
    decode_attention,
    decode_attention_and_weights,
    plan_decode_attention,
)


def read_token(
    cache: PagedCache,
    policy: Policy,
    first: int | Array,
    token: Tokens,
    *,
    active: Bool[Array, " B"],
    seats: Int[Array, " B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N H"], PagedCache]:
    """Let the rows of one layer read a token, as the policy says.

    Pages were set aside for it by `grant`, and `settle` comes after it. The position stays as it
    is: it moves on once all layers have read the token.

    Args:
        cache: made for the policy.
        policy: of the rows.
        first: row of the layer's first KV head.
        token: of B sequences.
        active: those that read it, none that `failed`; the others stay as they are.
        seats: of the sequences; None: all seats, in order.
        implementation: "xla", or a kernel that the policy has for it; None: the faster one as
            measured here.

    Returns:
        (the queries, rotated, the cache).
    """
    kernel = choose(implementation) if policy.launches and seats is None else XLA
    if kernel != XLA:
        pages = cache.pages
        rotated, held, state = policy.launch(
            State(pages.k, pages.v, cache.lengths, None, pages.k_scale, pages.v_scale),
            *(cache.state, token),
            page_table=cache.page_table,
            first=first,
            active=active,
            implementation=kernel,
        )
        scales = {"k_scale": held.k_scale, "v_scale": held.v_scale}
        pages = dataclasses.replace(pages, k=held.k_pages, v=held.v_pages, **scales)
        return rotated, dataclasses.replace(cache, pages=pages, lengths=held.lengths, state=state)
    K = token.k.shape[1]
    rows = functools.partial(take_rows, first=first, heads=K, seats=seats)
    lengths, before = rows(cache.lengths), jax.tree.map(rows, cache.state)
    after, edit = policy.step(before, token, lengths)
    reads = active[:, None]
    cache = _remember(cache, after, before, reads, first, seats)
    keys, values, slots, tokens = (
        None
        if getattr(edit, name) is None
        else jnp.stack([getattr(x, name) for x in edit.writes()], axis=2)
        for name in ("key", "value", "slot", "tokens")
    )
    highest = slots.max(axis=2)  # the only one that may be new
    has_page = owned(cache, highest, first, seats)
    grown = jnp.where(has_page, jnp.maximum(lengths, highest + 1), ~lengths)
    grown = jnp.where(reads, grown, lengths)
    cache = dataclasses.replace(cache, lengths=put_rows(cache.lengths, grown, first, seats))
    where = (has_page & reads)[..., None] & (slots >= 0)
    cache = write(cache, keys, values, slots, where, first, seats=seats, tokens=tokens)
    rotated = policy.rotate(token.q[:, None], token.positions[:, None], token.frequencies)
    return rotated[:, 0], cache


def _remember(cache, after, before, active, first, seats) -> PagedCache:
    """Put the new state of active rows into the cache."""

    def put(x, new, old):
        new = jnp.where(active[(..., *(None,) * (new.ndim - 2))], new, old)
        return put_rows(x, new, first, seats)

    return dataclasses.replace(cache, state=jax.tree.map(put, cache.state, after, before))


def attend_token(
    cache: PagedCache,
    policy: Policy,
    first: int | Array,
    token: Tokens,
    *,
    active: Bool[Array, " B"],
    seats: Int[Array, " B"] | None = None,
    implementation: str | None = None,
    update: str | None = None,
    plan: Plan | None = None,
) -> tuple[Float[Array, "B N H"], PagedCache]:
    """Let the rows of one layer read a token, and attend over them.

    Args:
        cache, policy, first, token, active, seats: as for `read_token`; the output of sequences
            that do not read is zero.
        implementation: of `decode_attention`; None: the fastest here that can do what the policy
            asks for.
        update: implementation of `read_token`; None: the fastest here.
        plan: of `plan_step`, which leaves out who does not read; None: the attention makes its own.

    Returns:
        (the attention output, the cache).
    """
    (B, N, H), K = token.q.shape, token.k.shape[1]
    rotated, cache = read_token(
        cache, policy, first, token, active=active, seats=seats, implementation=update
    )
    # Attention reads the pool after the layer wrote to it, and nothing reads it before: that
    # order lets XLA update it in place.
    queries = rotated.reshape(B * K, N // K, H), cache.pages.k, cache.pages.v
    options = {"scale": H**-0.5, "implementation": implementation}
    options |= {"k_scale": cache.pages.k_scale, "v_scale": cache.pages.v_scale}
    if policy.gamma is not None:
        options |= {"tokens": cache.pages.tokens, "gamma": jnp.tile(policy.gamma, B)}
    if plan is not None:
        out = decode_attention(
            *(*queries, cache.page_table, cache.lengths), **options, first=first, plan=plan
        )
        return out.reshape(B, N, H), cache
    rows = functools.partial(take_rows, first=first, heads=K, seats=seats)
    lengths = jnp.where(active[:, None], rows(cache.lengths), 0)
    arguments = *queries, rows(cache.page_table).reshape(B * K, -1), lengths.reshape(-1)
    if not policy.watches:
        return decode_attention(*arguments, **options).reshape(B, N, H), cache
    out, weights = decode_attention_and_weights(*arguments, **options)
    before = jax.tree.map(rows, cache.state)
    after = policy.observe(before, weights.reshape(B, K, N // K, -1), jnp.maximum(lengths, 0))
    return out.reshape(B, N, H), _remember(cache, after, before, active[:, None], first, seats)


def attend_cached(
    config: ModelConfig,
    policy: Policy,
    *,
    active: Bool[Array, " seats"],
    implementation: str | None = None,
    update: str | None = None,
    plans: dict[int, Plan | None] | None = None,
) -> Attend:
    """Make an attention function whose state is the `PagedCache`; one token per seat, T = 1.

    Every layer adds the token to its own rows and attends over them. Whoever calls the model has
    set pages aside by `grant`, and settles and moves the position on once all layers have read.

    Args:
        config: gives the layout of the rows, the rotary base and scaling.
        policy: that the cache was made for.
        active: seats that read a token, none that `failed`; the output of the others is zero.
        implementation: of `decode_attention`; None: the fastest here.
        update: implementation of `read_token`; None: the fastest here.
        plans: of `plan_step`; None: every layer makes its own.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    offsets = first_rows(config)

    def attend(q, k, v, x, layer, cache):
        N, K = q.shape[2], k.shape[2]
        # Parts of one product are one array for the kernel, if nothing lies between them and it.
        together = jnp.concatenate([q, k, v], axis=2)[:, 0]
        q, k, v = jnp.split(together, (N, N + K), axis=1)
        plan = plans and plans[K]
        out, cache = attend_token(
            *(cache, policy.of_layer(layer, offsets[layer], K), offsets[layer]),
            Tokens(q, k, v, cache.position, frequencies, x[:, 0]),
            active=active,
            implementation=implementation,
            update=update,
            plan=plan and dataclasses.replace(plan, layer=layer),
        )
        return out[:, None], cache, None

    return attend


def plan_step(
    config: ModelConfig,
    cache: PagedCache,
    active: Bool[Array, " seats"],
    implementation: str | None = None,
) -> dict[int, Plan | None]:
    """Split the attention of all layers of a step, before the first of them.

    A row takes one slot more or none in the step; the plan counts it in.

    Args:
        config: gives the layout of the rows.
        cache: as the step finds it.
        active: seats that read a token, none that `failed`.
        implementation: of `decode_attention`.

    Returns:
        For each number K of KV heads that some layer has, plans with a leading axis of layers.
    """
    seats, R, maxp = cache.page_table.shape
    lengths = jnp.where(active[:, None], cache.lengths + 1, 0)

    def plans_of(K):
        # Of a layer with other heads this reads other rows than its own; nobody uses that plan.
        rows = jnp.minimum(first_rows(config)[:, None] + jnp.arange(K), R - 1)  # [L, K]
        return plan_decode_attention(
            lengths[:, rows].swapaxes(0, 1).reshape(-1, seats * K),
            cache.pages.k,
            longest=maxp * cache.pages.page_size,
            implementation=implementation,
        )

    return {K: plans_of(K) for K in set(config.kv_heads_by_layer)}


def decode_step(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    tokens: Int[Array, " seats"],
    active: Bool[Array, " seats"],
    *,
    policy: Policy,
    dtype: str = "float32",
    implementation: str | None = None,
    update: str | None = None,
) -> tuple[PagedCache, Float[Array, "seats V"]]:
    """Read one token of every active sequence.

    Args:
        params: of `init_params` or, faster, `unstack_layers`.
        config: its sizes.
        cache: holds the tokens before.
        tokens: ids in [0, V); those of inactive seats do not matter.
        active: seats that read a token; the others stay as they are.
        policy: that the cache was made for.
        dtype: of the forward pass.
        implementation: of `decode_attention`; None: the fastest here.
        update: implementation of `read_token`; None: the fastest here.

    Returns:
        (the cache with the tokens, logits of the tokens after them). Both mean nothing for the
        seats that `failed` marks, which ran out of pages, and the logits of inactive ones.
    """
    cache, reads, granted = begin_step(cache, active)
    attend = attend_cached(
        *(config, policy),
        active=reads,
        implementation=implementation,
        update=update,
        # Whoever watches gets the weights from implementations that know no plans.
        plans=None if policy.watches else plan_step(config, cache, reads, implementation),
    )
    output = forward(params, config, tokens[:, None], dtype=dtype, attend=attend, state=cache)
    return end_step(output.state, active, granted), output.logits[:, 0]


def begin_step(
    cache: PagedCache, active: Bool[Array, " seats"]
) -> tuple[PagedCache, Bool[Array, " seats"], Granted]:
    """Set pages aside for a token of every active sequence.

    Returns:
        (the cache, the sequences that read, which are those that did not fail, what was set aside).
    """
    reads = active & ~cache.failed
    cache, granted = grant(cache, reads)
    return cache, reads, granted


def end_step(cache: PagedCache, active: Bool[Array, " seats"], granted: Granted) -> PagedCache:
    """Settle what was set aside, and move the positions on, after all layers have read."""
    cache = settle(cache, granted)
    return dataclasses.replace(cache, position=cache.position + active)
