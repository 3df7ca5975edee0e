"""Delayed eviction: a head decides on each token as it comes, and drops it `delay` tokens later."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import DMCSettings, hard_decisions, relaxed_decisions, superseded
from dmc_jax.core.gates import Gates, gate_logits
from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.errors import UserError
from dmc_jax.policies.policy import Attended, Edit, Policy, Record
from dmc_jax.policies.tail import inherited_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DMS(Policy):
    """Dynamic memory sparsification (Lancucki et al. 2025, arXiv 2506.05345), by gates.

    Token j is decided on from what came up to j, and seen by the queries of tokens j to
    j + delay - 1 whatever the decision. Token j + delay then takes its slot, if it is dropped, and
    a new one if it stays. So rows never shrink, and one of n tokens has as many slots as tokens of
    the first n - delay stay, and `delay` more.

    Attributes:
        gates: a logit for every token and row.
        threshold: logit above which a token is dropped; or one for each sequence that `step` and
            `chunk` read for. Another one compiles nothing anew.
        delay: tokens, 1 or more.
        temperature: of relaxed decisions.

    Raises:
        UserError: no delay.
    """

    gates: Gates
    threshold: float | Array = 0.0
    delay: int = dataclasses.field(default=16, metadata={"static": True})
    temperature: float = dataclasses.field(default=0.1, metadata={"static": True})

    name = "dms"
    chunked = True
    branches = True

    def __post_init__(self):
        if self.delay < 1:
            raise UserError(f"delay: expected a token or more, got {self.delay}")

    def of_layer(self, layer, first, heads):
        """Take the gates of a layer."""
        return dataclasses.replace(self, gates=self.gates.of_layer(layer, first, heads))

    def rotate(self, x, positions, frequencies):
        """Rotate; no channel is taken from the model."""
        return rotate(x, positions, frequencies)

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend with relaxed decisions where there is noise, with hard ones otherwise.

        Counted is then how probable each drop is, which is what the noise makes of a logit.
        """
        logits = gate_logits(self.gates, x)
        if noise is None:
            decisions = dropped = hard_decisions(logits, self.threshold)
            bias = superseded(dropped)
        else:
            logits -= self.threshold
            dropped = hard_decisions(logits + noise)
            decisions = jax.nn.sigmoid(logits)
            relaxation = DMCSettings(temperature=self.temperature)
            _, bias = relaxed_decisions(logits, noise, relaxation)
        frequencies = rotary_frequencies(q.shape[-1], where.rope_theta, where.rope_scaling)
        out = attention(
            rotate(q, where.positions, frequencies),
            rotate(k, where.positions, frequencies),
            v,
            bias,
            scale=q.shape[-1] ** -0.5,
            segment_ids=where.segment_ids,
            spared=self.delay,
        )
        # The slot of a dropped token goes to the one `delay` later in its document.
        before = jnp.pad(dropped, [(0, 0), (self.delay, 0), (0, 0)])[:, : dropped.shape[1]]
        inherits = before * (where.positions >= self.delay)[..., None]
        return Attended(out, Record(1.0 - inherits, decisions))

    def start(self, rows, head_dim, dtype, slots):
        """Remember of the last `delay` tokens those to be dropped: one more than their slot."""
        return jnp.zeros((*rows, self.delay), jnp.int32)

    def step(self, state, token, lengths):
        """Write the token to the slot that falls vacant now, or take the next one."""
        at = (token.positions % self.delay)[:, None, None]
        due = jnp.take_along_axis(state, at, axis=2)[..., 0]
        slot = jnp.where(due > 0, due - 1, lengths)
        drops = gate_logits(self.gates, token.x) > jnp.reshape(self.threshold, (-1, 1))
        now = jnp.where(drops, slot + 1, 0)
        state = jnp.where(jnp.arange(self.delay) == at, now[..., None], state)
        key = rotate(token.k[:, None], token.positions[:, None], token.frequencies)[:, 0]
        return state, Edit(slot, key, token.v)

    def chunk(self, state, tokens, lengths, counts):
        """Find all slots at once."""
        T, delay = tokens.k.shape[1], self.delay
        drops = gate_logits(self.gates, tokens.x) > jnp.reshape(self.threshold, (-1, 1, 1))
        drops = drops.swapaxes(1, 2)  # [B, K, T]
        due = jnp.take_along_axis(state, (tokens.positions[:, :delay] % delay)[:, None], axis=2)
        vacated = jnp.concatenate([due > 0, drops], axis=2)[..., :T]
        slot = inherited_slots(vacated, due - 1, lengths, delay)

        # The newest token at each place of the ring, if the chunk has one there.
        last = counts - 1
        newest = tokens.positions[:, :1] + last[:, None] - jnp.arange(delay)
        newest = (last[:, None] - newest % delay)[:, None]  # [B, 1, delay]
        now = jnp.where(drops, slot + 1, 0)
        now = jnp.take_along_axis(now, jnp.maximum(newest, 0), axis=2)
        state = jnp.where(newest >= 0, now, state)
        key = rotate(tokens.k, tokens.positions, tokens.frequencies)
        until = jnp.where(drops, jnp.arange(T) + delay, T + delay)
        return state, Edit(slot, key, tokens.v, until)

    def open_slots(self, state, lengths):
        """Those of tokens that are still to be dropped, whose place a later one takes."""
        return state - 1
