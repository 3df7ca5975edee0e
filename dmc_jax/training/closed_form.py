"""Gates without training: regress what a token's loss would cost on what the layer reads at it.

A query t whose head attends to token i with weight p, and would have to do without it, has the
output (o - p v_i) / (1 - p) for o. Through that head's part W of the output projection the residual
stream changes by

    p^2 / (1 - p)^2 |v_i - o|_M^2,    M = W W^T

in square. A token's cost in a KV head is the mean of that over the queries that come `delay` tokens
after it or later, summed over the query heads that share it, times the mean square of the loss's
gradient in the residual stream there. Its logarithm is regressed on the standardised input of the
attention, by ridge regression, head by head. Minus the prediction is the gate's logit, counted from
the middle of all logits, so scaled that they spread by `SPREAD`.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import dense_attention
from dmc_jax.core.gates import Gates
from dmc_jax.core.losses import token_losses
from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.errors import UserError
from dmc_jax.model.llama import Llama
from dmc_jax.processes import fetch

Batch = dict[str, np.ndarray | Array]

SPREAD = 4.0  # of the logits; the logistic noise of relaxed decisions has 1.8
_MOST_WEIGHT = 0.999  # of a token: nothing is left to a query that attends to nothing else
_FLOOR = 1e-4  # of a layer's mean cost: what is below counts as that
FEWEST = 32  # queries that a token needs after its delay, or its cost is a guess


class Moments(NamedTuple):
    """Sums over tokens of the inputs x of a layer and the costs y of its heads."""

    count: Float[Array, ""]
    x: Float[Array, " D"]
    y: Float[Array, " K"]
    xx: Float[Array, "D D"]
    xy: Float[Array, "D K"]
    yy: Float[Array, " K"]


class Fit(NamedTuple):
    """Gates, and how well they predict on windows that they were not fitted to."""

    gates: Gates
    r2: tuple[tuple[float, ...], ...]  # [layer][KV head], of the logarithm of the cost


def fit_gates(
    params: Any,
    config: ModelConfig,
    batches: Iterable[Batch],
    held_out: Iterable[Batch],
    *,
    delay: int,
    penalty: float = 1e-2,
    dtype: str = "float32",
) -> Fit:
    """Fit the gates of every layer and KV head in two passes over some windows.

    Args:
        params: as of `init_params`.
        config: their sizes.
        batches: windows to fit to, as `data.loader.windows` describes; read twice.
        held_out: windows to measure the fit on.
        delay: tokens for which a token stays anyway.
        penalty: on the squared weights, in units of a standardised input's variance.
        dtype: of the forward pass.

    Raises:
        UserError: windows without a token that has enough queries after its delay.
    """
    batches, held_out = list(batches), list(held_out)
    size = functools.partial(_gradient_size, config, dtype)
    sizes = np.mean([fetch(size(params, batch)) for batch in batches], axis=0)
    measure = functools.partial(_moments, config, dtype, delay)

    def total(windows):
        sums = [fetch(measure(params, batch, sizes)) for batch in windows]
        if not sums or not sums[0][0].count > 0:
            length = delay + FEWEST
            raise UserError(
                f"no token has {FEWEST} queries in its document {delay} tokens after it: give "
                f"windows, and documents, that are longer than {length} tokens"
            )
        return jax.tree.map(lambda *leaves: sum(np.asarray(x, np.float64) for x in leaves), *sums)

    layers = [
        _ridge(fitted, other, penalty)
        for fitted, other in zip(total(batches), total(held_out), strict=True)
    ]
    mean, deviation, weight, bias, r2, square = zip(*layers, strict=True)
    weight, bias = np.concatenate(weight), np.concatenate(bias)
    # In the middle of all logits is 0: one threshold for all rows.
    spread = np.sqrt(np.mean(np.concatenate(square)) - bias.mean() ** 2) / SPREAD
    arrays = np.stack(mean), np.stack(deviation), weight / spread, (bias - bias.mean()) / spread
    gates = Gates(*(jnp.asarray(x, jnp.float32) for x in arrays))
    return Fit(gates, tuple(tuple(map(float, x)) for x in r2))


def _ridge(fitted: Moments, other: Moments, penalty: float) -> tuple:
    """Solve for one layer; everything float64."""
    n = fitted.count
    mean, y_mean = fitted.x / n, fitted.y / n
    deviation = np.sqrt(np.maximum(np.diag(fitted.xx) / n - mean**2, 1e-12))
    scale = np.outer(deviation, deviation)
    covariance = (fitted.xx / n - np.outer(mean, mean)) / scale
    cross = (fitted.xy / n - np.outer(mean, y_mean)) / deviation[:, None]
    weight = np.linalg.solve(covariance + penalty * np.eye(mean.size), cross)  # [D, K]

    # The error's mean square on the other windows, from their sums alone.
    slope = weight / deviation[:, None]
    level = y_mean - mean @ slope
    x, y, xx, xy, yy = (moment / other.count for moment in other[1:])
    error = yy - 2 * (np.sum(slope * xy, axis=0) + level * y) + level**2
    error += np.einsum("DK,DE,EK->K", slope, xx, slope) + 2 * level * (x @ slope)
    r2 = 1 - error / np.maximum(yy - y**2, 1e-12)
    own = np.einsum("DK,DE,EK->K", weight, covariance, weight)
    return mean, deviation, -weight.T, -y_mean, r2, own + y_mean**2


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient_size(config, dtype, params, batch) -> Float[Array, " L"]:
    """The mean square of the loss's gradient in the residual stream after each attention.

    The gradient g in the attention's output is W g of the residual stream's; where that has no
    direction, |W g|^2 is its mean square times |W|^2.
    """
    shape = (config.layers, *batch["tokens"].shape, config.heads, config.head_dim)
    tokens = jnp.maximum(batch["loss_mask"].sum(), 1.0)

    def loss(nudge):
        def attend(q, k, v, x, layer, state):
            return _dense(config, batch, q, k, v) + nudge[layer].astype(q.dtype), state, None

        output = _forward(config, dtype, params, batch, attend)
        return jnp.sum(batch["loss_mask"] * token_losses(output.prediction, batch["targets"])[0])

    gradient = jax.grad(loss)(jnp.zeros(shape, jnp.float32))
    square = jnp.einsum("LNHD,LNHD->L", *2 * [_projections(params)])
    return jnp.einsum("LBTNH,LBTNH->L", gradient, gradient) / tokens / square


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(config, dtype, delay, params, batch, sizes) -> tuple[Moments, ...]:
    """Sums of every layer over the tokens of some windows."""
    projections = _projections(params)

    def attend(q, k, v, x, layer, state):
        out = _dense(config, batch, q, k, v)
        costs, left = eviction_costs(
            *_rotated(config, batch, q, k),
            v,
            projections[layer],
            batch["segment_ids"],
            delay=delay,
        )
        costs = sizes[layer] * costs
        counted = (left >= FEWEST).astype(jnp.float32)[..., None]
        mean = jnp.sum(counted * costs) / jnp.maximum(counted.sum() * k.shape[2], 1.0)
        y = counted * jnp.log(costs + _FLOOR * mean + 1e-30)
        x = x.astype(jnp.float32)
        some = counted * x
        product = functools.partial(jnp.einsum, precision="highest")
        return (
            out,
            state,
            Moments(
                counted.sum(),
                some.sum((0, 1)),
                y.sum((0, 1)),
                product("BTD,BTE->DE", some, x),
                product("BTD,BTK->DK", some, y),
                (y * y).sum((0, 1)),
            ),
        )

    records = _forward(config, dtype, params, batch, attend).records
    return tuple(
        jax.tree.map(lambda x, i=i: x[i], record)
        for record in records
        for i in range(record.count.size)
    )


def eviction_costs(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    projection: Float[Array, "N H D"],
    segment_ids: Int[Array, "B T"],
    *,
    delay: int,
) -> tuple[Float[Array, "B T K"], Int[Array, "B T"]]:
    """Measure how much the residual stream would change without each token, once it is `delay` old.

    Args:
        q, k, v: of one layer, rotated.
        projection: of its output.
        segment_ids: documents; padding has 0.
        delay: tokens for which a token stays anyway.

    Returns:
        (the mean over later queries of the squared change, summed over the query heads that share
        the KV head; how many queries those are, for which 0 has a cost of 0).
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    product = functools.partial(jnp.einsum, precision="highest")
    q, k, v, projection = (x.astype(jnp.float32) for x in (q, k, v, projection))
    q = q.reshape(B, T, K, N // K, H)
    metric = product("NHD,NID->NHI", projection, projection).reshape(K, N // K, H, H)
    same = segment_ids[:, :, None] == segment_ids[:, None]  # [B, T, S]
    age = jnp.arange(T)[:, None] - jnp.arange(T)
    later = same & (age >= delay) & (segment_ids > 0)[:, None]
    scores = H**-0.5 * product("BTKGH,BSKH->BKGTS", q, k)
    seen = (same & (age >= 0))[:, None, None]
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    o = product("BKGTS,BSKH->BTKGH", p, v)
    o_metric = product("BTKGH,KGHI->BTKGI", o, metric)
    of_o = product("BTKGH,BTKGH->BKGT", o_metric, o)
    of_v = product("BSKH,KGHI,BSKI->BKGS", v, metric, v)
    apart = of_o[..., None] + of_v[..., None, :] - 2 * product("BTKGH,BSKH->BKGTS", o_metric, v)
    p = jnp.minimum(p, _MOST_WEIGHT)
    change = jnp.where(later[:, None, None], (p / (1 - p)) ** 2 * jnp.maximum(apart, 0.0), 0.0)
    left = later.sum(axis=1)  # [B, S]
    return change.sum((2, 3)).swapaxes(1, 2) / jnp.maximum(left, 1)[..., None], left


def _projections(params) -> Float[Array, "L N H D"]:
    runs = sorted((name for name in params if name[:4] == "run_"), key=lambda name: int(name[4:]))
    return jnp.concatenate([params[name]["o"]["kernel"] for name in runs]).astype(jnp.float32)


def _rotated(config, batch, q, k):
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return (rotate(x, batch["positions"], frequencies) for x in (q, k))


def _dense(config, batch, q, k, v):
    return dense_attention(
        *(q, k, v),
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
    )


def _forward(config, dtype, params, batch, attend):
    model = Llama(config, dtype=jnp.dtype(dtype))
    return model.apply({"params": params}, batch["tokens"], attend=attend)
