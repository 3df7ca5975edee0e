"""Which training steps are not taken: of batches that give no number, or a spike of the loss.

Decided inside the compiled step, so that nothing waits for the host. `optax.apply_if_finite` takes
the update after all once it has refused enough of them, and knows of no spikes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_REMEMBERED = 100  # steps that the usual loss is a mean of
_FEWEST = 10  # steps before which none is a spike


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """What a step must not be, and how often."""

    spike: float = 0.0  # skip a step whose loss is above so many times the usual one; 0: off
    stop_after: int = 5  # skipped steps in a row that end the run; 1: the first one

    def __post_init__(self):
        if self.spike != 0 and not 1 < self.spike < float("inf"):
            raise ValueError(f"guard.spike must be above 1, or 0 for off, got {self.spike}")
        if self.stop_after < 1:
            raise ValueError(f"guard.stop_after must be at least 1, got {self.stop_after}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What is known of the steps of a stage so far."""

    skipped: Int[Array, ""]
    in_row: Int[Array, ""]  # skipped, up to the last step
    usual: Float[Array, ""]  # loss, a running mean over the steps that were taken


def fresh_guard() -> Guard:
    """Begin to count."""
    counts = (jnp.zeros((), jnp.int32) for _ in range(2))  # of their own, to be donated
    return Guard(*counts, jnp.zeros(()))


def judge(
    guard: Guard,
    step: Int[Array, ""],
    loss: Float[Array, ""],
    numbers: list[Array],
    spike: float,
) -> tuple[Bool[Array, ""], Guard]:
    """Say whether a step is to be taken, and count it.

    Args:
        guard: of the steps before.
        step: how many those are.
        loss: of the step.
        numbers: of any shapes, which must all be finite.
        spike: of `GuardSettings`.

    Returns:
        (whether it is taken, the guard after it).
    """
    taken = step - guard.skipped
    good = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in (loss, *numbers)]))
    if spike:
        good &= (taken < _FEWEST) | (loss <= spike * guard.usual)
    share = 1.0 / jnp.minimum(taken + 1, _REMEMBERED)
    usual = jnp.where(good, guard.usual + share * (loss - guard.usual), guard.usual)
    skips = jnp.where(good, 0, 1)
    return good, Guard(guard.skipped + skips, (guard.in_row + 1) * skips, usual)
