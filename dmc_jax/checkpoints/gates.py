"""Gates in a file: what makes a frozen model compress, and which model that is.

A safetensors file with the arrays of `core.gates.Gates` that there are, float32, and in its
metadata, as JSON under "dmc_jax", what running them takes: method, delay and window, the hash of
the model that they were made for, and a table of thresholds with what was measured at each.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save

from dmc_jax.config import ModelConfig, to_dict
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.gates import Gates
from dmc_jax.errors import UserError
from dmc_jax.fields import from_dict
from dmc_jax.files import appears_when_complete
from dmc_jax.policies.choice import Gated
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.processes import fetch

FILE = "gates.safetensors"  # in the directory of a run that made some, and in an export

_NAME = "dmc_jax"
_VERSION = 1
_METHODS = {policy.name: policy for policy in typing.get_args(Gated)}
SHIPPED = Path(__file__).parents[1] / "gates"  # files that are found by name
_SAMPLED = 256  # numbers of every array that a model is recognised by


@dataclasses.dataclass(frozen=True)
class Measured:
    """What gates did at one threshold on held-out text."""

    threshold: float
    ratio: float  # tokens per slot
    figures: dict[str, float] = dataclasses.field(default_factory=dict)  # others, by name


@dataclasses.dataclass(frozen=True)
class StoredGates:
    """A file of gates."""

    policy: Gated  # its threshold is that of the first entry of the table, unless one was chosen
    base_sha256: str  # of the model, by `model_hash`
    table: tuple[Measured, ...]  # ratios rise
    about: dict[str, Any]  # how they were made: command, text, tokens, machine, ...
    path: str = ""  # of the file that they were read from

    def at(self, ratio: float) -> Gated:
        """Set the threshold for a ratio: between two that were measured, in proportion.

        Raises:
            UserError: a ratio outside of what was measured.
        """
        for low, high in itertools.pairwise(self.table):
            if low.ratio <= ratio <= high.ratio:
                share = (math.log(ratio) - math.log(low.ratio)) / (
                    math.log(high.ratio) - math.log(low.ratio)
                )
                threshold = (1 - share) * low.threshold + share * high.threshold
                return dataclasses.replace(self.policy, threshold=threshold)
        raise UserError(
            f"ratio: these gates were measured from {self.table[0].ratio:g} to "
            f"{self.table[-1].ratio:g}, got {ratio:g}"
        )


def save_gates(path: str | os.PathLike, gates: StoredGates) -> None:
    """Write a file of gates.

    Args:
        path: of the file, which appears when it is complete.
        gates: their table is sorted.

    Raises:
        OSError: it cannot be written.
    """
    about = {
        "version": _VERSION,
        "method": gates.policy.name,
        **_settings(gates.policy),
        "base_sha256": gates.base_sha256,
        "table": [dataclasses.asdict(entry) for entry in gates.table],
        "about": gates.about,
    }
    arrays = {
        name: np.asarray(x, np.float32)
        for name, x in vars(gates.policy.gates).items()
        if x is not None
    }
    with appears_when_complete(path) as partial:
        partial.write_bytes(save(arrays, {_NAME: json.dumps(about)}))


def load_gates(path: str | os.PathLike, config: ModelConfig) -> StoredGates:
    """Read a file of gates.

    Args:
        path: of the file.
        config: sizes of the model that they shall serve.

    Raises:
        UserError: no such file, a damaged one, another format, or gates of a model of other sizes.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(_NAME)
            arrays = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a file of gates: {error}") from error
    if text is None:
        raise UserError(f"{path} has tensors, but no gates: expected a file that was made here")
    try:
        about = json.loads(text)
        if about["version"] != _VERSION:
            raise UserError(f"{path} is of version {about['version']}: use a newer dmc_jax")
        if about["method"] not in _METHODS:
            known = " and ".join(_METHODS)
            raise UserError(f"{path} has gates for {about['method']!r}; this version knows {known}")
        table = tuple(Measured(**entry) for entry in about["table"])
        if not all(isinstance(x, float | int) for at in table for x in (at.threshold, at.ratio)):
            raise ValueError("a threshold or ratio of its table is no number")
        settings = {"delay": about["delay"]}
        if about["method"] == DelayedDMC.name:
            settings["settings"] = from_dict(DMCSettings, about["settings"])
            settings["margin"] = about.get("margin")
            if not isinstance(settings["margin"], float | int | None):
                raise ValueError("its margin is no number")
        policy = _METHODS[about["method"]](Gates(**arrays), table[0].threshold, **settings)
        stored = StoredGates(policy, about["base_sha256"], table, about["about"], path=str(path))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    _check_sizes(path, arrays, config)
    return stored


def _settings(policy: Gated) -> dict[str, Any]:
    """What a policy has beside its gates and threshold."""
    fields = {name: x for name, x in to_dict(policy).items() if name not in ("gates", "threshold")}
    return {name: x.item() if hasattr(x, "item") else x for name, x in fields.items()}


def _check_sizes(path, arrays, config: ModelConfig) -> None:
    L, D, R = config.layers, config.width, config.kv_rows
    wanted = {"mean": (L, D), "deviation": (L, D), "weight": (R, D), "bias": (R,)}
    if arrays.keys() & {"importance_weight", "importance_bias"}:
        wanted |= {"importance_weight": (R, D), "importance_bias": (R,)}
    if "gamma" in arrays:
        wanted["gamma"] = (R,)
    found = {name: x.shape for name, x in arrays.items()}
    if found != wanted:
        raise UserError(f"{path} has gates of sizes {found}, the model needs {wanted}")


def find_gates(name: str | os.PathLike, folder: Path = SHIPPED) -> Path:
    """Find a file of gates.

    Args:
        name: a path, or where there is no such file, the name of one that comes along.
        folder: that holds those.

    Raises:
        UserError: neither is there.
    """
    if Path(name).is_file():
        return Path(name)
    known = {file.stem: file for file in sorted(folder.glob("*.safetensors"))}
    if str(name) not in known:
        raise UserError(
            f"{name} is no file, and no name of gates that come with dmc_jax, which are "
            f"{', '.join(known) or 'none yet'}"
        )
    return known[str(name)]


def gates_for(
    name: str | os.PathLike | None,
    config: ModelConfig,
    ratio: float | None = None,
    threshold: float | None = None,
    own: StoredGates | None = None,
) -> StoredGates | None:
    """Read the gates that a model runs with, if any, and set their threshold for a ratio.

    Args:
        name: as in `find_gates`; None: no other than its own.
        config: sizes of the model that they shall serve.
        ratio: tokens per slot; None: as stored. Without gates it is for others.
        threshold: given in its place; is only checked.
        own: those that came along with the model.

    Raises:
        UserError: both, a ratio outside of what was measured, or as `find_gates` and `load_gates`.
    """
    gates = own if name is None else load_gates(find_gates(name), config)
    if gates is None:
        return None
    if ratio is not None and threshold is not None:
        raise UserError("ratio: it is looked up in a file of gates, in place of a threshold")
    return gates if ratio is None else dataclasses.replace(gates, policy=gates.at(ratio))


def check_base(gates: StoredGates, params: Any, config: ModelConfig) -> None:
    """Refuse gates that were made for another model.

    Args:
        gates: from a file.
        params: of the model, as `init_params` gives them, in any dtype.
        config: its sizes.

    Raises:
        UserError: they were.
    """
    check_hash(gates, model_hash(params, config))


def check_hash(gates: StoredGates, found: str) -> None:
    """Refuse gates that were made for another model than the one with this hash.

    Raises:
        UserError: they were.
    """
    if found != gates.base_sha256:
        raise UserError(
            f"{gates.path} was made for another model (hash {gates.base_sha256[:12]}..., this one "
            f"has {found[:12]}...): gates serve the weights that they were made for, and no others"
        )


def model_hash(params: Any, config: ModelConfig) -> str:
    """Hash a model's sizes and some numbers of each of its arrays.

    Equal for every format and dtype that it was stored in: the numbers are rounded to bfloat16.

    Args:
        params: as `init_params` gives them.
        config: its sizes.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return hash_of_samples(
        (
            (jax.tree_util.keystr(path), leaf.shape, fetch(leaf.reshape(-1)[sampled(leaf.size)]))
            for path, leaf in leaves
        ),
        config,
    )


def sampled(size: int) -> np.ndarray:
    """Index the numbers of a flat array that `model_hash` looks at."""
    return np.linspace(0, size - 1, _SAMPLED).astype(np.int64)


def hash_of_samples(
    samples: Iterable[tuple[str, tuple[int, ...], Any]], config: ModelConfig
) -> str:
    """Hash what `model_hash` looks at.

    Args:
        samples: name and shape of every array, in order, and its numbers at `sampled`.
        config: sizes of the model.
    """
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    for name, shape, numbers in samples:
        digest.update(f"{name} {shape}\n".encode())
        digest.update(np.asarray(jnp.asarray(numbers, jnp.bfloat16)).tobytes())
    return digest.hexdigest()
