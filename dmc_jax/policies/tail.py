"""The newest tokens of a row, which are there as they came: their ring, and the slots they take."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def inherited_slots(
    vacated: Bool[Array, "B K T"],
    before: Int[Array, "B K _"],
    lengths: Int[Array, "B K"],
    delay: int,
) -> Int[Array, "B K T"]:
    """Find the slots of a chunk's tokens, which take those that fall vacant, or new ones.

    Args:
        vacated: whether a token takes the slot of the one `delay` before it.
        before: slots of the tokens that are so much before the chunk's first ones.
        lengths: slots that the rows have before the chunk.
        delay: tokens, 1 or more.
    """
    T = vacated.shape[2]
    t = jnp.arange(T)
    before = jnp.pad(before, [(0, 0), (0, 0), (0, max(0, T - delay))])[..., :T]
    new = lengths[..., None] - 1 + jnp.cumsum(~vacated, axis=2)
    slot = jnp.where(vacated, before, new)
    return inherited(slot, jnp.where(vacated & (t >= delay), t - delay, t), delay)


def inherited(
    slots: Int[Array, "*any T"], source: Int[Array, "*any T"], apart: int
) -> Int[Array, "*any T"]:
    """Give a slot that goes from token to token of a chunk to all of them.

    Args:
        slots: right of tokens that have theirs from none of the chunk.
        source: whose slot each token takes; of those, itself.
        apart: tokens from one to the next in a slot, at least.
    """
    for _ in range(math.ceil(math.log2(max(2, slots.shape[-1] / apart)))):
        source = jnp.take_along_axis(source, source, axis=-1)
    return jnp.take_along_axis(slots, source, axis=-1)


def oldest_first(
    ring: Shaped[Array, "B K delay *any"], start: Int[Array, " B"]
) -> Shaped[Array, "B delay K *any"]:
    """Put the tokens before a position in order, that of position p being at place p % delay.

    Args:
        ring: of every row.
        start: position of the token after the newest.
    """
    delay = ring.shape[2]
    place = (start[:, None] + jnp.arange(delay)) % delay
    return take(ring.swapaxes(1, 2), place)


def ring_after(
    tokens: Shaped[Array, "B n K *any"],
    start: Int[Array, " B"],
    counts: Int[Array, " B"],
    delay: int,
) -> Shaped[Array, "B K delay *any"]:
    """Put the newest tokens into a ring again.

    Args:
        tokens: those of `oldest_first`, and a chunk after them.
        start: position of the chunk's first token.
        counts: tokens of the chunk that are not padding.
        delay: tokens in the ring.
    """
    last = (start + counts - 1)[:, None]
    position = last - (last - jnp.arange(delay)) % delay  # newest at each place
    return take(tokens, position - start[:, None] + delay).swapaxes(1, 2)


def take(x: Array, index: Array) -> Array:
    """x[b, index[b]]."""
    return jnp.take_along_axis(x, index[(..., *(None,) * (x.ndim - 2))], axis=1)
