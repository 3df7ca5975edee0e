"""Reading a prompt into a `PagedCache`, many tokens at once: the parallel form of DMC.

A chunk of every prompt goes through the model in one pass. Its pooled states are computed together,
from the open segment that the cache carries over; the last state of each segment goes to a page.
The pages then hold, in order and without the states that a later merge replaced, every slot of the
tokens so far. So a query attends over the slots before its own, read from the pages, and over its
own running state: the work falls with the compression ratio, and for any split of the prompt into
chunks the result is what one token at a time gives.
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
from dmc_jax.core.dmc import (
    DMCSettings,
    OpenSegment,
    hard_decisions,
    importance,
    merge_logits,
    pool,
    rotate_for_attention,
)
from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.errors import UserError
from dmc_jax.inference.cache import (
    PagedCache,
    first_rows,
    pages_of,
    put_rows,
    reserve,
    take_rows,
    write,
)
from dmc_jax.inference.paged import attend_pages
from dmc_jax.model.llama import Attend, forward

# Chunks are padded to 32, 128, 512, ... tokens: each of these lengths takes seconds to compile.
_SMALLEST_BUCKET, _BUCKET_STEP = 32, 4
_SMALLEST_CHUNK = 16


def prefill(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    prompts: Sequence[Sequence[int]],
    sequences: Sequence[int],
    *,
    settings: DMCSettings | None,
    threshold: float | Array = 0.0,
    chunk: int = 512,
    dtype: str = "float32",
) -> tuple[PagedCache, Float[Array, "B V"]]:
    """Read prompts of any lengths, each into a slot of the cache.

    Compiles once for each of 32, 128, 512, ... (not above `chunk`) that a chunk's tokens are padded
    to, and every power of two that B is. A prompt continues what its slot holds: free it for a new
    one.

    Args:
        params: of the model.
        config: its sizes.
        cache: given up (its buffers are reused for the result).
        prompts: token ids in [0, V), one or more each.
        sequences: the slot of each prompt.
        settings: those that the cache was made with.
        threshold: of hard decisions.
        chunk: tokens of a prompt per pass, a power of two of 16 or more; activations grow with it.
        dtype: of the forward pass.

    Returns:
        (the cache with the prompts, logits after each prompt's last token). Both mean nothing for
        the sequences that `failed` marks, which ran out of pages.

    Raises:
        UserError: an empty prompt, a slot that does not exist or comes twice, a bad `chunk`.
    """
    _check(cache, prompts, sequences, chunk)
    slots = cache.position.size
    B = _power_of_two(len(prompts))
    lengths = np.zeros(B, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    where = np.full(B, slots, np.int32)  # the slot after the last: rows that fill up the batch
    where[: len(prompts)] = sequences
    logits = jnp.zeros((B, config.vocab_size))
    for start in range(0, lengths.max(), chunk):
        counts = np.clip(lengths - start, 0, chunk)
        tokens = np.zeros((B, min(chunk, _bucket(counts.max()))), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            part = prompt[start : start + chunk]
            row[: len(part)] = part
        cache, logits = _read_chunk(
            params, config, settings, dtype, cache, tokens, counts, where, logits, threshold
        )
    return cache, logits[: len(prompts)]


@functools.partial(
    jax.jit, static_argnames=("config", "settings", "dtype"), donate_argnames=("cache", "logits")
)
def _read_chunk(
    params, config, settings, dtype, cache, tokens, counts, sequences, logits, threshold
):
    """The cache with the chunk, and the logits [B, V] after each row's last token so far."""
    cache, last = prefill_chunk(
        params,
        config,
        cache,
        tokens,
        counts,
        sequences,
        settings=settings,
        threshold=threshold,
        dtype=dtype,
        only=jnp.maximum(counts - 1, 0),
    )
    return cache, jnp.where(counts[:, None] > 0, last[:, 0], logits)


def prefill_chunk(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    sequences: Int[Array, " B"],
    *,
    settings: DMCSettings | None,
    threshold: float | Array = 0.0,
    dtype: str = "float32",
    only: Int[Array, " B"] | None = None,
) -> tuple[PagedCache, Float[Array, "B T V"]]:
    """Read the next tokens of some sequences in one pass.

    Args:
        params: of the model.
        config: its sizes.
        cache: holds the tokens before.
        tokens: ids in [0, V); those from `counts` on are padding and leave no trace.
        counts: tokens to read per row, 0 to T.
        sequences: the slot of each row, all different; rows whose slot is outside the cache are
            padding.
        settings: those that the cache was made with; None: dense.
        threshold: of hard decisions.
        dtype: of the forward pass.
        only: index of the one token of each row whose logits are wanted; None: all.

    Returns:
        (the cache with the tokens, logits after each, or [B, 1, V] with `only`); those of padding
        mean nothing.
    """
    attend = attend_chunk(config, settings, counts=counts, sequences=sequences, threshold=threshold)
    output = forward(params, config, tokens, dtype=dtype, attend=attend, state=cache, only=only)
    position = output.state.position.at[sequences].add(counts, mode="drop")
    return dataclasses.replace(output.state, position=position), output.logits


def attend_chunk(
    config: ModelConfig,
    settings: DMCSettings | None,
    *,
    counts: Int[Array, " B"],
    sequences: Int[Array, " B"],
    threshold: float | Array,
) -> Attend:
    """An attention function whose state is the `PagedCache`, for T tokens of B of its sequences.

    Every layer adds the tokens to its own rows and attends over them. The positions stay as they
    are: whoever calls the model moves them on once all layers have read the tokens.

    Args:
        config: gives the layout of the rows, the rotary base and scaling.
        settings: those that the cache was made with; None: dense.
        counts: tokens of each row that are not padding.
        sequences: the slot of each row.
        threshold: of hard decisions.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    offsets = first_rows(config)
    rotation = rotate if settings is None else rotate_for_attention

    def attend(q, k, v, layer, cache):
        (_, T, K, _), first = k.shape, offsets[layer]
        # A failed sequence stays as it is, and so does a slot that the cache does not have.
        readable = ~cache.failed.at[sequences].get(mode="fill", fill_value=True)
        count = jnp.where(readable, counts, 0)
        real = jnp.arange(T) < count[:, None]  # [B, T]
        if settings is None:
            merges = jnp.zeros(k.shape[:3], bool)
        else:
            of_layer = functools.partial(take_rows, first=first, heads=K, sequences=sequences)
            k, v, merges, segment = pool_chunk(
                jax.tree.map(of_layer, cache.open_segment),
                k,
                v,
                hard_decisions(merge_logits(k, settings), threshold),
                importance(q, K, settings),
                count,
                settings.window,
            )
            put = functools.partial(put_rows, first=first, sequences=sequences)
            cache = dataclasses.replace(
                cache, open_segment=jax.tree.map(put, cache.open_segment, segment)
            )
        at = cache.position.at[sequences].get(mode="clip")[:, None] + jnp.arange(T)
        k = rotation(k.astype(q.dtype), at, frequencies)
        cache, slot = _store(cache, k, v, real, ~merges & real[..., None], first, sequences)
        q = rotation(q, at, frequencies)
        return attend_pages(q, k, v, slot, cache, first, sequences), cache, None

    return attend


# ---- pooled states of a chunk -----------------------------------------------------------------


def pool_chunk(
    open_segment: OpenSegment,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    decisions: Float[Array, "B T K"],
    omega: Float[Array, "B T K"],
    counts: Int[Array, " B"],
    window: int | None,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"], Bool[Array, "B T K"], OpenSegment]:
    """State of the open slot after every token, which may have begun before the chunk.

    It is `pool` over the chunk with what the open segment remembers in front: its last W - 1
    tokens, or for an unlimited window one token that stands for all.

    Args:
        open_segment: rows (B, K), before the chunk.
        k, v: unrotated.
        decisions: 1 merges, 0 appends. The first token of a row without a segment appends whatever
            it says.
        omega: importance of each token.
        counts: tokens of each row that are not padding.
        window: W, as given to `empty_segment`.

    Returns:
        (averaged keys, averaged values, float32; which tokens merge; the open segment after the
        chunk's last real token).
    """
    B, T, K, H = k.shape
    x = jnp.concatenate([k, v], axis=-1).astype(jnp.float32)  # [B, T, K, 2H]
    merges = decisions.at[:, 0].multiply((open_segment.count > 0).astype(decisions.dtype))

    weighted, weight, joins = _remembered(open_segment, window)  # [B, E, K, ...]
    before = jnp.where(weight > 0, weight, 1.0)  # an absent token counts, but nothing joins it
    together = functools.partial(jnp.concatenate, axis=1)
    states = pool(
        together([weighted / before[..., None], x]),
        together([joins, merges]),
        together([before, omega]),
        window,
    )[:, weight.shape[1] :]
    after = _open_after(
        open_segment,
        together([weighted, omega[..., None] * x]),
        together([weight, omega]),
        merges,
        counts,
        window,
    )
    return states[..., :H], states[..., H:], merges > 0, after


def _remembered(
    segment: OpenSegment, window: int | None
) -> tuple[Float[Array, "B E K 2*H"], Float[Array, "B E K"], Float[Array, "B E K"]]:
    """An open segment as E tokens: weighted [key | value], weight, and whether it is a merge.

    What the segment does not have has weight 0.
    """
    both = jnp.concatenate([segment.keys, segment.values], axis=-1)  # [B, K, W, 2H]
    weights = segment.weights
    if window:
        # Token m of the segment is in ring entry m % W; these are its last W - 1.
        token = segment.count[..., None] - (window - 1) + jnp.arange(window - 1)  # [B, K, E]
        entry = token % window
        both = jnp.take_along_axis(both, entry[..., None], axis=2)
        weights = jnp.where(token >= 0, jnp.take_along_axis(weights, entry, axis=2), 0.0)
        both = jnp.where(token[..., None] >= 0, both, 0.0)
        joins = (token >= 1).astype(jnp.float32)
    else:
        joins = jnp.zeros_like(weights)
    return both.swapaxes(1, 2), weights.swapaxes(1, 2), joins.swapaxes(1, 2)


def _open_after(segment, weighted, weights, merges, counts, window) -> OpenSegment:
    """The open segment after the last real token of the chunk.

    Args:
        segment: before the chunk, rows (B, K).
        weighted, weights: [B, E + T, K, ...], of the remembered tokens and the chunk's.
        merges: 0/1 [B, T, K].
        counts: tokens of the chunk, [B].
        window: W.
    """
    T, H = merges.shape[1], segment.keys.shape[-1]
    E, counts = weights.shape[1] - T, counts[:, None]
    token = jnp.arange(T)[:, None]
    opens = (merges == 0) & (token < counts[..., None])
    newest = jnp.where(opens, token, -1).max(axis=1)  # [B, K]: opened the segment; -1: an older did
    count = jnp.where(newest >= 0, counts - newest, segment.count + counts)
    if window:
        # Ring entry r holds the newest token m of the segment with m % W = r.
        age = (count[..., None] - 1 - jnp.arange(window)) % window  # [B, K, W]
        index = (E + counts[..., None] - 1 - age).swapaxes(1, 2)  # [B, W, K]
        there = (age < count[..., None]).swapaxes(1, 2)
        weighted = jnp.take_along_axis(weighted, index[..., None], axis=1, mode="clip")
        weights = jnp.take_along_axis(weights, index, axis=1, mode="clip")
        weighted, weights = jnp.where(there[..., None], weighted, 0.0), jnp.where(there, weights, 0)
    else:
        index = jnp.arange(-E, T)[:, None]
        inside = (index < counts[..., None]) & ((newest < 0)[:, None] | (index >= newest[:, None]))
        weighted = jnp.where(inside[..., None], weighted, 0.0).sum(axis=1, keepdims=True)
        weights = jnp.where(inside, weights, 0.0).sum(axis=1, keepdims=True)
    weighted = weighted.swapaxes(1, 2)  # [B, K, W, 2H]
    after = OpenSegment(weighted[..., :H], weighted[..., H:], weights.swapaxes(1, 2), count)

    def unless_nothing_came(new, old):
        return jnp.where((counts > 0)[(..., *(None,) * (new.ndim - 2))], new, old)

    return jax.tree.map(unless_nothing_came, after, segment)


# ---- into the pages ---------------------------------------------------------------------------


def _store(
    cache: PagedCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    real: Bool[Array, "B T"],
    opens: Bool[Array, "B T K"],
    first: Array,
    sequences: Int[Array, " B"],
) -> tuple[PagedCache, Int[Array, "B K T"]]:
    """Give every segment its slot, and write its last state there.

    Returns:
        (the cache, the slot of each token; padding has none before it).
    """
    T, K = k.shape[1:3]
    lengths = take_rows(cache.lengths, first, K, sequences)  # [B, K]
    opens = opens.transpose(0, 2, 1)  # [B, K, T]
    slot = lengths[..., None] - 1 + jnp.cumsum(opens, axis=-1)
    followed = jnp.pad(real[:, 1:], [(0, 0), (0, 1)])[:, None]  # by a real token of the chunk
    closes = jnp.pad(opens[..., 1:], [(0, 0), (0, 0), (0, 1)])
    last = real[:, None] & (closes | ~followed)
    cache, granted = reserve(
        cache,
        lengths + opens.sum(axis=-1),
        first,
        sequences=sequences,
        most=pages_of(T, cache.k_pages.shape[1]),
    )
    states = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    where = last & granted[..., None]
    cache = write(cache, *states, slot, where, first, sequences=sequences)
    return cache, jnp.where(real[:, None], slot, 0)


# ---- what comes in ----------------------------------------------------------------------------


def _bucket(tokens: int) -> int:
    size = _SMALLEST_BUCKET
    while size < tokens:
        size *= _BUCKET_STEP
    return size


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n` >= 1."""
    return 1 << (int(n) - 1).bit_length()


def _check(cache, prompts, sequences, chunk) -> None:
    slots = cache.position.size
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise UserError("prefill: every prompt needs a token, and there must be one prompt")
    if len(sequences) != len(prompts):
        raise UserError(f"prefill: {len(prompts)} prompts but {len(sequences)} slots for them")
    if len(set(sequences)) != len(sequences) or not all(0 <= s < slots for s in sequences):
        raise UserError(
            f"prefill: expected different slots from 0 to {slots - 1}, got {list(sequences)}"
        )
    if chunk < _SMALLEST_CHUNK or chunk & (chunk - 1):
        raise UserError(
            f"prefill: chunk must be a power of two, {_SMALLEST_CHUNK} or more, got {chunk}"
        )
