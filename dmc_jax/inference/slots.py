"""A cache with one array of slots per row, filled token by token: the step form of DMC.

A row is a KV head of a layer and has a length of its own. Every array has room for the longest, so
this cache counts its compression without saving the memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import (
    DMCSettings,
    OpenSegment,
    empty_segment,
    hard_decisions,
    importance,
    merge_logits,
    merge_step,
    rotate_for_attention,
)
from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.model.llama import Attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """Keys and values of all layers after `position` tokens of every sequence.

    R counts the KV heads of all layers in order, so layers may differ in how many they have.
    """

    keys: Float[Array, "B R S H"]  # rotated, each at the position of its newest token
    values: Float[Array, "B R S H"]
    lengths: Int[Array, "B R"]  # slots in use; the last of them is the open one
    open_segment: OpenSegment | None  # rows (B, R); None in a dense cache
    position: Int[Array, " B"]  # tokens read so far, which is where the next one stands


def init(
    config: ModelConfig,
    settings: DMCSettings | None,
    batch: int,
    slots: int,
    dtype: jnp.dtype = jnp.float32,
) -> SlotCache:
    """An empty cache.

    Args:
        config: gives R and H.
        settings: gives the window; None: a dense cache, which takes one slot per token.
        batch: B, sequences.
        slots: S, room in every row. At least the tokens that will be read: what goes beyond the
            room is lost without a word.
        dtype: of keys and values.
    """
    rows = (batch, config.kv_rows)
    segment = None
    if settings is not None:
        segment = empty_segment(rows, config.head_dim, settings.window)
    return SlotCache(
        keys=jnp.zeros((*rows, slots, config.head_dim), dtype),
        values=jnp.zeros((*rows, slots, config.head_dim), dtype),
        lengths=jnp.zeros(rows, jnp.int32),
        open_segment=segment,
        position=jnp.zeros(batch, jnp.int32),
    )


def cached(
    config: ModelConfig, settings: DMCSettings | None, *, threshold: float | Array = 0.0
) -> Attend:
    """An attention function whose state is the `SlotCache`; for one token a sequence, T = 1.

    Every layer adds the token to its own rows and attends over them. The position stays as it is:
    whoever calls the model moves it on once all layers have read the token.

    Args:
        config: gives the layout of the rows, the rotary base and scaling.
        settings: window, offset, eps; None: every token takes a slot and no channel is removed.
        threshold: of hard decisions.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    row_offsets = jnp.cumsum(jnp.array((0, *config.kv_heads_by_layer[:-1])))  # [L]
    rotation = rotate if settings is None else rotate_for_attention

    def attend(q, k, v, layer, cache):
        B, _, K, _ = k.shape
        first = row_offsets[layer]

        def of_layer(x):  # [B, R, ...] -> [B, K, ...]
            return jax.lax.dynamic_slice_in_dim(x, first, K, axis=1)

        def put(x, new):
            return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=1)

        if settings is None:
            key, value, segment = k[:, 0], v[:, 0], None
            opens = jnp.ones((B, K), jnp.int32)
        else:
            segment, key, value = merge_step(
                jax.tree.map(of_layer, cache.open_segment),
                k[:, 0],
                v[:, 0],
                hard_decisions(merge_logits(k, settings), threshold)[:, 0],
                importance(q, K, settings)[:, 0],
                settings.window,
            )
            opens = (segment.count == 1).astype(jnp.int32)
        lengths = of_layer(cache.lengths) + opens  # [B, K]
        at = cache.position[:, None]
        query = rotation(q, at, frequencies)[:, 0]
        key = rotation(key[:, None].astype(k.dtype), at, frequencies)[:, 0]

        # A merged state replaces what its slot held; an appended one takes the next slot.
        slot = jnp.arange(B)[:, None], first + jnp.arange(K), lengths - 1
        cache = dataclasses.replace(
            cache,
            keys=cache.keys.at[slot].set(key.astype(cache.keys.dtype)),
            values=cache.values.at[slot].set(value.astype(cache.values.dtype)),
            lengths=put(cache.lengths, lengths),
            open_segment=jax.tree.map(put, cache.open_segment, segment),
        )
        out = _attend_over_slots(query, of_layer(cache.keys), of_layer(cache.values), lengths)
        return out[:, None], cache, None

    return attend


def _attend_over_slots(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    lengths: Int[Array, "B K"],
) -> Float[Array, "B N H"]:
    """Softmax attention over each row's first `lengths` slots; query head n reads row n // G."""
    B, N, H = q.shape
    K, S = keys.shape[1:3]
    scores = jnp.einsum(
        "BKGH,BKSH->BKGS",
        q.reshape(B, K, N // K, H),
        keys,
        preferred_element_type=jnp.float32,
    )
    in_use = jnp.arange(S) < lengths[:, :, None, None]
    weights = jax.nn.softmax(jnp.where(in_use, H**-0.5 * scores, -jnp.inf), axis=-1)
    out = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(values.dtype), values)
    return out.reshape(B, N, H).astype(q.dtype)
