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
    PagedCache,
    first_rows,
    places,
    put_rows,
    reserve,
    take_rows,
    write,
)
from dmc_jax.model.llama import Attend, forward
from dmc_jax.policies.policy import Policy, Tokens
from pallas_kernels.decode_attention.api import (
    decode_attention,
    decode_attention_and_weights,
    plan_decode_attention,
)
from pallas_kernels.decode_attention.plan import Plan


def read_token(
    cache: PagedCache,
    policy: Policy,
    first: int | Array,
    token: Tokens,
    *,
    active: Bool[Array, " B"],
    seats: Int[Array, " B"] | None = None,
    implementation: str | None = None,
) -> PagedCache:
    """Let the rows of one layer read a token, as the policy says.

    The position stays as it is: it moves on once all layers have read the token.

    Args:
        cache: made for the policy.
        policy: of the rows.
        first: row of the layer's first KV head.
        token: of B sequences.
        active: those that read it; the others, and failed ones, stay as they are.
        seats: of the sequences; None: all seats, in order.
        implementation: "xla", or a kernel that the policy has for it; None: the faster one as
            measured here.
    """
    K = token.k.shape[1]
    active = _readable(cache, active, seats)[:, None]  # [B, 1]
    rows = functools.partial(take_rows, first=first, heads=K, seats=seats)
    lengths, before = rows(cache.lengths), jax.tree.map(rows, cache.state)
    kernel = policy.kernel(implementation)
    if kernel is not None and seats is None:
        slot = policy.slot(before, token, lengths)
        cache, granted = _grow(cache, lengths, slot, active, first)
        at = places(cache, slot[..., None], (granted & active)[..., None], first)
        k_pages, v_pages, state = policy.launch(
            *(cache.pages.k, cache.pages.v, cache.state, token),
            first=first,
            active=active[:, 0],
            at=(at[0][..., 0], at[1][..., 0]),
            implementation=kernel,
        )
        pages = dataclasses.replace(cache.pages, k=k_pages, v=v_pages)
        return dataclasses.replace(cache, pages=pages, state=state)
    after, edit = policy.step(before, token, lengths)
    cache = _remember(cache, after, before, active, first, seats)
    cache, granted = _grow(cache, lengths, edit.slot, active, first, seats)
    return write(
        cache,
        edit.key[:, :, None],
        edit.value[:, :, None],
        edit.slot[..., None],
        (granted & active)[..., None],
        first,
        seats=seats,
    )


def _readable(cache, active, seats) -> Bool[Array, " B"]:
    """Say which sequences read a token: none that failed, or whose seat the cache does not have."""
    if seats is None:
        return active & ~cache.failed
    return active & ~cache.failed.at[seats].get(mode="fill", fill_value=True)


def _grow(cache, lengths, slot, active, first, seats=None):
    """Reserve the slots that active rows write to, where they do not have them."""
    wanted = jnp.where(active, jnp.maximum(lengths, slot + 1), lengths)
    return reserve(cache, wanted, first, seats=seats)


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
        plan: of `plan_step`; None: the attention makes its own.

    Returns:
        (the attention output, the cache).
    """
    (B, N, H), K = token.q.shape, token.k.shape[1]
    cache = read_token(
        cache, policy, first, token, active=active, seats=seats, implementation=update
    )
    # Attention reads the pool after the layer wrote to it, and nothing reads it before: that
    # order lets XLA update it in place.
    rows = functools.partial(take_rows, first=first, heads=K, seats=seats)
    active = _readable(cache, active, seats)[:, None]
    lengths = jnp.where(active, rows(cache.lengths), 0)
    rotated = policy.rotate(token.q[:, None], token.positions[:, None], token.frequencies)
    arguments = (
        rotated.reshape(B * K, N // K, H),
        cache.pages.k,
        cache.pages.v,
        rows(cache.page_table).reshape(B * K, -1),
        lengths.reshape(-1),
    )
    options = {"scale": H**-0.5, "implementation": implementation}
    if not policy.watches:
        return decode_attention(*arguments, **options, plan=plan).reshape(B, N, H), cache
    out, weights = decode_attention_and_weights(*arguments, **options)
    before = jax.tree.map(rows, cache.state)
    after = policy.observe(before, weights.reshape(B, K, N // K, -1), lengths)
    return out.reshape(B, N, H), _remember(cache, after, before, active, first, seats)


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

    Every layer adds the token to its own rows and attends over them. The position stays as it is:
    whoever calls the model moves it on once all layers have read the token.

    Args:
        config: gives the layout of the rows, the rotary base and scaling.
        policy: that the cache was made for.
        active: seats that read a token; the output of the others is zero.
        implementation: of `decode_attention`; None: the fastest here.
        update: implementation of `read_token`; None: the fastest here.
        plans: of `plan_step`; None: every layer makes its own.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    offsets = first_rows(config)

    def attend(q, k, v, layer, cache):
        K = k.shape[2]
        out, cache = attend_token(
            *(cache, policy, offsets[layer]),
            Tokens(q[:, 0], k[:, 0], v[:, 0], cache.position, frequencies),
            active=active,
            implementation=implementation,
            update=update,
            plan=None if plans is None else jax.tree.map(lambda x: x[layer], plans[K]),
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
        active: seats that read a token.
        implementation: of `decode_attention`.

    Returns:
        For each number K of KV heads that some layer has, plans with a leading axis of layers.
    """
    seats, R, maxp = cache.page_table.shape
    lengths = jnp.where((active & ~cache.failed)[:, None], cache.lengths + 1, 0)

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
    attend = attend_cached(
        *(config, policy),
        active=active,
        implementation=implementation,
        update=update,
        # Whoever watches gets the weights from implementations that know no plans.
        plans=None if policy.watches else plan_step(config, cache, active, implementation),
    )
    output = forward(params, config, tokens[:, None], dtype=dtype, attend=attend, state=cache)
    cache = dataclasses.replace(output.state, position=output.state.position + active)
    return cache, output.logits[:, 0]
