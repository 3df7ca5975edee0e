"""Dynamic Memory Compression (Nawrot et al. 2024, arXiv 2403.09636): the equations.

Every KV head reads two numbers from the last channel of its keys and queries: whether token i is
*merged* into the slot of token i - 1 (decision 1) or *appended* as a new slot (decision 0), and how
much it weighs in the average (importance). A slot holds the weighted average of its segment. That
channel takes no part in attention, so DMC adds no parameters.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.rope import Llama3Scaling, rotary_frequencies, rotate

# The released models use the last channel of each head (the paper's text says the first).
DECISION_CHANNEL = -1

# Tokens per block of the banded product that pools them.
_POOL_BLOCK = 16

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
    """Log-odds of merging each token into the slot before it: `k[last] - offset` (eq. 2)."""
    return k[..., DECISION_CHANNEL].astype(jnp.float32) - settings.offset


def importance(
    q: Float[Array, "B T N H"], num_kv_heads: int, settings: DMCSettings
) -> Float[Array, "B T K"]:
    """Weight of each token in its slot's average: `sigmoid(q[last] + offset) + eps` (eq. 3).

    The G query heads that share a KV head speak through the mean of their logits.
    """
    B, T, N, _ = q.shape
    logits = q[..., DECISION_CHANNEL].astype(jnp.float32)
    logits = logits.reshape(B, T, num_kv_heads, N // num_kv_heads).mean(axis=-1)
    return jax.nn.sigmoid(logits + settings.offset) + settings.eps


def relaxed_decisions(
    logits: Float[Array, "B S K"], noise: Float[Array, "B S K"], settings: DMCSettings
) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
    """Gumbel-sigmoid relaxation for training: merge probability and keep log-probability (eq. 4).

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
    logits: Float[Array, "B S K"], threshold: float | Array = 0.0
) -> Float[Array, "B S K"]:
    """Decisions of a trained model: 1 (merge) where the logit exceeds `threshold`, else 0."""
    return (logits > threshold).astype(jnp.float32)


def segment_starts(
    B: int, S: int, segment_ids: Int[Array, "B S"] | None = None
) -> Float[Array, "B S 1"]:
    """1 where a token must append whatever its logit: position 0 and the first of a document."""
    starts = jnp.zeros((B, S, 1)).at[:, 0].set(1.0)
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = starts.at[:, 1:, 0].set(changes.astype(starts.dtype))
    return starts


# ---- what a slot holds ------------------------------------------------------------------------


def pool(
    x: Float[Array, "B S K H"],
    alpha: Float[Array, "B S K"],
    omega: Float[Array, "B S K"],
    window: int | None,
) -> Float[Array, "B S K H"]:
    """State of the open slot after every token, all tokens at once (eq. 5 to 7; SPEC 4).

        coef(i, j) = alpha_{j+1} ... alpha_i
        y_i = sum_j coef(i, j) omega_j x_j / sum_j coef(i, j) omega_j      over the last W tokens j

    That is a weighted mean of the last W tokens with weights [B, S, K, W], so a banded matrix
    product at cost O(S W); with an unlimited window O(S log S), by an associative scan of the
    recurrence `s_i = alpha_i s_{i-1} + omega_i x_i`.

    Args:
        x: keys or values before rotation.
        alpha: merge probability or 0/1 decision of each token, 0 at document starts; alpha_0
            counts as 0.
        omega: importance of each token.
        window: W >= 1 tokens; None or 0 is unlimited.

    Returns:
        The pooled states in the dtype of `x`, computed in float32.
    """
    if window == 1:
        return x
    alpha = jnp.where(jnp.arange(x.shape[1])[:, None] == 0, 0.0, alpha)
    if not window:
        weighted = omega[..., None] * x.astype(jnp.float32)
        total, weighted = _running_sum(alpha, omega), _running_sum(alpha[..., None], weighted)
        return (weighted / total[..., None]).astype(x.dtype)
    weights = _pooling_weights(alpha, omega, min(window, x.shape[1]))
    return _banded_product(weights, x.astype(jnp.float32)).astype(x.dtype)


def _pooling_weights(alpha: Array, omega: Array, window: int) -> Float[Array, "B S K W"]:
    """Weight of token i - W + 1 + w in the state of token i; they add up to 1 over w."""
    S = alpha.shape[1]
    past_alpha, past_omega = (jnp.pad(a, [(0, 0), (window - 1, 0), (0, 0)]) for a in (alpha, omega))

    def ago(padded: Array, m: int) -> Array:  # entry i of the result is entry i - m of the original
        return jax.lax.slice_in_dim(padded, window - 1 - m, window - 1 - m + S, axis=1)

    coef, weights = jnp.ones_like(alpha), [omega]
    for m in range(1, window):
        coef = coef * ago(past_alpha, m - 1)
        weights.insert(0, coef * ago(past_omega, m))
    stacked = jnp.stack(weights, axis=-1)
    return stacked / stacked.sum(axis=-1, keepdims=True)


def _banded_product(weights: Float[Array, "B S K W"], x: Float[Array, "B S K H"]) -> Array:
    """`y_i = sum_w weights[i, w] x[i - W + 1 + w]`, as small dense products.

    Blocks of b >= W - 1 tokens read themselves and the end of the block before. Measured on a
    2-core CPU at S = 2048, K = 8, H = 128: 13 ms forward and backward, against 263 ms for W shifted
    multiply-adds.
    """
    B, S, K, W = weights.shape
    b = max(_POOL_BLOCK, W - 1)
    pad = [(0, 0), (0, -S % b), (0, 0), (0, 0)]
    weights, x = jnp.pad(weights, pad), jnp.pad(x, pad)
    n = x.shape[1] // b
    x = x.reshape(B, n, b, K, -1)
    before = jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])[:, :-1, b - W + 1 :]
    seen = jnp.concatenate([before, x], axis=2)  # [B, n, W-1+b, K, H]
    # Row t of a block's band holds its W weights from column t on: pad each row to W + b and read
    # the same memory in rows of one less, which moves every row right by one more.
    band = weights.reshape(B, n, b, K, W).transpose(0, 1, 3, 2, 4)
    band = jnp.pad(band, [(0, 0)] * 4 + [(0, b)]).reshape(B, n, K, b * (W + b))
    band = band[..., : b * (W + b - 1)].reshape(B, n, K, b, W + b - 1)
    y = jnp.einsum("BnKts,BnsKH->BntKH", band, seen, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(B, n * b, K, -1)[:, :S]


def _running_sum(decay: Array, x: Array) -> Array:
    """`s_i = decay_i s_{i-1} + x_i` along axis 1."""

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (jnp.broadcast_to(decay, x.shape), x), axis=1)[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OpenSegment:
    """The newest slot of every row while it still grows: its last W tokens, weighted, float32.

    A ring rather than running sums: the average is recomputed from the ring at every step, so
    nothing is ever subtracted and no error accumulates. An unlimited window keeps sums (a ring of
    one entry that is added to).
    """

    keys: Float[Array, "*rows W H"]
    values: Float[Array, "*rows W H"]
    weights: Float[Array, "*rows W"]
    count: Int[Array, "*rows"]  # tokens in the segment; 0 before the first


def empty_segment(rows: tuple[int, ...], head_dim: int, window: int | None) -> OpenSegment:
    """An open segment without tokens; whatever comes first is appended."""
    ring = (*rows, window or 1)
    return OpenSegment(
        keys=jnp.zeros((*ring, head_dim)),
        values=jnp.zeros((*ring, head_dim)),
        weights=jnp.zeros(ring),
        count=jnp.zeros(rows, jnp.int32),
    )


def merge_step(
    open_segment: OpenSegment,
    k_t: Float[Array, "*rows H"],
    v_t: Float[Array, "*rows H"],
    decision: Float[Array, "*rows"],
    omega: Float[Array, "*rows"],
    window: int | None,
) -> tuple[OpenSegment, Float[Array, "*rows H"], Float[Array, "*rows H"]]:
    """Append or merge one token into each row's open segment (the step form of `pool`; SPEC 6).

    Args:
        open_segment: state before the token.
        k_t, v_t: the token's unrotated key and value.
        decision: 1 merges, 0 closes the segment and opens a new one. The first token of a row opens
            one whatever it says.
        omega: the token's importance.
        window: W, as given to `empty_segment`.

    Returns:
        (state after it, averaged key, averaged value), float32.
    """
    W = window or 1
    merge = jnp.where(open_segment.count > 0, decision, 0.0)
    kept = open_segment.count * merge.astype(jnp.int32)  # tokens that the new one joins
    newest = jnp.arange(W) == (kept % W)[..., None]  # [*rows, W]: the ring entry it takes
    weight = omega.astype(jnp.float32)[..., None]  # [*rows, 1]

    def updated(ring: Array, entry: Array) -> Array:
        """The ring with the token's entry [*rows, 1, ...]; emptied first where it opens a slot."""
        per_row = (..., *(None,) * (ring.ndim - merge.ndim))
        ring = ring * merge[per_row]
        return jnp.where(newest[per_row[:-1]], entry, ring) if window else ring + entry

    segment = OpenSegment(
        keys=updated(open_segment.keys, (weight * k_t.astype(jnp.float32))[..., None, :]),
        values=updated(open_segment.values, (weight * v_t.astype(jnp.float32))[..., None, :]),
        weights=updated(open_segment.weights, weight),
        count=kept + 1,
    )
    total = segment.weights.sum(axis=-1)[..., None]
    return segment, segment.keys.sum(axis=-2) / total, segment.values.sum(axis=-2) / total


# ---- attention over the compressed cache ------------------------------------------------------


def without_decision_channel(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """`x` with the decision channel set to 0."""
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
    block: int = 256,
) -> DMCOutput:
    """DMC attention over whole sequences, S = T (sections 3.1 and 3.2; SPEC 5).

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
        block: tokens per block of the attention.

    Returns:
        See `DMCOutput`.
    """
    B, S, K, H = k.shape
    logits = merge_logits(k, settings)
    omega = importance(q, K, settings)
    may_merge = 1.0 - segment_starts(B, S, segment_ids)  # [B, S, 1]

    if noise is None:
        decisions = alpha = hard_decisions(logits, threshold)
        log_keep = _SUPERSEDED * decisions
        merged = decisions * may_merge
    else:
        alpha, log_keep = relaxed_decisions(logits, noise, settings)
        hard = (alpha > 0.5).astype(jnp.float32)
        decisions = hard + (alpha - jax.lax.stop_gradient(alpha))  # straight-through
        merged = hard * may_merge

    alpha = alpha * may_merge
    both = pool(jnp.concatenate([k, v], axis=-1), alpha, omega, settings.window)
    pooled_k, pooled_v = both[..., :H], both[..., H:]
    # The next token's decision supersedes a state; nothing supersedes the last one.
    key_bias = jnp.pad((log_keep * may_merge)[:, 1:], [(0, 0), (0, 1), (0, 0)])

    frequencies = rotary_frequencies(H, rope_theta, rope_scaling)
    out = causal_attention(
        rotate_for_attention(q, positions, frequencies),
        rotate_for_attention(pooled_k, positions, frequencies),
        pooled_v,
        key_bias,
        scale=H**-0.5,
        segment_ids=segment_ids,
        block=block,
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
    block: int = 256,
) -> Float[Array, "B T N H"]:
    """Ordinary causal attention, with the decision channel fading out where asked (SPEC 8).

    Args:
        q, k, v, positions, rope_theta, segment_ids, rope_scaling, block: as in `dmc_attention`.
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
    return causal_attention(*rotated, v, scale=H**-0.5, segment_ids=segment_ids, block=block)
