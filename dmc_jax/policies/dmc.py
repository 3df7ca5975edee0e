"""Dynamic Memory Compression: every head appends a token, or merges it into its newest slot."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import (
    DMCSettings,
    OpenSegment,
    dmc_attention,
    empty_segment,
    hard_decisions,
    importance,
    merge_logits,
    merge_step,
    rotate_for_attention,
)
from dmc_jax.core.pooling import pool_chunk
from dmc_jax.policies.policy import Attended, Edit, Policy, Record
from pallas_kernels.cache_update.api import Segment, cache_update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DMC(Policy):
    """Nawrot et al. 2024 (arXiv 2403.09636); `core.dmc` has the equations.

    Attributes:
        settings: window, temperature, offset, eps.
        threshold: merge logit above which a hard decision merges: 0 is even odds, calibration sets
            it for a wanted ratio; or one for each sequence that `step` and the like read for.
            Another one compiles nothing anew.
    """

    settings: DMCSettings = dataclasses.field(metadata={"static": True})
    threshold: float | Array = 0.0

    name = "dmc"
    chunked = True
    launches = True
    branches = True

    def rotate(self, x, positions, frequencies):
        """Rotate, without the decision channel."""
        return rotate_for_attention(x, positions, frequencies)

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend with relaxed decisions where there is noise, with hard ones otherwise."""
        result = dmc_attention(
            q,
            k,
            v,
            **where._asdict(),
            settings=self.settings,
            noise=noise,
            threshold=self.threshold,
            attention=attention,
        )
        return Attended(result.out, Record(1.0 - result.merged, result.decisions))

    def start(self, rows, head_dim, dtype, slots):
        """Remember the tokens of the open segment."""
        return empty_segment(rows, head_dim, self.settings.window, dtype)

    def step(self, state, token, lengths):
        """Let the token join the open slot, or take the next one."""
        decision, omega = self._decide(token.q[:, None], token.k[:, None])
        after, key, value = merge_step(
            state, token.k, token.v, decision[:, 0], omega[:, 0], self.settings.window
        )
        key = key[:, None].astype(token.k.dtype)
        key = self.rotate(key, token.positions[:, None], token.frequencies)[:, 0]
        return after, Edit(lengths - (after.count > 1), key, value)

    def chunk(self, state, tokens, lengths, counts):
        """Pool the tokens, all at once."""
        k, v, merges, after = pool_chunk(
            state,
            tokens.k,
            tokens.v,
            *self._decide(tokens.q, tokens.k),
            counts,
            self.settings.window,
        )
        key = self.rotate(k.astype(tokens.q.dtype), tokens.positions, tokens.frequencies)
        slot = lengths[..., None] - 1 + jnp.cumsum(~merges, axis=1).swapaxes(1, 2)
        return after, Edit(slot, key, v)

    def open_slots(self, state, lengths):
        """The newest, which the next token may join."""
        return lengths[..., None] - 1

    def _decide(self, q, k):
        """Decisions and importance of tokens [B, T, heads, H]."""
        threshold = jnp.reshape(self.threshold, (-1, 1, 1))
        decisions = hard_decisions(merge_logits(k, self.settings), threshold)
        return decisions, importance(q, k.shape[2], self.settings)

    # ---- a step in one launch -----------------------------------------------------------------

    def launch(self, held, state, token, *, page_table, first, active, implementation):
        """Do a step: decision and importance, the ring, the average, its rotation and the pages."""
        rotated, held = cache_update(
            held._replace(segment=Segment(**vars(state))),
            *(token.q, token.k, token.v),
            page_table=page_table,
            first=first,
            active=active,
            position=token.positions,
            frequencies=token.frequencies,
            channel=0.0,
            threshold=self.threshold,
            offset=self.settings.offset,
            eps=self.settings.eps,
            window=self.settings.window,
            implementation=implementation,
        )
        return rotated, held, OpenSegment(*held.segment)
