"""The three terms of the training loss: next token, compression, distillation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Measure every target's negative log-likelihood in nats. Masking is the caller's."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def compression_loss(
    decision_mean: Float[Array, "L B"], prior: Float[Array, ""] | float, per_layer: bool = False
) -> Float[Array, ""]:
    """Ask by a hinge for at least a fraction `prior` of merges.

    Args:
        decision_mean: fraction of merge decisions of each layer and sample, over tokens and heads.
        prior: wanted fraction, `1 - 1 / ratio`.
        per_layer: False, the released implementation's form: one hinge per sample on the mean over
            layers. True: one hinge per layer on the mean over samples, which keeps any single layer
            from doing all the merging and lets easy text merge more than hard text.

    Returns:
        The mean of the hinges.
    """
    fraction = jnp.mean(decision_mean, axis=1 if per_layer else 0)
    return jnp.mean(jnp.maximum(0.0, prior - fraction))


def distillation(
    student: Float[Array, "B T V"], teacher: Float[Array, "B T V"]
) -> Float[Array, "B T"]:
    """Measure the KL divergence in nats from the teacher's next token to the student's."""
    student = jax.nn.log_softmax(student.astype(jnp.float32))
    teacher = jax.nn.log_softmax(teacher.astype(jnp.float32))
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
