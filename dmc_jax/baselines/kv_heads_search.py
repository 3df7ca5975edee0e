"""How many KV heads each layer gets: variable grouped-query attention within a budget of bytes.

The loss is measured with one layer's heads averaged at a time; the changes of several layers are
taken to add up, and the best sum within the budget is found exactly. DeciLM has its heads from a
search that is not public; this one is the simplest that can be stated.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.errors import UserError

Changes = Sequence[Mapping[int, float]]  # of each layer: KV heads -> by how much the loss is higher


def kv_head_options(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """List the numbers of KV heads that each layer may have, ascending, its own last.

    Args:
        config: sizes of the model.

    Raises:
        UserError: there is nothing to choose, every layer has one.
    """
    if config.kv_rows == config.layers:
        raise UserError(
            "the model has one KV head in every layer: there are no fewer to choose from"
        )
    return tuple(
        tuple(count for count in range(1, own + 1) if config.heads % count == 0)
        for own in config.kv_heads_by_layer
    )


def heads_within(config: ModelConfig, budget: float) -> int:
    """Count the KV heads, over all layers, that fit a budget; each costs as many bytes.

    Args:
        config: sizes of the model.
        budget: fraction of the bytes of its cache.

    Raises:
        UserError: fewer than one a layer, or no fewer than there are.
    """
    heads = 0
    if 0 < budget < 1:  # what is no number is neither
        heads = math.floor(budget * config.kv_rows + 1e-6)  # 1/3 of 90 are 30, however rounded
    if not config.layers <= heads < config.kv_rows:
        raise UserError(
            f"a budget of {budget:g} of the cache's bytes is not possible: the model has "
            f"{config.kv_rows} KV heads in {config.layers} layers, and each needs one; choose from "
            f"{math.ceil(1e4 * config.layers / config.kv_rows) / 1e4:g} to below 1"
        )
    return heads


def loss_changes(
    config: ModelConfig,
    loss_of: Callable[[tuple[int, ...]], float],
    report: Callable[[int, int, float], object],
) -> list[dict[int, float]]:
    """Measure what fewer KV heads in one layer alone change.

    Args:
        config: sizes of the model.
        loss_of: measures the model with so many KV heads in each layer.
        report: called with layer, KV heads and change after each measurement.

    Returns:
        Of each layer: by how much the loss is higher, by its number of KV heads; 0 for its own.
    """
    own, changes = config.kv_heads_by_layer, []
    before = loss_of(own)
    for layer, options in enumerate(kv_head_options(config)):
        of_layer = {}
        for count in options[:-1]:
            of_layer[count] = loss_of((*own[:layer], count, *own[layer + 1 :])) - before
            report(layer, count, of_layer[count])
        changes.append(of_layer | {own[layer]: 0.0})
    return changes


def predicted_change(changes: Changes, kv_heads: Sequence[int]) -> float:
    """Add up the changes of the layers.

    Args:
        changes: from `loss_changes`.
        kv_heads: of each layer.
    """
    return sum(of_layer[count] for of_layer, count in zip(changes, kv_heads, strict=True))


def best_assignment(changes: Changes, heads: int) -> tuple[int, ...]:
    """Choose the KV heads of each layer whose changes have the least sum, within a total.

    Exact, by dynamic programming over layers and heads: the best of the first layers with u heads
    at most is the best choice for the last of them beside the best of those before it with the
    rest. Of equal sums one with fewer heads in the last layers is taken.

    Args:
        changes: from `loss_changes`.
        heads: KV heads at most, over all layers; one for each layer or more.
    """
    best = np.zeros(heads + 1)  # [u], of no layers yet
    picked = []
    for of_layer in changes:
        counts = sorted(count for count in of_layer if count <= heads)
        sums = np.full((len(counts), heads + 1), np.inf)
        for row, count in zip(sums, counts, strict=True):
            row[count:] = best[: heads + 1 - count] + of_layer[count]
        picked.append(np.array(counts)[sums.argmin(axis=0)])
        best = sums.min(axis=0)
    chosen, left = [], heads
    for pick in reversed(picked):
        chosen.append(int(pick[left]))
        left -= chosen[-1]
    return tuple(reversed(chosen))


def uniform_assignment(config: ModelConfig, heads: int) -> tuple[int, ...]:
    """Give every layer as many KV heads, the most that all may have within a total.

    Args:
        config: sizes of the model.
        heads: KV heads at most, over all layers; one for each layer or more.
    """
    shared = set.intersection(*map(set, kv_head_options(config)))
    return (max(count for count in shared if count * config.layers <= heads),) * config.layers
