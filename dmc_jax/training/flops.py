"""Floating-point operations: what a model needs for a token, and what a step's products take."""

import math
from typing import Any

import jax

from dmc_jax.config import MeshConfig, ModelConfig, RunConfig
from dmc_jax.model.llama import count_parameters
from dmc_jax.model.sharding import make_mesh
from dmc_jax.training import metrics
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import abstract_batch, abstract_state
from dmc_jax.training.step import make_train_step


def model_flops(model: ModelConfig, length: int, learns: str = "all") -> float:
    """Count what a model needs for a token, `metrics.flops_per_token`, by its sizes.

    Args:
        model: the sizes.
        length: T, tokens in a window.
        learns: as there.
    """
    table = 0 if model.tied_embeddings else model.vocab_size * model.width
    return metrics.flops_per_token(
        params_without_embedding=count_parameters(model) - table,
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        length=length,
        learns=learns,
    )


def step_flops(run: RunConfig, stage: str) -> int:
    """Count the products of a step over all devices, with what is computed again.

    Attention is counted in blocks, of which those on the diagonal are half in vain.

    Args:
        run: the configuration; without a teacher.
        stage: one whose step is `make_train_step`'s.
    """
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
    step = make_train_step(run, stage, mesh, optimizer)
    state = abstract_state(run.model, optimizer, mesh)
    batch = abstract_batch(run.data.batch, run.data.length, mesh)
    return _products(jax.make_jaxpr(step)(state, batch, None).jaxpr)


def _products(jaxpr: Any, length: int = 1) -> int:
    """Count 2 m n k of every product of an m x k by a k x n matrix, as often as it is computed.

    Args:
        jaxpr: of the computation.
        length: of the scan around it. A loop inside whose bounds are computed is attention's, over
            the blocks up to the diagonal: (length + 1) / 2 times on average.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in axes)
            total += 2 * summed * math.prod(equation.outvars[0].aval.shape)
        loops = equation.params.get("length", length)
        inner = sum(
            _products(getattr(part, "jaxpr", part), loops)
            for part in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            )
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        )
        if equation.primitive.name == "scan":
            inner *= loops
        elif equation.primitive.name == "while":
            inner = inner * (length + 1) // 2
        total += inner
    return total
