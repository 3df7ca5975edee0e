"""Every schedule is a function of the step alone, so a resumed run follows it bit for bit."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Step = Int[Array, ""] | int


def compression_target(
    step: Step, steps: int, ratio: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Schedule the target compression ratio at `step`, rising linearly from 1.

    Linear in the ratio, not in the fraction of merged tokens. For the fine-tuning stage, where the
    target is fixed, ask for `step = steps`.

    Args:
        step: step of the stage, from 0; clipped to [0, steps].
        steps: length of the stage.
        ratio: tokens per slot at the end of it, >= 1.

    Returns:
        (ratio now, prior now), where the prior `1 - 1 / ratio` is the wanted fraction of merges.
    """
    now = 1.0 + (ratio - 1.0) * jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
    return now, 1.0 - 1.0 / now


def decision_channel_scale(step: Step, steps: int) -> Float[Array, ""]:
    """Fade the decision channel of q and k in the zero-out stage: 1 at first, 0 from 80 % on.

    `max(0, 1 - step / (0.8 steps))`: the released code's schedule (the paper's text fades over the
    whole stage).
    """
    return jnp.maximum(0.0, 1.0 - jnp.asarray(step, jnp.float32) / (0.8 * steps))


def learning_rate(
    step: Step, *, steps: int, peak: float, final: float, warmup: int, shape: str
) -> Float[Array, ""]:
    """Schedule the learning rate: linear warm-up to `peak`, then constant, cosine or linear.

    Args:
        step: step of the stage, from 0.
        steps: length of the stage.
        peak: rate after the warm-up.
        final: rate at the end of the stage; ignored when `shape` is "constant".
        warmup: steps of warm-up (0 for none); the first step already has `peak / warmup`.
        shape: "constant", "cosine" or "linear".

    Raises:
        ValueError: unknown `shape`.
    """
    step = jnp.asarray(step, jnp.float32)
    done = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
    if shape == "constant":
        rate = jnp.asarray(peak, jnp.float32)
    elif shape == "cosine":
        rate = final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    elif shape == "linear":
        rate = peak + (final - peak) * done
    else:
        raise ValueError(f"learning-rate shape {shape!r} is not one of constant, cosine, linear")
    return rate * jnp.minimum(1.0, (step + 1.0) / max(1, warmup))
