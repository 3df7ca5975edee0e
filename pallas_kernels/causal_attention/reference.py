"""Causal attention with a key bias from its definition: all scores at once, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query causal attention; query head n reads KV head n // (N / K).

        score(i, j) = scale * q_i . k_j + bias_j [j != i]      for j <= i in the same document
        out_i       = sum_j softmax_j(score(i, j)) v_j

    Args:
        q, k, v: float32 or bfloat16, of the same T tokens, rotated where positions matter.
        key_bias: added to the scores of a key for every query but its own token's; finite.
        scale: factor on the dot products.
        segment_ids: document of every token; attention stays inside a document. The tokens of a
            document follow one another.

    Returns:
        The attention output in the dtype of `q`; softmax and sums are float32.

    Raises:
        ValueError: shapes or dtypes that break the contract.
    """
    validate(q, k, v, key_bias, segment_ids)
    T, N = q.shape[1:3]
    share = N // k.shape[2]
    wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    wide_k, wide_v = (jnp.repeat(x, share, axis=2) for x in (wide_k, wide_v))
    scores = scale * jnp.einsum("BTNH,BSNH->BNTS", wide_q, wide_k, precision="highest")
    diagonal = jnp.eye(T, dtype=bool)
    if key_bias is not None:
        bias = jnp.repeat(key_bias.astype(jnp.float32), share, axis=2).transpose(0, 2, 1)
        scores += jnp.where(diagonal, 0.0, bias[:, :, None, :])
    visible = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, wide_v, precision="highest")
    return out.astype(q.dtype)


def validate(q, k, v, key_bias, segment_ids) -> None:
    """Checks shapes and dtypes against the contract of `causal_attention`.

    Raises:
        ValueError: they break it.
    """
    arrays = {"q": (q, "B T N H"), "k": (k, "B T K H"), "v": (v, "B T K H")}
    if key_bias is not None:
        arrays["key_bias"] = key_bias, "B T K"
    if segment_ids is not None:
        arrays["segment_ids"] = segment_ids, "B T"
    sizes: dict[str, int] = {}
    for name, (array, axes) in arrays.items():
        shape = tuple(array.shape)
        if len(shape) != len(axes.split()):
            raise ValueError(f"{name} must be [{axes}], got shape {shape}")
        for axis, size in zip(axes.split(), shape, strict=True):
            if size != sizes.setdefault(axis, size):
                raise ValueError(
                    f"{name} must be [{axes}] with {axis} = {sizes[axis]}, got shape {shape}"
                )
    for name in ("q", "k", "v"):
        if arrays[name][0].dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32 or bfloat16, got {arrays[name][0].dtype}")
    if sizes["N"] % sizes["K"]:
        raise ValueError(
            f"{sizes['N']} query heads cannot share {sizes['K']} KV heads:"
            f" {sizes['N']} % {sizes['K']} != 0"
        )
