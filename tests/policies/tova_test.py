"""TOVA against the rule of its paper in plain NumPy, and the memory that it takes."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.policies.policy import Where
from dmc_jax.policies.tova import TOVA
from tests.policies.policy_test import Ids, model

THETA = 100.0


def by_the_paper(q, k, v, budget):
    """Outputs for rotated q [T, N, H], k and v [T, K, H], and the tokens that each query saw.

    Among `budget - 1` tokens and the newest, the one with the least attention goes, on average over
    the heads (Oren et al. 2024, section 3.2).
    """
    (T, N, H), G = q.shape, q.shape[1] // k.shape[1]
    kept, out, history = [], np.zeros_like(q), []
    for t in range(T):
        kept = [*kept, t]
        weights = np.zeros((N, len(kept)))
        for n in range(N):
            scores = np.exp(k[kept, n // G] @ q[t, n] / np.sqrt(H))
            weights[n] = scores / scores.sum()
            out[t, n] = weights[n] @ v[kept, n // G]
        history.append(list(kept))
        if len(kept) == budget:
            kept.pop(int(np.argmin(weights.mean(axis=0))))
    return out, history


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 40])
def whole_sequences_follow_the_rule_of_the_paper_test(budget):
    rng = np.random.default_rng(budget)
    T, N, K, H = 24, 4, 2, 8
    q, k, v = (rng.normal(size=(2, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    positions = np.broadcast_to(np.arange(T), (2, T))
    tokens = [jnp.asarray(x) for x in (2 * q, k, v)]
    where = Where(jnp.asarray(positions), None, THETA, None)
    attended = TOVA(budget).whole(*tokens, where, x=jnp.zeros((2, T, 1)))
    frequencies = rotary_frequencies(H, THETA)
    turned = [
        np.asarray(rotate(x, jnp.asarray(positions), frequencies), np.float64) for x in tokens[:2]
    ]
    for row in range(2):
        expected, history = by_the_paper(turned[0][row], turned[1][row], v[row], budget)
        np.testing.assert_allclose(attended.out[row], expected, atol=1e-5)
        newest_went = [t for t in range(1, T) if t - 1 not in history[t]]
        assert budget != 5 or newest_went, "the rule for the newest token was not tried"
    np.testing.assert_array_equal(
        attended.record.appends, np.broadcast_to((np.arange(T) < budget)[:, None], (2, T, K))
    )


@pytest.mark.slow
@pytest.mark.parametrize("budget", [11, 16])
def no_row_ever_takes_more_bytes_than_its_budget_test(budget):
    params, config = model()
    engine = Engine(
        *(params, config, Ids()),
        policy=TOVA(budget),
        max_sequences=2,
        pages=10_000,
        page_size=8,
        max_length=128,
    )
    page_bytes = 2 * 8 * config.head_dim * 4
    # More pages than all rows may fill are not even allocated: two sequences, two pages a row.
    assert engine.free_pages == 2 * config.kv_rows * 2
    results = engine.generate([[1, *range(3, 40)], [1, 7]], SamplingParams(60, temperature=0.0))
    for result in results:
        assert result.new_tokens == 60 and result.finish_reason == "length"
        assert result.live_cache_bytes == config.kv_rows * 2 * page_bytes
        read = result.prompt_tokens + result.new_tokens - 1
        assert result.ratio == pytest.approx(read / budget)
