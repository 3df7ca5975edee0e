"""A model of any size with random weights that compresses as much as asked, for speed alone.

What decoding costs depends on the lengths of the rows, not on what the model says. So where no
trained model of a size is at hand, a random one stands in: the threshold on its merge logits is set
so that it measures the ratio asked for on random tokens. Its decisions then are those of the model,
made in its layers as ever, and its heads differ as random projections do; `row_ratios` says how
much.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.model.llama import Llama, init_params
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Policy, attend_whole

# Merge logits of a random model are symmetric around minus the offset: any ratio can be set.
SETTINGS = DMCSettings(window=12, offset=0.0)
_SAMPLE = (4, 512)  # sequences and tokens that the ratio is set on

# 26 million parameters: its cache outweighs them from some thousand tokens on.
WIDE = ModelConfig(
    vocab_size=2048,
    width=512,
    layers=8,
    heads=8,
    kv_heads=8,
    head_dim=64,
    mlp_width=1408,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_length=4096,
    tied_embeddings=True,
)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """Weights, and the policy of every ratio."""

    config: ModelConfig
    params: Any
    policies: dict[float, Policy]  # by the ratio asked for; 1 is dense
    row_ratios: dict[float, tuple[float, float, float]]  # least, mean and greatest over the rows


def sizes(config: ModelConfig) -> dict[str, int]:
    """What a JSON file says of a model."""
    names = ("layers", "width", "kv_heads", "head_dim", "mlp_width", "vocab_size")
    return {name: getattr(config, name) for name in names}


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    """Ids, uniform over the vocabulary."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def make(config: ModelConfig, ratios: tuple[float, ...]) -> RandomModel:
    """Draw weights and set a threshold for each ratio by bisection."""
    params = init_params(config, jax.random.key(0))
    policies, row_ratios = {1: Dense()}, {}
    for ratio in ratios:
        low, high = -10.0, 10.0  # merges nearly all, merges nearly nothing
        for _ in range(12):
            middle = (low + high) / 2
            policy = DMC(SETTINGS, middle)
            rows = slots_per_token(params, config, policy)
            low, high = (middle, high) if rows.mean() < 1 / ratio else (low, middle)
        policies[ratio] = policy
        row_ratios[ratio] = tuple(
            round(float(1 / x), 2) for x in (rows.max(), rows.mean(), rows.min())
        )
    return RandomModel(config, params, policies, row_ratios)


def slots_per_token(params: Any, config: ModelConfig, policy: Policy) -> np.ndarray:
    """Of every row, on random tokens."""
    records = _records(params, config, policy)
    return np.concatenate(
        [np.asarray(record.appends).mean(axis=(1, 2)).reshape(-1) for record in records]
    )


@functools.partial(jax.jit, static_argnames="config")
def _records(params, config, policy):
    positions = jnp.broadcast_to(jnp.arange(_SAMPLE[1]), _SAMPLE)
    attend = attend_whole(policy, config, positions)
    tokens = random_tokens(config, *_SAMPLE)
    return Llama(config).apply({"params": params}, tokens, attend=attend).records
