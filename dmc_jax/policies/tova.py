"""TOVA: a row of so many slots, of which the least attended makes room for a new token."""

import dataclasses

import jax
import jax.numpy as jnp

from dmc_jax.core.attention import causal_attention
from dmc_jax.policies.budget import Budgeted
from dmc_jax.policies.policy import whole_by_steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TOVA(Budgeted):
    """Token omission via attention (Oren et al. 2024, arXiv 2401.06104); needs no training.

    Once a row is full, the slot that the newest query attended to least, on average over the heads
    of the layer, goes to the next token: so all rows of a layer keep the same tokens, and the slot
    may be the newest one. The budget counts the newest token, so it is all that a row ever holds;
    the paper's state of `budget - 1` has one token more while it attends. The rule holds from the
    first token on, prompts included: the paper's code attends to the whole prompt and cuts then,
    whose memory is not bounded and whose result depends on where a prompt ends.
    """

    name = "tova"
    watches = True

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend token by token; `noise` and `attention` have no meaning."""
        return whole_by_steps(self, q, k, v, where, x)

    def start(self, rows, head_dim, dtype, slots):
        """Remember which slot was attended to least."""
        return jnp.zeros(rows, jnp.int32)

    def step(self, state, token, lengths):
        """Append the token, or write it over the least attended slot."""
        return state, self.place(token, lengths, state)

    def observe(self, state, weights, lengths):
        """Find the least attended slot; the first of equals."""
        mean = weights.mean(axis=(1, 2))  # [B, S]
        live = jnp.arange(mean.shape[1]) < lengths[:, :1]
        least = jnp.argmin(jnp.where(live, mean, jnp.inf), axis=1)
        return jnp.broadcast_to(least[:, None], state.shape).astype(jnp.int32)
