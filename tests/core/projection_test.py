"""Products of activations and matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.projection import project

EQUATION, X, KERNEL = "BTNH,NHD->BTD", (2, 5, 3, 4), (3, 4, 6)


def drawn(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("products", [None, jnp.bfloat16])
def test_operands_are_narrowed_and_sums_are_not(products):
    x, kernel, dy = drawn(X, 0), drawn(KERNEL, 1), drawn((2, 5, 6), 2)
    y, pull = jax.vjp(lambda x, kernel: project(EQUATION, x, kernel, products), x, kernel)
    dx, dkernel = pull(dy)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.float32,) * 3

    def narrow(array):
        return np.asarray(array.astype(products or array.dtype), np.float64)

    def close(found, equation, *operands):
        wanted = np.einsum(equation, *map(narrow, operands))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

    close(y, EQUATION, x, kernel)
    close(dx, "BTD,NHD->BTNH", dy, kernel)
    close(dkernel, "BTNH,BTD->NHD", x, dy)
