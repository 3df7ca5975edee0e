"""Which checkpoints of a run stay: the newest of every stage do, whatever the limits."""

import dataclasses
from pathlib import Path

from dmc_jax.checkpoints.run_directory import complete_steps
from dmc_jax.config import STAGES, RunConfig


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many checkpoints a run keeps, and how much room they may take."""

    per_stage: int
    total: int | None = None  # in all stages
    nbytes: float | None = None  # in all stages

    @classmethod
    def of(cls, run: RunConfig) -> "Limits":
        """Those of a config."""
        return cls(run.keep, run.keep_total or None, 1e9 * run.keep_gb or None)


def surplus(run_dir: Path, stage: str, limits: Limits) -> list[Path]:
    """List the complete checkpoints that are beyond the limits of a run, in the order to remove.

    A stage's newest is never among them: the run goes on from there, and its figures are told by
    it. Of the others the earliest stage's go first, and there the earliest step.

    Args:
        run_dir: of the run.
        stage: that is being written, which `limits.per_stage` is about.
        limits: to keep.
    """
    steps = {
        name: [run_dir / name / str(step) for step in complete_steps(run_dir / name)]
        for name in STAGES
    }
    going, steps[stage] = steps[stage][: -limits.per_stage], steps[stage][-limits.per_stage :]
    staying = [step for name in STAGES for step in steps[name]]
    sizes = dict.fromkeys(staying, 0)
    if limits.nbytes is not None:
        sizes = {step: _size(step) for step in staying}
    count, taken = len(staying), sum(sizes.values())
    for step in (step for name in STAGES for step in steps[name][:-1]):
        many = limits.total is not None and count > limits.total
        if many or (limits.nbytes is not None and taken > limits.nbytes):
            going.append(step)
            count, taken = count - 1, taken - sizes[step]
    return going


def _size(step_dir: Path) -> int:
    return sum(file.stat().st_size for file in step_dir.rglob("*") if file.is_file())
