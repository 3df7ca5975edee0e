"""Where the parameters of a stage come from, and those of its teacher."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from absl import logging
from jax.sharding import Mesh

from dmc_jax.checkpoints.models import find_checkpoint, load_model
from dmc_jax.checkpoints.run_directory import CheckpointRef, latest
from dmc_jax.checkpoints.states import load_params, load_state
from dmc_jax.config import ModelConfig, RunConfig, to_dict
from dmc_jax.data.prepared import read_manifest
from dmc_jax.data.tokenizer import fingerprint
from dmc_jax.errors import UserError
from dmc_jax.interop.formats import open_source, recognise
from dmc_jax.interop.parameters import read_params
from dmc_jax.interop.source import Source
from dmc_jax.model.llama import init_params
from dmc_jax.model.sharding import shardings
from dmc_jax.training.state import TrainState, abstract_state, init_state, state_of


def initial_checkpoint(run: RunConfig) -> CheckpointRef | None:
    """The checkpoint of ours that `init_from` names.

    None where the run starts from nothing or from a checkpoint of another format, which is then
    held against the config; `start_of_stage` reads it.

    Raises:
        UserError: there is none, or the first stage needs one and none is named, or a foreign one
            is not of the config's model or not of the data's tokenizer.
    """
    if not run.init_from:
        if run.stage_names[0] != "pretrain":
            raise UserError(
                f"stage {run.stage_names[0]} continues a trained model: name its checkpoint with "
                "--config.init_from=DIR, or start with --config.stages=pretrain,..."
            )
        return None
    if _foreign_start(run) is not None:
        return None
    return find_checkpoint(run.init_from)


def _foreign_start(run: RunConfig) -> Source | None:
    """The checkpoint of another format that `init_from` names, None where it names none."""
    if not run.init_from or recognise(run.init_from) in (None, "orbax"):
        return None
    source = open_source(run.init_from)
    ours, theirs = (
        to_dict(config) | {"kv_heads": config.kv_heads_by_layer, "max_length": None}
        for config in (run.model, source.config)
    )
    for name, value in theirs.items():
        if ours[name] != value:
            raise UserError(
                f"init_from: {source.path} has {name} {value}, config.model.{name} is "
                f"{ours[name]}: the config must describe the model that it starts from"
            )
    # One that comes without a tokenizer cannot be told from the data's.
    manifest = read_manifest(Path(run.data.path.split(",")[0].strip()))
    wanted = manifest and manifest["tokenizer_sha256"]
    if source.tokenizer and wanted not in map(fingerprint, source.tokenizer):
        raise UserError(
            f"init_from: {source.path} has another tokenizer than the one of {run.data.path}: "
            f"prepare the text with its own, prepare_data --tokenizer={source.tokenizer[0]}"
        )
    return source


def start_of_stage(
    run: RunConfig, stage: str, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, CheckpointRef | None]:
    """State to begin or go on with, and the checkpoint of this stage that it came from, if any.

    In order of preference: this stage's newest checkpoint; the end of the stage before it in this
    run, with its optimizer state; the parameters of `init_from`; fresh ones.

    Raises:
        UserError: a checkpoint of another shape.
    """
    directory = Path(run.output) / run.name
    wanted = abstract_state(run.model, optimizer, mesh)
    own = latest(directory / stage)
    if own is not None:
        return load_state(own, wanted), own
    position = run.stage_names.index(stage)
    if position > 0:
        before = latest(directory / run.stage_names[position - 1])
        state = load_state(before, wanted)
        return dataclasses.replace(state, step=0 * state.step), None
    source = _foreign_start(run)
    if source is not None:
        logging.info("starting %s from %s (%s)", stage, source.path, source.format)
        where = jax.tree.map(lambda leaf: leaf.sharding, wanted.params)
        return state_of(read_params(source, shardings=where), optimizer), None
    ref = initial_checkpoint(run)
    if ref is None:
        return init_state(run.model, optimizer, mesh, run.seed), None
    logging.info("starting %s from %s", stage, ref.path)
    return state_of(load_params(ref, wanted.params), optimizer), None


def load_teacher(run: RunConfig, stage: str, mesh: Mesh) -> tuple[ModelConfig | None, Any]:
    """Sizes and parameters of the distillation teacher; (None, None) where there is none.

    It is `compression.teacher`, or else the model that the run starts from: `init_from`, or the end
    of this run's own pretraining, which itself has no teacher.

    Raises:
        UserError: there is no such checkpoint.
    """
    source = run.compression.teacher or run.init_from
    if run.compression.distillation == 0 or (stage == "pretrain" and not source):
        return None, None
    path = source or Path(run.output, run.name, "pretrain")
    if recognise(path) in (None, "orbax"):
        teacher = load_model(path, mesh)
        return teacher.config, teacher.params
    foreign = open_source(path)
    shapes = jax.eval_shape(lambda key: init_params(foreign.config, key), jax.random.key(0))
    return foreign.config, read_params(foreign, shardings=shardings(shapes, mesh))
