"""Fixed strides: which tokens share a slot, and what it holds, counted by hand."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.policies.policy import Where
from dmc_jax.policies.stride import Stride

THETA = 100.0


def segments(ratio, tokens):
    """The number of each token's segment, in exact numbers."""
    ratio = fractions.Fraction(str(ratio))
    return np.array([math.floor(t / ratio) for t in range(tokens)])


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (1.5, [0, 0, 1, 2, 2, 3, 4, 4]),
        (2, [0, 0, 1, 1, 2, 2, 3, 3]),
        (2.5, [0, 0, 0, 1, 1, 2, 2, 2]),
        (8, [0] * 8),
    ],
)
def tokens_are_counted_off_test(ratio, expected):
    np.testing.assert_array_equal(segments(ratio, 8), expected)
    logits = jax.jit(Stride(ratio).logits, static_argnums=2)(None, jnp.arange(8)[None], 3)
    opens = np.diff(expected, prepend=-1) > 0
    np.testing.assert_array_equal(logits > 0, ~opens[None, :, None].repeat(3, 2))


@pytest.mark.parametrize("ratio", [1.1, 1.883, 3.7, 64.5])
def a_ratio_is_that_of_whole_numbers_in_every_program_test(ratio):
    opens = np.diff(segments(ratio, 3000), prepend=-1) > 0
    at = jnp.arange(3000)[None]
    by_steps = jax.jit(jax.vmap(lambda ratio, t: Stride(ratio).logits(None, t, 1), (None, 1)))
    given = jax.jit(lambda t: Stride(ratio).logits(None, t, 1))(at)
    np.testing.assert_array_equal(given[0, :, 0] < 0, opens)
    np.testing.assert_array_equal(by_steps(ratio, at)[:, 0, 0] < 0, opens)


@pytest.mark.parametrize("ratio", [1, 2, 2.5, 7])
def a_query_sees_the_plain_averages_of_segments_test(ratio):
    rng, (T, N, K, H) = np.random.default_rng(0), (20, 4, 2, 8)
    q, k, v = (rng.normal(size=(1, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    positions = jnp.arange(T)[None]
    where = Where(positions, None, THETA, None)
    attend = jax.jit(lambda *qkv: Stride(ratio).whole(*qkv, where, x=jnp.zeros((1, T, 1))))
    attended = attend(q, k, v)
    of = segments(ratio, T)
    np.testing.assert_array_equal(
        attended.record.appends[0], (np.diff(of, prepend=-1) > 0)[:, None].repeat(K, 1)
    )

    @jax.jit
    def turned(x, at):
        return rotate(x, at, rotary_frequencies(H, THETA))

    queries = np.asarray(turned(q, positions))[0]
    for t in range(T):
        members = [np.flatnonzero(of[: t + 1] == s) for s in range(of[t] + 1)]
        mean_k, mean_v = (np.stack([x[0, m].mean(axis=0) for m in members]) for x in (k, v))
        # Rotated at their newest tokens; of one shape, so that it compiles once.
        at, padded = np.zeros((1, T), int), np.zeros((1, T, K, H), np.float32)
        at[0, : len(members)], padded[0, : len(members)] = [m[-1] for m in members], mean_k
        keys = np.asarray(turned(padded, at))[0, : len(members)]
        for n in range(N):
            weights = np.exp(keys[:, n // 2] @ queries[t, n] / np.sqrt(H))
            expected = weights @ mean_v[:, n // 2] / weights.sum()
            np.testing.assert_allclose(attended.out[0, t, n], expected, atol=1e-5)
