"""A model in bfloat16 learns what one in float32 does: it rounds, and adds up in float32."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.config import CompressionConfig, MeshConfig
from dmc_jax.model.llama import init_params
from dmc_jax.model.sharding import batch_sharding, make_mesh, with_shardings
from dmc_jax.training import gated
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import abstract_state, init_state
from dmc_jax.training.step import make_train_step

WINDOWS, LENGTH, IDS = 16, 128, 5  # so that sums over equal tokens are long
IN_BFLOAT16 = [
    r"stablehlo\.(reduce|reduce_window|scatter|all_reduce|reduce_scatter)\b[^\n]*bf16",
    r"stablehlo\.(scatter|reduce_window|all_reduce)(?:[^\n]*\n){1,2}[^\n]*tensor<bf16>",  # a region
]


def of(tiny_run, dtype, **model):
    return dataclasses.replace(
        tiny_run,
        compute_dtype=dtype,
        mesh=MeshConfig(1, 1, 1),
        model=dataclasses.replace(tiny_run.model, width=64, mlp_width=96, **model),
        compression=CompressionConfig(ratio=3.0, weight=2.0, distillation=0.5),
        optimizer=dataclasses.replace(tiny_run.optimizer, clip=0.0),
    )


def gradient_of(run):
    """Of a step: the first moment that Adam keeps of it, from nothing."""
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    optimizer = make_optimizer(run.optimizer, 1.0)
    state = init_state(run.model, optimizer, mesh, 0)
    wider = jax.tree.map(lambda p: 3.0 * p if p.ndim > 2 else p, state.params)
    state = dataclasses.replace(state, params=wider)
    rng = np.random.default_rng(0)
    shape = WINDOWS, LENGTH
    batch = {
        "tokens": rng.integers(0, IDS, shape, np.int32),
        "targets": rng.integers(0, IDS, shape, np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (WINDOWS, 1)),
        "segment_ids": np.ones(shape, np.int32),
        "loss_mask": np.ones(shape, np.float32),
    }
    batch = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
    step = make_train_step(run, "finetune", mesh, optimizer, run.model)
    after, _ = step(state, batch, init_params(run.model, jax.random.key(9)))
    return jax.device_get(after.optimizer[1].mu)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def the_gradient_in_bfloat16_is_that_of_float32_leaf_by_leaf_test(tiny_run, tied):
    exact = gradient_of(of(tiny_run, "float32", tied_embeddings=tied))
    rounded = gradient_of(of(tiny_run, "bfloat16", tied_embeddings=tied))
    errors = {
        jax.tree_util.keystr(path): np.linalg.norm(y - x) / np.linalg.norm(x)
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(rounded), strict=True
        )
    }
    assert max(errors.values()) < 0.02, errors


@pytest.mark.parametrize("stage", ["zero_out", "retrofit", "distill"])
def no_reduction_of_a_training_step_is_in_bfloat16_test(tiny_run, stage):
    run = dataclasses.replace(of(tiny_run, "bfloat16"), accumulation=2, distill=tiny_run.finetune)
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    optimizer = make_optimizer(run.optimizer, 1.0)
    state = abstract_state(run.model, optimizer, mesh)
    ids = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((8, 32), dtype, sharding=batch_sharding(mesh))
        for name, dtype in (ids | {"loss_mask": jnp.float32}).items()
    }
    if stage == "distill":
        own = gated.make_optimizer(run)
        gates = jax.eval_shape(lambda: gated.state_of(gated.empty(run), own))
        step = gated.make_distill_step(run, mesh, own, np.zeros(run.model.vocab_size))
        lowered = step.lower(with_shardings(gates, mesh), batch, state.params)
    else:
        step = make_train_step(run, stage, mesh, optimizer, run.model)
        lowered = step.lower(state, batch, state.params)
    text = lowered.as_text()
    assert "bf16" in text and "stablehlo.reduce" in text
    for pattern in IN_BFLOAT16:
        found = re.search(pattern, text)
        assert found is None, found[0]


def a_reduction_in_bfloat16_would_be_found_test():
    x = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    for function in (
        lambda x, ids: jax.lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None),
        lambda x, ids: jnp.zeros((3, 4), x.dtype).at[ids].add(x),
        lambda x, ids: jax.lax.reduce_window(
            x, jnp.bfloat16(0), jax.lax.add, (2, 1), (1, 1), "VALID"
        ),
    ):
        text = jax.jit(function).lower(x, ids).as_text()
        assert any(re.search(pattern, text) for pattern in IN_BFLOAT16), text
    text = jax.jit(lambda x, ids: jnp.sum(x, axis=0)).lower(x, ids).as_text()
    assert not any(re.search(pattern, text) for pattern in IN_BFLOAT16), text
