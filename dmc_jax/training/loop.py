"""The retrofit from top to bottom: stages, steps, metrics, checkpoints."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dmc_jax import processes
from dmc_jax.checkpoints.digests import set_aside_damaged
from dmc_jax.checkpoints.gates import FILE, model_hash, save_gates
from dmc_jax.checkpoints.metadata import Metadata, load_metadata, write_metadata
from dmc_jax.checkpoints.retention import Limits
from dmc_jax.checkpoints.run_directory import CheckpointRef, latest
from dmc_jax.checkpoints.states import load_data_state, open_for_saving, quiet_orbax
from dmc_jax.commands import stop_requests
from dmc_jax.config import GATED, MERGING, ModelConfig, RunConfig
from dmc_jax.data.loader import training_batches
from dmc_jax.errors import RunFailure, UserError
from dmc_jax.evaluation.tables import missed_target
from dmc_jax.model.sharding import batch_sharding, part_of_batches
from dmc_jax.processes import of_first, together
from dmc_jax.training import checks, gated, memory, metrics, ownership, stages, starts
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.recent import Recent, not_finite, steps_before
from dmc_jax.training.spent import Spent, profiled_steps, profiler
from dmc_jax.training.state import order_seed
from dmc_jax.training.step import make_train_step

_TO_DEVICE = ("tokens", "targets", "positions", "segment_ids", "loss_mask")


def train(run: RunConfig, *, quiet: bool = False) -> Path:
    """Run the stages of a config in order; go on where an interrupted run of it stopped.

    Args:
        run: the configuration.
        quiet: nothing on the screen.

    Returns:
        The run's directory, `output/name`: checkpoints in `STAGE/STEP`, `metrics.jsonl`. A dry run
        leaves none.

    Raises:
        UserError: the config does not fit the data, the devices, the checkpoint or the directory.
        RunFailure: a validation loss that is not a finite number, or too many skipped steps in a
            row.
        KeyboardInterrupt: a signal, whose number it holds, asked to stop (see
            `commands.stop_requests`), after a checkpoint was written.
    """
    quiet_orbax()
    spent = Spent()
    directory = Path(run.output) / run.name
    with contextlib.ExitStack() as stack:
        processes.require_equal(run, _say_differing)
        begun = of_first((directory / "config.json").exists)
        if begun:
            _keep(directory, stack)
        ready = together(lambda: checks.check(run))
        processes.meet(ready.mesh)
        contents = of_first(
            lambda: ownership.contents_of(run, ready.datas, ready.start, ready.teacher)
        )
        run = of_first(lambda: ownership.same_run(directory, run, contents))
        for note in checks.notes(run, ready):
            logging.warning(note)
        if run.stage_names[0] in GATED:
            ready = ready._replace(start=ready.start.load(ready.mesh, run.compute_dtype))
        if run.dry_run:
            _try_one_step(run, ready)
            return directory
        if not begun:
            _keep(directory, stack)
        run = of_first(lambda: _claim(directory, run, contents))
        for stage in run.stage_names:
            if of_first(lambda stage=stage: not _is_finished(directory, run, stage)):
                # No name for the parameters: they would stay beside those of the next stage.
                _measure_stage(
                    run, stage, _train_stage(run, stage, ready, quiet, spent), ready, spent
                )
    return directory


def _keep(directory: Path, stack: contextlib.ExitStack) -> None:
    def keep():
        directory.mkdir(parents=True, exist_ok=True)
        stack.enter_context(ownership.locked(directory))

    of_first(keep)


def _claim(directory: Path, run: RunConfig, contents: dict[str, Any]) -> RunConfig:
    run = ownership.claim(directory, run, contents)
    for told in set_aside_damaged(directory):
        logging.warning("%s", told)
    return run


def _say_differing(ours: RunConfig, theirs: RunConfig) -> str:
    fields = ((name, value, getattr(theirs, name)) for name, value in vars(ours).items())
    differing = "; ".join(f"{n} is {b}, there {a}" for n, a, b in fields if a != b)
    return f"its config is not that of process 0 ({differing}): start all with the same command"


def _is_finished(directory: Path, run: RunConfig, stage: str) -> bool:
    done = latest(directory / stage)
    return (
        done is not None
        and done.step >= run.stage(stage).steps
        and load_metadata(done).validation is not None
    )


def _measure_stage(
    run: RunConfig, stage: str, params: Any, ready: checks.Ready, spent: Spent
) -> None:
    """Measure the end of a stage once it is safe on disk; the figures join its metadata."""
    ref = of_first(lambda: latest(Path(run.output) / run.name / stage))
    if stage == "distill":
        gated.save_model(run, params, ready.start, ready.datas[0][0])
    with spent.on("evaluation"):
        measured = _assess(run, stage, ref.step, params, ready)
    _check_measured(f"stage {stage}, {ref.path}", measured["validation"])
    about = _describe(run, stage, ref.step, ready)
    of_first(lambda: write_metadata(ref, dataclasses.replace(about, **measured)))
    if stage in MERGING:
        missed = missed_target(measured["validation"]["ratio"], run.compression.ratio)
        if missed:
            logging.warning("end of %s: %s", stage, missed)


def _assess(
    run: RunConfig,
    stage: str,
    step: int,
    params: Any,
    ready: checks.Ready,
    *,
    within: bool = False,
) -> dict:
    if stage not in GATED:
        data = ready.datas[0][0]
        return stages.assess(run, stage, params, data, ready.mesh, within=step if within else None)
    tokens = step * run.data.batch * run.data.length if stage == "distill" else 0
    gates, measured = gated.measure(
        run, params, ready.start, ready.datas, ready.mesh, tokens=tokens
    )
    of_first(lambda: save_gates(Path(run.output, run.name, FILE), gates))
    return {"validation": dataclasses.asdict(measured)}


def _describe(run: RunConfig, stage: str, step: int, ready: checks.Ready) -> Metadata:
    about = stages.describe(run, stage, step, ready.datas[0][0])
    if stage not in GATED:
        return about
    return dataclasses.replace(about, base_sha256=model_hash(ready.start.params, run.model))


def _check_measured(where: str, validation: dict) -> None:
    if not stages.finite(validation):
        raise RunFailure(
            f"{where}: on validation text loss = {validation['loss']:.4g}, perplexity = "
            f"{validation['perplexity']:.4g}: the model has diverged. Go back to an earlier "
            "checkpoint, or start again with a lower learning rate."
        )


class _Begun(NamedTuple):
    """A stage where it begins or goes on."""

    state: Any
    resumed: CheckpointRef | None  # the checkpoint of this stage that the state is of
    step: Callable[[Any, Any, Any], tuple]  # state, batch, `beside` -> state, metrics
    beside: Any  # parameters that stay as they are, of the teacher or below gates
    teacher: ModelConfig | None
    batches: Any


def _begin_stage(run: RunConfig, stage: str, ready: checks.Ready) -> _Begun:
    batches = _batches(run, stage, ready.datas, part_of_batches(ready.mesh))
    if stage in GATED:
        state, resumed, step = gated.begin(run, stage, ready.start, ready.datas, ready.mesh)
        teacher, beside = run.model if run.gates.distillation else None, ready.start.params
    else:
        optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
        state, resumed = starts.start_of_stage(run, stage, optimizer, ready.mesh)
        teacher, beside = starts.load_teacher(run, stage, ready.mesh)
        step = make_train_step(run, stage, ready.mesh, optimizer, teacher)
    if resumed is not None:
        batches.set_state(_position(resumed))
    return _Begun(state, resumed, step, beside, teacher, batches)


def _position(resumed: CheckpointRef) -> dict | bytes:
    """Where the data iterator stood: a batch a step from the stage's beginning."""
    position = load_data_state(resumed)
    read = position.get("next_index") if isinstance(position, dict) else None
    if read not in (None, resumed.step):
        raise UserError(
            f"{resumed.path} is damaged: after step {resumed.step} the text stands at batch "
            f"{read}; move it away and resume from an earlier one"
        )
    return position


def _try_one_step(run: RunConfig, ready: checks.Ready) -> None:
    """Take the next step of a run and forget it."""
    directory = Path(run.output) / run.name
    unfinished = (s for s in run.stage_names if not _is_finished(directory, run, s))
    stage = of_first(lambda: next(unfinished, None))
    if stage is None:
        logging.info("every stage of %s is finished", directory)
        return
    begun = _begin_stage(run, stage, ready)
    batch = _to_devices(next(begun.batches), ready.mesh)
    step = begun.step
    if hasattr(step, "lower"):  # the closed form is many programs
        step = step.lower(begun.state, batch, begun.beside).compile()
        for line in memory.describe(begun.state, begun.beside, batch, step):
            logging.info("dry run: %s", line)
    values = processes.fetch(step(begun.state, batch, begun.beside)[1])
    if not stages.finite(values):
        raise RunFailure(f"dry run, stage {stage}: {not_finite(values)} after one step")
    name = {"closed_form": "r2", "distill": "distillation"}.get(stage, "loss")
    logging.info("dry run: one step of %s, %s %.4f", stage, name, values[name])


def _train_stage(run: RunConfig, stage: str, ready: checks.Ready, quiet: bool, spent: Spent) -> Any:
    """Take the steps of one stage, from its newest checkpoint on; returns the parameters."""
    directory, steps = Path(run.output) / run.name, run.stage(stage).steps
    logging.info("stage %s: %d steps", stage, steps)
    state, resumed, take_step, beside, teacher, batches = _begin_stage(run, stage, ready)
    first = 0 if resumed is None else resumed.step
    if first:
        logging.info("resuming %s at step %d", stage, first)

    # Outermost: what is asked while the last save is written is heard too.
    with stop_requests("stopping after this step; the run can be resumed") as stopping:
        with (
            open_for_saving(directory, stage, Limits.of(run), resumed_step=first) as saver,
            _open_metrics(run, stage, first, quiet) as sink,
            profiler(profiled_steps(run.profile), directory / "profile") as before_step,
            processes.lost_peers_named(),  # innermost: nobody is left to finish a save with
        ):
            recent = Recent(run, stage, sink, saver, teacher, spent)
            spent.began(sink.lost)
            saved, due, values = time.monotonic(), False, None
            stop_for = processes.stop_agreement()
            for step in range(first, steps):
                batch = spent.fetch(batches, values)
                placed = _to_devices(batch, ready.mesh)
                before_step(steps_before(run, stage) + step + 1, values)
                compiles = step == first and stage != "closed_form"
                with spent.on("compile" if compiles else "step"):
                    state, values = take_step(state, placed, beside)
                recent.add(step, values, batch)
                taken = step + 1
                last, interrupted = taken == steps, stop_for(stopping)
                if last:
                    state = stages.finish_stage(stage, state)
                due |= taken % run.save_every == 0
                more = {}
                if run.eval_every and taken % run.eval_every == 0 and not last:
                    jax.block_until_ready(values)
                    with spent.on("evaluation"):
                        more = _validate(run, stage, taken, state.params, ready)
                if taken % run.log_every == 0 or last or more:
                    recent.log(**more)
                    due |= _overdue(run, saved)
                if due or last or interrupted:
                    recent.log()  # a state is saved only after its losses were seen to be finite
                    if last or not recent.in_row:  # or after the next step that is taken
                        about = _describe(run, stage, taken, ready)
                        with spent.on("checkpoint"):
                            saver.save(taken, state, batches.get_state(), about)
                        saved, due = time.monotonic(), False
                if interrupted:
                    break
            with spent.on("checkpoint"):
                saver.wait()
        if number := processes.agreed_signal(stopping):
            raise KeyboardInterrupt(number)
    return state.params


def _validate(run: RunConfig, stage: str, taken: int, params: Any, ready: checks.Ready) -> dict:
    """Measure on validation text within a stage; numbers for a log line."""
    measured = _assess(run, stage, taken, params, ready, within=True)["validation"]
    _check_measured(f"stage {stage}, step {taken}", measured)
    return {"validation_loss": measured["loss"], "validation_ratio": measured["ratio"]}


def _overdue(run: RunConfig, saved: float) -> bool:
    """Whether a save is by the clock; all hosts go by that of the first."""
    return of_first(lambda: 0 < run.save_minutes <= (time.monotonic() - saved) / 60)


def _batches(run: RunConfig, stage: str, datas: list, share: tuple[int, int] = (0, 1)):
    """The stage's own endless stream of training batches, this host's rows of them."""
    part, parts = share
    return iter(
        training_batches(
            datas,
            length=run.data.length,
            batch=run.data.batch,
            seed=order_seed(run, stage),
            host_index=part,
            host_count=parts,
        )
    )


def _to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in _TO_DEVICE
    }


def _open_metrics(run: RunConfig, stage: str, first: int, quiet: bool):
    if not processes.first():
        return contextlib.nullcontext(metrics.MetricsLogger(()))
    return metrics.open_metrics(
        Path(run.output) / run.name,
        total_steps=steps_before(run, run.stage_names[-1]) + run.stage(run.stage_names[-1]).steps,
        first_step=steps_before(run, stage) + first + 1,
        quiet=quiet,
        tensorboard=run.tensorboard,
        wandb=run.wandb,
    )
