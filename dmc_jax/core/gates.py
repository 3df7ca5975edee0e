"""Decisions read from the residual stream by gates, beside a model that stays as it is.

Every KV head of every layer has a linear read-out of the normalised input of its attention,

    a = w . (x - mean) / deviation + b

with the mean and deviation of each of the layer's inputs. DMC takes its logits from a channel of
the keys instead, which the model has to be taught to do without.
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

    def of_layer(self, layer: int | Array, first: int | Array, heads: int) -> "Gates":
        """Take those of one layer.

        Args:
            layer: its index.
            first: row of its first KV head.
            heads: K.
        """
        rows = (jax.lax.dynamic_slice_in_dim(x, first, heads) for x in (self.weight, self.bias))
        return Gates(self.mean[layer], self.deviation[layer], *rows)


def gate_logits(gates: Gates, x: Float[Array, "B *T D"]) -> Float[Array, "B *T K"]:
    """Read the logits of one layer, in float32.

    Args:
        gates: of the layer.
        x: input of its attention, after the norm.
    """
    standard = (x.astype(jnp.float32) - gates.mean) / gates.deviation
    return jnp.einsum("...D,KD->...K", standard, gates.weight, precision="highest") + gates.bias
