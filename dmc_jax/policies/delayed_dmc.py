"""Dynamic Memory Compression by gates: a token merges into its segment `delay` tokens later."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.delayed import delayed_attention
from dmc_jax.core.dmc import DMCSettings, hard_decisions, relaxed_decisions
from dmc_jax.core.gates import Gates, gate_importance, gate_logits
from dmc_jax.core.pooling import OpenSegment, empty_segment, merge_step, pool_chunk
from dmc_jax.core.rope import rotate
from dmc_jax.errors import UserError
from dmc_jax.policies.policy import Attended, Edit, Policy, Record
from dmc_jax.policies.tail import inherited_slots, oldest_first, ring_after, take

_NEXT_TO_NOTHING = 2**-10  # not 0: a window may hold nobody else


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DelayedDMC(Policy):
    """Merging as in DMC, by gates on a model that stays as it is; `core.delayed` has the equations.

    Rows grow where a segment is opened, for a token that merges leaves its slot to the newest one.
    So one of n tokens has as many slots as segments were opened by the first n - delay, and `delay`
    more.

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
    chunked = True

    def __post_init__(self):
        if self.delay < 0:
            raise UserError(f"delay: expected tokens, or 0 to merge at once, got {self.delay}")
        if self.settings.offset:
            raise UserError(f"offset: gates have a bias in its place, got {self.settings.offset}")

    @property
    def gamma(self):
        """That of the gates."""
        return self.gates.gamma

    def of_layer(self, layer, first, heads):
        """Take the gates of a layer."""
        return dataclasses.replace(self, gates=self.gates.of_layer(layer, first, heads))

    def rotate(self, x, positions, frequencies):
        """Rotate; no channel is taken from the model."""
        return rotate(x, positions, frequencies)

    def whole(self, q, k, v, where, *, x, noise=None, attention=causal_attention):
        """Attend with relaxed decisions where there is noise, with hard ones otherwise.

        Counted is then how probable each merge is, which is what the noise makes of a logit.
        """
        logits = gate_logits(self.gates, x) - self.threshold
        decisions = hard_decisions(logits) if noise is None else jax.nn.sigmoid(logits)
        out, merged = delayed_attention(
            *(q, k, v, logits, self._weights(x, logits, noise)),
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
        newest = Tail(token.k, token.v, *self._decide(token.x), lengths)
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
        new = Tail(tokens.k, tokens.v, *self._decide(tokens.x), jnp.zeros((len(start), T, K), int))
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

    def _decide(self, x):
        """Decisions and weights of tokens [B, *T, D]."""
        logits = gate_logits(self.gates, x)
        logits -= jnp.reshape(self.threshold, (-1, *(1,) * (x.ndim - 1)))
        return hard_decisions(logits), self._weights(x, logits)

    def _weights(self, x, logits, noise=None):
        """How much tokens weigh in the average of their slot."""
        omega = gate_importance(self.gates, x, self.settings.eps)
        if self.margin is None:
            return omega
        if noise is None:
            dropped = hard_decisions(logits, self.margin)
        else:
            dropped = relaxed_decisions(logits - self.margin, noise, self.settings)[0]
        return omega * jnp.maximum(1.0 - dropped, _NEXT_TO_NOTHING)

    def _tokens(self, count):
        """How many tokens the state of a segment holds."""
        return jnp.minimum(count, self.settings.window) if self.settings.window else count


def _where(condition, x, y):
    """Choose by a condition on the first axes."""
    return jnp.where(condition[(..., *(None,) * (x.ndim - condition.ndim))], x, y)
