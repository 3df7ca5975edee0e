"""AdamW as in the paper, and what DMC does to the decision channel's rows."""

import re
from typing import Any

import jax
import optax

from dmc_jax.config import OptimizerConfig
from dmc_jax.core.dmc import DECISION_CHANNEL
from dmc_jax.model.sharding import leaf_path


def is_matrix(path: str) -> bool:
    """Whether a parameter is a matrix, stacked or not: weight decay is for those alone."""
    return not path.endswith("scale")


def map_decision_rows(function, tree: Any) -> Any:
    """Apply `function` to the rows of W_q and W_k that make the decision channel.

    Works on parameters, gradients and optimizer moments alike (a leaf below `q` or `k` whose last
    axis is the head width), and on biases, which have that axis too.

    Args:
        function: from rows [...] to rows of the same shape.
        tree: pytree with the paths of the parameters at the end of its paths.
    """

    def of_leaf(path, leaf):
        if not re.search(r"(^|/)[qk]/(kernel|bias)$", leaf_path(path)):
            return leaf
        rows = leaf[..., DECISION_CHANNEL]
        return leaf.at[..., DECISION_CHANNEL].set(function(rows))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def zero_decision_rows(tree: Any) -> Any:
    """End of the zero-out stage: the decision channel starts from nothing."""
    return map_decision_rows(lambda rows: 0.0 * rows, tree)


def clipped_adam(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """What a chain begins with: Adam on clipped gradients, without rate and weight decay."""
    return [
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
    ]


def make_optimizer(
    config: OptimizerConfig, decision_multiplier: float
) -> optax.GradientTransformation:
    """AdamW without the learning rate, which the step multiplies in from its own schedule.

    Args:
        config: beta1, beta2, eps, weight decay, clip (0: off).
        decision_multiplier: factor on the update of the decision rows of W_q and W_k.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(leaf_path(path)), params)

    def scale_decision_rows(updates, params=None):
        return map_decision_rows(lambda rows: decision_multiplier * rows, updates)

    return optax.chain(
        *clipped_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(scale_decision_rows),
    )
