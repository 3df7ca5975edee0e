"""Decoding from the slot cache is the parallel form, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.inference import slots
from dmc_jax.inference.generate import decode_step
from dmc_jax.model import modes
from dmc_jax.model.llama import Llama

T = 64
TOLERANCE = 1e-4  # float32 logits of size 1
# Above every merge logit; at the middle of them; below most; below all.
NEVER, HALF, MOSTLY, ALWAYS = 1e3, 0.0, -1.5, -1e3


def random_tokens(batch=2):
    return jax.random.randint(jax.random.key(1), (batch, T), 0, 50)


@functools.partial(jax.jit, static_argnums=(1, 2))
def decode_all(params, config, settings, tokens, threshold):
    """The cache after all tokens, and the logits after each."""

    def step(cache, column):
        return decode_step(params, config, cache, column, settings=settings, threshold=threshold)

    cache = slots.init(config, settings, tokens.shape[0], T)
    cache, logits = jax.lax.scan(step, cache, tokens.T)
    return cache, logits.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def evaluate_all(params, config, settings, tokens, threshold):
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    if settings is None:
        attend = modes.dense(config, positions, block=T)
    else:
        attend = modes.compressed(config, settings, positions, threshold=threshold, block=T)
    return Llama(config).apply({"params": params}, tokens, attend=attend)


def merged_by_row(output):
    """0/1 [R, B, T]: what each token did in every row."""
    return np.concatenate(
        [
            np.moveaxis(np.asarray(record.merged), 3, 1).reshape(-1, *record.merged.shape[1:3])
            for record in output.records
        ]
    )


def longest_segment(merged):
    longest = here = 0
    for merge in merged:
        here = here + 1 if merge else 1
        longest = max(longest, here)
    return longest


@pytest.mark.parametrize(
    "kv_heads, window",
    [(4, 12), (2, None), (1, 1), ((4, 2), 12)],
)
def decoding_gives_the_logits_and_lengths_of_the_parallel_form_test(build_model, kv_heads, window):
    params, config = build_model(kv_heads)
    settings, tokens = DMCSettings(window=window, offset=0.0), random_tokens()
    ratios = []
    for threshold in (NEVER, HALF, MOSTLY, ALWAYS):
        cache, logits = decode_all(params, config, settings, tokens, threshold)
        expected = evaluate_all(params, config, settings, tokens, threshold)
        np.testing.assert_allclose(logits, expected.logits, atol=TOLERANCE, rtol=0)
        merged = merged_by_row(expected)
        np.testing.assert_array_equal(cache.lengths.T, T - merged.sum(axis=-1))
        ratios.append(merged.size / (merged.size - merged.sum()))
        if threshold == MOSTLY:  # the ring of the open segment must have gone round
            assert max(map(longest_segment, merged.reshape(-1, T))) > 12
    never, half, mostly, always = ratios
    assert never == 1 and 1.4 < half < 2.6 < mostly < 8 and always == T
    np.testing.assert_array_equal(cache.position, T)


def the_comparison_would_notice_another_threshold_or_window_test(tiny_model):
    params, config = tiny_model
    tokens = random_tokens()
    logits = [
        evaluate_all(params, config, DMCSettings(window=w, offset=0.0), tokens, t).logits
        for w, t in ((12, HALF), (12, MOSTLY), (11, MOSTLY))
    ]
    assert jnp.abs(logits[0] - logits[1]).max() > 100 * TOLERANCE
    assert jnp.abs(logits[1] - logits[2]).max() > 10 * TOLERANCE


def decoding_without_settings_is_the_dense_model_test(build_model):
    params, config = build_model((1, 4))
    tokens = random_tokens()
    cache, logits = decode_all(params, config, None, tokens, 0.0)
    expected = evaluate_all(params, config, None, tokens, 0.0)
    np.testing.assert_allclose(logits, expected.logits, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(cache.lengths, T)
