"""Where every array lives: one table of named rules over the mesh `data x fsdp x tensor`."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dmc_jax.config import MeshConfig, ModelConfig
from dmc_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Parameter (end of its path) -> mesh axis of each of its last dimensions. Optimizer moments have
# the same paths below their own prefix, so they follow. What no rule names is replicated.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding", ("tensor", "fsdp")),  # [V, D]
    (r"head", ("fsdp", "tensor")),  # [D, V]
    (r"[qkv]/kernel", ("fsdp", "tensor", None)),  # [D, heads, H]
    (r"o/kernel", ("tensor", None, "fsdp")),  # [N, H, D]
    (r"(gate|up)/kernel", ("fsdp", "tensor")),  # [D, F]
    (r"down/kernel", ("tensor", "fsdp")),  # [F, D]
)


def leaf_path(path: tuple) -> str:
    """A leaf's key path, slash-separated: `optimizer/1/mu/run_0/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Count the devices along each axis of the mesh that the config asks for.

    Args:
        config: devices per axis; one axis may be -1 and takes what is left.
        devices: how many there are.

    Raises:
        UserError: the product is not that.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) == 1:
        known = int(np.prod([s for s in sizes if s != -1]))
        if known > 0 and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
    if min(sizes) < 1 or int(np.prod(sizes)) != devices:
        asked = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise UserError(
            f"mesh {asked} does not fit {devices} devices: the product must be "
            f"{devices}; one axis may be -1 to take what is left"
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arrange the devices in the mesh that the config asks for.

    Args:
        config: as for `mesh_sizes`.
        devices: all of JAX's by default.

    Raises:
        UserError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices).reshape(mesh_sizes(config, len(devices))), AXES)


def _axes_of(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...] | None:
    """The mesh axis of each of an array's dimensions, as the table has it; None: no rule."""
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", path) and len(shape) >= len(axes):
            return (None,) * (len(shape) - len(axes)) + axes
    return None


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The rule for one array; an axis that does not divide its dimension is left out of it.

    So two KV heads on four tensor devices are replicated rather than refused. Training refuses
    what is not meant so: `check_divisible`.

    Args:
        path: slash-separated path of the leaf.
        shape: of the array; leading dimensions beyond the rule (stacked layers) are replicated.
        mesh: gives the axis sizes.
    """
    axes = _axes_of(path, shape)
    if axes is None:
        return PartitionSpec()
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def check_divisible(params: Any, mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh over which parameters would not be split, but lie on every device in full.

    KV heads that are fewer than the devices of `tensor` are meant to.

    Args:
        params: tree of arrays or shapes.
        mesh: gives the axis sizes.

    Raises:
        UserError: an axis does not divide a dimension; it names the parameter.
    """
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = leaf_path(keys)
        for axis, size in zip(_axes_of(path, leaf.shape) or (), leaf.shape, strict=False):
            devices = mesh.shape[axis] if axis else 1
            if re.search(r"(^|/)[kv]/kernel$", path) and axis == "tensor" and size < devices:
                continue
            if size % devices:
                sizes = " x ".join(map(str, leaf.shape))
                raise UserError(
                    f"mesh: {size} of the parameter {path} ({sizes}) cannot be split over {axis} "
                    f"{devices}: every device would hold it in full; choose a divisor of {size} "
                    f"for --config.mesh.{axis}"
                )


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A `NamedSharding` for every leaf of a tree of arrays or shapes."""

    def of(path, leaf):
        return NamedSharding(mesh, partition_spec(leaf_path(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def with_shardings(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shapes of a tree, with where each leaf belongs."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings(abstract, mesh),
    )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Batches [B, ...] are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def inner(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The mesh as it is to what is traced now: within a `shard_map`, with its axes taken."""
    here = jax.sharding.get_abstract_mesh()
    return here if here.manual_axes else mesh


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes that batches [B, ...] are to be split over, but for those that are taken."""
    return tuple(axis for axis in ("data", "fsdp") if axis not in mesh.manual_axes)


def residual_sharding(config: ModelConfig, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The residual stream [B, T, D] of training, of which every layer's input is kept.

    Its width is split over tensor where that divides it: products that end in it then scatter
    their sums instead of giving all of them to all.
    """
    tensor = mesh.shape["tensor"]
    width = "tensor" if tensor > 1 and config.width % tensor == 0 else None
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh), None, width))


def own_of_data(function: Callable, mesh: Mesh | AbstractMesh) -> Callable:
    """Give devices along `data` their own windows of a batch, and add up what each makes of them.

    The sum is taken once, of the result: what is added up within is of a device's own windows.

    Args:
        function: of a batch and of what all have alike; traced with `data` taken from the mesh.
        mesh: gives the axis sizes.
    """

    def own(batch, *alike):
        return jax.lax.psum(function(batch, *alike), "data")

    def divided(batch, *alike):
        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(PartitionSpec("data"), *(PartitionSpec() for _ in alike)),
            out_specs=PartitionSpec(),
            axis_names={"data"},
            check_vma=False,  # or gradients would be added up where each arises
        )(batch, *alike)

    return divided


def part_of_batches(mesh: Mesh) -> tuple[int, int]:
    """Say which windows of each batch the devices of this process take.

    Returns:
        (which part, of how many equal consecutive ones). Processes whose devices share windows,
        along `tensor`, have the same.

    Raises:
        UserError: they are no such part.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    of_devices = batch_sharding(mesh).addressable_devices_indices_map((shares,)).values()
    mine = sorted({rows.indices(shares)[0] for (rows,) in of_devices})
    part, rest = divmod(mine[0], len(mine))
    if rest or shares % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))):
        raise UserError(
            f"mesh: {mesh.shape['tensor']} devices along tensor do not fit processes of "
            f"{jax.local_device_count()} devices: one must be a multiple of the other"
        )
    return part, shares // len(mine)


def spread(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Give every device its part of an array that every process has in full."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device in full."""
    return NamedSharding(mesh, PartitionSpec())
