"""Merging after a delay: a token is decided on as it comes, and merged `delay` tokens later.

Token j is seen as it is, raw, by the queries of tokens j to j + delay - 1. When token j + delay
comes it settles: it merges into the open segment or opens one, which holds what `pooling.pool` says
of the settled tokens alone. So in one softmax the query of token t sees

    the raw keys of tokens j with 0 <= t - j < delay
    the states j of the segments with t - j >= delay, and to their scores are added
        log(1 - alpha_{j+1})   where t - j > delay: token j + 1 has settled and may have merged
        gamma log n_j          of the n_j tokens in the state, so that it may weigh like several

all within its document, of which the first token merges with none. A state's key is the average of
unrotated keys, rotated at its newest token's position. With hard decisions that is decoding over
the raw tokens of a tail and the slots of the segments before it. Delay 0 is DMC.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from dmc_jax.core.attention import CausalAttention, causal_attention, join
from dmc_jax.core.dmc import DMCSettings, decide
from dmc_jax.core.pooling import pool, tokens_in
from dmc_jax.core.rope import Llama3Scaling, rotary_frequencies, rotate

# Counts of tokens have two bytes beside the pages; an unlimited window may come to more.
_MOST_TOKENS = 2**16 - 1


def delayed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    logits: Float[Array, "B T K"],
    omega: Float[Array, "B T K"],
    *,
    delay: int,
    gamma: Float[Array, " K"] | None,
    positions: Int[Array, "B T"],
    rope_theta: float,
    settings: DMCSettings,
    noise: Float[Array, "B T K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    rope_scaling: Llama3Scaling | None = None,
    threshold: float | Array = 0.0,
    attention: CausalAttention = causal_attention,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K"]]:
    """Attend over whole sequences, whose tokens merge after a delay.

    Args:
        q, k, v: projections before rotation, all channels of which take part.
        logits: of merging each token.
        omega: its importance.
        delay: tokens, 0 or more; static.
        gamma: factor on the logarithm of the tokens in a state; None: 0, at no cost.
        positions, rope_theta, settings, noise, segment_ids, rope_scaling, threshold, attention: as
            in `core.dmc.dmc_attention`.

    Returns:
        (the output, 1 where a token merges `delay` tokens later, else 0).
    """
    H = q.shape[-1]
    alpha, key_bias, _, merged = decide(
        logits, settings, noise=noise, segment_ids=segment_ids, threshold=threshold
    )
    states = pool(jnp.concatenate([k, v], axis=-1), alpha, omega, settings.window)
    mass = None
    if gamma is not None:
        mass = slot_mass(tokens_in(alpha, settings.window), gamma)
        key_bias += mass
    frequencies = rotary_frequencies(H, rope_theta, rope_scaling)
    q = rotate(q, positions, frequencies)
    how = {"scale": H**-0.5, "segment_ids": segment_ids}
    of_states = {"spared": delay + 1, "spared_bias": mass, "first": delay, **how}
    arguments = q, rotate(states[..., :H], positions, frequencies), states[..., H:], key_bias
    if not delay:
        out = attention(*arguments, **of_states)
    else:
        raw = attention(q, rotate(k, positions, frequencies), v, until=delay, with_lse=True, **how)
        out = join(raw, attention(*arguments, with_lse=True, **of_states))
    return out, merged


def slot_mass(tokens: Num[Array, "*rows"], gamma: Float[Array, "*any"]) -> Float[Array, "*rows"]:
    """Say what the tokens in a slot add to its score: `gamma log n`.

    Args:
        tokens: n, 1 or more; more than 2 ** 16 - 1 count as that.
        gamma: of the rows.
    """
    return gamma * jnp.log(jnp.minimum(tokens, _MOST_TOKENS).astype(jnp.float32))
