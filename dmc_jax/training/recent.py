"""The log lines of a stage: what the steps since the last one came to, and those not taken."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from dmc_jax.checkpoints.run_directory import CheckpointRef, complete_steps, latest
from dmc_jax.checkpoints.states import Saver
from dmc_jax.config import GATED, STAGES, ModelConfig, RunConfig
from dmc_jax.errors import RunFailure
from dmc_jax.evaluation.times import MARK
from dmc_jax.processes import fetch, of_first
from dmc_jax.training import metrics, stages
from dmc_jax.training.flops import model_flops
from dmc_jax.training.spent import Spent

_SCHEDULES = ("learning_rate", "target_ratio")  # of the newest step, not averaged
_OF_GUARD = ("skipped", "skipped_in_row", "usual_loss")


def steps_before(run: RunConfig, stage: str) -> int:
    """Count the steps of the stages that come before in this run's directory, as metrics do.

    Args:
        run: the configuration.
        stage: one of `STAGES`.
    """
    directory = Path(run.output) / run.name
    before = STAGES[: STAGES.index(stage)]
    there = [name for name in before if name in run.stage_names or latest(directory / name)]
    return sum(run.stage(name).steps for name in there if run.stage(name) is not None)


@dataclasses.dataclass
class Recent:
    """Steps since the last log line: their metrics stay on the device until they are asked for."""

    run: RunConfig
    stage: str
    sink: metrics.MetricsLogger
    saver: Saver
    teacher: ModelConfig | None
    spent: Spent
    steps: list[tuple[int, Any, dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)
    in_row: int = 0  # steps that were skipped, up to the last that was logged

    def add(self, step: int, values: Any, batch: dict[str, np.ndarray]) -> None:
        """Remember a step, its metrics and where its batch came from."""
        read = {name: batch[name] for name in ("corpus", "window", "documents")}
        self.steps.append((step, values, read))

    def log(self, **more: float) -> None:
        """Log a line for the steps since the last, and name those that were skipped.

        Args:
            more: numbers for that line.

        Raises:
            RunFailure: too many in a row were.
        """
        if not self.steps:
            return
        fetched = fetch([values for _, values, _ in self.steps])
        times = self.spent.take()
        guards = [{n: v.pop(n) for n in _OF_GUARD if n in v} for v in fetched]
        for (step, _, read), values, guard in zip(self.steps, fetched, guards, strict=True):
            if guard.get("skipped_in_row") or not stages.finite(values):
                self._skipped(step, values, guard, read)
        self.in_row = int(guards[-1].get("skipped_in_row", 0))
        # One batch is a poor sample: what depends on it is averaged since the last line.
        taken = [v for v, g in zip(fetched, guards, strict=True) if not g.get("skipped_in_row")]
        values = jax.tree.map(lambda *each: np.mean(each, axis=0), *(taken or fetched))
        values |= {name: fetched[-1][name] for name in _SCHEDULES if name in values}
        merged = values.pop("merged", None)
        if merged is not None:
            values["ratio"] = 1 / (1 - np.average(merged, weights=self.run.model.kv_heads_by_layer))
            values |= {
                f"ratio{metrics.LAYER_MARK}{i:02d}": 1 / (1 - m) for i, m in enumerate(merged)
            }
        if guards[-1].get("skipped"):
            values["skipped"] = int(guards[-1]["skipped"])
        if self.stage != "closed_form":
            seconds = times[f"{MARK}step"] + times[f"{MARK}data"]
            values |= speed(self.run, self.stage, self.teacher, len(self.steps), seconds)
        self.sink.log(
            steps_before(self.run, self.stage) + self.steps[-1][0] + 1, values | more | times
        )
        self.steps.clear()

    def _skipped(self, step: int, values: Any, guard: Any, read: dict[str, np.ndarray]) -> None:
        in_row = int(guard.get("skipped_in_row", self.run.guard.stop_after))
        what = not_finite(values) or (
            f"loss = {values['loss']:.4g}, the usual is {guard['usual_loss']:.4g}"
        )
        where = f"stage {self.stage}, step {step}"
        documents = f"training documents {read['documents'].tolist()}"
        if read["corpus"].any():
            documents += f" of the folders {read['corpus'].tolist()} of data.path"
        covered = f"The batch's windows {read['window'].tolist()} cover {documents}."
        if in_row < self.run.guard.stop_after:
            logging.warning("%s is skipped (%d in a row): %s. %s", where, in_row, what, covered)
            return
        good = self._last_good(step - in_row + 1)
        raise RunFailure(
            f"{where}: {what}, the last of {in_row} skipped in a row. Last good checkpoint: "
            f"{good.path if good else 'none'}. {covered} Look at them, lower the learning rate, or "
            "skip more with --config.guard.stop_after."
        )

    def _last_good(self, first_skipped: int) -> CheckpointRef | None:
        """The newest checkpoint from which a step was taken that came to something."""
        directory = Path(self.run.output) / self.run.name / self.stage
        self.saver.wait()

        def newest():
            good = [step for step in complete_steps(directory) if step < first_skipped]
            if good:
                return CheckpointRef(directory / str(good[-1]), self.stage, good[-1])
            before = STAGES[: STAGES.index(self.stage)]
            found = [latest(directory.parent / stage) for stage in reversed(before)]
            return next(filter(None, found), None)

        return of_first(newest)


def not_finite(values: dict[str, Any]) -> str:
    """Name the metrics that are not finite numbers; empty where all are."""
    return ", ".join(f"{n} = {v}" for n, v in values.items() if not np.isfinite(v).all())


def speed(
    run: RunConfig, stage: str, teacher: ModelConfig | None, steps: int, seconds: float
) -> dict[str, float]:
    """Tokens per second and, where the device's peak is known, model FLOP/s utilisation.

    Args:
        run, stage: of the steps.
        teacher: sizes of the model that teaches there, if any.
        steps: how many.
        seconds: that they took, with waits for data.
    """
    rate = steps * run.data.batch * run.data.length / max(seconds, 1e-9)
    beside = stage in GATED and run.gates.model != "all"
    per_token = model_flops(run.model, run.data.length, "beside" if beside else "all")
    if teacher is not None:
        per_token += model_flops(teacher, run.data.length, "nothing")
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    utilisation = metrics.mfu(rate, per_token, jax.device_count(), peak)
    return {"tokens_per_second": rate} | ({} if utilisation is None else {"mfu": utilisation})
