"""A tiny random model whose heads differ in how they merge."""

import jax
import jax.numpy as jnp
import numpy as np

from dmc_jax.checkpoints.gates import Measured, StoredGates
from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DECISION_CHANNEL
from dmc_jax.core.gates import Gates
from dmc_jax.model.llama import init_params
from dmc_jax.policies.dms import DMS


def build(kv_heads=2, layers=2, heads=4, vocab_size=50):
    config = ModelConfig(
        vocab_size=vocab_size,
        width=32,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=16,
        mlp_width=48,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=128,
        tied_embeddings=False,
    )

    rng = np.random.default_rng(7)

    def weights(path, shape):
        """Weights with which attention is far from uniform and merge logits spread by about 2."""
        if path[-1].key == "scale":
            return np.ones(shape.shape, np.float32)
        values = rng.normal(0, 0.16, shape.shape).astype(np.float32)
        if path[-1].key == "kernel" and path[-2].key in ("q", "k"):
            values[..., DECISION_CHANNEL] *= 2
        return values

    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(weights, shapes), config


def some_gates(layers=2, rows=4, width=32):
    """Random gates for it, with a table of ratios that was not measured."""
    rng = np.random.default_rng(3)
    arrays = np.zeros((layers, width)), np.ones((layers, width)), rng.normal(0, 0.3, (rows, width))
    gates = Gates(*(jnp.asarray(x, jnp.float32) for x in (*arrays, rng.normal(size=rows))))
    table = ((9.0, 1.0), (0.5, 1.5), (-0.5, 2.0), (-2.0, 3.0))
    return StoredGates(DMS(gates, 9.0, delay=4), "", tuple(Measured(*x) for x in table), {})
