"""What training carries from step to step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from dmc_jax.checkpoints.run_directory import CheckpointRef
from dmc_jax.checkpoints.states import describe_mismatch, load_state
from dmc_jax.config import STAGES, ModelConfig, RunConfig
from dmc_jax.core.guard import Guard, fresh_guard, judge
from dmc_jax.model.llama import abstract_params, init_params
from dmc_jax.model.sharding import batch_sharding, shardings, with_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Float32 parameters and optimizer state after `step` steps of the current stage."""

    step: Int[Array, ""]
    params: Any
    optimizer: Any
    guard: Guard | None  # None: to load what was saved without


def state_of(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around given parameters."""
    return new_state(params, optimizer.init(params))


def new_state(params: Any, optimizer_state: Any, step: int = 0) -> TrainState:
    """A state before the first step of a stage, or after what counts as some."""
    return TrainState(jnp.asarray(step, jnp.int32), params, optimizer_state, fresh_guard())


def after_step(
    before: TrainState, params: Any, optimizer_state: Any, metrics: dict[str, Array], spike: float
) -> tuple[TrainState, dict[str, Array]]:
    """Take a step, unless it is one to be skipped: then only the count of steps moves.

    Args:
        before: the state that it was computed from.
        params, optimizer_state: that it comes to.
        metrics: of the step, among them "loss" where there is a spike to be told by it.
        spike: of `GuardSettings`; 0: only what is not finite is skipped.

    Returns:
        (the state, the metrics with what the guard says: steps `skipped` so far, `skipped_in_row`
        up to this one, which is skipped where that is not 0, and the `usual_loss` before it).
    """
    loss = metrics["loss"] if spike else jnp.zeros(())
    numbers = list(metrics.values())
    good, guard = judge(before.guard, before.step, loss, numbers, spike)
    kept = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, optimizer_state),
        (before.params, before.optimizer),
    )
    told = {"skipped": guard.skipped, "skipped_in_row": guard.in_row}
    told["usual_loss"] = before.guard.usual
    return TrainState(before.step + 1, *kept, guard), metrics | told


def restore(ref: CheckpointRef, wanted: TrainState) -> TrainState:
    """Load the state of a stage, or of one from before skipped steps were counted.

    Args:
        ref: its checkpoint.
        wanted: shapes and shardings.

    Raises:
        UserError: the checkpoint is of another shape, or damaged.
    """
    if not describe_mismatch(ref, {"guard": wanted.guard}, within="guard"):
        return load_state(ref, wanted)
    uncounted = load_state(ref, dataclasses.replace(wanted, guard=None))
    placed = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), fresh_guard(), wanted.guard
    )
    return dataclasses.replace(uncounted, guard=placed)


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shapes and shardings of a state; what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda params: state_of(params, optimizer), abstract_params(config))
    return with_shardings(shapes, mesh)


def abstract_batch(windows: int, length: int, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Shapes and shardings of what a step reads of a batch [windows, length]."""
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    dtypes["loss_mask"] = jnp.float32
    placed = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((windows, length), dtype, sharding=placed)
        for name, dtype in dtypes.items()
    }


def key_of(seed: int) -> Array:
    """Make a random key of a seed of any size, 0 or more: `jax.random.key` has 32 bits of it."""
    key = jax.random.key(seed % 2**32)
    for place in range(32, seed.bit_length(), 32):
        key = jax.random.fold_in(key, np.uint32((seed >> place) % 2**32))
    return key


def order_seed(run: RunConfig, stage: str) -> int:
    """Seed the order in which a stage reads its text: runs of other seeds have other orders.

    Of seed 0 it is as it was when they shared some.
    """
    return (run.seed if run.draws == 1 else 4 * run.seed) + STAGES.index(stage)


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    std: float = RunConfig.initializer_range,
) -> TrainState:
    """Fresh parameters and optimizer state, made where they belong: no device holds them all."""

    def make(key):
        return state_of(init_params(config, key, std), optimizer)

    return made_on(mesh, make, key_of(seed))


def made_on(mesh: Mesh, make: Callable, *arguments: Any) -> Any:
    """Run a function whose results belong on a mesh, where `shardings` says."""
    shapes = jax.eval_shape(make, *arguments)
    return jax.jit(make, out_shardings=shardings(shapes, mesh))(*arguments)
