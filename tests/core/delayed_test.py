"""Delayed merging against plain NumPy: the cache as it is decoded, and the sums of the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.delayed import delayed_attention
from dmc_jax.core.dmc import DMCSettings, dense_attention

THETA, T, N, K, H = 100.0, 23, 4, 2, 6


def turned(x, position):
    """Rotate x [H], pairs (f, f + H/2)."""
    angle = position * THETA ** (-np.arange(0, H, 2) / H)
    a, b = x[: H // 2], x[H // 2 :]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def softmax_of(scores, values):
    weights = np.exp(np.array(scores) - max(scores))
    return weights @ np.array(values) / weights.sum()


def by_decoding(q, k, v, merges, omega, gamma, delay, window):
    """Outputs for one KV head of one document, of queries q [T, G, H], and slots after each token.

    Segments are lists of tokens; a tail of raw ones follows.
    """
    segments, out, slots = [], np.zeros(q.shape), []
    for t in range(len(k)):
        j = t - delay
        if j >= 0 and segments and merges[j]:
            segments[-1].append(j)
        elif j >= 0:
            segments.append([j])
        keys, values, more = [], [], []
        for segment in segments:
            members = segment[-window:] if window else segment
            weights = omega[members] / omega[members].sum()
            keys.append(turned(weights @ k[members], segment[-1]))
            values.append(weights @ v[members])
            more.append(gamma * np.log(len(members)))
        for i in range(max(0, j + 1), t + 1):
            keys.append(turned(k[i], i))
            values.append(v[i])
            more.append(0.0)
        for g in range(q.shape[1]):
            scores = np.array(keys) @ turned(q[t, g], t) / np.sqrt(H) + more
            out[t, g] = softmax_of(scores, values)
        slots.append(len(keys))
    return out, slots


def by_formula(q, k, v, alpha, omega, gamma, delay, window):
    """The same for fractional decisions, alpha [T]: every state of the prefix, with its weight."""
    out = np.zeros(q.shape)

    def coefficient(i, j):
        return np.prod(alpha[j + 1 : i + 1]) if j + 1 <= i else 1.0

    for t in range(len(k)):
        keys, values, more = [], [], []
        for j in range(t + 1):
            if t - j < delay:
                keys.append(turned(k[j], j))
                values.append(v[j])
                more.append(0.0)
                continue
            members = range(max(0, j - window + 1) if window else 0, j + 1)
            parts = np.array([coefficient(j, m) for m in members])
            weights = parts * omega[list(members)]
            keys.append(turned(weights @ k[list(members)] / weights.sum(), j))
            values.append(weights @ v[list(members)] / weights.sum())
            open_one = t - j == delay
            more.append(gamma * np.log(parts.sum()) + (0 if open_one else np.log(1 - alpha[j + 1])))
        for g in range(q.shape[1]):
            scores = np.array(keys) @ turned(q[t, g], t) / np.sqrt(H) + more
            out[t, g] = softmax_of(scores, values)
    return out


def draw(seed=0, B=2):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, heads, H)) for heads in (N, K, K))
    logits, noise = rng.normal(size=(B, T, K)), rng.logistic(size=(B, T, K))
    omega, gamma = rng.uniform(0.1, 1.0, (B, T, K)), rng.normal(size=K)
    return q, k, v, logits + 0.5, omega, gamma, noise


LENGTHS = (9, 14)  # of the documents of a window
SEGMENTS = np.repeat([3, 4], LENGTHS)[None].repeat(2, axis=0)
POSITIONS = np.concatenate([np.arange(n) for n in LENGTHS])[None].repeat(2, axis=0)


def run(q, k, v, logits, omega, gamma, noise, *, delay, window, temperature=0.4):
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v, logits, omega))
    return delayed_attention(
        *arrays,
        delay=delay,
        gamma=None if gamma is None else jnp.asarray(gamma, jnp.float32),
        positions=jnp.asarray(POSITIONS),
        rope_theta=THETA,
        settings=DMCSettings(window, temperature, offset=0.0),
        noise=None if noise is None else jnp.asarray(noise, jnp.float32),
        segment_ids=jnp.asarray(SEGMENTS),
        attention=functools.partial(causal_attention, block=8),
    )


def expected(oracle, q, k, v, choice, omega, gamma, *, delay, window):
    """Outputs of an oracle for every document, sequence and head; and what else it returns."""
    out, others = np.zeros(q.shape), {}
    gamma, G = np.zeros(K) if gamma is None else gamma, N // K
    for b in range(len(q)):
        for head in range(K):
            for end, length in zip(np.cumsum(LENGTHS), LENGTHS, strict=True):
                part = slice(end - length, end)
                heads = slice(head * G, (head + 1) * G)
                found = oracle(
                    q[b, part, heads],
                    *(x[b, part, head] for x in (k, v, choice, omega)),
                    gamma[head],
                    delay,
                    window,
                )
                out[b, part, heads] = found[0] if isinstance(found, tuple) else found
                others[b, end, head] = found[1] if isinstance(found, tuple) else None
    return out, others


CASES = pytest.mark.parametrize(
    "delay, window", [(0, 3), (1, 12), (3, None), (5, 2), (8, 12), (9, 3), (40, 12)]
)


@CASES
@pytest.mark.parametrize("massive", [True, False], ids=["gamma", "no gamma"])
def hard_decisions_are_decoding_over_segments_and_a_tail_test(delay, window, massive):
    q, k, v, logits, omega, gamma, _ = draw(delay)
    gamma = gamma if massive else None
    actual, merges = run(q, k, v, logits, omega, gamma, None, delay=delay, window=window)
    out, slots = expected(
        by_decoding, q, k, v, logits > 0, omega, gamma, delay=delay, window=window
    )
    np.testing.assert_allclose(actual, out, atol=2e-5)
    for (b, end, head), after in slots.items():
        merged = np.asarray(merges)[b, end - len(after) : end, head]
        taken = [n + 1 - merged[: max(0, n + 1 - delay)].sum() for n in range(len(after))]
        np.testing.assert_array_equal(taken, after)


@CASES
def relaxed_decisions_are_the_sums_of_the_formula_test(delay, window):
    q, k, v, logits, omega, gamma, noise = draw(delay)
    actual, merges = run(q, k, v, logits, omega, gamma, noise, delay=delay, window=window)
    alpha = 1 / (1 + np.exp(-(logits + noise) / 0.4))
    first = POSITIONS[..., None] == 0
    out, _ = expected(
        by_formula, q, k, v, np.where(first, 0, alpha), omega, gamma, delay=delay, window=window
    )
    np.testing.assert_allclose(actual, out, atol=2e-5)
    np.testing.assert_array_equal(merges, (alpha > 0.5) & ~first)


@pytest.mark.parametrize(
    "delay, window",
    [
        pytest.param(0, 3, marks=pytest.mark.slow),
        pytest.param(4, None, marks=pytest.mark.slow),
        (3, 3),
    ],
)
def gradients_are_finite_differences_test(delay, window):
    """With respect to what gates give: logits, importance and gamma."""
    q, k, v, logits, omega, gamma, noise = draw(3)
    weight = np.random.default_rng(4).normal(size=q.shape)
    given = {"logits": logits, "omega": omega, "gamma": gamma}

    def loss(given):
        actual, _ = run(q, k, v, **given, noise=noise, delay=delay, window=window)
        return jnp.sum(actual * weight)

    def loss_of_formula(given):
        alpha = 1 / (1 + np.exp(-(given["logits"] + noise) / 0.4))
        alpha = np.where(POSITIONS[..., None] == 0, 0, alpha)
        parts = alpha, given["omega"], given["gamma"]
        out, _ = expected(by_formula, q, k, v, *parts, delay=delay, window=window)
        return np.sum(out * weight)

    gradients = jax.grad(loss)({name: jnp.asarray(x, jnp.float32) for name, x in given.items()})
    rng = np.random.default_rng(5)
    for name, x in given.items():
        direction, step = rng.normal(size=x.shape), 1e-5
        ends = [loss_of_formula({**given, name: x + sign * step * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        along = np.sum(np.asarray(gradients[name]) * direction)
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(along, slope, rtol=2e-3, atol=2e-3)


def a_delay_longer_than_the_text_is_dense_attention_test():
    q, k, v, logits, omega, gamma, _ = draw(1)
    actual, _ = run(q, k, v, logits + 9, omega, gamma, None, delay=max(LENGTHS), window=12)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    positions, segment_ids = jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
    dense = dense_attention(*arrays, positions=positions, rope_theta=THETA, segment_ids=segment_ids)
    np.testing.assert_allclose(actual, dense, atol=1e-5)
