"""A mesh that would leave parameters whole on every device is refused by name."""

import dataclasses
import re

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dmc_jax.config import ModelConfig
from dmc_jax.errors import UserError
from dmc_jax.model.llama import abstract_params
from dmc_jax.model.presets import PRESETS
from dmc_jax.model.sharding import (
    AXES,
    check_divisible,
    leaf_path,
    partition_spec,
    residual_sharding,
)


def mesh_of(*sizes):
    return AbstractMesh(sizes, AXES)


@pytest.mark.parametrize(
    "model, sizes, told",
    [
        ("7b", (1, 24, 1), "4096 of the parameter embedding (32000 x 4096) .* over fsdp 24"),
        ("13b", (1, 1, 16), "40 of the parameter run_0/k/kernel (40 x 5120 x 40 x 128)"),
        (
            "smollm2_135m",
            (1, 1, 2),
            "3 of the parameter run_0/k/kernel .* for --config.mesh.tensor",
        ),
    ],
)
def a_mesh_that_does_not_divide_a_parameter_is_refused_by_name_test(model, sizes, told):
    told = re.escape(told).replace(r"\.\*", ".*")
    with pytest.raises(UserError, match=told):
        check_divisible(abstract_params(PRESETS[model]), mesh_of(*sizes))


def the_residual_streams_width_is_split_where_it_can_be_test():
    config, mesh = PRESETS["smollm2_135m"], mesh_of(2, 2, 3)
    assert residual_sharding(config, mesh).spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    odd = dataclasses.replace(config, width=580)
    assert residual_sharding(odd, mesh).spec == PartitionSpec(("data", "fsdp"), None, None)


@pytest.mark.parametrize(
    "model, sizes", [("7b", (1, 64, 1)), ("70b", (1, 4, 16)), ("llama3_8b", (2, 4, 32))]
)
def kv_heads_fewer_than_the_devices_are_on_all_of_them_test(model, sizes):
    """And nothing else is."""
    config: ModelConfig = PRESETS[model]
    params, mesh = abstract_params(config), mesh_of(*sizes)
    check_divisible(params, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    specs = {leaf_path(p): partition_spec(leaf_path(p), leaf.shape, mesh) for p, leaf in leaves}
    whole = {name for name, spec in specs.items() if "tensor" not in spec and "kernel" in name}
    fewer = config.kv_heads < mesh.shape["tensor"]
    assert whole == ({"run_0/k/kernel", "run_0/v/kernel"} if fewer else set())
