"""Decisions read from the residual stream by gates, beside a model that stays as it is.

Every KV head of every layer has a linear read-out of the normalised input of its attention,

    a = w . (x - mean) / deviation + b

with the mean and deviation of each of the layer's inputs, and may have a second one, of the
importance of a token, and a number gamma, by which the score of a slot of n tokens is gamma log n
higher. DMC takes its logits from a channel of the keys instead, and of the queries, which the model
has to be taught to do without.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """Of all layers, R rows being their KV heads in order; `of_layer` drops L and has R = K."""

    mean: Float[Array, "*L D"]
    deviation: Float[Array, "*L D"]
    weight: Float[Array, "R D"]
    bias: Float[Array, " R"]
    importance_weight: Float[Array, "R D"] | None = None  # both or none
    importance_bias: Float[Array, " R"] | None = None
    gamma: Float[Array, " R"] | None = None

    def of_layer(self, layer: int | Array, first: int | Array, heads: int) -> "Gates":
        """Take those of one layer.

        Args:
            layer: its index.
            first: row of its first KV head.
            heads: K.
        """
        own = {name: getattr(self, name)[layer] for name in _INPUTS}
        rows = {name: leaf for name, leaf in vars(self).items() if name not in _INPUTS}
        rows = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, heads), rows)
        return Gates(**own, **rows)


_INPUTS = ("mean", "deviation")  # of layers; all else is of rows


def gate_logits(gates: Gates, x: Float[Array, "B *T D"]) -> Float[Array, "B *T K"]:
    """Read the logits of one layer, in float32.

    Args:
        gates: of the layer.
        x: input of its attention, after the norm.
    """
    return _read_out(gates, x, gates.weight, gates.bias)


def gate_importance(gates: Gates, x: Float[Array, "B *T D"], eps: float) -> Float[Array, "B *T K"]:
    """Read how much tokens weigh in the average of their slot: `sigmoid(u) + eps`, or all 1.

    Args:
        gates: of the layer; without those of the importance all weigh the same.
        x: as in `gate_logits`.
        eps: so that no slot has the weight 0.
    """
    if gates.importance_weight is None:
        return jnp.ones((*x.shape[:-1], gates.weight.shape[0]))
    u = _read_out(gates, x, gates.importance_weight, gates.importance_bias)
    return jax.nn.sigmoid(u) + eps


def _read_out(gates, x, weight, bias):
    standard = (x.astype(jnp.float32) - gates.mean) / gates.deviation
    return jnp.einsum("...D,KD->...K", standard, weight, precision="highest") + bias
