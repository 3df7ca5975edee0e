"""One contract for attention over whole sequences: keys of some age, a bias that comes late.

Plain JAX can do this too, in blocks, with a gradient of its own. That form is the caller's and is
not repeated here: `choose` says whether to take it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import check_axes, check_dtypes, check_groups
from pallas_kernels.implementations import XLA, Implementations

__all__ = ["IMPLEMENTATIONS", "XLA", "causal_attention", "choose", "unavailable"]

IMPLEMENTATIONS = Implementations("causal_attention", ("reference", "triton"))
unavailable = IMPLEMENTATIONS.unavailable


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    key_bias: Float[Array, "B T K"] | None = None,
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    spared: int = 1,
    spared_bias: Float[Array, "B T K"] | None = None,
    first: int = 0,
    until: int | None = None,
    with_lse: bool = False,
    implementation: str,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Grouped-query causal attention; query head n reads KV head n // (N / K).

        score(i, j) = scale * q_i . k_j + (bias_j if i - j >= spared else spared_bias_j)
                      for first <= i - j < until in the same document
        out_i       = sum_j softmax_j(score(i, j)) v_j
        lse_i       = log sum_j exp(score(i, j))

    A query that sees no key has the output 0 and lse minus infinity.

    Args:
        q, k, v: float32 or bfloat16, of the same T tokens, rotated where positions matter.
        key_bias: added to the scores of a key for every query but those of the `spared` first
            tokens that see it, of which its own token is one; finite.
        scale: factor on the dot products.
        segment_ids: document of every token; attention stays inside a document. The tokens of a
            document follow one another.
        spared: tokens for which a key has no bias, or another; static, as the two that follow.
        spared_bias: of a key for these; finite; None: nothing is added.
        first: age in tokens from which a key is seen; 0: by its own token's query.
        until: age from which it is seen no more; None: always.
        with_lse: whether to return lse too.
        implementation: one of `IMPLEMENTATIONS.names`; it never falls back to another.

    Returns:
        The attention output in the dtype of `q`, or (it, lse); softmax and sums are float32.

    Raises:
        ValueError: an unknown implementation, `spared` below 1, ages that no key has, or shapes or
            dtypes that break the contract.
        RuntimeError: an implementation that cannot run on this machine, and why.
    """
    module = IMPLEMENTATIONS.load(implementation)
    _validate(q, k, v, {"key_bias": key_bias, "spared_bias": spared_bias}, segment_ids)
    if spared < 1:
        raise ValueError(f"spared must be 1 or more, got {spared}")
    if first < 0 or (until is not None and until <= first):
        raise ValueError(f"ages must be 0 <= first < until, got first {first} and until {until}")
    return module.causal_attention(
        *(q, k, v, key_bias),
        scale=scale,
        segment_ids=segment_ids,
        spared=spared,
        spared_bias=spared_bias,
        first=first,
        until=until,
        with_lse=with_lse,
    )


def choose(implementation: str | None) -> str:
    """Name who attends: `XLA`, or an implementation that can run here.

    Args:
        implementation: `XLA`, one of `IMPLEMENTATIONS.names`, or None: "triton" where it can run,
            elsewhere the caller's own form.

    Raises:
        ValueError, RuntimeError: as `causal_attention`.
    """
    return IMPLEMENTATIONS.choose(implementation, on_gpu=("triton",))


def _validate(q, k, v, biases, segment_ids) -> None:
    arrays = {"q": (q, "B T N H"), "k": (k, "B T K H"), "v": (v, "B T K H")}
    arrays |= {name: (bias, "B T K") for name, bias in biases.items() if bias is not None}
    if segment_ids is not None:
        arrays["segment_ids"] = segment_ids, "B T"
    sizes = check_axes(arrays)
    check_dtypes({"q": q, "k": k, "v": v}, jnp.float32, jnp.bfloat16)
    check_groups(sizes)
