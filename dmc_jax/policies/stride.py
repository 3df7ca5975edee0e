"""A fixed stride: so many tokens share a slot, whatever they say."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.policies.merging import Merging

_PARTS = 1000  # of a token in which a ratio is counted
_CERTAIN = 1e4  # a logit which no noise changes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stride(Merging):
    """Merging that nobody decides on: what anything that learns to merge has to be better than.

    Token t of a document opens a segment where floor(t / ratio) is another number than for the
    token before it, and else merges: of a whole ratio n, every n tokens are one segment. All tokens
    of a segment weigh the same; keys are averaged and rotated as in DMC (arXiv 2403.09636). There
    is nothing to train, and the model stays as it was pretrained.

    Attributes:
        ratio: tokens for a slot, 1 or more, counted in thousandths. Another one compiles nothing
            anew.
        delay: tokens for which one stays as it is; 0 merges at once.
    """

    ratio: float | Array
    delay: int = dataclasses.field(default=0, metadata={"static": True})

    name = "stride"
    settings = DMCSettings(window=None, offset=0.0)  # an average of all, however many

    def logits(self, x, positions, heads):
        """Count tokens. In whole numbers: no two programs differ."""
        ratio = jnp.round(_PARTS * jnp.asarray(self.ratio)).astype(jnp.int32)
        segment, before = (_PARTS * t // ratio for t in (positions, positions - 1))
        logits = jnp.where(segment == before, _CERTAIN, -_CERTAIN)
        return jnp.broadcast_to(logits[..., None], (*positions.shape, heads))
