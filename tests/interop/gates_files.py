"""A file of gates for a checkpoint."""

import jax.numpy as jnp
import numpy as np

from dmc_jax.checkpoints.gates import Measured, StoredGates, model_hash, save_gates
from dmc_jax.core.gates import Gates
from dmc_jax.interop.parameters import read_params
from dmc_jax.policies.dms import DMS

TABLE = (Measured(9.0, 1.0), Measured(0.3, 1.5), Measured(-0.5, 2.5))


def write_gates(file, source, delay=4):
    """Random ones, with which a threshold of 0.3 drops some two of five tokens."""
    rng, config = np.random.default_rng(5), source.config
    layers, rows = (config.layers, config.width), (config.kv_rows, config.width)
    arrays = rng.normal(size=layers), rng.uniform(0.5, 2, layers), 0.3 * rng.normal(size=rows)
    gates = Gates(*(jnp.asarray(x, jnp.float32) for x in (*arrays, rng.normal(size=rows[0]))))
    base = model_hash(read_params(source), config)
    save_gates(file, StoredGates(DMS(gates, 9.0, delay=delay), base, TABLE, {"by": "a test"}))
    return file
