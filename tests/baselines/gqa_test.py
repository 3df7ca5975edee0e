"""Mean-pooled KV heads: the right heads, the right mean, nothing else touched; tied is pooled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.baselines.gqa import mean_pool_kv_heads, repeat_kv_heads, tie_kv_heads
from dmc_jax.config import ModelConfig
from dmc_jax.errors import UserError
from dmc_jax.model.llama import Llama, init_params, layer_stacks
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import attend_whole


def make_model(kv_heads, layers=2, heads=8):
    config = ModelConfig(
        vocab_size=20,
        width=16,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=4,
        mlp_width=24,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=32,
        tied_embeddings=False,
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype("f"), shapes), config


def layer(params, config, index, name):
    for run, (first, length, _) in enumerate(layer_stacks(config)):
        if first <= index < first + length:
            return np.asarray(params[f"run_{run}"][name]["kernel"][index - first])
    raise AssertionError(index)


def logits(params, config):
    tokens = jnp.arange(12).reshape(1, 12) * 7 % 20
    attend = attend_whole(Dense(), config, jnp.arange(12)[None])
    apply = jax.jit(lambda p: Llama(config).apply({"params": p}, tokens, attend=attend).logits)
    return apply(params)


@pytest.mark.parametrize("before, after", [(8, 2), (4, 1), ((8, 4), 4), ((8, 4), (8, 2))])
def every_new_head_is_the_mean_of_the_heads_its_queries_read_test(before, after):
    params, config = make_model(before)
    pooled, smaller = mean_pool_kv_heads(params, config, after)
    expected = jax.eval_shape(lambda: init_params(smaller, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, pooled) == jax.tree.map(jnp.shape, expected)
    for i, (old_heads, new_heads) in enumerate(
        zip(config.kv_heads_by_layer, smaller.kv_heads_by_layer, strict=True)
    ):
        for name in ("k", "v"):
            old, new = layer(params, config, i, name), layer(pooled, smaller, i, name)
            for head in range(new_heads):
                # Which old heads did the query heads of this new head read?
                queries = [n for n in range(8) if n // (8 // new_heads) == head]
                read = [old[:, n // (8 // old_heads)] for n in queries]
                np.testing.assert_allclose(new[:, head], np.mean(read, axis=0), atol=1e-6)
        for name in ("q", "o", "gate", "up", "down"):
            np.testing.assert_array_equal(
                layer(pooled, smaller, i, name), layer(params, config, i, name)
            )
    np.testing.assert_array_equal(pooled["head"], params["head"])


def heads_that_are_equal_in_a_group_lose_nothing_test():
    params, config = make_model(8)
    for name in ("k", "v"):
        kernel = params["run_0"][name]["kernel"]  # [layers, D, K, H]
        params["run_0"][name]["kernel"] = np.repeat(kernel[:, :, ::4], 4, axis=2)
    pooled, smaller = mean_pool_kv_heads(params, config, 2)
    np.testing.assert_allclose(logits(pooled, smaller), logits(params, config), atol=1e-5)
    # Pooling heads that differ does change the model.
    pooled, smaller = mean_pool_kv_heads(params, config, 1)
    assert jnp.abs(logits(pooled, smaller) - logits(params, config)).max() > 0.1


@pytest.mark.parametrize(
    "before, after, complaint",
    [
        (4, 8, "4 KV heads of layer 0 cannot be averaged into 8"),
        (4, 3, "8 query heads cannot share 3"),
        ((8, 2), 4, "2 KV heads of layer 1"),
        (8, (2, 2, 2), "names 3 layers"),
    ],
)
def a_number_that_does_not_divide_is_refused_test(before, after, complaint):
    params, config = make_model(before)
    with pytest.raises(UserError, match=complaint):
        mean_pool_kv_heads(params, config, after)


@pytest.mark.parametrize("before, after", [(8, (2, 8)), ((8, 4), (1, 2)), (4, (4, 4))])
def tied_heads_compute_what_pooled_heads_do_in_the_old_shapes_test(before, after):
    params, config = make_model(before)
    tied = tie_kv_heads(params, config, after)
    assert jax.tree.map(jnp.shape, tied) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(
        logits(tied, config), logits(*mean_pool_kv_heads(params, config, after)), atol=1e-5
    )
    if after != config.kv_heads_by_layer:
        assert jnp.abs(logits(tied, config) - logits(params, config)).max() > 0.1
    for name in ("q", "o", "down"):
        for i in range(2):
            one, other = layer(tied, config, i, name), layer(params, config, i, name)
            np.testing.assert_array_equal(one, other)


def a_divisor_of_the_queries_that_divides_no_kv_heads_is_pooled_and_tied_test():
    """As Llama 3.2 3B's 24 queries and 8 KV heads can be 6 or 3."""
    params, config = make_model(4, heads=12)
    wide, repeated = repeat_kv_heads(params, config, (12, 12))
    np.testing.assert_allclose(logits(wide, repeated), logits(params, config), atol=1e-5)
    tied = tie_kv_heads(wide, repeated, (3, 4))
    pooled, smaller = mean_pool_kv_heads(params, config, (3, 4))
    assert smaller.kv_heads == (3, 4)
    np.testing.assert_allclose(logits(tied, repeated), logits(pooled, smaller), atol=1e-5)
    # Query heads 0 to 3 read old head 0 three times and old head 1 once.
    old, new = layer(params, config, 0, "k"), layer(pooled, smaller, 0, "k")
    np.testing.assert_allclose(new[:, 0], 0.75 * old[:, 0] + 0.25 * old[:, 1], atol=1e-6)


def layers_that_are_to_stay_are_not_copied_test():
    params, config = make_model(8)
    assert repeat_kv_heads(params, config, (8, 8)) == (params, config)
