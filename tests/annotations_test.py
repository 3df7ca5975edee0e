"""Annotations are run, where they should be and nowhere else."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from dmc_jax.config import load_config
from dmc_jax.interop import pickles
from pallas_kernels.decode_attention import xla
from pallas_kernels.decode_attention.api import Plan, decode_attention, rows_of


@pytest.mark.parametrize(
    "lengths, rows",
    [(jnp.zeros(3, jnp.int32), 2), (jnp.zeros((2, 3)), 2), (jnp.zeros((2, 3), jnp.int32), "2")],
    ids=["shape", "dtype", "type"],
)
def what_an_annotation_does_not_allow_is_refused_test(lengths, rows):
    with pytest.raises(TypeCheckError, match="parameter 'x'|parameter 'rows'"):
        rows_of(lengths, 0, rows)


def a_size_must_be_the_same_in_all_arguments_test():
    pool, table = jnp.zeros((5, 8, 16)), jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(TypeCheckError, match="parameter 'v_pages'"):
        xla.decode_attention(
            jnp.zeros((2, 4, 16)), pool, pool[:, :4], table, jnp.zeros(2, jnp.int32), 1.0
        )


@pytest.mark.usefixtures("annotations_aside")
def they_can_be_put_aside_test():
    pool, table = jnp.zeros((5, 8, 16)), jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match="lengths must be"):
        decode_attention(jnp.zeros((2, 4, 16)), pool, pool, table, table, scale=1.0)


def pytrees_may_hold_anything_test():
    plan = Plan(*[jnp.zeros(4, jnp.int32)] * 5, block=8)
    shapes = jax.tree.map(jnp.shape, plan, is_leaf=lambda x: not isinstance(x, Plan))
    assert isinstance(shapes, Plan) and shapes.of_row == (4,)


def triton_compiles_what_was_written_test():
    pytest.importorskip("triton", reason="triton is not installed")
    from pallas_kernels.decode_attention import triton

    assert not hasattr(triton.attend_items.fn, "__wrapped__")
    assert hasattr(triton.decode_attention, "__wrapped__")


def all_of_the_product_is_checked_but_what_is_named_test():
    with pytest.raises(TypeCheckError, match="parameter 'name'"):
        load_config(7)
    assert hasattr(load_config, "__wrapped__") and not hasattr(pickles.read_pickle, "__wrapped__")
