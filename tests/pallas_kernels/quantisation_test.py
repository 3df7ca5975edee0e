"""What int8 with a scale keeps of a vector."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantisation import dequantise, quantise, rounded


def vectors(seed=0, count=200, width=16):
    """Of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-30, 30, (count, 1))
    return jnp.asarray(sizes * rng.normal(size=(count, width)), jnp.float32)


@pytest.mark.parametrize("dtype, slack", [("float32", 1e-6), ("bfloat16", 2**-7)])
def no_entry_is_off_by_more_than_half_a_step_test(dtype, slack):
    x = vectors()
    steps, scale = quantise(x, dtype)
    assert steps.dtype == jnp.int8 and scale.dtype == dtype
    assert jnp.abs(steps).max() == 127 and steps.min() == -127
    scale = np.asarray(scale, np.float64)[:, None]
    error = np.abs(np.asarray(steps, np.float64) * scale - np.asarray(x, np.float64))
    assert (error <= scale * (0.5 + slack)).all()
    # And a step is the largest entry over 127: no smaller one would do.
    np.testing.assert_allclose(scale[:, 0], np.abs(x).max(axis=1) / 127, rtol=slack)
    assert rounded(x, dtype).dtype == dtype
    np.testing.assert_array_equal(rounded(x, dtype), dequantise(*quantise(x, dtype)))


def a_vector_by_hand_test():
    steps, scale = quantise(jnp.array([[254.0, -127.0, 1.0, 3.1, -2.9]]), "float32")
    np.testing.assert_array_equal(steps, [[127, -64, 0, 2, -1]])  # a half goes to the even one
    np.testing.assert_array_equal(scale, [2.0])


def signs_make_no_difference_test():
    x = vectors(1)
    np.testing.assert_array_equal(rounded(-x, "float32"), -rounded(x, "float32"))


def zeros_stay_zeros_and_nan_is_not_hidden_test():
    x = jnp.zeros((3, 4)).at[1, 2].set(jnp.nan).at[2, 0].set(1e-44)
    kept = rounded(x, "float32")
    np.testing.assert_array_equal(kept[0], 0.0)
    assert np.isnan(kept[1]).all() and np.isfinite(kept[2]).all()
