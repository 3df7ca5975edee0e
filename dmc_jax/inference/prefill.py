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
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.errors import UserError
from dmc_jax.inference.decoding import attend_token
from dmc_jax.inference.layers import logits_of, run_layers
from dmc_jax.inference.paged_cache import (
    PagedCache,
    first_rows,
    grant,
    pages_of,
    put_rows,
    reserve,
    settle,
    take_rows,
    write,
)
from dmc_jax.inference.pages import Pages
from dmc_jax.model.llama import Attend
from dmc_jax.policies.policy import Edit, Policy, Tokens
from pallas_kernels.prefill_attention.api import XLA, choose, prefill_attention

# Chunks are padded to 32, 128, 512, ... tokens: each of these lengths is compiled.
_SMALLEST_BUCKET, _BUCKET_STEP = 32, 4
_SMALLEST_CHUNK = 16

# Queries and slots per block of the attention of many tokens.
_QUERY_BLOCK = 128
_SLOT_BLOCK = 128


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
    a new one.

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
    B = _power_of_two(len(prompts))
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
    counts = np.array([len(part) for part in parts], np.int32)
    tokens = np.zeros((len(parts), width), np.int32)
    for row, part in zip(tokens, parts, strict=True):
        row[: len(part)] = part
    x, cache = run_layers(
        *(params, config, tokens, cache),
        make_attend=attend_chunk,
        inputs={"policy": policy, "counts": counts, "seats": seats},
        dtype=dtype,
    )
    return _end_chunk(cache, x, counts, seats)


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
    offsets = first_rows(config)

    def by_steps(q, k, v, layer, cache):
        start, first = cache.position.at[seats].get(mode="clip"), offsets[layer]

        def read(t, carry):
            out, cache = carry
            token = Tokens(q[:, t], k[:, t], v[:, t], start + t, frequencies)
            active = (t < counts) & _readable(cache, seats)
            cache, granted = grant(cache, active, first, heads=k.shape[2], seats=seats)
            out_t, cache = attend_token(*(cache, policy, first, token), active=active, seats=seats)
            return out.at[:, t].set(out_t), settle(cache, granted, first, seats=seats)

        out, cache = jax.lax.fori_loop(0, counts.max(), read, (jnp.zeros_like(q), cache))
        return out, cache, None

    def attend(q, k, v, layer, cache):
        (_, T, K, _), first = k.shape, offsets[layer]
        count = jnp.where(_readable(cache, seats), counts, 0)
        real = jnp.arange(T) < count[:, None]  # [B, T]
        at = cache.position.at[seats].get(mode="clip")[:, None] + jnp.arange(T)
        of_layer = functools.partial(take_rows, first=first, heads=K, seats=seats)
        state, edits = policy.chunk(
            jax.tree.map(of_layer, cache.state),
            Tokens(q, k, v, at, frequencies),
            of_layer(cache.lengths),
            count,
        )
        put = functools.partial(put_rows, first=first, seats=seats)
        cache = dataclasses.replace(cache, state=jax.tree.map(put, cache.state, state))
        cache, slot = _store(cache, edits, real, first, seats)
        q = policy.rotate(q, at, frequencies)
        return attend_pages(q, edits.key, edits.value, slot, cache, first, seats), cache, None

    return attend if policy.chunked else by_steps


def _readable(cache: PagedCache, seats: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Say which rows read: no sequence that failed, no seat that the cache does not have."""
    return ~cache.failed.at[seats].get(mode="fill", fill_value=True)


# ---- into the pages ---------------------------------------------------------------------------


def _store(
    cache: PagedCache,
    edits: Edit,
    real: Bool[Array, "B T"],
    first: int | Array,
    seats: Int[Array, " B"],
) -> tuple[PagedCache, Int[Array, "B K T"]]:
    """Give the rows their new slots, and write to each the last that is written to it.

    Returns:
        (the cache, the slot of each token; padding has none before it).
    """
    T, K = edits.key.shape[1:3]
    lengths = take_rows(cache.lengths, first, K, seats)  # [B, K]
    real = real[:, None]
    slot = jnp.where(real, edits.slot, -1)  # [B, K, T]
    # The next token does not write to the same slot: it is padding, or opens another one.
    last = real & (slot != jnp.pad(slot[..., 1:], [(0, 0), (0, 0), (0, 1)], constant_values=-1))
    cache, granted = reserve(
        cache,
        jnp.maximum(lengths, slot.max(axis=-1) + 1),
        first,
        seats=seats,
        most=pages_of(T, cache.pages.page_size),
    )
    states = (x.transpose(0, 2, 1, 3) for x in (edits.key, edits.value))
    cache = write(cache, *states, slot, last & granted[..., None], first, seats=seats)
    return cache, jnp.maximum(slot, 0)


# ---- attention over the pages -------------------------------------------------------------------


def attend_pages(
    q: Float[Array, "B T N H"],
    own_k: Float[Array, "B T K H"],
    own_v: Float[Array, "B T K H"],
    slot: Int[Array, "B K T"],
    cache: PagedCache,
    first: int | Array,
    seats: Int[Array, " B"],
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attend over the slots before a token's own, from the pages, and over what the token wrote.

    XLA's form lets blocks of queries meet blocks of slots with a running softmax. Each block of
    queries stops at the last slot that any of its rows can see, so the loop is as short as the
    cache is compressed. A GPU would ask the host at every turn of it: it has a kernel.

    Args:
        q: queries, rotated.
        own_k, own_v: what each token wrote, keys rotated.
        slot: which slot that is; the query sees those before it.
        cache: holds those slots already.
        first: row of the layer's first KV head.
        seats: the seat of each row of the batch.
        implementation: of `prefill_attention`, or "xla"; None: the fastest here.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.
    """
    implementation = choose(implementation)
    if implementation != XLA:
        return prefill_attention(
            *(q, own_k, own_v, slot, cache.pages.k, cache.pages.v),
            *(cache.page_table, cache.lengths, seats),
            first=first,
            scale=q.shape[-1] ** -0.5,
            implementation=implementation,
        )
    B, T, N, H = q.shape
    K = own_k.shape[2]
    block = math.gcd(T, _QUERY_BLOCK)
    table = take_rows(cache.page_table, first, K, seats)
    lengths = take_rows(cache.lengths, first, K, seats)

    def blocks(x, axis):  # [..., T, ...] -> [T / b, ..., b, ...]
        x = x.reshape(*x.shape[:axis], T // block, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    queries = q.reshape(B, T, K, N // K, H)
    out = jax.lax.map(
        lambda x: _attend_block(*x, table, lengths, cache.pages),
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
    pool: Pages,
) -> Float[Array, "B K G b H"]:
    """Attend with one block of queries; see `attend_pages`."""
    H, page = q.shape[-1], pool.page_size
    pages = max(1, _SLOT_BLOCK // page)  # per block of slots
    table = jnp.pad(table, [(0, 0), (0, 0), (0, -table.shape[2] % pages)])
    dtype = jnp.promote_types(q.dtype, pool.dtype)

    def einsum(equation, *operands):
        operands = (x.astype(dtype) for x in operands)
        return jnp.einsum(
            equation, *operands, precision="highest", preferred_element_type=jnp.float32
        )

    def meet_slots(j, carry):
        peak, total, weighted = carry  # [B, K, G, b] twice, [B, K, G, b, H]
        ids = jax.lax.dynamic_slice_in_dim(table, j * pages, pages, axis=2)
        keys, values = pool.read(ids)  # [B, K, s, H]
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
    own_k, own_v = own_k.astype(pool.dtype), own_v.astype(pool.dtype)
    own = H**-0.5 * einsum("BTKGH,BTKH->BKGT", q, own_k)
    value = own_v.astype(jnp.float32).transpose(0, 2, 1, 3)[:, :, None]  # [B, K, 1, b, H]
    start = own, jnp.ones_like(own), jnp.broadcast_to(value, (*own.shape, H))
    # Slots 0 to slot - 1 are in this many blocks.
    steps = pages_of(jnp.minimum(slot.max(), lengths.max()), pages * page)
    _, total, weighted = jax.lax.fori_loop(0, steps, meet_slots, start)
    return (weighted / total[..., None]).astype(q.dtype)


# ---- what comes in ----------------------------------------------------------------------------


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n` >= 1."""
    return 1 << (int(n) - 1).bit_length()


def _check(cache, prompts, seats, chunk) -> None:
    last = cache.position.size - 1
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise UserError("prefill: every prompt needs a token, and there must be one prompt")
    if len(seats) != len(prompts):
        raise UserError(f"prefill: {len(prompts)} prompts but {len(seats)} seats for them")
    if len(set(seats)) != len(seats) or not all(0 <= s <= last for s in seats):
        raise UserError(f"prefill: expected different seats from 0 to {last}, got {list(seats)}")
    check_chunk(chunk)
