"""Heads averaged into fewer or repeated into more: what every query reads."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.model.kv_heads import share_heads

N = 24
DIVISORS = [count for count in range(1, N + 1) if N % count == 0]


@pytest.mark.parametrize("new", DIVISORS)
@pytest.mark.parametrize("old", [1, 2, 8, 24])
def a_new_head_is_the_mean_of_what_its_queries_read_test(old, new):
    x = np.random.default_rng(old).normal(size=(3, old, 2)).astype("f")
    shared = np.asarray(share_heads(jnp.asarray(x), new))
    assert shared.shape == (3, new, 2)
    for head in range(new):
        queries = [n for n in range(N) if n // (N // new) == head]
        read = [x[:, n // (N // old)] for n in queries]
        np.testing.assert_allclose(shared[:, head], np.mean(read, axis=0), atol=1e-6)


def the_axis_of_heads_can_be_any_and_the_dtype_stays_test():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)), jnp.bfloat16)
    first = share_heads(x, 2, axis=0)
    assert first.dtype == jnp.bfloat16
    again = share_heads(jnp.moveaxis(x, 0, 1), 2)
    np.testing.assert_array_equal(jnp.moveaxis(first, 0, 1), again)


def repeated_heads_are_the_same_heads_test():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)), jnp.float32)
    np.testing.assert_array_equal(share_heads(x, 12), jnp.repeat(x, 4, axis=1))
    np.testing.assert_array_equal(share_heads(x, 3), x)
