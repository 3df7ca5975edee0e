"""The retrofit from top to bottom: stages, steps, metrics, checkpoints."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dmc_jax import processes
from dmc_jax.checkpoints.digests import set_aside_damaged
from dmc_jax.checkpoints.gates import FILE, model_hash, save_gates
from dmc_jax.checkpoints.metadata import Metadata, load_metadata, write_metadata
from dmc_jax.checkpoints.run_directory import CheckpointRef, latest
from dmc_jax.checkpoints.states import Saver, load_data_state, open_for_saving, quiet_orbax
from dmc_jax.commands import stop_requests
from dmc_jax.config import GATED, MERGING, STAGES, ModelConfig, RunConfig
from dmc_jax.data.loader import training_batches
from dmc_jax.errors import RunFailure, UserError
from dmc_jax.evaluation.tables import missed_target
from dmc_jax.model.llama import count_parameters
from dmc_jax.model.sharding import batch_sharding, part_of_batches
from dmc_jax.processes import of_first, together
from dmc_jax.training import checks, gated, metrics, ownership, stages, starts
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import order_seed
from dmc_jax.training.step import make_train_step

_SCHEDULES = ("learning_rate", "target_ratio")  # of the newest step, not averaged

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
        RunFailure: a loss that is not a finite number.
        KeyboardInterrupt: a signal, whose number it holds, asked to stop (see
            `commands.stop_requests`), after a checkpoint was written.
    """
    quiet_orbax()
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
                _measure_stage(run, stage, _train_stage(run, stage, ready, quiet), ready)
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


def _measure_stage(run: RunConfig, stage: str, params: Any, ready: checks.Ready) -> None:
    """Measure the end of a stage once it is safe on disk; the figures join its metadata."""
    ref = of_first(lambda: latest(Path(run.output) / run.name / stage))
    if stage == "distill":
        gated.save_model(run, params, ready.start, ready.datas[0][0])
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
    calibrate: bool = True,
) -> dict:
    if stage not in GATED:
        data = ready.datas[0][0]
        return stages.assess(run, stage, params, data, ready.mesh, calibrate=calibrate)
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


def _begin_stage(run: RunConfig, stage: str, ready: checks.Ready) -> tuple:
    """State, its checkpoint in this stage, what takes a step, batches, and the teacher's sizes."""
    batches = _batches(run, stage, ready)
    if stage in GATED:
        state, resumed, step = gated.begin(run, stage, ready.start, ready.datas, ready.mesh)
        teacher = run.model if run.gates.distillation else None
    else:
        state, resumed, step, teacher = _begin_retrofit(run, stage, ready.mesh)
    if resumed is not None:
        batches.set_state(_position(resumed))

    def take_step(state, batch):
        return step(state, _to_devices(batch, ready.mesh))

    return state, resumed, take_step, batches, teacher


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


def _begin_retrofit(run: RunConfig, stage: str, mesh: Mesh) -> tuple:
    optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
    state, resumed = starts.start_of_stage(run, stage, optimizer, mesh)
    teacher, teacher_params = starts.load_teacher(run, stage, mesh)
    step = make_train_step(run, stage, mesh, optimizer, teacher)
    return state, resumed, lambda state, batch: step(state, batch, teacher_params), teacher


def _try_one_step(run: RunConfig, ready: checks.Ready) -> None:
    """Take the next step of a run and forget it."""
    directory = Path(run.output) / run.name
    unfinished = (s for s in run.stage_names if not _is_finished(directory, run, s))
    stage = of_first(lambda: next(unfinished, None))
    if stage is None:
        logging.info("every stage of %s is finished", directory)
        return
    state, _, take_step, batches, _ = _begin_stage(run, stage, ready)
    values = processes.fetch(take_step(state, next(batches))[1])
    if not stages.finite(values):
        raise RunFailure(f"dry run, stage {stage}: {_not_finite(values)} after one step")
    name = {"closed_form": "r2", "distill": "distillation"}.get(stage, "loss")
    logging.info("dry run: one step of %s, %s %.4f", stage, name, values[name])


def _train_stage(run: RunConfig, stage: str, ready: checks.Ready, quiet: bool) -> Any:
    """Take the steps of one stage, from its newest checkpoint on; returns the parameters."""
    directory, steps = Path(run.output) / run.name, run.stage(stage).steps
    logging.info("stage %s: %d steps", stage, steps)
    state, resumed, take_step, batches, teacher = _begin_stage(run, stage, ready)
    first = 0 if resumed is None else resumed.step
    if first:
        logging.info("resuming %s at step %d", stage, first)

    # Outermost: what is asked while the last save is written is heard too.
    with stop_requests("stopping after this step; the run can be resumed") as stopping:
        with (
            open_for_saving(directory, stage, run.keep, resumed_step=first) as saver,
            _open_metrics(run, stage, first, quiet) as sink,
            processes.lost_peers_named(),  # innermost: nobody is left to finish a save with
        ):
            recent = _Recent(run, stage, sink, saver, teacher)
            saved, stop_for = time.monotonic(), processes.stop_agreement()
            for step in range(first, steps):
                batch = next(batches)
                state, values = take_step(state, batch)
                recent.add(step, values, batch)
                taken = step + 1
                last, interrupted = taken == steps, stop_for(stopping)
                if last:
                    state = stages.finish_stage(stage, state)
                due = taken % run.save_every == 0
                if taken % run.log_every == 0 or last:
                    recent.log()
                    due |= _overdue(run, saved)
                if run.eval_every and taken % run.eval_every == 0 and not last:
                    measured = _assess(run, stage, taken, state.params, ready, calibrate=False)
                    loss = measured["validation"]["loss"]
                    _check_measured(f"stage {stage}, step {taken}", measured["validation"])
                    logging.info("step %d: validation loss %.4f", taken, loss)
                if due or last or interrupted:
                    recent.log()  # a state is saved only after its losses were seen to be finite
                    about = _describe(run, stage, taken, ready)
                    saver.save(taken, state, batches.get_state(), about)
                    saved = time.monotonic()
                if interrupted:
                    break
        if number := processes.agreed_signal(stopping):
            raise KeyboardInterrupt(number)
    return state.params


def _overdue(run: RunConfig, saved: float) -> bool:
    """Whether a save is by the clock; all hosts go by that of the first."""
    return of_first(lambda: 0 < run.save_minutes <= (time.monotonic() - saved) / 60)


def _batches(run: RunConfig, stage: str, ready: checks.Ready):
    """The stage's own endless stream of training batches, this host's rows of them."""
    part, parts = part_of_batches(ready.mesh)
    return iter(
        training_batches(
            ready.datas,
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


def _steps_before(run: RunConfig, stage: str) -> int:
    """Steps of the stages that come before in this run's directory: metrics count over them all."""
    directory = Path(run.output) / run.name
    before = STAGES[: STAGES.index(stage)]
    there = [name for name in before if name in run.stage_names or latest(directory / name)]
    return sum(run.stage(name).steps for name in there if run.stage(name) is not None)


def _open_metrics(run: RunConfig, stage: str, first: int, quiet: bool):
    if not processes.first():
        return contextlib.nullcontext(metrics.MetricsLogger(()))
    return metrics.open_metrics(
        Path(run.output) / run.name,
        total_steps=_steps_before(run, run.stage_names[-1]) + run.stage(run.stage_names[-1]).steps,
        first_step=_steps_before(run, stage) + first + 1,
        quiet=quiet,
        tensorboard=run.tensorboard,
        wandb=run.wandb,
    )


@dataclasses.dataclass
class _Recent:
    """Steps since the last log line: their metrics stay on the device until they are asked for."""

    run: RunConfig
    stage: str
    sink: metrics.MetricsLogger
    saver: Saver
    teacher: ModelConfig | None
    steps: list[tuple[int, Any, np.ndarray]] = dataclasses.field(default_factory=list)
    since: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, step: int, values: Any, batch: dict[str, np.ndarray]) -> None:
        """Remember a step, its metrics and which documents its batch came from."""
        self.steps.append((step, values, batch["documents"]))

    def log(self) -> None:
        """Log a line for the steps since the last; stop at the first bad number among them."""
        if not self.steps:
            return
        fetched = processes.fetch([values for _, values, _ in self.steps])
        seconds = time.perf_counter() - self.since
        for (step, _, documents), values in zip(self.steps, fetched, strict=True):
            if not stages.finite(values):
                self._diverged(step, values, documents)
        # One batch is a poor sample: what depends on it is averaged since the last line.
        values = jax.tree.map(lambda *each: np.mean(each, axis=0), *fetched)
        values |= {name: fetched[-1][name] for name in _SCHEDULES if name in values}
        merged = values.pop("merged", None)
        if merged is not None:
            values["ratio"] = 1 / (1 - np.average(merged, weights=self.run.model.kv_heads_by_layer))
            values |= {
                f"ratio{metrics.LAYER_MARK}{i:02d}": 1 / (1 - m) for i, m in enumerate(merged)
            }
        if self.stage != "closed_form":
            values |= _speed(self.run, self.stage, self.teacher, len(self.steps), seconds)
        self.sink.log(_steps_before(self.run, self.stage) + self.steps[-1][0] + 1, values)
        self.steps.clear()
        self.since = time.perf_counter()

    def _diverged(self, step: int, values: Any, documents: np.ndarray) -> None:
        directory = Path(self.run.output) / self.run.name / self.stage
        self.saver.wait()
        good = of_first(lambda: latest(directory) or latest(directory.parent))
        raise RunFailure(
            f"stage {self.stage}, step {step}: "
            + _not_finite(values)
            + f". Last good checkpoint: {good.path if good else 'none'}. The batch's windows cover "
            f"training documents {documents.tolist()}. Look at them, or lower the learning rate."
        )


def _not_finite(values: dict[str, Any]) -> str:
    return ", ".join(f"{n} = {v}" for n, v in values.items() if not np.isfinite(v).all())


def _speed(
    run: RunConfig, stage: str, teacher: ModelConfig | None, steps: int, seconds: float
) -> dict[str, float]:
    """Tokens per second and, where the device's peak is known, model FLOP/s utilisation."""
    rate = steps * run.data.batch * run.data.length / seconds
    beside = stage in GATED and run.gates.model != "all"
    per_token = _flops(run, run.model, "beside" if beside else "all")
    if teacher is not None:
        per_token += _flops(run, teacher, "nothing")
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    utilisation = metrics.mfu(rate, per_token, jax.device_count(), peak)
    return {"tokens_per_second": rate} | ({} if utilisation is None else {"mfu": utilisation})


def _flops(run: RunConfig, model: ModelConfig, learns: str) -> float:
    table = 0 if model.tied_embeddings else model.vocab_size * model.width
    return metrics.flops_per_token(
        params_without_embedding=count_parameters(model) - table,
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        length=run.data.length,
        learns=learns,
    )
