"""StreamingLLM: the first tokens of a text, which everybody attends to, and the newest ones."""

import dataclasses

import jax
import jax.numpy as jnp

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import superseded
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.errors import UserError
from dmc_jax.policies.budget import Budgeted
from dmc_jax.policies.policy import Attended, Edit, Record, whole_by_steps
from dmc_jax.policies.tail import inherited


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window(Budgeted):
    """Attention sinks and a sliding window (Xiao et al. 2023, arXiv 2309.17453); no training.

    Once a row is full, a new token takes the slot of the oldest one but for the first `sinks`. The
    budget counts sinks and the newest token: it is the `start_size + recent_size` of the authors'
    code.

    Positions are those in the text, as with every policy: this is ordinary attention under a mask.
    The authors count positions in the cache instead, and rotate its keys anew for every token.
    Within the window that is the same, since only distances count. The sinks differ: here they are
    at their true distance, there just before the window. Up to the length that the model was made
    for, and the engine takes no more, every distance is one that it was trained on; beyond, which
    is what the authors' way is for, this does not lead.

    Beside keys and values this takes 4 bytes a slot, for the position of its token: a budget that
    grows leaves the window's tokens in slots of no order.

    Attributes:
        sinks: tokens at the beginning of a text that stay, fewer than the budget; the paper's 4.

    Raises:
        UserError: a number of sinks that is none, or leaves no slot.
    """

    sinks: int = dataclasses.field(default=4, kw_only=True, metadata={"static": True})

    name = "window"
    chunked = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.sinks < self.budget:
            raise UserError(
                f"budget: expected more slots than the {self.sinks} of the first tokens, got "
                f"{self.budget}"
            )

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend within the window and to the sinks; token by token where it grows."""
        if self.ratio is not None:
            return whole_by_steps(self, q, k, v, where, x)
        frequencies = rotary_frequencies(q.shape[-1], where.rope_theta, where.rope_scaling)
        in_heads = jnp.ones(k.shape[:3])
        out = attention(
            self.rotate(q, where.positions, frequencies),
            self.rotate(k, where.positions, frequencies),
            v,
            superseded(in_heads * (where.positions >= self.sinks)[..., None]),
            scale=q.shape[-1] ** -0.5,
            segment_ids=where.segment_ids,
            spared=self.budget - self.sinks,
        )
        appends = in_heads * (where.positions < self.budget)[..., None]
        return Attended(out, Record(appends, decisions=None))

    def start(self, rows, head_dim, dtype, slots):
        """Remember the position of each slot's token."""
        return jnp.zeros((*rows, slots), jnp.int32)

    def step(self, state, token, lengths):
        """Append the token, or write it over the oldest but for the sinks."""
        oldest = jnp.argmin(self._ages(state, lengths), axis=-1).astype(jnp.int32)
        edit = self.place(token, lengths, oldest)
        taken = jnp.arange(state.shape[-1]) == edit.slot[..., None]
        return jnp.where(taken, token.positions[:, None, None], state), edit

    def chunk(self, state, tokens, lengths, counts):
        """Find all slots at once: they queue, those of the row before those of the chunk."""
        (B, T, K, _), S = tokens.k.shape, state.shape[-1]
        at, t, rows = tokens.positions, jnp.arange(T), jnp.arange(B)[:, None]
        # All rows of a layer are alike.
        length, state = lengths[:, :1], state[:, 0]
        new = self.slots_after(at) < self.slots_after(at + 1)
        leaves = jnp.cumsum(~new, axis=1) - 1  # how many went before the token that makes room
        before = jnp.argsort(self._ages(state, lengths[:, 0]), axis=-1)
        before = jnp.take_along_axis(before, jnp.minimum(leaves, S - 1), axis=1)
        slot = jnp.where(new, self.slots_after(at), before)
        # The queue begins with `length - sinks` tokens of the row. Sinks do not queue: where the
        # chunk has some, that is minus their number.
        source = leaves - (length - self.sinks)
        follows = ~new & (source >= 0)
        slot = inherited(slot, jnp.where(follows, source, t), self.budget - self.sinks)
        until = jnp.full((B, T), T).at[rows, jnp.where(follows, source, T)].set(t, mode="drop")

        real = jnp.where(t < counts[:, None], slot, S)
        state = state.at[rows, real].max(at, mode="drop")
        key = self.rotate(tokens.k, at, tokens.frequencies)
        slot, until, state = (jnp.repeat(x[:, None], K, axis=1) for x in (slot, until, state))
        return state, Edit(slot, key, tokens.v, until)

    def _ages(self, state, lengths):
        """Positions of the tokens that may go; those of other slots are beyond all."""
        slots = jnp.arange(state.shape[-1])
        may_go = (slots >= self.sinks) & (slots < lengths[..., None])
        return jnp.where(may_go, state, jnp.iinfo(jnp.int32).max)
