"""What can be known before the first step, asked before anything is made: all mistakes at once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from dmc_jax.checkpoints.models import StoredModel
from dmc_jax.config import RunConfig
from dmc_jax.data.loader import evaluation_batches, training_batches
from dmc_jax.data.prepared import MANIFEST, PreparedData, open_data, read_manifest
from dmc_jax.errors import Checklist, UserError
from dmc_jax.model.causal_attention import choose_attention
from dmc_jax.model.llama import abstract_params
from dmc_jax.model.sharding import check_divisible, make_mesh, part_of_batches
from dmc_jax.training import metrics, starts
from dmc_jax.training.closed_form import FEWEST
from dmc_jax.training.spent import profiled_steps


class Ready(NamedTuple):
    """A run that can begin."""

    mesh: Mesh
    datas: list[tuple[PreparedData, float]]  # prepared folders and their mixing weights
    start: StoredModel | None  # what `init_from` names
    teacher: StoredModel | None  # what `compression.teacher` names


def check(run: RunConfig) -> Ready:
    """Find everything that a run needs, or say all that is missing, in the order of its mending.

    Args:
        run: the configuration.

    Raises:
        UserError: something does not fit; a `Checklist` where several things do not.
    """
    faults: list[UserError] = []

    def ask(question: Callable, *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except UserError as fault:
            faults.append(fault)
            return None

    for question in (_check_name, _check_output, _check_measuring, _check_gates):
        ask(question, run)
    start = ask(starts.initial_model, run)
    teacher = ask(starts.named_teacher, run)
    datas = ask(open_datas, run, start)
    mesh = ask(_find_mesh, run)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        listed = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(faults, 1))
        raise Checklist(
            f"{run.name} cannot start; what is missing, in this order:\n{listed}\n"
            "Then give this command again, with the flags named above."
        )
    return Ready(mesh, datas, start, teacher)


def notes(run: RunConfig, ready: Ready) -> list[str]:
    """Say what is allowed and perhaps not meant, a sentence each."""
    said = [
        f"{stage}.warmup is {run.stage(stage).warmup} steps, the stage has "
        f"{run.stage(stage).steps}: its learning rate is never reached"
        for stage in run.stage_names
        if run.stage(stage).warmup > run.stage(stage).steps
    ]
    known = [run.model.max_length] + ([ready.start.config.max_length] if ready.start else [])
    if run.data.length > min(known):
        said.append(
            f"data.length is {run.data.length} tokens, the model was made for {min(known)}: it has "
            "seen no positions beyond"
        )
    return said


def open_datas(
    run: RunConfig, start: StoredModel | None = None
) -> list[tuple[PreparedData, float]]:
    """Open the prepared folders of a config and find their mixing weights.

    Args:
        run: the configuration.
        start: the model that it starts from, whose tokenizer the text must be prepared with.

    Raises:
        UserError: no such folders, ids that the model does not have, splits too short for a window,
            or weights that do not match the folders.
    """
    paths = [path.strip() for path in run.data.path.split(",")]
    missing = [path for path in paths if read_manifest(Path(path)) is None]
    if missing:
        commands = (
            f"`python -m dmc_jax.prepare_data {_tokenizer_flag(run, start)} --output={path}`"
            for path in missing
        )
        raise UserError(
            f"{', '.join(missing)} is not a prepared data folder: make it with "
            f"{' and '.join(commands)}"
        )
    datas = [open_data(path) for path in paths]
    for data in datas:
        if data.vocab_size > run.model.vocab_size:
            raise UserError(
                f"{data.path} was tokenized with {data.vocab_size} ids, model.vocab_size is "
                f"{run.model.vocab_size}: use the model's tokenizer (prepare_data --tokenizer=...) "
                "or set --config.model.vocab_size"
            )
        _check_unchanged(data)
    weights = [float(len(data.tokens["train"])) for data in datas]
    if run.data.weights:
        try:
            weights = [float(w) for w in run.data.weights.split(",")]
        except ValueError as error:
            raise UserError(f"data.weights: {error}; expected numbers, comma-separated") from error
    if len(weights) != len(datas):
        raise UserError(f"data.weights names {len(weights)} corpora, data.path {len(datas)}")
    weighted = list(zip(datas, weights, strict=True))
    # Both refuse what does not fit; nothing is read yet.
    training_batches(weighted, length=run.data.length, batch=run.data.batch, seed=run.seed)
    evaluation_batches(datas[0], "validation", length=run.data.length, batch=1)
    return weighted


def _check_unchanged(data: PreparedData) -> None:
    """Read the tokens through only where they are newer than the manifest, written last."""
    written = (data.path / MANIFEST).stat().st_mtime_ns
    if any((data.path / f"{s}.tokens").stat().st_mtime_ns > written for s in data.tokens):
        open_data(data.path, check_contents=True)


def _tokenizer_flag(run: RunConfig, start: StoredModel | None) -> str:
    if start is not None and start.tokenizer is not None:
        return f"--input=TEXT --tokenizer={start.tokenizer}"
    if run.init_from:
        return "--input=TEXT --tokenizer=FILE"
    if run.stage_names[0] != "pretrain":  # DIR, as the demand for `init_from` calls it
        return "--input=TEXT --tokenizer=DIR/tokenizer.model"
    return f"--vocab_size={run.model.vocab_size}"


def _find_mesh(run: RunConfig) -> Mesh:
    mesh = make_mesh(run.mesh)
    check_mesh(run, mesh)
    part_of_batches(mesh)  # which refuses what processes cannot share
    choose_attention(run.attention, mesh=mesh)  # which refuses what cannot run here
    return mesh


def check_mesh(run: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh over which a run's parameters or windows cannot be split evenly.

    Args:
        run: the configuration.
        mesh: devices, or the sizes of its axes alone.

    Raises:
        UserError: it names the parameter, or the number of windows.
    """
    check_divisible(abstract_params(run.model), mesh)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if (run.data.batch // run.accumulation) % shares:
        raise UserError(
            f"data.batch / accumulation = {run.data.batch // run.accumulation} windows cannot be "
            f"split over {shares} devices (mesh data x fsdp); choose a multiple of {shares}"
        )


def _check_name(run: RunConfig) -> None:
    parts = Path(run.name).parts
    if not parts or Path(run.name).is_absolute() or ".." in parts or not run.name.isprintable():
        raise UserError(
            f"name is {run.name!r}; expected that of a folder inside output ({run.output})"
        )


def _check_output(run: RunConfig) -> None:
    place = Path(run.output) / run.name
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "no permission to write there" if place.is_dir() else "it is no folder"
        raise UserError(
            f"output: cannot make {Path(run.output) / run.name} in {place}: {what}; choose another "
            "--config.output"
        )


def _check_gates(run: RunConfig) -> None:
    least = run.gates.delay + FEWEST
    if "closed_form" in run.stage_names and run.data.length <= least:
        raise UserError(
            f"data.length: to know what a token's loss costs takes {FEWEST} tokens beyond "
            f"gates.delay, so windows of more than {least} tokens; got {run.data.length}"
        )
    if "distill" in run.stage_names and "closed_form" not in run.stage_names:
        raise UserError("stages: distill goes on from closed_form, which must stand before it")


def _check_measuring(run: RunConfig) -> None:
    if run.eval_windows < 1:
        raise UserError(f"eval_windows must be at least 1, got {run.eval_windows}")
    profiled_steps(run.profile)
    metrics.check_packages(tensorboard=run.tensorboard, wandb=run.wandb)
