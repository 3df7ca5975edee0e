"""The noise of relaxed decisions."""

import jax
from jaxtyping import Array, Float, Int


def decision_noise(
    key: Array,
    part: tuple[Int[Array, ""] | int, int],
    layer: Int[Array, ""] | int,
    shape: tuple[int, int, int],
) -> Float[Array, "B T K"]:
    """Draw a layer's noise: the difference of two Gumbel draws, which is logistic.

    Args:
        key: one, or a key of each sequence, [B].
        part: of one key, (i, n) where the sequences are every n-th, from i on, of a batch whose
            noise is drawn as one.
        layer: its index.
        shape: [B, T, K] of the result.
    """
    B, *rest = shape
    if key.ndim:
        own = jax.vmap(jax.random.fold_in, (0, None))(key, layer)
        return jax.vmap(lambda of_sequence: jax.random.logistic(of_sequence, rest))(own)
    number, parts = part
    whole = jax.random.logistic(jax.random.fold_in(key, layer), (B * parts, *rest))
    return whole.reshape(B, parts, *rest)[:, number]
