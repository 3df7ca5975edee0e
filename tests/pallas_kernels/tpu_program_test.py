"""What a TPU is told to do, by XLA's and Mosaic's real compiler for TPUs that are not here."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from pallas_kernels.decode_attention.api import decode_attention

SEATS, ROWS, PAGES = 34, 40, 4096  # rows of a sequence in all layers


@functools.cache
def an_absent_tpu(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not there; `make test-all` installs it")
    return topologies.get_topology_desc(name, platform="tpu").devices[0]


def compiled(device, G, H, page, dtype, rows=8, maxp=200, pool_dtype=None, massive=False):
    """Compiles the attention of a layer, of `rows` of each sequence."""
    there = SingleDeviceSharding(device)

    def shape(*sizes, dtype="int32"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=there)

    def attend(q, k_pages, v_pages, table, lengths, first, mass):
        rows = k_pages, v_pages, table, lengths
        return decode_attention(q, *rows, scale=0.1, first=first, implementation="tpu", **mass)

    kind = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
    pool = shape(PAGES, page, H, dtype=pool_dtype or dtype)
    mass = {
        "tokens": shape(PAGES, page, dtype="uint16"),
        "gamma": shape(SEATS * rows, dtype="float32"),
    }
    with use_abstract_mesh(mesh):
        return (
            jax.jit(attend)
            .lower(
                shape(SEATS * rows, G, H, dtype=dtype),
                *(pool, pool, shape(SEATS, ROWS, maxp), shape(SEATS, ROWS), shape()),
                mass if massive else {},
            )
            .compile()
        )


def copies_of_a_pool(program, page, H):
    return re.findall(rf"= \w+\[{PAGES},{page},{H}\]\S* (?:copy|fusion)\(", program.as_text())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("G", [1, 4, 8])
@pytest.mark.parametrize("H", [64, 128])
def a_pool_is_read_where_it_lies_if_a_slot_fills_whole_lines_test(dtype, G, H):
    program = compiled(an_absent_tpu("v5e:2x2x1"), G, H, 16, dtype)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert len(copies_of_a_pool(program, 16, H)) == (2 if H % 128 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page", [8, 64, 256])
def pages_of_every_size_are_compiled_for_test(dtype, page):
    program = compiled(an_absent_tpu("v5e:2x2x1"), 12, 128, page, dtype)
    assert not copies_of_a_pool(program, page, 128)


@pytest.mark.slow
@pytest.mark.parametrize("tpu", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2x1"])
def other_tpus_are_compiled_for_test(tpu):
    device = an_absent_tpu(tpu)
    for dtype in ("float32", "bfloat16"):
        assert not copies_of_a_pool(compiled(device, 4, 128, 64, dtype), 64, 128)


@pytest.mark.slow
def float32_queries_over_a_bfloat16_pool_are_compiled_test():
    device = an_absent_tpu("v5e:2x2x1")
    assert compiled(device, 4, 128, 64, "float32", pool_dtype=jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("page", [16, 64])
def slots_of_several_tokens_are_compiled_for_test(page):
    program = compiled(an_absent_tpu("v5e:2x2x1"), 4, 128, page, "bfloat16", massive=True)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert not copies_of_a_pool(program, page, 128)


@pytest.mark.slow
def a_table_far_larger_than_scalar_memory_is_no_obstacle_test():
    program = compiled(an_absent_tpu("v5e:2x2x1"), 1, 128, 16, "bfloat16", rows=40, maxp=8192)
    table = SEATS * 40 * 8192 * 4
    assert table > 40 * 2**20  # scalar memory has one MiB
    # It is read as it is, or once copied in lines.
    assert program.memory_analysis().temp_size_in_bytes < 2.1 * table
