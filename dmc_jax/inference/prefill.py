"""Reading a prompt into a `PagedCache`, many tokens at once.

A chunk of every prompt goes through the model in one pass. The policy says for all its tokens at
once what each writes to which slot, from the state that the cache carries over; the last that is
written to a slot goes to a page. The pages then hold, in order and without what was written over,
every slot of the tokens so far. So a query attends over the slots before its own, read from the
pages, and over what its own token wrote: the work falls with the compression ratio, and for any
split of the prompt into chunks the result is what one token at a time gives. With a policy that has
no such form, every layer attends token by token, and only the rest of the model is parallel.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.errors import UserError
from dmc_jax.inference.chunk_attention import attend_pages, attend_until
from dmc_jax.inference.decoding import attend_token
from dmc_jax.inference.layers import logits_of, run_layers
from dmc_jax.inference.paged_cache import (
    PagedCache,
    grant,
    pages_of,
    put_rows,
    reserve,
    settle,
    take_rows,
    write,
)
from dmc_jax.inference.prompt_cut import cut_prompts
from dmc_jax.model.llama import Attend
from dmc_jax.policies.policy import Edit, Policy, Tokens, first_rows

# Chunks are padded to 32, 128, 512, ... tokens: each of these lengths is compiled.
_SMALLEST_BUCKET, _BUCKET_STEP = 32, 4
_SMALLEST_CHUNK = 16


def prefill(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    prompts: Sequence[Sequence[int] | Integer[np.ndarray, "_"]],
    seats: Sequence[int],
    *,
    policy: Policy,
    chunk: int | None = None,
    dtype: str = "float32",
) -> tuple[PagedCache, Float[Array, "B V"]]:
    """Read prompts of any lengths, each into a seat of the cache.

    Compiles one layer for each of 32, 128, 512, ... (not above `chunk`) that a chunk's tokens are
    padded to, and every power of two that B is. A prompt continues what its seat holds: free it for
    a new one. A policy that cuts prompts does so with the first in a seat.

    Args:
        params: of the model.
        config: its sizes.
        cache: given up (its buffers are reused for the result).
        prompts: token ids in [0, V), one or more each.
        seats: the seat of each prompt.
        policy: that the cache was made for.
        chunk: tokens of a prompt per pass, a power of two of 16 or more; activations grow with it.
            None: 512, and 1,024 on a GPU, where half as many launches and passes over the weights
            were measured to be faster.
        dtype: of the forward pass.

    Returns:
        (the cache with the prompts, logits after each prompt's last token). Both mean nothing for
        the seats that `failed` marks, which ran out of pages.

    Raises:
        UserError: an empty prompt, a seat that does not exist or comes twice, a bad `chunk`.
    """
    chunk = usual_chunk() if chunk is None else chunk
    _check(cache, prompts, seats, chunk)
    policy = policy.of_prompts(_whole_prompts(cache, prompts, seats))
    B = power_of_two(len(prompts))
    # The seat after the last: rows that fill up the batch.
    where = np.full(B, cache.position.size, np.int32)
    where[: len(prompts)] = seats
    last = None
    for start in range(0, max(map(len, prompts)), chunk):
        parts = [prompt[start : start + chunk] for prompt in prompts]
        parts += [()] * (B - len(prompts))
        width = chunk_width(max(map(len, parts)), chunk)
        cache, x = read_chunk(
            *(params, config, cache, parts, where), width=width, policy=policy, dtype=dtype
        )
        read = np.array([len(part) > 0 for part in parts])
        last = x if last is None else jnp.where(read[:, None], x, last)
    return cache, logits_of(params, config, last)[: len(prompts)]


def usual_chunk() -> int:
    """Tokens of a prompt per pass: as many as pay for the pass over the weights, and no more."""
    return 1024 if jax.default_backend() == "gpu" else 512


def chunk_width(tokens: int, chunk: int) -> int:
    """Tell to how many tokens a pass of so many is padded: 32, 128, 512, ..., `chunk` at most."""
    size = _SMALLEST_BUCKET
    while size < tokens:
        size *= _BUCKET_STEP
    return min(size, chunk)


def check_chunk(chunk: int) -> None:
    """Refuse a number of tokens per pass that is no power of two, or too small.

    Raises:
        UserError: it is.
    """
    if chunk < _SMALLEST_CHUNK or chunk & (chunk - 1):
        raise UserError(
            f"prefill: chunk must be a power of two, {_SMALLEST_CHUNK} or more, got {chunk}"
        )


def read_chunk(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    parts: Sequence[Sequence[int] | Integer[np.ndarray, "_"]],
    seats: Int[np.ndarray, " B"],
    *,
    width: int,
    policy: Policy,
    dtype: str,
) -> tuple[PagedCache, Float[Array, "B D"]]:
    """Let sequences read some tokens more, in one pass. Compiles for every B and width.

    Args:
        params: of the model.
        config: its sizes.
        cache: given up.
        parts: token ids of each sequence, `width` at most, perhaps none.
        seats: of the sequences, all different; one that the cache does not have fills up the batch.
        width: of the pass in tokens, a power of two.
        policy: that the cache was made for.
        dtype: of the forward pass.

    Returns:
        (the cache with the tokens, the residual stream at each sequence's last token).
    """
    tokens, counts = side_by_side(parts, width)
    x, cache = run_layers(
        *(params, config, tokens, cache),
        make_attend=attend_chunk,
        inputs={"policy": policy, "counts": counts, "seats": seats},
        dtype=dtype,
    )
    return _end_chunk(cache, x, counts, seats)


def side_by_side(
    parts: Sequence[Sequence[int] | Integer[np.ndarray, "_"]], width: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Pad the tokens of each sequence to a width; also how many it has."""
    tokens = np.zeros((len(parts), width), np.int32)
    for row, part in zip(tokens, parts, strict=True):
        row[: len(part)] = part
    return tokens, np.array([len(part) for part in parts], np.int32)


@functools.partial(jax.jit, donate_argnames="cache")
def _end_chunk(cache, x, counts, seats):
    """Move the positions on; also the residual stream [B, D] at each row's last token."""
    position = cache.position.at[seats].add(counts, mode="drop")
    x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return dataclasses.replace(cache, position=position), x


def attend_chunk(
    config: ModelConfig,
    policy: Policy,
    *,
    counts: Int[Array, " B"],
    seats: Int[Array, " B"],
) -> Attend:
    """Make an attention function whose state is the `PagedCache`, for T tokens of B of its seats.

    Every layer adds the tokens to its own rows and attends over them. The positions stay as they
    are: whoever calls the model moves them on once all layers have read the tokens.

    Args:
        config: gives the layout of the rows, the rotary base and scaling.
        policy: that the cache was made for.
        counts: tokens of each row that are not padding.
        seats: the seat of each row.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    offsets, policy = first_rows(config), policy.of_seats(seats)

    def by_steps(q, k, v, x, layer, cache):
        start, first = cache.position.at[seats].get(mode="clip"), offsets[layer]
        own = policy.of_layer(layer, first, k.shape[2])

        def read(t, carry):
            out, cache = carry
            token = Tokens(q[:, t], k[:, t], v[:, t], start + t, frequencies, x[:, t])
            active = (t < counts) & _readable(cache, seats)
            cache, granted = grant(cache, active, first, heads=k.shape[2], seats=seats)
            out_t, cache = attend_token(*(cache, own, first, token), active=active, seats=seats)
            return out.at[:, t].set(out_t), settle(cache, granted, first, seats=seats)

        out, cache = jax.lax.fori_loop(0, counts.max(), read, (jnp.zeros_like(q), cache))
        return out, cache, None

    def attend(q, k, v, x, layer, cache):
        K, first = k.shape[2], offsets[layer]
        own = policy.of_layer(layer, first, K)
        at = cache.position.at[seats].get(mode="clip")[:, None] + jnp.arange(k.shape[1])
        tokens = Tokens(q, k, v, at, frequencies, x)
        cache, edits, real = read_into_state(cache, own, tokens, first, counts, seats)
        q = own.rotate(q, at, frequencies)
        if edits.until is not None:
            out = attend_until(q, edits, real, cache, first, seats, own.gamma)
            edits = edits._replace(slot=_once_read(out, edits.slot))
            return out, store(cache, edits, real, first, seats)[0], None
        cache, slot = store(cache, edits, real, first, seats)
        out = attend_pages(q, edits.key, edits.value, slot, cache, first, seats)
        if own.observers:
            prompt = _once_read(out, own.prompt - at[:, 0])
            how = {"prompt": prompt, "counts": real.sum(axis=1), "first": first, "seats": seats}
            out, cache = cut_prompts(out, q, edits, slot, cache, own, **how)
        return out, cache, None

    return attend if policy.chunked else by_steps


def read_into_state(
    cache: PagedCache,
    policy: Policy,
    tokens: Tokens,
    first: int | Array,
    counts: Int[Array, " B"],
    seats: Int[Array, " B"],
) -> tuple[PagedCache, Edit, Bool[Array, "B T"]]:
    """Let what the rows of a layer remember beside their slots read a chunk.

    Args:
        cache: whose pages stay as they are.
        policy: of the layer.
        tokens: of B sequences.
        first: row of the layer's first KV head.
        counts: tokens of each that are not padding.
        seats: of the sequences.

    Returns:
        (the cache, what is to be written to the pages, which tokens are read: none of sequences
        that failed).
    """
    T, K = tokens.k.shape[1:3]
    count = jnp.where(_readable(cache, seats), counts, 0)
    of_layer = functools.partial(take_rows, first=first, heads=K, seats=seats)
    before = jax.tree.map(of_layer, cache.state)
    state, edits = policy.chunk(before, tokens, of_layer(cache.lengths), count)
    put = functools.partial(put_rows, first=first, seats=seats)
    state = jax.tree.map(put, cache.state, state)
    return dataclasses.replace(cache, state=state), edits, jnp.arange(T) < count[:, None]


def _readable(cache: PagedCache, seats: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Say which rows read: no sequence that failed, no seat that the cache does not have."""
    return ~cache.failed.at[seats].get(mode="fill", fill_value=True)


def _once_read(out: Float[Array, "B T N H"], x: Int[Array, "*any"]) -> Int[Array, "*any"]:
    """Let what says where to write wait for what attention read.

    XLA copies all pages, twice, where a write to them does not depend on a read that has to come
    before it. What this asks for is never the case.
    """
    never = jnp.isnan(out[0, 0, 0, 0]) & jnp.isinf(out[0, 0, 0, 0])
    return jnp.where(never, -1, x)


# ---- into the pages ---------------------------------------------------------------------------


def store(
    cache: PagedCache,
    edits: Edit,
    real: Bool[Array, "B T"],
    first: int | Array,
    seats: Int[Array, " B"],
) -> tuple[PagedCache, Int[Array, "B K T"]]:
    """Give the rows their new slots, and write to each the last that is written to it.

    Returns:
        (the cache, the slot that each token wrote to first; padding has none before it).
    """
    T, K = edits.key.shape[1:3]
    lengths = take_rows(cache.lengths, first, K, seats)  # [B, K]
    counts = real.sum(axis=1)[:, None, None]
    edits, real = edits.side_by_side(), jnp.tile(real, len(edits.writes()))[:, None]
    slot = jnp.where(real, edits.slot, -1)  # [B, K, T]
    if edits.until is None:
        # The next token does not write to the same slot: it is padding, or opens another one.
        next_slot = jnp.pad(slot[..., 1:], [(0, 0), (0, 0), (0, 1)], constant_values=-1)
        last = real & (slot != next_slot)
    else:
        last = (slot >= 0) & (edits.until >= counts)
    cache, granted = reserve(
        cache,
        jnp.maximum(lengths, slot.max(axis=-1) + 1),
        first,
        seats=seats,
        most=pages_of(T, cache.pages.page_size),
    )
    states = (x.transpose(0, 2, 1, 3) for x in (edits.key, edits.value))
    last = last & granted[..., None]
    cache = write(cache, *states, slot, last, first, seats=seats, tokens=edits.tokens)
    return cache, jnp.maximum(slot[..., :T], 0)


# ---- what comes in ----------------------------------------------------------------------------


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n` >= 1."""
    return 1 << (int(n) - 1).bit_length()


def _whole_prompts(cache, prompts, seats) -> Int[Array, " seats"]:
    """Tokens of the prompt of every seat, 0 where it continues what is there or there is none."""
    seats = np.asarray(seats)
    tokens = jnp.zeros_like(cache.position).at[seats].set([len(prompt) for prompt in prompts])
    return jnp.where(cache.position > 0, 0, tokens)


def _check(cache, prompts, seats, chunk) -> None:
    last = cache.position.size - 1
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise UserError("prefill: every prompt needs a token, and there must be one prompt")
    if len(seats) != len(prompts):
        raise UserError(f"prefill: {len(prompts)} prompts but {len(seats)} seats for them")
    if len(set(seats)) != len(seats) or not all(0 <= s <= last for s in seats):
        raise UserError(f"prefill: expected different seats from 0 to {last}, got {list(seats)}")
    check_chunk(chunk)
