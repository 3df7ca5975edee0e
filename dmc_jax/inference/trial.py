"""A pass that reads tokens beside a cache which stays as it is, until it is known which count.

What is decided in each layer is computed twice: once for all tokens, whose attention reads the
pages as they are and what the chunk writes beside them; and once for those that count, from the
queries, keys and values of the first time. So nothing has to be taken back, and slots that tokens
were merged into, or given up for, need not be restored.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.inference.chunk_attention import attend_until
from dmc_jax.inference.layers import logits_of, run_layers
from dmc_jax.inference.paged_cache import PagedCache
from dmc_jax.inference.prefill import read_into_state, side_by_side, store
from dmc_jax.inference.programs import Batch, Tally, choose_tokens, tally
from dmc_jax.inference.sampling import Chosen, SamplingArrays
from dmc_jax.model.llama import Attend
from dmc_jax.policies.policy import Edit, Policy, Tokens, first_rows


def try_tokens(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    parts: Sequence[Sequence[int]],
    seats: Int[np.ndarray, " B"],
    *,
    width: int,
    policy: Policy,
    dtype: str,
) -> tuple[PagedCache, Float[Array, "L B T W"], Float[Array, "B T V"]]:
    """Let sequences read tokens without keeping them, in one pass. Compiles for every B and width.

    Args:
        params: of the model.
        config: its sizes.
        cache: given up; the result is the same.
        parts: the newest token of each sequence, which the cache does not hold, and its draft.
        seats: of the sequences, all different; one that the cache does not have fills up the batch.
        width: T of the pass, in tokens.
        policy: that the cache was made for, which is `chunked`.
        dtype: of the forward pass.

    Returns:
        (the cache, what `take_tried` asks for, logits after every token).
    """
    B, H = len(parts), config.head_dim
    tokens, counts = side_by_side(parts, width)
    most = config.heads * H + 2 * max(config.kv_heads_by_layer) * H + config.width
    tried = jnp.zeros((config.layers, B, width, most), dtype)
    x, (cache, tried) = run_layers(
        *(params, config, tokens, (cache, tried)),
        make_attend=_attend_tried,
        inputs={"policy": policy, "counts": counts, "seats": seats},
        dtype=dtype,
    )
    logits = logits_of(params, config, x.reshape(B * width, -1))
    return cache, tried, logits.reshape(B, width, -1)


def _attend_tried(
    config: ModelConfig, policy: Policy, *, counts: Int[Array, " B"], seats: Int[Array, " B"]
) -> Attend:
    """Make an attention function whose state is (a cache, which it only reads, tokens tried)."""
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    offsets, policy = first_rows(config), policy.of_seats(seats)

    def attend(q, k, v, x, layer, state):
        (cache, tried), first = state, offsets[layer]
        own = policy.of_layer(layer, first, k.shape[2])
        at = cache.position.at[seats].get(mode="clip")[:, None] + jnp.arange(k.shape[1])
        tokens = Tokens(q, k, v, at, frequencies, x)
        _, edits, real = read_into_state(cache, own, tokens, first, counts, seats)
        edits = _until_written_over(edits, real)
        out = attend_until(
            own.rotate(q, at, frequencies), edits, real, cache, first, seats, own.gamma
        )
        # All layers in one array, for which the widest makes the room.
        flat = jnp.concatenate([each.reshape(*at.shape, -1) for each in (q, k, v, x)], axis=-1)
        tried = jax.lax.dynamic_update_slice(tried, flat[None], (layer, 0, 0, 0))
        return out, (cache, tried), None

    return attend


def _until_written_over(edits: Edit, real: Bool[Array, "B T"]) -> Edit:
    """Say until when a chunk's writes are seen, where tokens write to the newest slot or to a new.

    `attend_until` needs no pages that were written to.
    """
    if edits.until is not None:
        return edits
    T = real.shape[1]
    follows = jnp.pad(real[:, 1:], [(0, 0), (0, 1)])[:, None]
    next_slot = jnp.pad(edits.slot[..., 1:], [(0, 0), (0, 0), (0, 1)])
    until = jnp.where(follows & (next_slot == edits.slot), jnp.arange(1, T + 1), T)
    return edits._replace(until=until)


@jax.jit
def choose_each(
    seen: Bool[Array, "seats V"],
    seats: Int[Array, " B"],
    logits: Float[Array, "B T V"],
    sampling: SamplingArrays,
    index: Int[Array, " B"],
) -> Chosen:
    """Choose a token after every one that was tried.

    Args:
        seen: tokens that the sequence of each seat has.
        seats: of those that tried some.
        logits: after these.
        sampling: how to choose.
        index: of the first that is chosen, among the new tokens of its sequence.

    Returns:
        The tokens [B, T]: up to the first that is not the draft's, as if one came after another.
    """

    def one(seen, now):
        return choose_tokens(seen, now[0], sampling, index + now[1])

    by_token = logits.swapaxes(0, 1), jnp.arange(logits.shape[1])
    _, chosen = jax.lax.scan(one, seen.at[seats].get(mode="clip"), by_token)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), chosen)


def take_tried(
    config: ModelConfig,
    batch: Batch,
    tried: Float[Array, "L B T W"],
    chosen: Int[np.ndarray, "B T"],
    counts: Int[np.ndarray, " B"],
    seats: Int[np.ndarray, " B"],
    policy: Policy,
) -> tuple[Batch, Tally]:
    """Let the cache read the first tokens of those that were tried.

    Args:
        config: of the model.
        batch: whose cache `try_tokens` returned; given up.
        tried: of `try_tokens`.
        chosen: of `choose_each`.
        counts: tokens of each sequence that the cache is to read.
        seats: of the sequences.
        policy: that the cache was made for.

    Returns:
        (the batch, the tally); a sequence may have `failed`.
    """
    cache = batch.cache
    for layer, kv_heads in enumerate(config.kv_heads_by_layer):
        how = {"config": config, "kv_heads": kv_heads}
        cache = _take_layer(cache, tried, np.int32(layer), counts, seats, policy, **how)
    return _end(dataclasses.replace(batch, cache=cache), chosen, counts, seats)


@functools.partial(jax.jit, static_argnames=("config", "kv_heads"), donate_argnames="cache")
def _take_layer(cache, tried, layer, counts, seats, policy, *, config, kv_heads):
    heads = config.heads, kv_heads, kv_heads
    ends = np.cumsum([n * config.head_dim for n in heads] + [config.width])
    q, k, v, x, _ = jnp.split(tried[layer], ends, axis=-1)
    q, k, v = (
        each.reshape(*each.shape[:2], n, config.head_dim)
        for each, n in zip((q, k, v), heads, strict=True)
    )
    first = first_rows(config)[layer]
    own = policy.of_seats(seats).of_layer(layer, first, kv_heads)
    at = cache.position.at[seats].get(mode="clip")[:, None] + jnp.arange(k.shape[1])
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    tokens = Tokens(q, k, v, at, frequencies, x)
    cache, edits, real = read_into_state(cache, own, tokens, first, counts, seats)
    return store(cache, edits, real, first, seats)[0]


@functools.partial(jax.jit, donate_argnames="batch")
def _end(batch, chosen, counts, seats):
    """Move the positions on, and mark the tokens that the sequences have now."""
    position = batch.cache.position.at[seats].add(counts, mode="drop")
    cache = dataclasses.replace(batch.cache, position=position)
    said = jnp.where(jnp.arange(chosen.shape[1]) < counts[:, None], chosen, batch.seen.shape[1])
    seen = batch.seen.at[seats[:, None], said].set(True, mode="drop")
    return Batch(cache, seen), tally(cache)
