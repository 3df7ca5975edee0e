"""Merging, whatever it goes by: a token joins its segment's slot at once, or when it is older."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.delayed import delayed_attention
from dmc_jax.core.dmc import DMCSettings, hard_decisions
from dmc_jax.core.pooling import OpenSegment, empty_segment, merge_step, pool_chunk
from dmc_jax.core.rope import rotate
from dmc_jax.errors import UserError
from dmc_jax.policies.policy import Attended, Edit, Policy, Record
from dmc_jax.policies.tail import inherited_slots, oldest_first, ring_after, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
    """The last `delay` tokens of every row, as they came; that of position p at p % delay."""

    keys: Float[Array, "*rows delay H"]
    values: Float[Array, "*rows delay H"]
    merges: Float[Array, "*rows delay"]  # 0/1
    weights: Float[Array, "*rows delay"]
    slots: Int[Array, "*rows delay"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What rows remember beside their slots."""

    segment: OpenSegment  # of tokens that have settled
    slot: Int[Array, "*rows"]  # of it
    tail: Tail


class Merging(Policy):
    """Merging on a model that stays as it is; `core.delayed` has the equations.

    Rows grow where a segment is opened, for a token that merges leaves its slot to the newest one.
    So one of n tokens has as many slots as segments were opened by the first n - delay, and `delay`
    more. What tokens go by is left to `logits` and `weights`.

    Attributes:
        delay: tokens for which one stays as it is; 0 merges at once. Static.
        settings: window, temperature and eps. Static.

    Raises:
        UserError: a negative delay.
    """

    delay: int
    settings: DMCSettings

    chunked = True
    branches = True

    def __post_init__(self):
        if self.delay < 0:
            raise UserError(f"delay: expected tokens, or 0 to merge at once, got {self.delay}")

    @abc.abstractmethod
    def logits(
        self, x: Float[Array, "B *T D"], positions: Int[Array, "B *T"], heads: int
    ) -> Float[Array, "B *T K"]:
        """Give the logit of merging each token into the segment before it; above 0 it merges.

        Args:
            x: input of the attention, after the norm.
            positions: in their documents, of which the first token opens a segment in any case.
            heads: K.
        """

    def weights(
        self,
        x: Float[Array, "B *T D"],
        logits: Float[Array, "B *T K"],
        noise: Float[Array, "B *T K"] | None = None,
    ) -> Float[Array, "B *T K"]:
        """Say how much tokens weigh in the average of their slot: all alike.

        Args:
            x: as for `logits`.
            logits: of merging.
            noise: as for `whole`.
        """
        return jnp.ones_like(logits)

    def rotate(self, x, positions, frequencies):
        """Rotate; no channel is taken from the model."""
        return rotate(x, positions, frequencies)

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend with relaxed decisions where there is noise, with hard ones otherwise.

        Counted is then how probable each merge is, which is what the noise makes of a logit.
        """
        logits = self.logits(x, where.positions, k.shape[2])
        decisions = hard_decisions(logits) if noise is None else jax.nn.sigmoid(logits)
        out, merged = delayed_attention(
            *(q, k, v, logits, self.weights(x, logits, noise)),
            delay=self.delay,
            gamma=self.gamma,
            **where._asdict(),
            settings=self.settings,
            noise=noise,
            attention=attention,
        )
        # The slot of a token that merges goes to the one `delay` later in its document.
        before = jnp.pad(merged, [(0, 0), (self.delay, 0), (0, 0)])[:, : merged.shape[1]]
        inherits = before * (where.positions >= self.delay)[..., None]
        return Attended(out, Record(1.0 - inherits, decisions))

    def start(self, rows, head_dim, dtype, slots):
        """Remember the tokens of the tail, and those of the open segment."""
        ring = (*rows, self.delay)
        tokens = (jnp.zeros((*ring, head_dim), dtype) for _ in range(2))
        numbers = (jnp.zeros(ring) for _ in range(2))
        segment = empty_segment(rows, head_dim, self.settings.window, dtype)
        tail = Tail(*tokens, *numbers, jnp.zeros(ring, jnp.int32))
        return Rows(segment, jnp.zeros(rows, jnp.int32), tail)

    def step(self, state, token, lengths):
        """Let the token `delay` before settle, and write the newest to its slot, or the next."""
        newest = Tail(token.k, token.v, *self._decide(token), lengths)
        settled, there = newest, jnp.ones_like(lengths, bool)
        if self.delay:
            at = (token.positions % self.delay)[:, None]
            settled = jax.tree.map(lambda x: take(x.swapaxes(1, 2), at)[:, 0], state.tail)
            there = jnp.broadcast_to((token.positions >= self.delay)[:, None], lengths.shape)
        weights = jnp.where(there, settled.weights, 1.0)  # of nobody: 0, to divide by
        numbers = settled.merges, weights, self.settings.window
        after, key, value = merge_step(state.segment, settled.keys, settled.values, *numbers)
        segment = jax.tree.map(lambda x, old: _where(there, x, old), after, state.segment)
        joins = there & (after.count > 1)
        slot = jnp.where(there & ~joins, settled.slots, state.slot)  # of the open segment
        positions = (token.positions - self.delay)[:, None]
        key = rotate(key[:, None].astype(token.k.dtype), positions, token.frequencies)[:, 0]
        merged = Edit(jnp.where(there, slot, -1), key, value, tokens=self._tokens(after.count))
        if not self.delay:
            return Rows(segment, slot, state.tail), merged
        newest = dataclasses.replace(newest, slots=jnp.where(joins, settled.slots, lengths))
        here = jnp.arange(self.delay) == at[..., None]  # [B, 1, delay]
        tail = jax.tree.map(
            lambda ring, x: _where(here, x[:, :, None].astype(ring.dtype), ring), state.tail, newest
        )
        key = rotate(token.k[:, None], token.positions[:, None], token.frequencies)[:, 0]
        raw = Edit(newest.slots, key, token.v, tokens=jnp.ones_like(lengths), also=merged)
        return Rows(segment, slot, tail), raw

    def chunk(self, state, tokens, lengths, counts):
        """Let as many tokens settle, which are those `delay` before; and find all slots at once."""
        (T, K), delay = tokens.k.shape[1:3], self.delay
        start, t = tokens.positions[:, 0], jnp.arange(T)
        old = jax.tree.map(lambda ring: oldest_first(ring, start), state.tail)
        new = Tail(tokens.k, tokens.v, *self._decide(tokens), jnp.zeros((len(start), T, K), int))
        known = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), old, new)

        # None settles while a row has fewer tokens than `delay`: the first that does, to the front.
        absent = jnp.clip(delay - start, 0, T)[:, None]
        settling = jax.tree.map(lambda x: take(x[:, :T], jnp.minimum(t + absent, T - 1)), known)
        *states, joins, segment = pool_chunk(
            state.segment,
            *(settling.keys, settling.values, settling.merges),
            jnp.where(settling.weights > 0, settling.weights, 1.0),  # of nobody: 0, to divide by
            jnp.maximum(counts - absent[:, 0], 0),
            self.settings.window,
        )
        *states, joins = (take(x, jnp.maximum(t - absent, 0)) for x in (*states, joins))
        there = (t >= absent)[..., None]
        joins, opens = (there & x for x in (joins, ~joins))
        newest = jax.lax.cummax(jnp.where(opens, t[:, None], -1), axis=1)  # to open a segment
        before = state.segment.count[:, None] - absent[..., None]
        count = jnp.where(newest >= 0, t[:, None] - newest, before + t[:, None]) + 1

        if delay:
            of_rows = (x.swapaxes(1, 2) for x in (joins, old.slots))
            slots = inherited_slots(*of_rows, lengths, delay).swapaxes(1, 2)
        else:
            slots = lengths[:, None] - 1 + jnp.cumsum(~joins, axis=1)
        known = dataclasses.replace(known, slots=jnp.concatenate([old.slots, slots], axis=1))
        opened = jnp.take_along_axis(known.slots, jnp.maximum(newest, 0), axis=1)
        slot = jnp.where(newest >= 0, opened, state.slot[:, None])  # of the open segment
        last = jnp.take_along_axis(slot, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        tail = jax.tree.map(lambda x: ring_after(x, start, counts, delay), known)
        after = Rows(segment, jnp.where(counts[:, None] > 0, last, state.slot), tail)

        key = rotate(states[0].astype(tokens.k.dtype), tokens.positions - delay, tokens.frequencies)
        until = jnp.where(jnp.pad(joins[:, 1:], [(0, 0), (0, 1), (0, 0)]), t[:, None] + 1, T)
        merged = Edit(
            *(jnp.where(there, slot, -1).swapaxes(1, 2), key, states[1], until.swapaxes(1, 2)),
            tokens=self._tokens(count).swapaxes(1, 2),
        )
        if not delay:
            return after, merged
        key = rotate(tokens.k, tokens.positions, tokens.frequencies)
        until, ones = (jnp.broadcast_to(x, joins.swapaxes(1, 2).shape) for x in (t + delay, 1))
        return after, Edit(slots.swapaxes(1, 2), key, tokens.v, until, tokens=ones, also=merged)

    def open_slots(self, state, lengths):
        """That of the open segment, and those of tokens that have not settled."""
        return jnp.concatenate([state.tail.slots, state.slot[..., None]], axis=-1)

    def _decide(self, tokens):
        """Decisions and weights of tokens [B, *T]."""
        logits = self.logits(tokens.x, tokens.positions, tokens.k.shape[-2])
        return hard_decisions(logits), self.weights(tokens.x, logits)

    def _tokens(self, count):
        """How many tokens the state of a segment holds."""
        return jnp.minimum(count, self.settings.window) if self.settings.window else count


def _where(condition, x, y):
    """Choose by a condition on the first axes."""
    return jnp.where(condition[(..., *(None,) * (x.ndim - condition.ndim))], x, y)
