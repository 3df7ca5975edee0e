"""Dynamic Memory Compression by gates: a token merges into its segment `delay` tokens later."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmc_jax.core.dmc import DMCSettings, hard_decisions, relaxed_decisions
from dmc_jax.core.gates import Gates, gate_importance, gate_logits
from dmc_jax.errors import UserError
from dmc_jax.policies.merging import Merging

_NEXT_TO_NOTHING = 2**-10  # not 0: a window may hold nobody else


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DelayedDMC(Merging):
    """Merging as in DMC, by gates.

    Attributes:
        gates: a logit for every token and row, perhaps its importance, and gamma.
        threshold: logit above which a token merges; or one for each sequence that `step` and
            `chunk` read for. Another one compiles nothing anew.
        delay: tokens for which one stays as it is; 0 merges at once.
        settings: window, temperature and eps. There is no offset: gates have a bias.
        margin: by how much more than the threshold a token's logit makes it weigh next to nothing
            in the slot that it joins: so it is dropped, and what has to be kept of the others is
            not averaged with it. None: all that do not open a slot merge.

    Raises:
        UserError: a negative delay, or an offset.
    """

    gates: Gates
    threshold: float | Array = 0.0
    delay: int = dataclasses.field(default=16, metadata={"static": True})
    settings: DMCSettings = dataclasses.field(
        default=DMCSettings(offset=0.0), metadata={"static": True}
    )
    margin: float | Array | None = None

    name = "dmc"

    def __post_init__(self):
        super().__post_init__()
        if self.settings.offset:
            raise UserError(f"offset: gates have a bias in its place, got {self.settings.offset}")

    @property
    def gamma(self):
        """That of the gates."""
        return self.gates.gamma

    def of_layer(self, layer, first, heads):
        """Take the gates of a layer."""
        return dataclasses.replace(self, gates=self.gates.of_layer(layer, first, heads))

    def logits(self, x, positions, heads):
        """Read the gates."""
        threshold = jnp.reshape(self.threshold, (-1, *(1,) * (x.ndim - 1)))
        return gate_logits(self.gates, x) - threshold

    def weights(self, x, logits, noise=None):
        """Read the importance, and let next to nothing of dropped tokens count."""
        omega = gate_importance(self.gates, x, self.settings.eps)
        if self.margin is None:
            return omega
        if noise is None:
            dropped = hard_decisions(logits, self.margin)
        else:
            dropped = relaxed_decisions(logits - self.margin, noise, self.settings)[0]
        return omega * jnp.maximum(1.0 - dropped, _NEXT_TO_NOTHING)
