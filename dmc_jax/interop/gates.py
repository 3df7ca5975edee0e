"""Gates that go along with a model's export at Hugging Face, and come back with it."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmc_jax.checkpoints.gates import (
    FILE,
    StoredGates,
    check_hash,
    gates_for,
    hash_of_samples,
    load_gates,
    sampled,
)
from dmc_jax.config import ModelConfig
from dmc_jax.errors import UserError
from dmc_jax.interop.fields import Fields
from dmc_jax.interop.parameters import leaf_shapes, places, to_ours, unflatten
from dmc_jax.interop.source import Source
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense


def with_gates(
    source: Source, name: str | os.PathLike | None, ratio: float | None = None
) -> Source:
    """Give a model gates.

    Args:
        source: a dense model; its tensors are read, one at a time.
        name: of their file, as in `checkpoints.gates.find_gates`; None: those that it has.
        ratio: tokens per slot that they shall come to; None: as stored.

    Raises:
        UserError: a model that merges, gates that were made for another one, or as in `gates_for`.
    """
    gates = gates_for(name, source.config, ratio, own=source.gates)
    if gates is None and ratio is not None:
        raise UserError("ratio: it is looked up in a file of gates; name one")
    if gates is not None:
        if not isinstance(source.policy, Dense):
            raise UserError(
                f"gates: they are for models as they were pretrained, {source.path} merges"
            )
        check_hash(gates, source_hash(source))
    return dataclasses.replace(source, gates=gates)


def source_hash(source: Source) -> str:
    """Hash a checkpoint as `checkpoints.gates.model_hash` does its parameters.

    Args:
        source: the checkpoint, of which one tensor at a time is in memory.

    Raises:
        UserError: a tensor cannot be read.
    """
    shapes = leaf_shapes(source.config)
    at = {leaf: sampled(int(np.prod(shape))) for leaf, shape in shapes.items()}
    numbers = {leaf: np.zeros(index.size, np.float32) for leaf, index in at.items()}
    for name, place in places(source.config).items():
        size = int(np.prod(place.shape))
        inside = at[place.leaf] - size * (place.layer or 0)
        here = (inside >= 0) & (inside < size)
        if here.any():
            ours = to_ours(place, source.tensors[name].read(), 0, place.shape[0])
            numbers[place.leaf][here] = ours.reshape(-1)[inside[here]]
    leaves = jax.tree_util.tree_leaves_with_path(unflatten({leaf: leaf for leaf in shapes}))
    samples = ((jax.tree_util.keystr(path), shapes[leaf], numbers[leaf]) for path, leaf in leaves)
    return hash_of_samples(samples, source.config)


def gates_json(gates: StoredGates) -> dict[str, Any]:
    """Say in `config.json` what the remote code computes by, beside the file of gates."""
    policy = gates.policy
    said = {"method": policy.name, "delay": policy.delay, "threshold": float(policy.threshold)}
    if isinstance(policy, DelayedDMC):
        settings = policy.settings
        said |= {"window": settings.window, "eps": settings.eps, "margin": policy.margin}
    return said


def gates_of(folder: Path, raw: dict[str, Any], config: ModelConfig) -> StoredGates | None:
    """Read the gates of an export.

    Args:
        folder: of the export.
        raw: its `config.json`.
        config: sizes of the model.

    Returns:
        The gates, with the threshold of the config; None where it does not speak of any.

    Raises:
        UserError: their file is missing or damaged, or is not the one that the config speaks of.
    """
    if raw.get("gates") is None:
        return None
    where, said = f"{folder / 'config.json'}, gates", raw["gates"]
    if not isinstance(said, dict):
        raise UserError(f"{where} is no object")
    gates = load_gates(folder / FILE, config)
    for name, ours in gates_json(gates).items():
        if name != "threshold" and said.get(name) != ours:
            raise UserError(
                f"{where} says {name} {said.get(name)!r:.60}, {FILE} beside it {ours!r}: take the "
                "config and the gates of one export"
            )
    threshold = Fields(where, said).number("threshold", least=-math.inf)
    return dataclasses.replace(gates, policy=dataclasses.replace(gates.policy, threshold=threshold))
