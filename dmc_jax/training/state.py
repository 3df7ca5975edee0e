"""What training carries from step to step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from dmc_jax.config import STAGES, ModelConfig, RunConfig
from dmc_jax.model.llama import init_params
from dmc_jax.model.sharding import shardings, with_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Float32 parameters and optimizer state after `step` steps of the current stage."""

    step: Int[Array, ""]
    params: Any
    optimizer: Any


def state_of(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around given parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes and shardings of a state; what a checkpoint is restored into."""
    shapes = jax.eval_shape(
        lambda key: state_of(init_params(config, key), optimizer), jax.random.key(0)
    )
    return with_shardings(shapes, mesh)


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
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """Fresh parameters and optimizer state, made where they belong: no device holds them all."""

    def make(key):
        return state_of(init_params(config, key), optimizer)

    return made_on(mesh, make, key_of(seed))


def made_on(mesh: Mesh, make: Callable, *arguments: Any) -> Any:
    """Run a function whose results belong on a mesh, where `shardings` says."""
    shapes = jax.eval_shape(make, *arguments)
    return jax.jit(make, out_shardings=shardings(shapes, mesh))(*arguments)
