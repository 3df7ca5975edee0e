"""The ways a Llama can attend: an argument of `Llama.apply`, not different models.

dense      the pretrained model, untouched
zero_out   dense, with the decision channel fading (stage one)
relaxed    DMC training: Gumbel-sigmoid decisions with noise (stages two and three)
hard       the compressed model: 0/1 decisions, as evaluation and decoding see it
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.attention import CausalAttention, causal_attention
from dmc_jax.core.dmc import DMCSettings, dense_attention, dmc_attention
from dmc_jax.model.llama import Attend, ModelOutput


class Decisions(NamedTuple):
    """What a DMC mode records per layer, stacked over a run; see `DMCOutput`."""

    decisions: Float[Array, "run B T K"]
    merged: Float[Array, "run B T K"]


def dense(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    channel_scale: float | Array | None = None,
    attention: CausalAttention = causal_attention,
) -> Attend:
    """Ordinary causal attention; `channel_scale` makes it the zero-out stage's.

    Args:
        config: gives the rotary base and scaling.
        positions: of the tokens in their document.
        segment_ids: documents of packed windows.
        channel_scale: factor on the decision channel, None to leave it alone.
        attention: what computes the attention itself; see `model.causal_attention`.
    """

    def attend(q, k, v, layer, state):
        out = dense_attention(
            q,
            k,
            v,
            positions=positions,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
            segment_ids=segment_ids,
            channel_scale=channel_scale,
            attention=attention,
        )
        return out, state, None

    return attend


def compressed(
    config: ModelConfig,
    settings: DMCSettings,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    noise_key: Array | None = None,
    threshold: float | Array = 0.0,
    attention: CausalAttention = causal_attention,
) -> Attend:
    """DMC attention: relaxed where a noise key is given, with hard decisions otherwise.

    Args:
        config: gives the rotary base and scaling.
        settings: window, temperature, offset, eps.
        positions: of the tokens in their document.
        segment_ids: documents of packed windows; merging stays inside them.
        noise_key: of this step's Gumbel noise; layers fold their index in.
        threshold: of hard decisions.
        attention: what computes the attention itself; see `model.causal_attention`.
    """

    def attend(q, k, v, layer, state):
        noise = None
        if noise_key is not None:
            # The difference of two Gumbel draws is logistic.
            noise = jax.random.logistic(jax.random.fold_in(noise_key, layer), k.shape[:3])
        result = dmc_attention(
            q,
            k,
            v,
            positions=positions,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
            settings=settings,
            noise=noise,
            segment_ids=segment_ids,
            threshold=threshold,
            attention=attention,
        )
        return result.out, state, Decisions(result.decisions, result.merged)

    return attend


def decision_means(output: ModelOutput) -> Float[Array, "L B"]:
    """Fraction of merge decisions of every layer and sample, over tokens and KV heads."""
    return jnp.concatenate([record.decisions.mean(axis=(2, 3)) for record in output.records])


def merged_tokens(
    output: ModelOutput, real: Float[Array, "B T"]
) -> tuple[Float[Array, "run K"], ...]:
    """How many real tokens every KV head merged, one array [layers of run, K] per run.

    Args:
        output: of a DMC mode.
        real: 1 for tokens, 0 for padding.
    """
    return tuple(jnp.einsum("LBTK,BT->LK", record.merged, real) for record in output.records)
