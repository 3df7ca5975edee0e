"""A slot for every token: the ordinary cache, and what the others are measured against."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import DECISION_CHANNEL, dense_attention
from dmc_jax.core.rope import rotate
from dmc_jax.policies.policy import Attended, Edit, Policy, Record
from pallas_kernels.cache_update.api import cache_update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Ordinary causal attention.

    Attributes:
        channel_scale: factor on the decision channel of queries and keys, before their rotation and
            after it: 0 for a model that was made for DMC, whose attention knows no such channel;
            falling to 0 in the zero-out stage; None: the untouched pretrained model.
    """

    channel_scale: float | Array | None = None

    name = "dense"
    chunked = True
    launches = True
    branches = True

    def rotate(self, x, positions, frequencies):
        """Rotate, without the faded part of the decision channel."""
        return rotate_scaled(x, positions, frequencies, self.channel_scale)

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend over all tokens before; `noise` has no meaning."""
        out = dense_attention(
            q,
            k,
            v,
            **where._asdict(),
            channel_scale=self.channel_scale,
            attention=attention,
        )
        return Attended(out, Record(appends=jnp.ones(k.shape[:3]), decisions=None))

    def start(self, rows, head_dim, dtype, slots):
        """Remember nothing."""
        return ()

    def step(self, state, token, lengths):
        """Append the token."""
        key = self.rotate(token.k[:, None], token.positions[:, None], token.frequencies)[:, 0]
        return state, Edit(lengths, key, token.v)

    def chunk(self, state, tokens, lengths, counts):
        """Append the tokens."""
        key = self.rotate(tokens.k, tokens.positions, tokens.frequencies)
        slot = lengths[..., None] + jnp.arange(key.shape[1])
        return state, Edit(slot, key, tokens.v)

    def open_slots(self, state, lengths):
        """None is."""
        return jnp.zeros((*lengths.shape, 0), jnp.int32)

    # ---- a step in one launch -----------------------------------------------------------------

    def launch(self, held, state, token, *, page_table, first, active, implementation):
        """Do a step: the rotations and the pages."""
        rotated, held = cache_update(
            held,
            *(token.q, token.k, token.v),
            page_table=page_table,
            first=first,
            active=active,
            position=token.positions,
            frequencies=token.frequencies,
            channel=1.0 if self.channel_scale is None else self.channel_scale,
            implementation=implementation,
        )
        return rotated, held, state


def rotate_scaled(x, positions, frequencies, channel_scale):
    """Rotate queries or keys, their decision channel scaled before and after; None: left alone."""
    if channel_scale is None:
        return rotate(x, positions, frequencies)
    channel = jnp.ones(x.shape[-1]).at[DECISION_CHANNEL].set(channel_scale).astype(x.dtype)
    return channel * rotate(channel * x, positions, frequencies)
