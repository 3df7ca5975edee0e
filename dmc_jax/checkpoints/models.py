"""Models ready to run, from our own checkpoints, without the config file that made them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dmc_jax.checkpoints.run_directory import CheckpointRef, latest, load_metadata
from dmc_jax.checkpoints.states import load_params
from dmc_jax.config import ModelConfig, from_dict
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from dmc_jax.errors import UserError
from dmc_jax.model.llama import init_params
from dmc_jax.model.sharding import with_shardings


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    ref: CheckpointRef
    config: ModelConfig
    params: Any
    settings: DMCSettings | None  # None: a dense model
    threshold: float  # of hard decisions, calibrated at the end of the retrofit
    data: Path  # prepared folder it was trained on
    tokenizer: Path | None  # None: it was converted from a checkpoint without one
    metadata: dict


def find_checkpoint(path: str | os.PathLike) -> CheckpointRef:
    """The newest complete checkpoint of a run directory, a stage of it, or a step itself.

    Raises:
        UserError: there is none.
    """
    ref = latest(path)
    if ref is None:
        raise UserError(
            f"no complete checkpoint in {path}; expected a run directory, a stage of one "
            "(RUN/finetune) or a step of that (RUN/finetune/600)"
        )
    return ref


def load_own_tokenizer(model: LoadedModel, path: str | os.PathLike | None = None) -> Tokenizer:
    """The tokenizer that a model was trained with.

    Args:
        model: from `load_model`.
        path: where it is now; None: where it was in training.

    Raises:
        UserError: no tokenizer there, or another one.
    """
    path = path or model.tokenizer
    if path is None:
        raise UserError(
            f"{model.ref.path} was converted from a checkpoint without a tokenizer: name one with "
            "--tokenizer=FILE"
        )
    tokenizer = load_tokenizer(path)
    expected = model.metadata["tokenizer_sha256"]
    if expected is not None and fingerprint(path) != expected:
        raise UserError(
            f"{path} is not the tokenizer that {model.ref.path} was trained with: name that one "
            "with --tokenizer=FILE"
        )
    return tokenizer


def load_model(path: str | os.PathLike, mesh: Mesh | None = None) -> LoadedModel:
    """Load sizes, parameters and DMC settings of a checkpoint.

    Args:
        path: as in `find_checkpoint`.
        mesh: devices to spread the parameters over; None: the first device.

    Returns:
        The model; its parameters are float32, whatever they are stored in.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    ref = find_checkpoint(path)
    metadata = load_metadata(ref)
    config = from_dict(ModelConfig, metadata["run"]["model"])
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    if mesh is not None:
        shapes = with_shardings(shapes, mesh)
    settings = from_dict(DMCSettings, metadata["run"]["dmc"])
    return LoadedModel(
        ref=ref,
        config=config,
        params=load_params(ref, shapes),
        settings=settings if metadata["mode"] == "dmc" else None,
        threshold=metadata["threshold"],
        data=Path(metadata["data"]),
        tokenizer=tokenizer_path(ref, metadata),
        metadata=metadata,
    )


def tokenizer_path(ref: CheckpointRef, metadata: dict) -> Path | None:
    """Where the tokenizer is; a converted checkpoint names one beside itself."""
    return (ref.path / metadata["tokenizer"]).resolve() if metadata["tokenizer"] else None
