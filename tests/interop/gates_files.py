"""A file of gates for a checkpoint."""

import jax.numpy as jnp
import numpy as np

from dmc_jax.checkpoints.gates import Measured, StoredGates, model_hash, save_gates
from dmc_jax.core.gates import Gates
from dmc_jax.interop.parameters import read_params
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dms import DMS

TABLE = (Measured(9.0, 1.0), Measured(0.3, 1.5), Measured(-0.5, 2.5))


def write_gates(file, source, delay=4, *, merging=None, parts=(), margin=None):
    """Random ones, with which a threshold of 0.3 drops or merges some two of five tokens.

    Args:
        merging: settings of those that merge; None: they drop.
        parts: what they have beside logits: "importance", "gamma".
        margin: of those that merge.
    """
    rng, config = np.random.default_rng(5), source.config
    layers, rows = (config.layers, config.width), (config.kv_rows, config.width)

    def read_out():
        return {"weight": 0.3 * rng.normal(size=rows), "bias": rng.normal(size=rows[0])}

    arrays = {"mean": rng.normal(size=layers), "deviation": rng.uniform(0.5, 2, layers)}
    arrays |= read_out()
    if "importance" in parts:
        arrays |= {f"importance_{name}": 2 * x for name, x in read_out().items()}
    if "gamma" in parts:
        arrays["gamma"] = rng.normal(size=rows[0])
    gates = Gates(**{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()})
    if merging is None:
        policy = DMS(gates, 9.0, delay)
    else:
        policy = DelayedDMC(gates, 9.0, delay, merging, margin)
    base = model_hash(read_params(source), config)
    save_gates(file, StoredGates(policy, base, TABLE, {"by": "a test"}))
    return file
