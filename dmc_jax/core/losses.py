"""The three terms of the training loss: next token, distillation, compression."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.core.projection import project

# Logits are held for so many ids at a time. In float32 that is 32 KiB a token, no more than what
# the MLP of a large model's layer takes, and products so wide keep any device busy.
_IDS_AT_A_TIME = 8192

# A finite stand-in for minus infinity: two of them have a difference.
_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """The logits after every token, as the product that they are."""

    hidden: Float[Array, "B T D"]  # after the final norm
    head: Float[Array, "D V"] | Float[Array, "V D"]
    tied: bool = dataclasses.field(metadata={"static": True})  # the head is the embedding [V, D]

    @property
    def ids(self) -> int:
        """V, the size of the vocabulary."""
        return self.head.shape[0 if self.tied else 1]

    @property
    def logits(self) -> Float[Array, "B T V"]:
        """Multiply: all logits at once, in float32."""
        equation = "BTD,VD->BTV" if self.tied else "BTD,DV->BTV"
        # Rounded to bfloat16, a logit of 16 would be off by up to 0.03 nats.
        return project(equation, self.hidden, self.head, sums=jnp.float32)

    def heads(self, blocks: int) -> Array:
        """Split the head along the vocabulary, zeros behind it where it does not divide.

        Block i has the ids i, i + blocks, i + 2 * blocks, ...: where every device has a part of
        the vocabulary, it has a part of each block.

        Args:
            blocks: how many.

        Returns:
            [blocks, ...], each as `head` is.
        """
        axis = 0 if self.tied else 1
        padding = [(0, 0)] * 2
        padding[axis] = 0, -self.ids % blocks
        head = jnp.pad(self.head, padding)
        shape = (*head.shape[:axis], -1, blocks, *head.shape[axis + 1 :])
        return jnp.moveaxis(head.reshape(shape), axis + 1, 0)


class _Running(NamedTuple):
    """Of every token [B, T], over the ids that were read so far."""

    total: Array  # log-sum-exp of the logits
    target: Array  # logit of the target
    taught: Array  # log-sum-exp of the teacher's logits
    apart: Array  # the teacher's logits less the student's, averaged by the teacher's softmax


def token_losses(
    prediction: Prediction, targets: Int[Array, "B T"], teacher: Prediction | None = None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Measure every prediction by the token that came, and by what a teacher predicts.

    The vocabulary is read a block at a time into running sums, and the backward pass multiplies
    again, so that a large one's logits [B, T, V] are never held. Masking is the caller's.

    Args:
        prediction: of a model.
        targets: ids in [0, V).
        teacher: prediction of another model for the same tokens, which gets no gradient.

    Returns:
        In nats, the negative log-likelihood of each target, and the KL divergence from the
        teacher's next token to the model's, 0 without a teacher.
    """
    models = (prediction,) if teacher is None else (prediction, jax.lax.stop_gradient(teacher))
    blocks = 1 << (-(-prediction.ids // _IDS_AT_A_TIME) - 1).bit_length()
    # Their gradients add up over the blocks: in float32.
    hidden = [model.hidden.astype(jnp.float32) for model in models]

    def read(running, block):
        first, heads = block
        logits = [
            Prediction(x.astype(model.hidden.dtype), head, model.tied).logits
            for x, head, model in zip(hidden, heads, models, strict=True)
        ]
        ids = first + blocks * jnp.arange(logits[0].shape[-1])
        if prediction.ids % blocks:
            logits = [jnp.where(ids < prediction.ids, x, _MASKED) for x in logits]
        target = jnp.where(ids == targets[..., None], logits[0], 0.0).sum(axis=-1)
        new = running._replace(
            total=jnp.logaddexp(running.total, jax.nn.logsumexp(logits[0], axis=-1)),
            target=running.target + target,
        )
        if teacher is not None:
            taught = jnp.logaddexp(running.taught, jax.nn.logsumexp(logits[1], axis=-1))
            weights = jnp.exp(logits[1] - taught[..., None])
            apart = jnp.sum(weights * (logits[1] - logits[0]), axis=-1)
            apart += running.apart * jnp.exp(running.taught - taught)
            new = new._replace(taught=taught, apart=apart)
        return new, None

    nothing = jnp.zeros(targets.shape)
    start = _Running(nothing - jnp.inf, nothing, nothing - jnp.inf, nothing)
    if blocks == 1:
        end, _ = read(start, (0, [model.head for model in models]))
    else:
        heads = [model.heads(blocks) for model in models]
        end, _ = jax.lax.scan(
            jax.checkpoint(read, prevent_cse=False), start, (jnp.arange(blocks), heads)
        )
    nats = end.total - end.target
    return nats, nothing if teacher is None else end.apart - end.taught + end.total


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
