"""Rows that are held to a budget: a number of slots, or one that grows with the text."""

import dataclasses
import fractions

import jax.numpy as jnp
from jaxtyping import Array, Int

from dmc_jax.errors import UserError
from dmc_jax.policies.dense import rotate_scaled
from dmc_jax.policies.policy import Edit, Policy, Tokens

LEAST = 16  # slots below which a budget that grows need not begin: to save there is not worth it

_MOST_RATIO = 1_000_000


@dataclasses.dataclass(frozen=True)
class Budgeted(Policy):
    """A policy whose rows take a slot for every token until they have as many as they may.

    From then on a token takes the slot of another one, but for those with which the budget grows. A
    row then has, of t tokens, t slots or the budget, whichever is less, at every t: so a ratio is
    that of means over a text as well as that at its end, and fixed budgets are for equal peaks.
    Both size arrays: other ones compile anew.

    Attributes:
        budget: slots of a row, 1 or more; with a ratio, the least that it is held to.
        ratio: tokens for each slot of a budget that grows with the text: t / ratio slots after t
            tokens, rounded down; counted as the nearest fraction of a denominator up to 1,000.
            None: the budget is fixed.
        channel_scale: as in `Dense`.

    Raises:
        UserError: no slot, or a ratio below 1 or above a million.
    """

    budget: int = dataclasses.field(metadata={"static": True})
    ratio: float | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})
    channel_scale: float | Array | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        if self.budget < 1:
            raise UserError(f"budget: expected a slot or more for a row, got {self.budget}")
        if self.ratio is not None:
            check_ratio(self.ratio)

    def most_slots(self, tokens):
        """Say how many slots a row may come to: the budget."""
        return min(tokens, max(self.budget, self._share(tokens)))

    def slots_after(self, tokens: Int[Array, "*any"]) -> Int[Array, "*any"]:
        """Say how many slots a row has after so many tokens: those it may come to."""
        return jnp.minimum(tokens, jnp.maximum(self.budget, self._share(tokens)))

    def _share(self, tokens):
        """The slots that a ratio gives to tokens. In whole numbers: no two programs differ."""
        if self.ratio is None:
            return 0
        ratio = fractions.Fraction(self.ratio).limit_denominator(1000)
        return tokens * ratio.denominator // ratio.numerator

    def rotate(self, x, positions, frequencies):
        """Rotate as `Dense` does."""
        return rotate_scaled(x, positions, frequencies, self.channel_scale)

    def place(self, token: Tokens, lengths: Int[Array, "B K"], victim: Int[Array, "B K"]) -> Edit:
        """Write a token to the next slot if its row may have one more, else to the victim's.

        Args:
            token: of every sequence.
            lengths: slots that the rows have before it.
            victim: a slot of each row that has one.
        """
        key = self.rotate(token.k[:, None], token.positions[:, None], token.frequencies)[:, 0]
        room = lengths < self.slots_after(token.positions + 1)[:, None]
        return Edit(jnp.where(room, lengths, victim), key, token.v)


def check_ratio(ratio: float) -> None:
    """Refuse tokens for a slot that cannot be.

    Raises:
        UserError: fewer than 1, or more than a million.
    """
    if not 1 <= ratio <= _MOST_RATIO:
        raise UserError(f"ratio: expected 1 to {_MOST_RATIO:,} tokens for a slot, got {ratio:g}")
