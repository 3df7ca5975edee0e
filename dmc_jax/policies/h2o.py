"""H2O: a row of so many slots, part for the newest tokens, part for those attended to most."""

import dataclasses
import fractions
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.core.attention import causal_attention
from dmc_jax.errors import UserError
from dmc_jax.policies.budget import Budgeted
from dmc_jax.policies.policy import whole_by_steps


class Received(NamedTuple):
    """What each slot's token was given so far."""

    weight: Float[Array, "*rows S"]  # of attention, summed over queries and their heads
    position: Int[Array, "*rows S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class H2O(Budgeted):
    """Heavy-hitter oracle (Zhang et al. 2023, arXiv 2306.14048); needs no training.

    Once a row is full, a new token takes the slot of the one that was given the least attention so
    far: the sum of its softmax weights over all queries that saw it, its own among them, and over
    the query heads of the KV head. The newest tokens are spared. So every KV head keeps tokens of
    its own. The budget counts the newest token, so it is all that a row ever holds; the authors'
    code, with `budget - 1`, has one token more while it attends. The rule holds from the first
    token on, prompts included: their code attends to the whole prompt and cuts then, whose memory
    is not bounded and whose result depends on where a prompt ends.

    Beside keys and values this takes 8 bytes a slot.

    Attributes:
        recent: share of the budget, above 0 and up to 1, for the newest tokens, rounded down but
            for one at least. 1 keeps them alone; the paper's halves are the default.

    Raises:
        UserError: a share that is none.
    """

    recent: float = dataclasses.field(default=0.5, kw_only=True, metadata={"static": True})

    name = "h2o"
    watches = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.recent <= 1:
            raise UserError(
                f"recent: expected a share of the budget, above 0 and up to 1, got {self.recent:g}"
            )

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend token by token; `noise` and `attention` have no meaning."""
        return whole_by_steps(self, q, k, v, where, x)

    def start(self, rows, head_dim, dtype, slots):
        """Remember each slot's token, and the attention that it was given."""
        return Received(
            weight=jnp.zeros((*rows, slots), jnp.float32),
            position=jnp.zeros((*rows, slots), jnp.int32),
        )

    def step(self, state, token, lengths):
        """Append the token, or write it over the least attended slot of an older one."""
        now = token.positions[:, None]
        share = fractions.Fraction(self.recent).limit_denominator(1000)
        spared = self.slots_after(now + 1) * share.numerator // share.denominator
        # Of the newest tokens this one is the first.
        old = state.position <= (now - jnp.maximum(1, spared))[..., None]
        slots = jnp.arange(old.shape[-1])
        old &= slots < lengths[..., None]
        victim = jnp.argmin(jnp.where(old, state.weight, jnp.inf), axis=-1).astype(jnp.int32)
        edit = self.place(token, lengths, victim)
        taken = slots == edit.slot[..., None]
        state = Received(
            weight=jnp.where(taken, 0.0, state.weight),
            position=jnp.where(taken, now[..., None], state.position),
        )
        return state, edit

    def observe(self, state, weights, lengths):
        """Count what every slot was given."""
        given = weights.sum(axis=2)[..., : state.weight.shape[-1]]
        return state._replace(weight=state.weight + given)
