"""What a step is made of and what it needs: for a dry run."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dmc_jax.model.sharding import leaf_path
from dmc_jax.training.state import TrainState


def describe(state: TrainState, beside: Any, batch: Any, step: Any) -> Iterator[str]:
    """Yield lines about shapes and memory.

    Args:
        state: of training.
        beside: parameters that stay as they are; None: there are none.
        batch: of a step.
        step: compiled for these three.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        own = leaf.sharding.shard_shape(leaf.shape)
        split = "" if own == leaf.shape else f", {_shape(own)} on a device"
        yield f"{leaf_path(path)} {leaf.dtype} {_shape(leaf.shape)}{split}"
    for name, leaf in batch.items():
        yield f"batch {name} {leaf.dtype} {_shape(leaf.shape)}"
    parts = {"parameters": state.params, "optimizer": state.optimizer, "beside them": beside}
    parts["batch"] = batch
    for name, tree in parts.items():
        numbers = sum(leaf.size for leaf in jax.tree.leaves(tree))
        if numbers:
            yield f"{name}: {numbers:,} numbers, {_of_device(tree) / 2**30:.3f} GiB a device"
    plan = step.memory_analysis()
    if plan is None:  # not every backend tells
        return
    given, made = plan.argument_size_in_bytes, plan.output_size_in_bytes - plan.alias_size_in_bytes
    temporary = plan.temp_size_in_bytes
    yield (
        f"a step needs {(given + made + temporary) / 2**30:.3f} GiB a device, as XLA plans it: "
        f"{given / 2**30:.3f} GiB given, {made / 2**30:.3f} made, {temporary / 2**30:.3f} temporary"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _of_device(tree: Any) -> int:
    """Bytes of a tree on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
