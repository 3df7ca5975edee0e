"""A token's cost is what brute force finds; the regression is what plain least squares gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.gates import gate_logits
from dmc_jax.errors import UserError
from dmc_jax.model.llama import Llama
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dms import DMS
from dmc_jax.policies.policy import attend_whole
from dmc_jax.training import closed_form
from dmc_jax.training.closed_form import eviction_costs, fit_gates
from tests.tiny_llama import build

DELAY = 3


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def by_brute_force(q, k, v, projection, segments, delay):
    """Run every later query without the token, and look at what comes into the stream."""
    B, T, N, H = q.shape
    G = N // k.shape[2]
    costs = np.zeros(k.shape[:3])
    for b, i, n in np.ndindex(B, T, N):
        total, queries = 0.0, 0
        for t in range(i + delay, T):
            if segments[b, t] != segments[b, i]:
                continue
            seen = [j for j in range(t + 1) if segments[b, j] == segments[b, t]]
            left = [j for j in seen if j != i]

            def out(tokens, t=t, b=b, n=n):
                scores = q[b, t, n] @ k[b, tokens, n // G].T / np.sqrt(H)
                return softmax(scores) @ v[b, tokens, n // G] @ projection[n]

            total += np.sum((out(left) - out(seen)) ** 2)
            queries += 1
        costs[b, i, n // G] += total / max(queries, 1)
    return costs


@pytest.mark.parametrize("delay", [1, 3])
def a_cost_is_what_running_without_the_token_changes_test(delay):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 9, heads, 8)) for heads in (4, 2, 2))
    projection = rng.normal(size=(4, 8, 6))
    segments = np.array([[1] * 9, [1] * 4 + [2] * 5])
    costs, left = eviction_costs(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v, projection)),
        jnp.asarray(segments),
        delay=delay,
    )
    expected = by_brute_force(q, k, v, projection, segments, delay)
    np.testing.assert_allclose(costs, expected, rtol=1e-3, atol=1e-5 * expected.max())
    np.testing.assert_array_equal(left[0], np.maximum(9 - delay - np.arange(9), 0))
    np.testing.assert_array_equal(left[1, 4:], np.maximum(5 - delay - np.arange(5), 0))


def some_batches(config, count, seed, T=60):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = rng.integers(0, config.vocab_size, (1, T + 1)).astype(np.int32)
        arrays = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.arange(T)[None],
            "segment_ids": np.ones((1, T), np.int32),
            "loss_mask": np.ones((1, T), np.float32),
        }
        yield jax.tree.map(jnp.asarray, arrays)


def inputs_and_costs(params, config, batches):
    """Of every layer, tokens that count: x [n, D] and log costs [n, K], without the scale."""
    projections = closed_form._projections(params)

    def attend(q, k, v, x, layer, state, batch):
        out = closed_form._dense(config, batch, q, k, v)
        turned = closed_form._rotated(config, batch, q, k)
        costs, left = eviction_costs(
            *turned, v, projections[layer], batch["segment_ids"], delay=DELAY
        )
        return out, state, (x, costs, left)

    found = []
    for batch in batches:
        records = Llama(config).apply(
            {"params": params}, batch["tokens"], attend=functools.partial(attend, batch=batch)
        )
        found.append(
            [
                jax.tree.map(lambda x, i=i: np.asarray(x[i, 0], np.float64), record)
                for record in records.records
                for i in range(record[0].shape[0])
            ]
        )
    layers = []
    for parts in zip(*found, strict=True):
        counted = [left >= closed_form.FEWEST for _, _, left in parts]
        x, costs = (
            np.concatenate([part[i][keep] for part, keep in zip(parts, counted, strict=True)])
            for i in (0, 1)
        )
        layers.append((x, costs))
    return layers


@pytest.mark.slow
def the_regression_is_that_of_all_tokens_at_once_test(monkeypatch):
    params, config = build(kv_heads=(4, 2))
    monkeypatch.setattr(closed_form, "_FLOOR", 0.0)  # the floor is a layer's and a window's
    batches, others = (list(some_batches(config, 6, seed)) for seed in (1, 2))
    fit = fit_gates(params, config, batches, others, delay=DELAY, penalty=0.1)
    fitted, held = (inputs_and_costs(params, config, x) for x in (batches, others))
    first, logits, wanted = 0, [], []
    for layer, ((x, costs), (x2, costs2)) in enumerate(zip(fitted, held, strict=True)):
        K = costs.shape[1]
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        z, y = (x - mean) / deviation, np.log(costs)
        ridge = z.T @ z / len(z) + 0.1 * np.eye(z.shape[1])
        weight = np.linalg.solve(ridge, z.T @ (y - y.mean(axis=0)) / len(z))
        predicted = (x2 - mean) / deviation @ weight + y.mean(axis=0)
        y2 = np.log(costs2)
        r2 = 1 - ((y2 - predicted) ** 2).mean(axis=0) / y2.var(axis=0)
        np.testing.assert_allclose(fit.r2[layer], r2, rtol=2e-2, atol=2e-2)
        wanted.append(-(z @ weight))
        gates = fit.gates.of_layer(layer, first, K)
        logits.append(np.asarray(gate_logits(gates, jnp.asarray(x[None], jnp.float32)))[0])
        first += K
    for got, expected in zip(logits, wanted, strict=True):
        # Up to the common scale, and a shift of each layer, which the gradient's size decides.
        got, expected = (y - y.mean(axis=0) for y in (got, expected))
        scale = np.sum(got * expected) / np.sum(expected**2)
        np.testing.assert_allclose(got, scale * expected, atol=2e-2 * np.abs(got).max())
    together = np.concatenate([x.reshape(-1) for x in logits])
    rows = np.concatenate([x.mean(axis=0) for x in logits])
    assert abs(rows.mean()) < 1e-3
    assert together.std() == pytest.approx(closed_form.SPREAD, rel=0.2)


def a_model_drops_what_costs_least_test():
    """At one ratio, against the opposite choice: the loss says which tokens were needed."""
    params, config = build()
    params = jax.tree.map(jnp.asarray, params)
    batches = list(some_batches(config, 8, 3))
    fit = fit_gates(params, config, batches[:6], batches[6:], delay=DELAY)
    assert len(fit.r2) == config.layers and all(len(layer) == 2 for layer in fit.r2)

    def change(gates, batch):
        where = batch["positions"], batch["segment_ids"]
        run = [
            Llama(config).apply(
                {"params": params}, batch["tokens"], attend=attend_whole(policy, config, *where)
            )
            for policy in (Dense(), DMS(gates, delay=DELAY))
        ]
        appends = np.mean([record.appends.mean() for record in run[1].records])
        return float(jnp.mean((run[0].logits - run[1].logits) ** 2)), float(appends)

    opposite = jax.tree.map(jnp.copy, fit.gates)
    opposite = type(fit.gates)(opposite.mean, opposite.deviation, -opposite.weight, -opposite.bias)
    good, bad = (
        np.mean([change(gates, batch) for batch in batches[6:]], axis=0)
        for gates in (fit.gates, opposite)
    )
    assert 0.35 < good[1] < 0.75 and 0.35 < bad[1] < 0.75
    assert good[0] < 0.5 * bad[0]


def windows_shorter_than_the_delay_are_refused_test():
    params, config = build()
    batches = list(some_batches(config, 1, 0, T=20))
    with pytest.raises(UserError, match="no token has 32 queries .* longer than 35 tokens"):
        fit_gates(params, config, batches, batches, delay=DELAY)
