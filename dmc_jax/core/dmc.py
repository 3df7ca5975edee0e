"""Dynamic Memory Compression (Nawrot et al. 2024, arXiv 2403.09636): the equations.

Every KV head reads two numbers from the last channel of its keys and queries: whether token i is
*merged* into the slot of token i - 1 (decision 1) or *appended* as a new slot (decision 0), and how
much it weighs in the average (importance). A slot holds the weighted average of its segment. That
channel takes no part in attention, so DMC adds no parameters.

Where the paper and NVIDIA's released implementation differ, this follows the implementation, whose
numbers are in tests/data: the channel is the last one, the loss counts hard decisions (with a
straight-through gradient), each sample has a hinge of its own, and the first token's decision is
counted although it cannot merge. Unlike that implementation, state is float32 everywhere and one
eps serves training and decoding. Slots are in `pooling.py`, re-exported here.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.core.attention import CausalAttention, causal_attention
from dmc_jax.core.pooling import OpenSegment, empty_segment, merge_step, pool
from dmc_jax.core.rope import Llama3Scaling, rotary_frequencies, rotate

__all__ = [
    "DECISION_CHANNEL",
    "DMCOutput",
    "DMCSettings",
    "OpenSegment",
    "dense_attention",
    "dmc_attention",
    "empty_segment",
    "hard_decisions",
    "importance",
    "merge_logits",
    "merge_step",
    "pool",
    "relaxed_decisions",
    "rotate_for_attention",
    "segment_starts",
    "without_decision_channel",
]

# The released models use the last channel of each head (the paper's text says the first).
DECISION_CHANNEL = -1

# Log-weight of a superseded state under hard decisions; exp of it is 0 in float32.
_SUPERSEDED = -50_000.0


@dataclasses.dataclass(frozen=True)
class DMCSettings:
    """What the paper fixes for a whole run.

    Attributes:
        window: tokens that a merged state may cover, itself included; None (or 0) is unlimited.
        temperature: of the Gumbel-sigmoid relaxation.
        offset: subtracted from merge logits and added to importance logits, so that with a zero
            channel alpha = sigmoid(-5) = 0.0067 and omega = sigmoid(5) = 0.9933.
        eps: added to the importance so that a state's total weight is never 0.

    Raises:
        ValueError: a negative window or eps, or a temperature that is not positive.
    """

    window: int | None = 12
    temperature: float = 0.1
    offset: float = 5.0
    eps: float = 2**-7

    def __post_init__(self):
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must be >= 1, or None for unlimited, got {self.window}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.eps < 0:
            raise ValueError(f"eps must be >= 0, got {self.eps}")


class DMCOutput(NamedTuple):
    """Result of `dmc_attention`; S = T, all per KV head where not said otherwise."""

    out: Float[Array, "B T N H"]
    decisions: Float[Array, "B S K"]  # 0/1 as the loss counts them, straight-through in training
    merged: Float[Array, "B S K"]  # 0/1 as they act: position 0 and document starts append
    pooled_k: Float[Array, "B S K H"]  # unrotated
    pooled_v: Float[Array, "B S K H"]
    key_bias: Float[Array, "B S K"]


# ---- what a head decides ----------------------------------------------------------------------


def merge_logits(k: Float[Array, "B S K H"], settings: DMCSettings) -> Float[Array, "B S K"]:
    """Read the log-odds of merging each token into the slot before it: `k[last] - offset`."""
    return k[..., DECISION_CHANNEL].astype(jnp.float32) - settings.offset


def importance(
    q: Float[Array, "B T N H"], num_kv_heads: int, settings: DMCSettings
) -> Float[Array, "B T K"]:
    """Read the weight of each token in its slot's average: `sigmoid(q[last] + offset) + eps`.

    The G query heads that share a KV head speak through the mean of their logits.
    """
    B, T, N, _ = q.shape
    logits = q[..., DECISION_CHANNEL].astype(jnp.float32)
    logits = logits.reshape(B, T, num_kv_heads, N // num_kv_heads).mean(axis=-1)
    return jax.nn.sigmoid(logits + settings.offset) + settings.eps


def relaxed_decisions(
    logits: Float[Array, "*any"], noise: Float[Array, "*any"], settings: DMCSettings
) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """Relax decisions for training by a Gumbel-sigmoid: merge and keep log-probability.

    Args:
        logits: merge logits.
        noise: difference of two standard Gumbel draws, which is one standard logistic draw.
        settings: gives the temperature.

    Returns:
        (alpha, log(1 - alpha)); the second is computed from the logit, exact where alpha rounds
        to 1.
    """
    z = (logits + noise) / settings.temperature
    return jax.nn.sigmoid(z), jax.nn.log_sigmoid(-z)


def hard_decisions(
    logits: Float[Array, "*any"], threshold: float | Array = 0.0
) -> Float[Array, "*any"]:
    """Decide as a trained model: 1 (merge) where the logit exceeds `threshold`, else 0."""
    return (logits > threshold).astype(jnp.float32)


def superseded(decisions: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Bias keys so that nobody attends where a decision is 1: log(1 - 1), but finite."""
    return _SUPERSEDED * decisions


def segment_starts(
    B: int, S: int, segment_ids: Int[Array, "B S"] | None = None
) -> Float[Array, "B S 1"]:
    """Mark with 1 the tokens that append whatever their logits: the first of every document."""
    starts = jnp.zeros((B, S, 1)).at[:, 0].set(1.0)
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = starts.at[:, 1:, 0].set(changes.astype(starts.dtype))
    return starts


class Decisions(NamedTuple):
    """Result of `decide`."""

    alpha: Float[Array, "B S K"]  # 0 at document starts
    key_bias: Float[Array, "B S K"]  # log-weight of each token's state once the next has come
    decisions: Float[Array, "B S K"]  # as in `DMCOutput`
    merged: Float[Array, "B S K"]


def decide(
    logits: Float[Array, "B S K"],
    settings: DMCSettings,
    *,
    noise: Float[Array, "B S K"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    threshold: float | Array = 0.0,
) -> Decisions:
    """Decide for whole sequences, relaxed where there is noise.

    Args:
        logits: of merging.
        settings, noise, segment_ids, threshold: as in `dmc_attention`.
    """
    may_merge = 1.0 - segment_starts(*logits.shape[:2], segment_ids)  # [B, S, 1]
    if noise is None:
        decisions = alpha = hard_decisions(logits, threshold)
        log_keep = superseded(decisions)
        merged = decisions * may_merge
    else:
        alpha, log_keep = relaxed_decisions(logits, noise, settings)
        hard = (alpha > 0.5).astype(jnp.float32)
        decisions = hard + (alpha - jax.lax.stop_gradient(alpha))  # straight-through
        merged = hard * may_merge
    # The next token's decision supersedes a state; nothing supersedes the last one.
    key_bias = jnp.pad((log_keep * may_merge)[:, 1:], [(0, 0), (0, 1), (0, 0)])
    return Decisions(alpha * may_merge, key_bias, decisions, merged)


# ---- attention over the compressed cache ------------------------------------------------------


def without_decision_channel(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Set the decision channel of `x` to 0."""
    channel = jnp.arange(x.shape[-1]) == x.shape[-1] + DECISION_CHANNEL
    return jnp.where(channel, jnp.zeros((), x.dtype), x)


def rotate_for_attention(
    x: Float[Array, "B T heads H"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " H//2"],
) -> Float[Array, "B T heads H"]:
    """Rotate queries or pooled keys so that the decision channel takes no part in attention.

    It is zeroed before the rotation and after it, since its partner channel rotates into it.
    """
    rotated = rotate(without_decision_channel(x), positions, frequencies)
    return without_decision_channel(rotated)


def dmc_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    positions: Int[Array, "B T"],
    rope_theta: float,
    settings: DMCSettings,
    noise: Float[Array, "B S K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    rope_scaling: Llama3Scaling | None = None,
    threshold: float | Array = 0.0,
    attention: CausalAttention = causal_attention,
) -> DMCOutput:
    """Attend over whole sequences with DMC, S = T of the paper's section 3.

    Every token's pooled state is a key of its own; the state of token j is superseded where token
    j + 1 merges, and then counts with weight (1 - alpha_{j+1}) for later queries. A query always
    sees its own token's state. With hard decisions this is decoding over the merged cache.

    Args:
        q, k, v: projections before rotation, with the raw decision channel.
        positions: of the tokens in their document; a merged key is rotated at its newest token's.
        rope_theta: base of the rotary frequencies.
        settings: window, temperature, offset, eps.
        noise: logistic noise of the training path; None: hard decisions.
        segment_ids: documents of a packed window; neither merging nor attention crosses them.
        rope_scaling: Llama 3.1's stretching of the frequencies, if the model has it.
        threshold: of hard decisions on the merge logit (calibrated for a wanted ratio; 0 is even
            odds).
        attention: what computes the attention itself.

    Returns:
        See `DMCOutput`.
    """
    K, H = k.shape[2:]
    logits = merge_logits(k, settings)
    omega = importance(q, K, settings)
    alpha, key_bias, decisions, merged = decide(
        logits, settings, noise=noise, segment_ids=segment_ids, threshold=threshold
    )
    both = pool(jnp.concatenate([k, v], axis=-1), alpha, omega, settings.window)
    pooled_k, pooled_v = both[..., :H], both[..., H:]

    frequencies = rotary_frequencies(H, rope_theta, rope_scaling)
    out = attention(
        rotate_for_attention(q, positions, frequencies),
        rotate_for_attention(pooled_k, positions, frequencies),
        pooled_v,
        key_bias,
        scale=H**-0.5,
        segment_ids=segment_ids,
    )
    return DMCOutput(out, decisions, merged, pooled_k, pooled_v, key_bias)


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    positions: Int[Array, "B T"],
    rope_theta: float,
    segment_ids: Int[Array, "B T"] | None = None,
    rope_scaling: Llama3Scaling | None = None,
    channel_scale: float | Array | None = None,
    attention: CausalAttention = causal_attention,
) -> Float[Array, "B T N H"]:
    """Attend in the ordinary way, with the decision channel fading out where asked.

    Args:
        q, k, v, positions, rope_theta, segment_ids, rope_scaling, attention: as in
            `dmc_attention`.
        channel_scale: factor on the decision channel of q and k, applied before the rotation and
            again after it; None: the untouched pretrained model.
    """
    H = q.shape[-1]
    frequencies = rotary_frequencies(H, rope_theta, rope_scaling)
    if channel_scale is None:
        rotated = (rotate(x, positions, frequencies) for x in (q, k))
    else:
        channel = jnp.ones(H).at[DECISION_CHANNEL].set(channel_scale).astype(q.dtype)
        rotated = (channel * rotate(channel * x, positions, frequencies) for x in (q, k))
    return attention(*rotated, v, scale=H**-0.5, segment_ids=segment_ids)
