"""A prompt read in chunks of any size leaves what one token at a time leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.inference import decoding, layers, paged_cache, prefill
from dmc_jax.model.llama import Llama
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Edit, attend_whole
from tests.inference import chunks

TOLERANCE = 1e-5  # float32 logits and states of size 1
# Above every merge logit; at the middle of them; below most; below all.
THRESHOLDS = {"never": 1e3, "half": 0.0, "mostly": -1.5, "always": -1e3}
T, CHUNK = 40, 16
CACHE_OPTIONS = ("pages", "seats", "max_length", "dtype")

POLICIES = {
    "window 12": (2, DMCSettings(window=12, offset=0.0)),
    "window 3, KV heads 4 and 2": ((4, 2), DMCSettings(window=3, offset=0.0)),
    "window 1": (1, DMCSettings(window=1, offset=0.0)),
    "unlimited window": (4, DMCSettings(window=None, offset=0.0)),
    "dense": (2, None),
}


def policy_of(settings, threshold=0.0):
    return Dense() if settings is None else DMC(settings, threshold)


@functools.cache
def some_tokens(batch=2, length=T):
    return np.random.default_rng(1).integers(0, 50, (batch, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=CACHE_OPTIONS)
def poisoned_cache(config, settings, pages=200, seats=3, max_length=T, dtype=jnp.float32):
    """An empty cache whose pages are NaN."""
    cache = paged_cache.init(
        config,
        policy_of(settings),
        seats=seats,
        pages=pages,
        page_size=8,
        max_length=max_length,
        dtype=dtype,
    )
    return dataclasses.replace(cache, pages=jax.tree.map(lambda x: x * jnp.nan, cache.pages))


@functools.partial(jax.jit, static_argnums=(1, 2))
def read_one_by_one(params, config, settings, cache, tokens, lengths, threshold):
    """Seat 0 reads row 0, seat 1 row 1; the third reads nothing. Logits [B, T, V]."""

    def step(cache, now):
        t, column = now
        active = jnp.append(t < lengths, False)
        return decoding.decode_step(
            params,
            config,
            cache,
            jnp.append(column, 0),
            active,
            policy=policy_of(settings, threshold),
        )

    cache, logits = jax.lax.scan(step, cache, (jnp.arange(tokens.shape[1]), tokens.T))
    return cache, logits.swapaxes(0, 1)[:2]


@functools.partial(jax.jit, static_argnums=(1, 2))
def read_chunk(params, config, settings, cache, tokens, counts, seats, threshold):
    return chunks.read_chunk(
        params,
        config,
        cache,
        tokens,
        counts,
        seats,
        policy=policy_of(settings, threshold),
    )


def read_in_chunks(params, config, settings, cache, tokens, splits, threshold):
    """Read both rows; each entry of `splits` has (tokens of row 0, of row 1, rows swapped)."""
    logits, at = np.zeros((2, T, 50), np.float32), np.zeros(2, int)
    for *counts, swapped in splits:
        chunk = np.full((2, CHUNK), 49, np.int32)
        for row in range(2):
            chunk[row, : counts[row]] = tokens[row, at[row] : at[row] + counts[row]]
        order = np.array([1, 0] if swapped else [0, 1])
        cache, new = read_chunk(
            params,
            config,
            settings,
            cache,
            chunk[order],
            np.array(counts, np.int32)[order],
            order,
            threshold,
        )
        for row in range(2):
            part = np.asarray(new)[list(order).index(row), : counts[row]]
            logits[row, at[row] : at[row] + counts[row]] = part
        at += counts
    return cache, logits, at


def rows_of(cache, pool):
    """What every row holds, in order, whatever the pages are: (seat, row) -> [length, H]."""
    table, lengths, pool = (np.asarray(x) for x in (cache.page_table, cache.lengths, pool))
    page, H = pool.shape[1:]
    return {
        row: pool[table[row][: -(-length // page)]].reshape(-1, H)[:length]
        for row, length in np.ndenumerate(lengths)
    }


def assert_same_cache(cache, expected):
    for name in ("lengths", "position", "free_count", "failed"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(expected, name), err_msg=name)
    for name in ("k", "v"):
        mine, theirs = (rows_of(x, getattr(x.pages, name)) for x in (cache, expected))
        for row, slots in mine.items():
            np.testing.assert_allclose(slots, theirs[row], atol=TOLERANCE, rtol=0)
    if expected.state:
        np.testing.assert_array_equal(cache.state.count, expected.state.count)
        # An unlimited window keeps sums, whose error grows with what they sum.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=TOLERANCE, rtol=TOLERANCE),
            cache.state,
            expected.state,
        )


splits = st.lists(
    st.tuples(st.integers(0, CHUNK), st.integers(0, CHUNK), st.booleans()), max_size=7
).filter(lambda parts: all(sum(part[row] for part in parts) <= T for row in (0, 1)))
# Below and above the window, an empty chunk, single tokens, rows of different lengths.
EDGES = [(1, 16, False), (0, 1, True), (13, 0, False), (1, 1, True), (16, 2, False), (2, 16, True)]


@pytest.mark.parametrize("policy", POLICIES)
def prefill_in_any_chunks_equals_one_token_at_a_time_test(build_model, policy):
    kv_heads, settings = POLICIES[policy]
    params, config = build_model(kv_heads)
    empty = poisoned_cache(config, settings)

    def check(parts, threshold):
        tokens = some_tokens()
        cache, logits, lengths = read_in_chunks(
            params, config, settings, empty, tokens, parts, threshold
        )
        expected_cache, expected = read_one_by_one(
            params, config, settings, empty, tokens, lengths, threshold
        )
        assert_same_cache(cache, expected_cache)
        expected = np.asarray(expected)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                logits[row, :length], expected[row, :length], atol=TOLERANCE, rtol=0
            )
        return cache

    for name, threshold in THRESHOLDS.items():
        cache = check(EDGES, threshold)
        counts = cache.state.count if settings else jnp.ones(())
        if name == "always" and settings:  # far beyond the window
            assert (counts[:2] == cache.position[:2, None]).all() and counts.max() > 30

    @hypothesis_settings(max_examples=12, deadline=None)
    @given(splits, st.sampled_from(list(THRESHOLDS.values())))
    def any_split(parts, threshold):
        check(parts, threshold)

    any_split()


def prefill_into_bfloat16_pages_equals_one_token_at_a_time_test(tiny_model):
    """A token's own state is read as its page would hold it, though no page does for long."""
    params, config = tiny_model
    settings = DMCSettings(offset=0.0)
    empty = poisoned_cache(config, settings, dtype=jnp.bfloat16)
    args, threshold = (params, config, settings, empty, some_tokens()), THRESHOLDS["mostly"]
    cache, logits, lengths = read_in_chunks(*args, EDGES, threshold)
    expected_cache, expected = read_one_by_one(*args, lengths, threshold)
    expected = np.asarray(expected)
    np.testing.assert_array_equal(cache.lengths, expected_cache.lengths)
    for row, length in enumerate(lengths):
        # Wider than in float32: a last bit may tip what bfloat16 rounds to. Without the rounding
        # of the own state the difference is 0.005 and more.
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "threshold", [pytest.param(THRESHOLDS["never"], marks=pytest.mark.slow), THRESHOLDS["mostly"]]
)
def long_prompts_of_different_lengths_then_decoding_give_the_evaluated_logits_test(
    tiny_model, threshold
):
    """Several blocks of queries and of slots, and chunks that end within a block."""
    params, config = tiny_model
    settings, lengths, after = DMCSettings(offset=0.0), (5, 500, 270), 3
    tokens = some_tokens(3, 503)
    cache = poisoned_cache(config, settings, pages=450, seats=4, max_length=504)
    cache, last = prefill.prefill(
        params,
        config,
        cache,
        [row[:length] for row, length in zip(tokens, lengths, strict=True)],
        (2, 0, 3),
        policy=policy_of(settings, threshold),
        chunk=256,
    )
    assert not cache.failed.any()
    logits = [last]
    for i in range(after):
        column = np.zeros(4, np.int32)
        column[[2, 0, 3]] = [row[length + i] for row, length in zip(tokens, lengths, strict=True)]
        cache, new = decode(params, config, settings, cache, column, threshold)
        logits.append(np.asarray(new)[[2, 0, 3]])
    logits = np.stack(logits, axis=1)  # [B, 1 + after, V]
    expected = np.asarray(evaluated(params, config, settings, tokens, threshold).logits)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            logits[row], expected[row, length - 1 : length + after], atol=TOLERANCE, rtol=0
        )
    np.testing.assert_array_equal(cache.position, [503, 0, 8, 273])


def slots_per_token(*of_model_tokens_and_threshold):
    records = evaluated(*of_model_tokens_and_threshold).records
    return np.mean([record.appends.mean() for record in records])


def threshold_for(ratio, *model_and_tokens):
    low, high = -4.0, 4.0
    for _ in range(14):
        middle = (low + high) / 2
        few = slots_per_token(*model_and_tokens, middle) < 1 / ratio
        low, high = (middle, high) if few else (low, middle)
    return middle


# The groupings with the fewest and the most queries per KV head, and one between them.
@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, kv_heads",
    [(4, 4), (4, 1), (8, 1)],
)
def prefill_then_decoding_is_full_evaluation_at_every_ratio_and_grouping_test(
    build_model, heads, kv_heads
):
    """Two seats split at random, and then two others in the pages that they leave."""
    params, config = build_model(kv_heads, heads=heads)
    settings, rng = DMCSettings(window=5, offset=0.0), np.random.default_rng(heads * kv_heads)
    cache = poisoned_cache(config, settings, pages=2 * config.kv_rows * 5, seats=2)
    for ratio in (1, 2, 4, 8):
        tokens = rng.integers(0, 50, (2, T)).astype(np.int32)
        of_model = params, config, settings
        threshold = threshold_for(ratio, *of_model, tokens) if ratio > 1 else THRESHOLDS["never"]
        expected = np.asarray(evaluated(*of_model, tokens, threshold).logits)
        splits = [(*rng.integers(0, 14, 2), bool(rng.integers(2))) for _ in range(2)]
        cache, logits, at = read_in_chunks(*of_model, cache, tokens, splits, threshold)
        cache, after = decode_rest(*of_model, cache, tokens, jnp.asarray(at), threshold)
        assert not cache.failed.any() and (cache.position == T).all()
        for row in (0, 1):
            logits[row, at[row] :] = np.asarray(after)[row, at[row] :]
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
        measured = 2 * T * config.kv_rows / float(cache.lengths.sum())
        assert measured == pytest.approx(1 / float(slots_per_token(*of_model, tokens, threshold)))
        assert measured == pytest.approx(ratio, rel=0.3)
        if ratio == 8:  # some segment is longer than the window
            assert (cache.lengths.min(axis=1) < T / 5).any()
        cache = paged_cache.free(cache, jnp.full(2, True))


@functools.partial(jax.jit, static_argnums=(1, 2))
def decode_rest(params, config, settings, cache, tokens, at, threshold):
    """Both rows, one token at a time, from where they are to their ends; logits [B, T, V]."""

    def step(cache, now):
        t, column = now
        return decoding.decode_step(
            params,
            config,
            cache,
            column,
            t >= at,
            policy=policy_of(settings, threshold),
        )

    cache, logits = jax.lax.scan(step, cache, (jnp.arange(T), tokens.T))
    return cache, logits.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def decode(params, config, settings, cache, tokens, threshold):
    active = jnp.array([True, False, True, True])
    return decoding.decode_step(
        params,
        config,
        cache,
        tokens,
        active,
        policy=policy_of(settings, threshold),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def evaluated(params, config, settings, tokens, threshold):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = attend_whole(policy_of(settings, threshold), config, positions)
    return Llama(config).apply({"params": params}, tokens, attend=attend)


def read_prompts(tiny_model, prompts, cache, where, **changes):
    options = {"policy": DMC(DMCSettings(offset=0.0)), "chunk": CHUNK} | changes
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    return prefill.prefill(*tiny_model, cache, prompts, where, **options)


@pytest.fixture
def empty_cache(tiny_model):
    return poisoned_cache(tiny_model[1], DMCSettings(offset=0.0))


def lengths_in_one_bucket_do_not_compile_again_test(tiny_model):
    config = tiny_model[1]
    settings = DMCSettings(offset=0.0)
    read_prompts(tiny_model, [[1] * 40, [2]], poisoned_cache(config, settings), (0, 1))
    before = layers._run_layer._cache_size()
    for lengths in ((1, 1), (15, 9), (16, 3), (37, 20)):
        prompts = [[3] * length for length in lengths]
        read_prompts(tiny_model, prompts, poisoned_cache(config, settings), (2, 1))
    assert layers._run_layer._cache_size() == before


def who_shares_the_batch_does_not_matter_test(tiny_model):
    settings = DMCSettings(offset=0.0)
    prompts, rows, logits = [list(row) for row in some_tokens(3)], [], []
    for mine, other, length in ((0, 1, 9), (2, 2, 38)):
        cache = poisoned_cache(tiny_model[1], settings)
        batch = [prompts[0][:21], prompts[other][:length]]
        cache, last = read_prompts(tiny_model, batch, cache, (mine, 1))
        held = rows_of(cache, cache.pages.k)
        rows.append([held[mine, row] for row in range(4)])
        logits.append(last[0])
    np.testing.assert_allclose(*logits, atol=TOLERANCE, rtol=0)
    for first, second in zip(*rows, strict=True):
        np.testing.assert_allclose(first, second, atol=TOLERANCE, rtol=0)


def padding_leaves_no_trace_test(tiny_model, empty_cache):
    params, config = tiny_model
    caches = [
        read_chunk(
            params,
            config,
            DMCSettings(offset=0.0),
            empty_cache,
            np.where(np.arange(CHUNK) < 5, some_tokens(1, CHUNK), padding).repeat(2, axis=0),
            np.array([5, 5], np.int32),
            np.array([1, 3], np.int32),  # the second is outside the cache
            THRESHOLDS["half"],
        )[0]
        for padding in (0, 33)
    ]
    jax.tree.map(np.testing.assert_array_equal, *caches)
    np.testing.assert_array_equal(caches[0].position, [0, 5, 0])
    assert (caches[0].lengths[1] > 0).all()
    assert (caches[0].lengths[::2] == 0).all()
    used = -(-caches[0].lengths[1] // 8).sum()
    assert caches[0].free_count == 200 - used


def every_slot_of_a_chunk_is_written_once_test(tiny_model, empty_cache, monkeypatch):
    """Of two writes to one slot, which one stays would be up to the machine."""
    writes = []

    def note(cache, keys, values, slots, where, first, *, seats, tokens):
        writes.append((slots, where))
        return cache

    monkeypatch.setattr(prefill, "write", note)
    opens = np.array([[1, 0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]], bool)[..., None]
    real = jnp.arange(8) < jnp.array([7, 5])[:, None]
    states = jnp.zeros((2, 8, 1, 16))

    @jax.jit
    def store(cache):
        slot = jnp.cumsum(opens, axis=1).swapaxes(1, 2) - 1
        _, slot = prefill.store(cache, Edit(slot, states, states), real, 0, jnp.arange(2))
        return slot, writes

    slot, [(slots, where)] = store(empty_cache)
    written = [np.bincount(slots[row][where[row]]).tolist() for row in np.ndindex(slots.shape[:2])]
    assert written == [[1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(slot[:, 0], [[0, 0, 0, 1, 2, 2, 2, 0], [0, 1, 2, 2, 3, 0, 0, 0]])


def prompts_without_enough_pages_are_reported_and_harm_no_other_test(tiny_model):
    config, settings = tiny_model[1], DMCSettings(offset=0.0)
    prompts, options = (
        some_tokens()[:, :CHUNK],
        {"policy": DMC(DMCSettings(offset=0.0), THRESHOLDS["never"])},
    )
    # Without merging, 16 tokens take 2 pages in each of 4 rows, and one token a page in each.
    fitting = [prompts[0], [1]]
    enough, expected = read_prompts(
        tiny_model, fitting, poisoned_cache(config, settings, pages=12), (0, 2), **options
    )
    cache, logits = read_prompts(
        tiny_model, prompts, poisoned_cache(config, settings, pages=12), (0, 1), **options
    )
    np.testing.assert_array_equal(cache.failed, [False, True, False])
    np.testing.assert_allclose(logits[0], expected[0], atol=TOLERANCE, rtol=0)
    for name in ("k", "v"):
        mine, theirs = (rows_of(x, getattr(x.pages, name)) for x in (cache, enough))
        for row in range(config.kv_rows):
            np.testing.assert_allclose(mine[0, row], theirs[0, row], atol=TOLERANCE, rtol=0)
    cache = paged_cache.free(cache, jnp.array([True, True, False]))
    assert cache.free_count == 12 and not cache.failed.any()
    cache, logits = read_prompts(tiny_model, fitting, cache, (1, 2), **options)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "prompts, where, changes, complaint",
    [
        ([], (), {}, "needs a token"),
        ([[1], []], (0, 1), {}, "needs a token"),
        ([[1], [2]], (0,), {}, "2 prompts but 1 seats"),
        ([[1], [2]], (1, 1), {}, "different seats from 0 to 2, got \\[1, 1\\]"),
        ([[1]], (3,), {}, "different seats from 0 to 2, got \\[3\\]"),
        ([[1]], (0,), {"chunk": 24}, "chunk must be a power of two, 16 or more, got 24"),
    ],
)
def bad_requests_are_refused_test(tiny_model, empty_cache, prompts, where, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        read_prompts(tiny_model, prompts, empty_cache, where, **changes)
