"""What the engine keeps on the device, and the two programs that it runs there."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.errors import UserError
from dmc_jax.inference import decoding, paged_cache
from dmc_jax.inference.layers import logits_of, run_layers
from dmc_jax.inference.paged_cache import PagedCache, pages_for_one_token, pages_of
from dmc_jax.inference.prefill import chunk_width, read_chunk
from dmc_jax.inference.requests import Request, Usage
from dmc_jax.inference.sampling import (
    Chosen,
    SamplingArrays,
    SamplingParams,
    sample,
    stack_params,
    token_keys,
    with_logprobs,
)
from dmc_jax.inference.snapshot import copy_in
from dmc_jax.policies.policy import Policy

NOBODY = SamplingParams(temperature=0.0)  # fills the places of seats that are empty, and up a batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences in the cache, one per seat."""

    cache: PagedCache
    seen: Bool[Array, "seats V"]  # tokens that each sequence has; that of an empty seat is void


class Tally(NamedTuple):
    """What the host needs to know of a cache; NumPy once it was read."""

    free: Int[Array, ""]  # pages
    failed: Bool[Array, " seats"]
    may_take: Int[Array, " seats"]  # pages that the next token of each sequence takes at most
    position: Int[Array, " seats"]
    slots: Int[Array, " seats"]  # in use, over all rows of each sequence
    pages: Int[Array, " seats"]  # likewise
    most_pages: Int[Array, " seats"]  # that each sequence had, if it gave some back


def init(
    config: ModelConfig,
    policy: Policy,
    *,
    seats: int,
    pages: int | None,
    kv_bytes: int | None,
    page_size: int,
    max_length: int,
    room: int,
    dtype: str,
    kv_dtype: str,
) -> Batch:
    """Allocate a batch without sequences.

    Args:
        config: of the model.
        policy: of the cache.
        seats: sequences at a time.
        pages: in the pool. More than all sequences could fill are not allocated.
        kv_bytes: the pool's size instead of pages.
        page_size: slots per page.
        max_length: tokens of a sequence.
        room: tokens that page tables have room for so far; see `widen`.
        dtype: of the forward pass.
        kv_dtype: of keys and values, one of `pages.KV_DTYPES`.

    Raises:
        UserError: not one of `pages` and `kv_bytes`, fewer pages than a token takes, or as in
            `paged_cache.init`.
    """
    if (pages is None) == (kv_bytes is None):
        raise UserError("engine: give one of pages and kv_bytes")
    sizes = {"page_size": page_size, "max_length": room}
    sizes |= {"dtype": kv_dtype, "tokens": jnp.dtype(dtype)}
    of_cache = functools.partial(paged_cache.init, config, policy, seats=seats, **sizes)
    rows = config.kv_rows
    # Without a pool yet: it refuses sizes that the next lines could not divide by.
    page_bytes = jax.eval_shape(lambda: of_cache(pages=1)).pages.page_bytes
    pages = kv_bytes // page_bytes if pages is None else pages
    if pages < rows:
        raise UserError(
            f"engine: a pool of {pages} pages cannot hold a token of the {rows} rows of one "
            f"sequence: give {rows} pages, {rows * page_bytes:,} bytes, or more"
        )
    most = seats * rows * pages_of(policy.most_slots(max_length), page_size)
    pages = min(pages, most)
    return Batch(of_cache(pages=pages), jnp.zeros((seats, config.vocab_size), bool))


def widen(batch: Batch, policy: Policy, room: int) -> Batch:
    """Give the rows room for longer sequences.

    Every step reads whole page tables, so their width is that of the sequences that came, and not
    of those that the model could read.

    Args:
        batch: given up.
        policy: of the cache.
        room: tokens of a sequence.
    """
    return dataclasses.replace(batch, cache=paged_cache.widen(batch.cache, policy, room))


def read_prompts(
    params: Any,
    config: ModelConfig,
    batch: Batch,
    parts: Sequence[tuple[Request, int]],
    *,
    chunk: int,
    policy: Policy,
    dtype: str,
) -> tuple[Batch, Chosen]:
    """Read some tokens more of sequences, what they have said included, in one pass.

    Args:
        params: of the model.
        config: its sizes.
        batch: given up.
        parts: each sequence, and how many of its tokens the cache has; all of one width.
        chunk: tokens of a sequence that a pass reads at most.
        policy: that the batch was made for; of `for_requests`, if the sequences differ.
        dtype: of the forward pass.

    Returns:
        (the batch, the token that follows each, which means nothing if the sequence `failed`, or
        has tokens left to read).
    """
    known = [request.known for request, _ in parts]
    read = [
        tokens[begin : request.part_end(begin, chunk)]
        for tokens, (request, begin) in zip(known, parts, strict=True)
    ]
    seats = np.array([request.seat for request, _ in parts], np.int32)
    cache, x = read_chunk(
        *(params, config, batch.cache, read, seats),
        width=chunk_width(max(map(len, read)), chunk),
        policy=policy,
        dtype=dtype,
    )
    sampling = stack_params([request.params for request, _ in parts])
    index = np.array([len(request.tokens) for request, _ in parts], np.int32)
    seen = np.stack([_mark(config, tokens) for tokens in known])
    logits = logits_of(params, config, x)
    seen, chosen = _first_tokens(batch.seen, seats, seen, logits, sampling, index)
    return Batch(cache, seen), chosen


def put_back(config: ModelConfig, batch: Batch, request: Request) -> Batch:
    """Put a sequence that was resumed from a snapshot into its seat, without reading it.

    Args:
        config: of the model.
        batch: given up.
        request: its seat is empty, and its rows are those of the snapshot.

    Returns:
        The batch; the sequence may have `failed`.
    """
    cache = copy_in(batch.cache, request.rows, request.seat)
    seen = _mark(config, [*request.prompt, *request.tokens])
    return Batch(cache, batch.seen.at[request.seat].set(seen))


def _mark(config: ModelConfig, tokens: Sequence[int]) -> Bool[np.ndarray, " V"]:
    seen = np.zeros(config.vocab_size, bool)
    seen[list(tokens)] = True
    return seen


@functools.partial(jax.jit, donate_argnames="all_seen")
def _first_tokens(all_seen, seats, seen, logits, sampling, index):
    seen, chosen = choose_tokens(seen, logits, sampling, index)
    return all_seen.at[seats].set(seen), chosen


def for_requests(policy: Policy, seats: Sequence[Request | None]) -> Policy:
    """Give every seat its sequence's own threshold and length of prompt, where the policy asks.

    Args:
        policy: of the cache.
        seats: the sequence in each, if any.
    """
    prompts = [len(request.prompt) if request else 0 for request in seats]
    policy = policy.of_prompts(np.array(prompts, np.int32))
    if policy.threshold is None:
        return policy
    own = [request.params.threshold if request else 0.0 for request in seats]
    return dataclasses.replace(policy, threshold=np.array(own, np.float32))


def columns(
    seats: Sequence[Request | None],
) -> tuple[
    Int[np.ndarray, " seats"],
    Bool[np.ndarray, " seats"],
    SamplingArrays,
    Int[np.ndarray, " seats"],
]:
    """Collect what `next_tokens` asks of the host.

    Args:
        seats: the sequence in each, if any.

    Returns:
        (tokens, active, sampling, index).
    """
    return (
        np.array([request.tokens[-1] if request else 0 for request in seats], np.int32),
        np.array([request is not None for request in seats]),
        stack_params([request.params if request else NOBODY for request in seats]),
        np.array([len(request.tokens) if request else 0 for request in seats], np.int32),
    )


def next_tokens(
    params: Any,
    config: ModelConfig,
    batch: Batch,
    tokens: Int[Array | np.ndarray, " seats"],
    active: Bool[Array | np.ndarray, " seats"],
    sampling: SamplingArrays,
    index: Int[Array | np.ndarray, " seats"],
    *,
    policy: Policy,
    dtype: str,
) -> tuple[Batch, Chosen, Tally]:
    """Read one token of every active sequence and choose the one after it.

    Args:
        params: of the model.
        config: its sizes.
        batch: given up.
        tokens: the newest of each sequence, which the cache does not hold yet.
        active: seats with a sequence.
        sampling: how to choose.
        index: of the token that is chosen, among the new ones of its sequence.
        policy: that the batch was made for; of `for_requests`, if the sequences differ.
        dtype: of the forward pass.

    Returns:
        (the batch, the chosen tokens, the tally). The tokens of inactive and failed sequences mean
        nothing.
    """
    # Launching a program per layer costs a CPU nothing beside the layer, and compiles in a moment.
    read = read_tokens_by_layer if jax.default_backend() == "cpu" else read_tokens
    cache, logits, counts = read(
        *(params, config, batch.cache, tokens, active),
        policy=policy,
        dtype=dtype,
    )
    # A program of its own: another way of choosing must not compile the model again.
    seen, chosen = choose_tokens(batch.seen, logits, sampling, index, active)
    return Batch(cache, seen), chosen, counts


# A pool as large as the device leaves XLA for GPUs no way below the memory that it wants programs
# to keep to; trying, it would compute products of matrices two and three times.
@functools.partial(
    jax.jit,
    static_argnames=("config", "dtype"),
    donate_argnames="cache",
    compiler_options={"xla_disable_hlo_passes": "rematerialization"},
)
def read_tokens(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    tokens: Int[Array, " seats"],
    active: Bool[Array, " seats"],
    *,
    policy: Policy,
    dtype: str,
) -> tuple[PagedCache, Float[Array, "seats V"], Tally]:
    """Read one token of every active sequence; see `next_tokens`.

    Returns:
        (the cache, logits of the tokens after them, the tally).
    """
    cache, logits = decoding.decode_step(
        *(params, config, cache, tokens, active),
        policy=policy,
        dtype=dtype,
    )
    return cache, logits, tally(cache)


def read_tokens_by_layer(
    params: Any,
    config: ModelConfig,
    cache: PagedCache,
    tokens: Int[Array | np.ndarray, " seats"],
    active: Bool[Array | np.ndarray, " seats"],
    *,
    policy: Policy,
    dtype: str,
) -> tuple[PagedCache, Float[Array, "seats V"], Tally]:
    """Do what `read_tokens` does with a program for each kind of layer."""
    cache, reads, granted = _begin_step(cache, active)
    x, cache = run_layers(
        *(params, config, tokens[:, None], cache),
        make_attend=decoding.attend_cached,
        inputs={"policy": policy, "active": reads},
        dtype=dtype,
    )
    cache, x, counts = _end_step(cache, x, active, granted)
    return cache, logits_of(params, config, x), counts


_begin_step = jax.jit(decoding.begin_step, donate_argnames="cache")


@functools.partial(jax.jit, donate_argnames="cache")
def _end_step(cache, x, active, granted):
    cache = decoding.end_step(cache, active, granted)
    return cache, x[:, 0], tally(cache)


@functools.partial(jax.jit, donate_argnames="seen")
def choose_tokens(
    seen: Bool[Array, "seats V"],
    logits: Float[Array, "seats V"],
    sampling: SamplingArrays,
    index: Int[Array, " seats"],
    active: Bool[Array, " seats"] | None = None,
) -> tuple[Bool[Array, "seats V"], Chosen]:
    """Choose a token after every sequence; see `next_tokens`. Without `active` all are.

    Returns:
        (tokens seen, the chosen ones among them; the chosen tokens).
    """
    chosen = sample(logits, sampling, token_keys(sampling.seed, index), seen)
    # Of who is not active, nothing was said: the token means nothing.
    said = chosen if active is None else jnp.where(active, chosen, seen.shape[1])
    seen = seen.at[jnp.arange(chosen.size), said].set(True, mode="drop")
    return seen, with_logprobs(chosen, logits) if sampling.logprobs else Chosen(chosen)


@functools.partial(jax.jit, donate_argnames="batch")
def release(batch: Batch, leaving: Bool[Array, " seats"]) -> tuple[Batch, Tally]:
    """Empty some seats; none is fine.

    Args:
        batch: given up.
        leaving: seats to empty.

    Returns:
        (the batch, the tally).
    """
    batch = dataclasses.replace(batch, cache=paged_cache.free(batch.cache, leaving))
    return batch, tally(batch.cache)


def tally(cache: PagedCache) -> Tally:
    """Count, on the device."""
    page = cache.pages.page_size
    return Tally(
        free=cache.free_count,
        failed=cache.failed,
        may_take=pages_for_one_token(cache),
        position=cache.position,
        slots=cache.lengths.sum(axis=1),
        pages=pages_of(cache.lengths, page).sum(axis=1),
        most_pages=cache.most_pages,
    )


def usage(cache: PagedCache, counts: Tally, seat: int) -> Usage:
    """Say what the sequence in a seat holds.

    Args:
        cache: gives the sizes.
        counts: of the cache, in NumPy.
        seat: not empty.
    """
    position, rows = int(counts.position[seat]), cache.lengths.shape[1]
    # A dense model does not count the tokens of its slots.
    dense = dataclasses.replace(cache.pages, tokens=None).page_bytes
    live = int(counts.pages[seat])
    return Usage(
        ratio=position * rows / int(counts.slots[seat]),
        live_bytes=live * cache.pages.page_bytes,
        peak_bytes=max(live, int(counts.most_pages[seat])) * cache.pages.page_bytes,
        dense_bytes=rows * pages_of(position, cache.pages.page_size) * dense,
    )
