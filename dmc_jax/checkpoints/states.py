"""Saves and restores training states with Orbax; `run_directory.py` says what lies where.

Orbax's `AsyncCheckpointer` writes a step beside its final name and renames it when complete. Its
`CheckpointManager` is not used: after one failed save it forgets the checkpoints that are still on
disk. What to keep is decided here, from the directories alone.
"""

import base64
import contextlib
import gc
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dmc_jax.checkpoints import digests
from dmc_jax.checkpoints.metadata import Metadata, to_json
from dmc_jax.checkpoints.retention import Limits, surplus
from dmc_jax.checkpoints.run_directory import (
    PARTIAL_MARK,
    CheckpointRef,
    clear_partial,
    complete_steps,
    free_space,
    read_json,
    remove_step,
)
from dmc_jax.config import STAGES
from dmc_jax.errors import LostPeer, UserError
from dmc_jax.processes import first, is_lost_peer, of_first

PyTree = Any

_SHOWN_DIFFERENCES = 5


class Saver:
    """Writes one stage's checkpoints in the background; `open_for_saving` makes it."""

    def __init__(self, directory: Path, limits: Limits, resumed_step: int | None):
        self._directory = directory
        self._limits = limits
        self._resumed_step = resumed_step
        self._pending: int | None = None
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._record),
        )

    def save(
        self, step: int, state: PyTree, data_state: Mapping | bytes, metadata: Metadata
    ) -> bool:
        """Copy the state to the host and write it in the background.

        Returns as soon as the copy is made, so the caller may donate the state's buffers at once.
        The previous save is waited for first; its failure, if any, is raised here.

        Args:
            step: Training steps taken in this stage; greater than that of every checkpoint there.
            state: Any pytree of jax arrays, typed PRNG keys included.
            data_state: Where the data iterator stands: bytes, or a JSON-able dict.
            metadata: What the checkpoint says of itself.

        Returns:
            True; or False where `step` is the resumed one, which is on disk already.

        Raises:
            TypeError: `data_state` or the figures in `metadata` are not JSON-able.
            UserError: The step, or a later one, is there already.
            OSError: This or the previous write failed. Earlier checkpoints are untouched.
        """
        self.wait()
        if step == self._resumed_step:
            return False
        newest = max(complete_steps(self._directory), default=None)
        if newest is not None and step <= newest:
            raise UserError(
                f"cannot save step {step} in {self._directory}: step {newest} is there, and no "
                "checkpoint is overwritten. Resume from the newest step, choose another run "
                "directory, or remove the later steps."
            )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(_tagged(data_state)),
            metadata=ocp.args.JsonSave(_through_json(to_json(metadata))),
        )
        self._pending = step
        self._attempt(lambda: self._checkpointer.save(self._directory / str(step), args=items))
        return True

    def _record(self) -> None:
        """In the background, in process 0, when a step is complete but for its name."""
        for partial in self._directory.glob(f"{self._pending}{PARTIAL_MARK}*"):
            digests.record(partial)

    def wait(self) -> None:
        """Wait for the save in the background, then remove what is beyond the limits.

        Raises:
            OSError: The save failed. Earlier checkpoints are untouched.
        """
        self._attempt(self._checkpointer.wait_until_finished)
        self._pending = None
        if first():
            for step in surplus(self._directory.parent, self._directory.name, self._limits):
                remove_step(step)

    def close(self) -> None:
        """Wait for the save in the background and free Orbax's threads.

        Raises:
            OSError: The save failed. Earlier checkpoints are untouched.
        """
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, LostPeer):
            return  # a save that has begun takes all: it would wait for the dead
        if error is None:
            self.close()
            return
        try:
            self.close()
        except OSError as failed_save:  # must not hide the error that ended the run
            error.add_note(str(failed_save))

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            reason = _system_error(error)
            if reason is None:  # a defect, not the disk: shown as it is
                raise
            newest = max(complete_steps(self._directory), default=None)
            earlier = "there is no earlier step" if newest is None else f"step {newest} is intact"
            raise OSError(
                f"could not write checkpoint {self._directory / str(self._pending)}: {reason} "
                f"({free_space(self._directory)}; {earlier}). Make room or mend permissions, then "
                "resume the run."
            ) from error


def open_for_saving(
    run_dir: str | os.PathLike,
    stage: str,
    keep: int | Limits,
    *,
    resumed_step: int | None = None,
) -> Saver:
    """Open a stage of a run for writing and clear what an interrupted save left behind.

    Args:
        run_dir: The run's directory; made if missing.
        stage: One of `STAGES`.
        keep: How many of the newest steps stay; at least 1, so a stage's end always stays. Or more
            limits. While one more is being written, the disk holds that, too.
        resumed_step: The step of this stage that the run was resumed from; saving it again does
            nothing.

    Returns:
        A `Saver`, to be used in a `with` statement.

    Raises:
        UserError: An unknown stage, `keep` below 1, or a directory that cannot be made.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}; expected one of {', '.join(STAGES)}.")
    limits = Limits(keep) if isinstance(keep, int) else keep
    if limits.per_stage < 1:
        raise UserError(f"keep is {keep}: at least 1 checkpoint of a stage must stay.")
    directory = Path(run_dir).absolute() / stage

    def clear() -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            clear_partial(directory)
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints in {directory}: {error.strerror or error}. Choose a run "
                "directory that this user may write to."
            ) from error

    of_first(clear)
    return Saver(directory, limits, resumed_step)


def load_data_state(ref: CheckpointRef) -> dict | bytes:
    """Read where the data iterator stood.

    Args:
        ref: The checkpoint.

    Returns:
        What was given to `Saver.save`, of the same type: a dict or bytes.

    Raises:
        UserError: The file is missing or damaged.
    """

    def read() -> dict:
        digests.check(ref.path, "data/")
        return read_json(ref.path / "data" / "metadata")

    saved = of_first(read)
    return base64.b64decode(saved["base64"]) if saved["type"] == "bytes" else saved["json"]


def load_state(ref: CheckpointRef, abstract_state: PyTree) -> PyTree:
    """Restore the whole state, straight into the given shardings and dtypes.

    Args:
        ref: The checkpoint.
        abstract_state: The state's structure with `jax.ShapeDtypeStruct` leaves (or arrays). A leaf
            without a sharding goes to the first device. The mesh may differ from the saving one.

    Returns:
        The state, of the same structure.

    Raises:
        UserError: The checkpoint is of another shape, or damaged.
    """
    of_first(lambda: _check(ref, abstract_state))
    return _restore(ref, abstract_state)


def load_params(ref: CheckpointRef, abstract_params: PyTree) -> PyTree:
    """Restore the model's parameters without reading the optimizer's state.

    Args:
        ref: The checkpoint; its state has a key or an attribute `params`.
        abstract_params: The parameters' structure, as in `load_state`.

    Returns:
        The parameters, of the same structure.

    Raises:
        UserError: The checkpoint is of another shape, or damaged.
    """
    wanted = {"params": abstract_params}
    of_first(lambda: _check(ref, wanted, within="params"))
    return _restore(ref, wanted)["params"]


def _check(ref: CheckpointRef, wanted: PyTree, within: str | None = None) -> None:
    """Read the checkpoint through before all processes read their parts of it."""
    digests.check(ref.path, "state/")
    _require_match(ref, describe_mismatch(ref, wanted, within=within))


def describe_mismatch(
    ref: CheckpointRef, abstract_state: PyTree, *, within: str | None = None
) -> list[str]:
    """Compare the shapes in a checkpoint with those asked for; read no array.

    Args:
        ref: The checkpoint.
        abstract_state: What is asked for, as in `load_state`.
        within: Compare only this top-level entry and what is below it.

    Returns:
        One line for each leaf that differs, is missing or is left over; empty where all agree.
        Dtypes may differ: restoring casts.

    Raises:
        UserError: The checkpoint's description of itself is missing or damaged.
    """
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(ref.path / "state")).tree
    except Exception as error:
        raise _damaged(ref, error) from error
    saved = {
        name: tuple(leaf.shape)
        for name, leaf in _named_leaves(tree).items()
        if within is None or name.split(".")[0] == within
    }
    wanted = {name: _stored_shape(leaf) for name, leaf in _named_leaves(abstract_state).items()}
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            lines.append(f"{name}: not in the checkpoint, expected {wanted[name]}")
        elif name not in wanted:
            lines.append(f"{name}: {saved[name]} in the checkpoint, not expected")
        elif saved[name] != wanted[name]:
            lines.append(f"{name}: {saved[name]} in the checkpoint, expected {wanted[name]}")
    return lines


def quiet_orbax() -> None:
    """Drop Orbax's informational log lines (many for each save); its warnings still show.

    So do not the tracebacks that its threads log of a failed save, which is raised here, too.
    """
    source = os.path.dirname(ocp.__file__) + os.sep

    def keeps(record: logging.LogRecord) -> bool:
        if not record.pathname.startswith(source):
            return True
        return record.levelno >= logging.WARNING and not record.exc_info

    logging.getLogger("absl").addFilter(keeps)


def _restore(ref: CheckpointRef, abstract: PyTree) -> PyTree:
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or first_device
        sharding.shard_shape(leaf.shape)  # a mesh that does not divide it is no damage: jax says so
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    item = jax.tree.map(placed, abstract)
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,  # `describe_mismatch` has said what else the checkpoint may hold
    )
    with _abandoned_reads_silenced():
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(ref.path / "state", args=args)
        except Exception as error:
            if is_lost_peer(error):
                raise
            damaged = _damaged(ref, error)
        # Raised out here, without the cause: that would keep the other reads alive.
        gc.collect()
        raise damaged


@contextlib.contextmanager
def _abandoned_reads_silenced():
    """Drop what is said of reads that Orbax left unawaited when one of them failed.

    They tell of the same damage, pages long, when they are collected or finish after their event
    loop is closed, from threads of TensorStore; so after a failure the filter stays.
    """
    show_unraisable, show_uncaught = sys.unraisablehook, sys.excepthook

    def unraisable(about) -> None:
        said = f"{about.object!r} {about.exc_value!r}"
        if "_read_array" not in said and "Event loop is closed" not in said:
            show_unraisable(about)

    def uncaught(kind, error, trace) -> None:
        if "Event loop is closed" not in str(error):
            show_uncaught(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught
    yield
    sys.unraisablehook, sys.excepthook = show_unraisable, show_uncaught


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    # Attributes, keys and positions are all spelled alike, as they are on disk: params.blocks.w
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _stored_shape(leaf) -> tuple[int, ...]:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # a typed key is stored as its words
    return tuple(leaf.shape)


def _require_match(ref: CheckpointRef, differences: list[str]) -> None:
    if differences:
        more = len(differences) - _SHOWN_DIFFERENCES
        shown = differences[:_SHOWN_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        raise UserError(
            f"{ref.path} is a checkpoint of another shape: {'; '.join(shown)}. Use the model and "
            "optimizer settings that it was saved with; its metadata holds them."
        )


def _damaged(ref: CheckpointRef, error: Exception) -> UserError:
    reason = _system_error(error) or str(_root_cause(error))[:300]
    return UserError(
        f"cannot read checkpoint {ref.path}: {reason}. It is damaged; move it away and resume from "
        "an earlier one."
    )


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:  # Orbax wraps what went wrong in what it was doing
        error = error.__cause__
    return error


def _system_error(error: BaseException) -> str | None:
    """What the operating system said ("No space left on device"); None if it said nothing."""
    cause = _root_cause(error)
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    # tensorstore raises a ValueError and spells the errno into its text.
    code = re.search(r"os_error_code='(\d+)'", str(cause))
    return os.strerror(int(code[1])) if code else None


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))  # fails here, at the caller, and not in Orbax's thread


def _tagged(data_state: Mapping | bytes) -> dict[str, Any]:
    if isinstance(data_state, bytes):
        return {"type": "bytes", "base64": base64.b64encode(data_state).decode()}
    return {"type": "json", "json": _through_json(data_state)}
