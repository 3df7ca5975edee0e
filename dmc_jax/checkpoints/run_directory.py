"""What lies where in a run directory, `RUN/<stage>/<step>/`, and the JSON beside the arrays.

    RUN/metrics.jsonl                      one line a logged step
    RUN/<stage>/<step>/state/              the arrays, written by `states.py`
    RUN/<stage>/<step>/data/metadata       JSON: where the data iterator stands
    RUN/<stage>/<step>/metadata/metadata   JSON: configuration and what else a reader wants first

The last file name is Orbax's choice for every JSON item. A step is written under another name and
renamed when complete, so a directory with the plain step number for a name is whole.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmc_jax.config import STAGES
from dmc_jax.errors import UserError

# Part of the name of a directory that is not a checkpoint yet.
PARTIAL_MARK = ".orbax-checkpoint-tmp"


@dataclass(frozen=True)
class CheckpointRef:
    """A complete checkpoint on disk.

    Attributes:
        path: The step directory.
        stage: One of `STAGES`, or the parent directory's name for a step kept elsewhere.
        step: The number of training steps taken in the stage.
    """

    path: Path
    stage: str
    step: int


def latest(path: str | os.PathLike) -> CheckpointRef | None:
    """Find the newest complete checkpoint at or below a path.

    Args:
        path: A run directory (its furthest stage's newest step), a stage directory (its newest
            step) or a step directory (itself).

    Returns:
        The checkpoint; None where there is no complete one.
    """
    path = Path(path).absolute()
    if is_complete(path):
        return CheckpointRef(path, path.parent.name, int(path.name))
    stage_dirs = [path] if path.name in STAGES else []
    stage_dirs += [path / stage for stage in reversed(STAGES)]
    for directory in stage_dirs:
        steps = complete_steps(directory)
        if steps:
            return CheckpointRef(directory / str(steps[-1]), directory.name, steps[-1])
    return None


def complete_steps(stage_dir: Path) -> list[int]:
    """List the complete checkpoints of a stage.

    Args:
        stage_dir: `RUN/<stage>`; may be missing.

    Returns:
        Their steps, ascending.
    """
    if not stage_dir.is_dir():
        return []
    return sorted(int(entry.name) for entry in stage_dir.iterdir() if is_complete(entry))


def is_complete(step_dir: Path) -> bool:
    """Tell a complete checkpoint from a partial one and from any other directory.

    Args:
        step_dir: What may be `RUN/<stage>/<step>`.

    Returns:
        True where the name is a step number and every item is there.
    """
    parts = ("_CHECKPOINT_METADATA", "state/_METADATA", "data/metadata", "metadata/metadata")
    is_step = step_dir.name.isdecimal() and step_dir.name == str(int(step_dir.name))
    return is_step and all((step_dir / part).is_file() for part in parts)


def remove_step(step_dir: Path) -> None:
    """Remove a checkpoint; interrupted, it leaves nothing that looks like one.

    Args:
        step_dir: `RUN/<stage>/<step>`.

    Raises:
        OSError: It cannot be removed.
    """
    doomed = step_dir.with_name(f"{step_dir.name}{PARTIAL_MARK}-removed")
    os.replace(step_dir, doomed)
    shutil.rmtree(doomed)


def clear_partial(stage_dir: Path) -> None:
    """Remove what interrupted saves and removals left in a stage.

    Args:
        stage_dir: `RUN/<stage>`, which no other process is writing.

    Raises:
        OSError: Something there cannot be removed.
    """
    for leftover in stage_dir.glob(f"*{PARTIAL_MARK}*"):
        shutil.rmtree(leftover)


def read_json(file: Path) -> Any:
    """Read one JSON item of a checkpoint.

    Args:
        file: The file.

    Returns:
        Its content.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {file}: {error}. The checkpoint is damaged; use an earlier one."
        ) from error


def free_space(directory: Path) -> str:
    """Say how full the disk below a directory is, for a message.

    Args:
        directory: An existing directory.

    Returns:
        For example `"1.5 GB free there"`.
    """
    return f"{shutil.disk_usage(directory).free / 1e9:.1f} GB free there"
