"""A window's noise is its own: how a batch is divided changes nothing, from step to step, too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.config import CompressionConfig, MeshConfig
from dmc_jax.core.noise import decision_noise
from dmc_jax.data.loader import training_batches
from dmc_jax.data.prepared import open_data
from dmc_jax.model.sharding import batch_sharding, make_mesh, shardings
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import init_state
from dmc_jax.training.step import make_train_step, noise_of

NAMES = ("tokens", "targets", "positions", "segment_ids", "loss_mask")
PLAIN = {"accumulation": 1, "remat": "full", "mesh": MeshConfig(1, 1, 1)}
DIVIDED = {"accumulation": 4, "remat": "none", "mesh": MeshConfig(2, 1, 2)}


@pytest.mark.parametrize("draws", [2, 3])
def a_windows_noise_does_not_depend_on_the_parts_of_its_batch_test(tiny_run, draws):
    batch, key = {"tokens": jnp.zeros((8, 5), jnp.int32)}, jax.random.key(3)

    def drawn(accumulation):
        run = dataclasses.replace(tiny_run, draws=draws, accumulation=accumulation)
        noise = np.zeros((2, 8, 5, 3), np.float32)
        for number in range(accumulation):
            own = noise_of(run, key, number, batch)
            for layer in range(2):
                rows = slice(number, None, accumulation)
                shape = (8 // accumulation, 5, 3)
                noise[layer, rows] = decision_noise(own.key, own.part, jnp.int32(layer), shape)
        return noise

    whole = drawn(1)
    assert len(np.unique(whole)) == whole.size
    for accumulation in (2, 8):
        np.testing.assert_array_equal(drawn(accumulation), whole)


def steps(run, ways, each=10):
    """Metrics of steps of retrofitting, so many in each way, and the parameters at the end."""
    state, history = None, []
    data = open_data(run.data.path)
    batches = iter(training_batches([(data, 1.0)], length=32, batch=run.data.batch, seed=0))
    for way in ways:
        way = dataclasses.replace(run, **way)
        sizes = dataclasses.astuple(way.mesh)
        mesh = make_mesh(way.mesh, jax.devices()[: int(np.prod(sizes))])
        optimizer = make_optimizer(way.optimizer, way.compression.decision_multiplier)
        if state is None:
            state = init_state(way.model, optimizer, mesh, way.seed)
            # Spread the decisions of a fresh model, so that noise and hinge matter.
            wider = jax.tree.map(lambda p: 3.0 * p if p.ndim > 2 else p, state.params)
            state = dataclasses.replace(state, params=wider)
        state = jax.device_put(state, shardings(state, mesh))
        step = make_train_step(way, "retrofit", mesh, optimizer)
        for _ in range(each):
            batch = next(batches)
            placed = {name: jax.device_put(batch[name], batch_sharding(mesh)) for name in NAMES}
            state, metrics = step(state, placed, None)
            told = jax.device_get(metrics)
            history.append([told["loss"], told["compression_loss"], *told["merged"]])
    return np.array(history), jax.device_get(state.params)


@pytest.fixture(scope="module")
def plain():
    return {}


@pytest.mark.parametrize(
    "ways",
    [
        [PLAIN, DIVIDED],  # as a run that is resumed on other devices
        pytest.param([DIVIDED, PLAIN], marks=pytest.mark.slow),
        pytest.param([PLAIN | {"accumulation": 8}] * 2, marks=pytest.mark.slow),
        pytest.param([PLAIN | {"remat": "dots"}] * 2, marks=pytest.mark.slow),
        pytest.param(
            [DIVIDED | {"mesh": MeshConfig(1, 2, 4), "remat": "dots"}] * 2, marks=pytest.mark.slow
        ),
    ],
    ids=["resumed", "resumed_on_one", "accumulation", "remat", "mesh"],
)
def accumulation_mesh_and_remat_change_nothing_in_20_steps_test(tiny_run, plain, ways):
    compression = CompressionConfig(ratio=3.0, weight=2.0, per_layer=True, decision_multiplier=3.0)
    run = dataclasses.replace(tiny_run, compression=compression)
    run = dataclasses.replace(run, retrofit=dataclasses.replace(run.retrofit, steps=20))
    if not plain:
        plain["steps"] = steps(run, [PLAIN], each=20)
    expected, params = plain["steps"]
    assert (expected[:, 1] > 0).sum() > 8 and len(np.unique(expected[:, 2])) > 10
    history, others = steps(run, ways)
    np.testing.assert_allclose(history, expected, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), others, params)
