"""The equations against slow loops written from the formulas, and small cases by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.core import dmc
from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import DMCSettings

TOLERANCE = 1e-5
pool = jax.jit(dmc.pool, static_argnums=3)


def slow_pool(x, alpha, omega, window):
    """The double sum of the definition of `pool`, in float64, one token at a time."""
    B, S, K, H = x.shape
    y = np.zeros(x.shape)
    for b in range(B):
        for h in range(K):
            for i in range(S):
                numerator, denominator = np.zeros(H), 0.0
                first = 0 if not window else max(0, i - window + 1)
                for j in range(first, i + 1):
                    coef = np.prod([alpha[b, m, h] for m in range(j + 1, i + 1)])
                    numerator += coef * omega[b, j, h] * x[b, j, h]
                    denominator += coef * omega[b, j, h]
                y[b, i, h] = numerator / denominator
    return y


def draw(seed, B, S, K, H, hard):
    rng = np.random.default_rng(seed)
    alpha = rng.uniform(size=(B, S, K)).astype(np.float32)
    if hard:
        alpha = (alpha < 0.8).astype(np.float32)
    omega = rng.uniform(0.05, 1, size=(B, S, K)).astype(np.float32)
    return rng.normal(size=(B, S, K, H)).astype(np.float32), alpha, omega


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    S=st.sampled_from([1, 2, 15, 16, 17, 40]),
    K=st.integers(1, 3),
    window=st.sampled_from([None, 1, 2, 5, 12, 17, 30, 100]),
    hard=st.booleans(),
)
def pooling_equals_the_double_sum_test(seed, S, K, window, hard):
    x, alpha, omega = draw(seed, 2, S, K, 3, hard)
    alpha[:, 0] = 0.0  # the sum starts at token 0
    np.testing.assert_allclose(
        pool(x, alpha, omega, window), slow_pool(x, alpha, omega, window), atol=TOLERANCE
    )


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    S=st.sampled_from([1, 2, 15, 16, 17, 40]),
    window=st.sampled_from([None, 1, 2, 5, 12, 30]),
)
def one_token_at_a_time_equals_all_at_once_test(seed, S, window):
    x, decisions, omega = draw(seed, 2, S, 3, 4, hard=True)
    k, v = x, x[..., ::-1].copy()
    segment = dmc.empty_segment((2, 3), 4, window, jnp.float32)
    step = jax.jit(functools.partial(dmc.merge_step, window=window))
    expected_k = np.asarray(pool(k, decisions, omega, window))
    expected_v = np.asarray(pool(v, decisions, omega, window))
    for t in range(S):
        segment, k_bar, v_bar = step(segment, k[:, t], v[:, t], decisions[:, t], omega[:, t])
        np.testing.assert_allclose(k_bar, expected_k[:, t], atol=TOLERANCE)
        np.testing.assert_allclose(v_bar, expected_v[:, t], atol=TOLERANCE)


def window_cuts_both_sums_by_hand_test():
    """W = 2, everything merges, weights 1, 2, 4: the third state forgets the first token."""
    x = np.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1).astype(np.float32)
    omega = np.array([1.0, 2.0, 4.0]).reshape(1, 3, 1).astype(np.float32)
    y = pool(x, np.ones((1, 3, 1), np.float32), omega, 2)[0, :, 0, 0]
    np.testing.assert_allclose(y, [1.0, (1 + 20) / 3, (20 + 400) / 6], rtol=1e-6)


def pooling_ignores_the_first_alpha_test():
    x, alpha, omega = draw(0, 1, 6, 1, 2, hard=False)
    other = alpha.copy()
    other[:, 0] = 1 - alpha[:, 0]
    for window in (None, 3):
        np.testing.assert_array_equal(pool(x, alpha, omega, window), pool(x, other, omega, window))


def an_empty_segment_appends_whatever_it_is_told_test():
    segment = dmc.empty_segment((2,), 3, 4, jnp.float32)
    k = jnp.arange(6.0).reshape(2, 3)
    segment, k_bar, _ = dmc.merge_step(segment, k, k, jnp.ones(2), jnp.full(2, 0.5), 4)
    np.testing.assert_array_equal(segment.count, 1)
    np.testing.assert_allclose(k_bar, k)


def importance_is_the_mean_over_logits_of_the_group_test():
    q = np.zeros((1, 1, 4, 2), np.float32)
    q[0, 0, :, -1] = [-9.0, 1.0, 3.0, 5.0]
    actual = dmc.importance(jnp.asarray(q), 2, DMCSettings(offset=5.0, eps=0.25))[0, 0]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(actual, sigmoid(np.array([1.0, 9.0])) + 0.25, rtol=1e-6)


def relaxed_decisions_stay_exact_where_alpha_saturates_test():
    alpha, log_keep = dmc.relaxed_decisions(jnp.array([20.0]), jnp.zeros(1), DMCSettings())
    assert alpha[0] == 1.0
    np.testing.assert_allclose(log_keep, [-200.0])


def hard_decision_is_strict_at_the_threshold_test():
    logits = jnp.array([-1.0, 0.0, 1e-6, 2.0])
    np.testing.assert_array_equal(dmc.hard_decisions(logits), [0, 0, 1, 1])
    np.testing.assert_array_equal(dmc.hard_decisions(logits, 1.0), [0, 0, 0, 1])


def documents_never_touch_each_other_test():
    """A packed window equals its documents run alone: outputs, merges, pooled states."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 20, 4, 8)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(1, 20, 2, 8)), jnp.float32)
    v = jnp.asarray(rng.normal(size=(1, 20, 2, 8)), jnp.float32)
    lengths = (7, 1, 12)
    segments = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    for noise in (None, jnp.asarray(rng.logistic(size=(1, 20, 2)), jnp.float32)):
        settings = DMCSettings(window=4, offset=0.0)
        run = jax.jit(
            functools.partial(
                dmc.dmc_attention,
                rope_theta=100.0,
                settings=settings,
                attention=functools.partial(causal_attention, block=8),
            )
        )
        packed = run(q, k, v, positions=positions, segment_ids=segments, noise=noise)
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            alone = run(
                q[:, part], k[:, part], v[:, part],
                positions=positions[:, part],
                noise=None if noise is None else noise[:, part],
            )  # fmt: skip
            for name in ("out", "merged", "pooled_k", "pooled_v", "decisions"):
                np.testing.assert_allclose(
                    getattr(packed, name)[:, part], getattr(alone, name), atol=TOLERANCE
                )
            start += n
        starts = np.cumsum((0, *lengths[:-1]))
        np.testing.assert_array_equal(packed.merged[:, starts], 0)


def decision_channel_takes_no_part_in_attention_test():
    """With every merge logit far below 0, only importance reads it, and importance cancels."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 9, 2, 4)), jnp.float32) for _ in range(3))
    run = functools.partial(
        dmc.dmc_attention, positions=jnp.arange(9)[None], rope_theta=10.0, settings=DMCSettings()
    )
    k = k.at[..., -1].set(-3.0)
    other = run(q.at[..., -1].add(2.0), k.at[..., -1].set(-7.0), v)
    np.testing.assert_allclose(run(q, k, v).out, other.out, atol=TOLERANCE)


@pytest.mark.parametrize(
    "bad", [{"window": -1}, {"temperature": 0.0}, {"eps": -1.0}], ids=lambda bad: next(iter(bad))
)
def impossible_settings_are_refused_test(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DMCSettings(**bad)
