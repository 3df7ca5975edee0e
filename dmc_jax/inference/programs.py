"""What the engine keeps on the device, and the two programs that it runs there."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.inference import decoding, paged_cache
from dmc_jax.inference.paged_cache import PagedCache, pages_of
from dmc_jax.inference.prefill import prefill
from dmc_jax.inference.requests import Request, Usage
from dmc_jax.inference.sampling import (
    SamplingArrays,
    SamplingParams,
    sample,
    stack_params,
    token_keys,
)
from dmc_jax.inference.snapshot import copy_in

_NOBODY = SamplingParams(temperature=0.0)  # fills the places of slots that are empty


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences in the cache, one per slot."""

    cache: PagedCache
    seen: Bool[Array, "slots V"]  # tokens that each sequence has; that of an empty slot is void


class Tally(NamedTuple):
    """What the host needs to know of a cache; NumPy once it was read."""

    free: Int[Array, ""]  # pages
    failed: Bool[Array, " slots"]
    may_take: Int[Array, " slots"]  # pages that the next token of each sequence takes at most
    position: Int[Array, " slots"]
    slots: Int[Array, " slots"]  # in use, over all rows of each sequence
    pages: Int[Array, " slots"]  # likewise


def init(
    config: ModelConfig,
    settings: DMCSettings | None,
    *,
    slots: int,
    pages: int | None,
    kv_bytes: int | None,
    page_size: int,
    max_length: int,
    dtype: str,
) -> Batch:
    """A batch without sequences.

    Args:
        config: of the model.
        settings: of the cache.
        slots: sequences at a time.
        pages: in the pool. More than all sequences could fill are not allocated.
        kv_bytes: the pool's size instead of pages.
        page_size: slots per page.
        max_length: tokens of a sequence.
        dtype: of keys and values.

    Raises:
        UserError: not one of `pages` and `kv_bytes`, fewer pages than a token takes, or as in
            `paged_cache.init`.
    """
    if (pages is None) == (kv_bytes is None):
        raise UserError("engine: give one of pages and kv_bytes")
    sizes = {"page_size": page_size, "max_length": max_length, "dtype": jnp.dtype(dtype)}
    of_cache = functools.partial(paged_cache.init, config, settings, slots=slots, **sizes)
    rows = config.kv_rows
    # Without a pool yet: it refuses sizes that the next lines could not divide by.
    page_bytes = sum(_page_bytes(jax.eval_shape(lambda: of_cache(pages=1))))
    pages = kv_bytes // page_bytes if pages is None else pages
    if pages < rows:
        raise UserError(
            f"engine: a pool of {pages} pages cannot hold a token of the {rows} rows of one "
            f"sequence: give {rows} pages, {rows * page_bytes:,} bytes, or more"
        )
    pages = min(pages, slots * rows * pages_of(max_length, page_size))
    return Batch(of_cache(pages=pages), jnp.zeros((slots, config.vocab_size), bool))


def _page_bytes(cache: PagedCache) -> tuple[int, int]:
    """Of a page's keys and values."""
    return tuple(
        math.prod(pool.shape[1:]) * pool.dtype.itemsize for pool in (cache.k_pages, cache.v_pages)
    )


def read_prompt(
    params: Any,
    config: ModelConfig,
    batch: Batch,
    request: Request,
    *,
    settings: DMCSettings | None,
    threshold: float,
    dtype: str,
) -> tuple[Batch, Int[Array, ""]]:
    """Read a sequence, what it has said included, and choose the token after it.

    One at a time, so that what a prompt gives does not depend on the others' lengths.

    Args:
        params: of the model.
        config: its sizes.
        batch: given up.
        request: its slot is empty.
        settings: those that the batch was made with.
        threshold: of hard decisions.
        dtype: of the forward pass.

    Returns:
        (the batch, the token, which means nothing if the sequence `failed`).
    """
    tokens = [*request.prompt, *request.tokens]
    cache, logits = prefill(
        params,
        config,
        batch.cache,
        [tokens],
        [request.slot],
        settings=settings,
        threshold=threshold,
        dtype=dtype,
    )
    numbers = stack_params([request.params]), np.array([len(request.tokens)], np.int32)
    seen = _mark(config, tokens)
    seen, chosen = _first_token(batch.seen, np.int32(request.slot), seen, logits, *numbers)
    return Batch(cache, seen), chosen


def put_back(config: ModelConfig, batch: Batch, request: Request) -> Batch:
    """Put a sequence that was resumed from a snapshot into its slot, without reading it.

    Args:
        config: of the model.
        batch: given up.
        request: its slot is empty, and its rows are those of the snapshot.

    Returns:
        The batch; the sequence may have `failed`.
    """
    cache = copy_in(batch.cache, request.rows, request.slot)
    seen = _mark(config, [*request.prompt, *request.tokens])
    return Batch(cache, batch.seen.at[request.slot].set(seen))


def _mark(config: ModelConfig, tokens: Sequence[int]) -> Bool[np.ndarray, " V"]:
    seen = np.zeros(config.vocab_size, bool)
    seen[list(tokens)] = True
    return seen


@functools.partial(jax.jit, donate_argnames="all_seen")
def _first_token(all_seen, slot, seen, logits, sampling, index):
    chosen = sample(logits, sampling, token_keys(sampling.seed, index), seen[None])[0]
    return all_seen.at[slot].set(seen.at[chosen].set(True)), chosen


def columns(
    slots: Sequence[Request | None],
) -> tuple[
    Int[np.ndarray, " slots"],
    Bool[np.ndarray, " slots"],
    SamplingArrays,
    Int[np.ndarray, " slots"],
]:
    """What `next_tokens` asks of the host.

    Args:
        slots: the sequence in each, if any.

    Returns:
        (tokens, active, sampling, index).
    """
    return (
        np.array([request.tokens[-1] if request else 0 for request in slots], np.int32),
        np.array([request is not None for request in slots]),
        stack_params([request.params if request else _NOBODY for request in slots]),
        np.array([len(request.tokens) if request else 0 for request in slots], np.int32),
    )


@functools.partial(
    jax.jit, static_argnames=("config", "settings", "dtype"), donate_argnames="batch"
)
def next_tokens(
    params: Any,
    config: ModelConfig,
    batch: Batch,
    tokens: Int[Array, " slots"],
    active: Bool[Array, " slots"],
    sampling: SamplingArrays,
    index: Int[Array, " slots"],
    *,
    settings: DMCSettings | None,
    threshold: float,
    dtype: str,
) -> tuple[Batch, Int[Array, " slots"], Tally]:
    """Read one token of every active sequence and choose the one after it.

    Args:
        params: of the model.
        config: its sizes.
        batch: given up.
        tokens: the newest of each sequence, which the cache does not hold yet.
        active: slots with a sequence.
        sampling: how to choose.
        index: of the token that is chosen, among the new ones of its sequence.
        settings: those that the batch was made with.
        threshold: of hard decisions.
        dtype: of the forward pass.

    Returns:
        (the batch, the chosen tokens, the tally). The tokens of inactive and failed sequences mean
        nothing.
    """
    cache, logits = decoding.decode_step(
        params,
        config,
        batch.cache,
        tokens,
        active,
        settings=settings,
        threshold=threshold,
        dtype=dtype,
    )
    chosen = sample(logits, sampling, token_keys(sampling.seed, index), batch.seen)
    seen = batch.seen.at[jnp.arange(chosen.size), chosen].set(True)
    return Batch(cache, seen), chosen, tally(cache)


@functools.partial(jax.jit, donate_argnames="batch")
def release(batch: Batch, leaving: Bool[Array, " slots"]) -> tuple[Batch, Tally]:
    """Empty some slots; none is fine.

    Args:
        batch: given up.
        leaving: slots to empty.

    Returns:
        (the batch, the tally).
    """
    batch = dataclasses.replace(batch, cache=paged_cache.free(batch.cache, leaving))
    return batch, tally(batch.cache)


def tally(cache: PagedCache) -> Tally:
    """Count, on the device."""
    page = cache.k_pages.shape[1]
    return Tally(
        free=cache.free_count,
        failed=cache.failed,
        # As `pages_for_one_token`, of every sequence.
        may_take=(cache.lengths % page == 0).sum(axis=1, dtype=jnp.int32),
        position=cache.position,
        slots=cache.lengths.sum(axis=1),
        pages=pages_of(cache.lengths, page).sum(axis=1),
    )


def usage(cache: PagedCache, counts: Tally, slot: int) -> Usage:
    """What the sequence in a slot holds.

    Args:
        cache: gives the sizes.
        counts: of the cache, in NumPy.
        slot: not empty.
    """
    position, rows = int(counts.position[slot]), cache.lengths.shape[1]
    page_bytes = sum(_page_bytes(cache))
    return Usage(
        ratio=position * rows / int(counts.slots[slot]),
        live_bytes=int(counts.pages[slot]) * page_bytes,
        dense_bytes=rows * pages_of(position, cache.k_pages.shape[1]) * page_bytes,
    )
