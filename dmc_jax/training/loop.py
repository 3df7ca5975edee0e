"""The retrofit from top to bottom: stages, steps, metrics, checkpoints."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dmc_jax.checkpoints.metadata import load_metadata, write_metadata
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.checkpoints.states import Saver, load_data_state, open_for_saving, quiet_orbax
from dmc_jax.commands import stop_requests
from dmc_jax.config import STAGES, RunConfig, to_dict
from dmc_jax.data.loader import longest_document, training_batches
from dmc_jax.data.prepared import PreparedData, open_data
from dmc_jax.errors import RunFailure, UserError
from dmc_jax.files import write_text
from dmc_jax.model.causal_attention import choose_attention
from dmc_jax.model.llama import count_parameters
from dmc_jax.model.sharding import batch_sharding, make_mesh
from dmc_jax.training import metrics, stages, starts
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.step import make_train_step

# What may change between the parts of an interrupted run; everything else would make it another.
_MAY_CHANGE = {"stages", "output", "mesh", "log_every", "eval_every", "eval_windows", "save_every"}
_MAY_CHANGE |= {"keep", "tensorboard", "wandb", "init_from", "attention"}

_SCHEDULES = ("learning_rate", "target_ratio")  # of the newest step, not averaged

_TO_DEVICE = ("tokens", "targets", "positions", "segment_ids", "loss_mask")


def train(run: RunConfig, *, quiet: bool = False) -> Path:
    """Run the stages of a config in order; go on where an interrupted run of it stopped.

    Args:
        run: the configuration.
        quiet: nothing on the screen.

    Returns:
        The run's directory, `output/name`: checkpoints in `STAGE/STEP`, `metrics.jsonl`.

    Raises:
        UserError: the config does not fit the data, the devices, the checkpoint or the directory.
        RunFailure: a loss that is not a finite number.
        KeyboardInterrupt: SIGINT or SIGTERM, after a checkpoint was written.
    """
    quiet_orbax()
    directory = Path(run.output) / run.name
    datas = open_datas(run)
    starts.initial_model(run)  # which refuses another model or another tokenizer
    mesh = make_mesh(run.mesh)
    _check_batch(run, mesh)
    choose_attention(run.attention, mesh=mesh)  # which refuses what cannot run here
    _claim_directory(directory, run)
    for stage in run.stage_names:
        if _is_finished(directory, run, stage):
            continue
        params = _train_stage(run, stage, datas, mesh, quiet)
        # The end of a stage is measured after it is safe on disk; the figures join its metadata.
        ref, data = latest(directory / stage), datas[0][0]
        measured = stages.assess(run, stage, params, data)
        about = stages.describe(run, stage, ref.step, data)
        write_metadata(ref, dataclasses.replace(about, **measured))
    return directory


def _is_finished(directory: Path, run: RunConfig, stage: str) -> bool:
    done = latest(directory / stage)
    return (
        done is not None
        and done.step >= run.stage(stage).steps
        and load_metadata(done).validation is not None
    )


def _train_stage(run: RunConfig, stage: str, datas: list, mesh: Mesh, quiet: bool) -> Any:
    """Take the steps of one stage, from its newest checkpoint on; returns the parameters."""
    directory, steps = Path(run.output) / run.name, run.stage(stage).steps
    logging.info("stage %s: %d steps", stage, steps)
    optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
    state, resumed = starts.start_of_stage(run, stage, optimizer, mesh)
    teacher, teacher_params = starts.load_teacher(run, stage, mesh)
    take_step = make_train_step(run, stage, mesh, optimizer, teacher)
    batches = _batches(run, stage, datas)
    first = 0
    if resumed is not None:
        first = resumed.step
        batches.set_state(load_data_state(resumed))
        logging.info("resuming %s at step %d", stage, first)

    with (
        open_for_saving(directory, stage, run.keep, resumed_step=first) as saver,
        _open_metrics(run, stage, first, quiet) as sink,
        stop_requests("stopping after this step; the run can be resumed") as stopping,
    ):
        recent = _Recent(run, stage, sink, saver)
        for step in range(first, steps):
            batch = next(batches)
            state, values = take_step(state, _to_devices(batch, mesh), teacher_params)
            recent.add(step, values, batch)
            taken = step + 1
            last, interrupted = taken == steps, bool(stopping)
            if last:
                state = stages.finish_stage(stage, state)
            if taken % run.log_every == 0 or last:
                recent.log()
            if run.eval_every and taken % run.eval_every == 0 and not last:
                measured = stages.assess(run, stage, state.params, datas[0][0], calibrate=False)
                logging.info("step %d: validation loss %.4f", taken, measured["validation"]["loss"])
            if taken % run.save_every == 0 or last or interrupted:
                recent.log()  # a state is saved only after its losses were seen to be finite
                about = stages.describe(run, stage, taken, datas[0][0])
                saver.save(taken, state, batches.get_state(), about)
            if interrupted:
                raise KeyboardInterrupt
    return state.params


def _batches(run: RunConfig, stage: str, datas: list):
    """The stage's own endless stream of training batches, this host's rows of them."""
    return iter(
        training_batches(
            datas,
            length=run.data.length,
            batch=run.data.batch,
            seed=run.seed + STAGES.index(stage),
            host_index=jax.process_index(),
            host_count=jax.process_count(),
        )
    )


def open_datas(run: RunConfig) -> list[tuple[PreparedData, float]]:
    """The prepared folders of a config with their mixing weights, checked against the model.

    Raises:
        UserError: another vocabulary, a window longer than any document, or weights that do not
            match the folders.
    """
    datas = [open_data(path.strip()) for path in run.data.path.split(",")]
    weights = [float(len(data.tokens["train"])) for data in datas]
    if run.data.weights:
        try:
            weights = [float(w) for w in run.data.weights.split(",")]
        except ValueError as error:
            raise UserError(f"data.weights: {error}; expected numbers, comma-separated") from error
    if len(weights) != len(datas):
        raise UserError(f"data.weights names {len(weights)} corpora, data.path {len(datas)}")
    for data in datas:
        if data.vocab_size != run.model.vocab_size:
            raise UserError(
                f"{data.path} was tokenized with {data.vocab_size} ids, model.vocab_size is "
                f"{run.model.vocab_size}: use the model's tokenizer (prepare_data --tokenizer=...) "
                "or set --config.model.vocab_size"
            )
        longest = longest_document(data, "train")
        if run.data.length > longest:
            raise UserError(
                f"data.length is {run.data.length} tokens, but the longest document in "
                f"{data.path} has {longest}: no window would hold one document; shorten it"
            )
    return list(zip(datas, weights, strict=True))


def _check_batch(run: RunConfig, mesh: Mesh) -> None:
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if (run.data.batch // run.accumulation) % shares:
        raise UserError(
            f"data.batch / accumulation = {run.data.batch // run.accumulation} windows cannot be "
            f"split over {shares} devices (mesh data x fsdp); choose a multiple of {shares}"
        )


def _claim_directory(directory: Path, run: RunConfig) -> None:
    """Write config.json, or check that the one there describes the same run."""
    file = directory / "config.json"
    ours = json.loads(json.dumps(to_dict(run)))
    if file.exists():
        theirs = json.loads(file.read_text())
        # Settings of a stage that was never run here say nothing; older files have some for each.
        silent = {n for n in STAGES if ours[n] is None and latest(directory / n) is None}
        kept = ours.keys() - _MAY_CHANGE - silent
        changed = [n for n in ours if n in kept and ours[n] != theirs.get(n)]
        if changed:
            raise UserError(
                f"{directory} holds a run with another {', '.join(changed)}; choose another "
                "--config.name, or remove that directory to start afresh"
            )
    write_text(file, json.dumps(ours, indent=1) + "\n")


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
    steps: list[tuple[int, Any, np.ndarray]] = dataclasses.field(default_factory=list)
    since: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, step: int, values: Any, batch: dict[str, np.ndarray]) -> None:
        """Remember a step, its metrics and which documents its batch came from."""
        self.steps.append((step, values, batch["documents"]))

    def log(self) -> None:
        """Log a line for the steps since the last; stop at the first bad number among them."""
        if not self.steps:
            return
        fetched = jax.device_get([values for _, values, _ in self.steps])
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
            values |= {f"ratio_layer_{i:02d}": 1 / (1 - m) for i, m in enumerate(merged)}
        values |= _speed(self.run, len(self.steps), seconds)
        self.sink.log(_steps_before(self.run, self.stage) + self.steps[-1][0] + 1, values)
        self.steps.clear()
        self.since = time.perf_counter()

    def _diverged(self, step: int, values: Any, documents: np.ndarray) -> None:
        directory = Path(self.run.output) / self.run.name / self.stage
        self.saver.wait()
        good = latest(directory) or latest(directory.parent)
        raise RunFailure(
            f"stage {self.stage}, step {step}: "
            + ", ".join(f"{n} = {v}" for n, v in values.items() if not np.isfinite(v).all())
            + f". Last good checkpoint: {good.path if good else 'none'}. The batch's windows cover "
            f"training documents {documents.tolist()}. Look at them, or lower the learning rate."
        )


def _speed(run: RunConfig, steps: int, seconds: float) -> dict[str, float]:
    """Tokens per second and, where the device's peak is known, model FLOP/s utilisation."""
    model = run.model
    rate = steps * run.data.batch * run.data.length / seconds
    table = 0 if model.tied_embeddings else model.vocab_size * model.width
    per_token = metrics.train_flops_per_token(
        params_without_embedding=count_parameters(model) - table,
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        length=run.data.length,
    )
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    utilisation = metrics.mfu(rate, per_token, jax.device_count(), peak)
    return {"tokens_per_second": rate} | ({} if utilisation is None else {"mfu": utilisation})
