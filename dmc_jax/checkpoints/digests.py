"""A digest of every file of a checkpoint, beside them: a byte that a disk has flipped is told.

    RUN/<stage>/<step>/digests.json    JSON: SHA-256 by the path below the step

Checkpoints without it, older ones say, are taken as they are.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmc_jax.checkpoints.run_directory import is_complete, latest
from dmc_jax.config import STAGES
from dmc_jax.errors import UserError
from dmc_jax.files import write_text

_FILE = "digests.json"
_OF_ORBAX = "_CHECKPOINT_METADATA"  # times, which it writes last and nobody reads


def record(step_dir: Path) -> None:
    """Write down the digests of a checkpoint that is complete, or so but for its name.

    Args:
        step_dir: its directory.

    Raises:
        OSError: a file cannot be read or written.
    """
    files = (str(f.relative_to(step_dir)) for f in sorted(step_dir.rglob("*")) if f.is_file())
    _write(step_dir, _digests(step_dir, (name for name in files if name not in (_FILE, _OF_ORBAX))))


@contextlib.contextmanager
def rewritten(step_dir: Path, name: str) -> Iterator[None]:
    """Have one file of a checkpoint written anew; interrupted, it is one without a digest.

    Args:
        step_dir: `RUN/<stage>/<step>`.
        name: of the file, a path below it.

    Raises:
        OSError: a file cannot be read or written.
    """
    before = _read(step_dir)
    if before is not None:
        _write(step_dir, {other: x for other, x in before.items() if other != name})
    yield
    if before is not None:
        _write(step_dir, before | _digests(step_dir, [name]))


def damage(step_dir: Path, within: str = "") -> str | None:
    """Say what of a checkpoint is not as it was written; None where nothing is known to be.

    Args:
        step_dir: `RUN/<stage>/<step>`.
        within: only files whose path below it begins so.
    """
    try:
        recorded = _read(step_dir) or {}
        known = {name: digest for name, digest in recorded.items() if name.startswith(within)}
        missing = [name for name in known if not (step_dir / name).is_file()]
        there = _digests(step_dir, known.keys() - {*missing})
    except (OSError, UserError) as error:
        return str(error)
    changed = [name for name, digest in there.items() if digest != known[name]]
    told = [f"{name} is missing" for name in missing]
    told += [f"{name} is not as it was written" for name in sorted(changed)]
    return "; ".join(told[:3]) + "; ..." * (len(told) > 3) if told else None


def check(step_dir: Path, within: str) -> None:
    """Refuse a checkpoint that is damaged.

    Args:
        step_dir: as in `damage`.
        within: as there.

    Raises:
        UserError: it is.
    """
    told = damage(step_dir, within)
    if told is not None:
        raise UserError(
            f"cannot read checkpoint {step_dir}: {told}. It is damaged; move it away and resume "
            "from an earlier one."
        )


def set_aside_damaged(run_dir: Path) -> list[str]:
    """Give another name to what a run cannot go on from: its newest steps, until one is whole.

    Args:
        run_dir: of a run that no other process writes.

    Returns:
        A line for each.

    Raises:
        OSError: a directory cannot be renamed.
    """
    told = []
    for stage in STAGES:
        for step_dir in sorted((run_dir / stage).glob("*")):
            if step_dir.is_dir() and step_dir.name.isdecimal() and not is_complete(step_dir):
                told.append(_set_aside(step_dir, "parts of it are missing"))
    while (ref := latest(run_dir)) is not None and (reason := damage(ref.path)) is not None:
        told.append(_set_aside(ref.path, reason))
    return told


def _set_aside(step_dir: Path, reason: str) -> str:
    for number in itertools.count(1):
        aside = step_dir.with_name(f"{step_dir.name}.damaged" + f"-{number}" * (number > 1))
        if not aside.exists():
            os.rename(step_dir, aside)
            return f"{step_dir} is damaged: {reason}. It lies aside as {aside.name}."
    raise AssertionError("numbers end")


def _digests(step_dir: Path, names: Iterable[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (step_dir / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = sorted(names)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(digest, names), strict=True))


def _read(step_dir: Path) -> dict[str, str] | None:
    file = step_dir / _FILE
    if not file.exists():
        return None
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def _write(step_dir: Path, digests: dict[str, str]) -> None:
    write_text(step_dir / _FILE, json.dumps(digests, indent=1) + "\n")
