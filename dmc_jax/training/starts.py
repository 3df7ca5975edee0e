"""Where the parameters of a stage come from, and those of its teacher."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from absl import logging
from jax.sharding import Mesh

from dmc_jax.checkpoints.models import StoredModel, find_model, open_model
from dmc_jax.checkpoints.run_directory import CheckpointRef, latest
from dmc_jax.config import GATED, ModelConfig, RunConfig, to_dict
from dmc_jax.data.prepared import read_manifest
from dmc_jax.errors import UserError
from dmc_jax.policies.dense import Dense
from dmc_jax.processes import of_first
from dmc_jax.training.state import (
    TrainState,
    abstract_state,
    init_state,
    made_on,
    restore,
    state_of,
)


def initial_model(run: RunConfig) -> StoredModel | None:
    """The model that `init_from` names, in any format; None where the run starts from nothing.

    Raises:
        UserError: there is none, or the first stage needs one and none is named, or it is not the
            config's model or not of the data's tokenizer.
    """
    if not run.init_from:
        if run.stage_names[0] != "pretrain":
            other = ", or start with --config.stages=pretrain,..." if run.pretrain else ""
            raise UserError(
                f"stage {run.stage_names[0]} continues a trained model: name its checkpoint, one "
                "of Hugging Face, Meta, Megatron, llama.cpp (GGUF) or an earlier run that has "
                f"{run.model.layers} layers of width {run.model.width}, with "
                f"--config.init_from=DIR{other}"
            )
        return None
    model = find_model(run.init_from)
    ours, theirs = (
        to_dict(config) | {"kv_heads": config.kv_heads_by_layer, "max_length": None}
        for config in (run.model, model.config)
    )
    differing = [
        f"{name} {value}, config.model.{name} is {ours[name]}"
        for name, value in theirs.items()
        if ours[name] != value
    ]
    if differing:
        raise UserError(
            f"init_from: {model.path} has {'; '.join(differing)}: the config must describe the "
            "model that it starts from"
        )
    if run.stage_names[0] in GATED and not isinstance(model.policy, Dense):
        raise UserError(
            f"init_from: {model.path} merges already: gates are for models as they were pretrained"
        )
    # Ids mean the same only under one tokenizer.
    data = run.data.path.split(",")[0].strip()
    manifest = read_manifest(Path(data))
    if manifest and not model.accepts_tokenizer(manifest["tokenizer_sha256"]):
        raise UserError(
            f"init_from: {model.path} was trained with another tokenizer than the one of {data}: "
            f"prepare the text with its own, prepare_data --tokenizer={model.tokenizer}"
        )
    return model


def named_teacher(run: RunConfig) -> StoredModel | None:
    """The distillation teacher that the config names, if it does and has a use for it.

    Raises:
        UserError: there is no such checkpoint, or its ids are not the model's.
    """
    if not (run.compression.teacher and run.compression.distillation):
        return None
    model = find_model(run.compression.teacher)
    manifest = read_manifest(Path(run.data.path.split(",")[0].strip()))
    known = manifest is None or model.accepts_tokenizer(manifest["tokenizer_sha256"])
    if model.config.vocab_size != run.model.vocab_size or not known:
        raise UserError(
            f"compression.teacher: the ids of {model.path} ({model.config.vocab_size}) are not "
            f"those of the model ({run.model.vocab_size}): a teacher needs the same tokenizer"
        )
    return model


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
    own = of_first(lambda: latest(directory / stage))
    if own is not None:
        return restore(own, wanted), own
    position = run.stage_names.index(stage)
    if position > 0:
        before = of_first(lambda: latest(directory / run.stage_names[position - 1]))
        state = restore(before, wanted)
        begun = jax.tree.map(lambda x: 0 * x, (state.step, state.guard))
        return dataclasses.replace(state, step=begun[0], guard=begun[1]), None
    model = initial_model(run)
    if model is None:
        return init_state(run.model, optimizer, mesh, run.seed, run.initializer_range), None
    logging.info("starting %s from %s (%s)", stage, model.path, model.format)
    for note in model.notes:
        logging.info(note)
    params = model.read_params(wanted.params)
    # The rest alone: parameters are not copied.
    state = made_on(
        mesh, lambda p: dataclasses.replace(state_of(p, optimizer), params=None), params
    )
    return dataclasses.replace(state, params=params), None


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
    path = source or of_first(lambda: latest(Path(run.output, run.name, "pretrain"))).path
    teacher = open_model(path, mesh)
    return teacher.config, teacher.params
