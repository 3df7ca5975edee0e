"""Whose a run directory is: one living process's, and one run's.

    RUN/config.json    the run's configuration
    RUN/contents.json  hashes of what it was trained on and from: tokens, tokenizer, start, teacher
    RUN/lock           held by the process that trains the run

A run is the same as long as what decides its parameters is: the settings that `_settings` lists,
and the contents of what its paths name. All else may change whenever it goes on. Until there is a
checkpoint everything may.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from dmc_jax.checkpoints.metadata import FORMAT
from dmc_jax.checkpoints.models import StoredModel
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.config import GATED, STAGES, RunConfig, read_config, to_dict
from dmc_jax.data.prepared import PreparedData
from dmc_jax.errors import UserError
from dmc_jax.files import write_text

_ABOUT = {  # what contents.json has -> how a message calls it
    "data": "the text of data.path",
    "tokenizer": "the tokenizer of data.path",
    "init_from": "the model of init_from",
    "teacher": "the model of compression.teacher",
}
_TEXT = {".json", ".md", ".txt", ".model", ".py"}  # beside the weights in other formats
_CONFIGS = {"config.json", "params.json"}  # which decide what the weights mean
_WHOLE, _SAMPLE, _EVERY = 2**24, 2**12, 2**20  # bytes


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep a run directory for this process; whatever ends the process ends that, too.

    Args:
        directory: of the run; must exist.

    Raises:
        UserError: another process trains that run now.
    """
    with open(directory / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{directory} is being trained by {file.read().strip() or 'another process'}: wait "
                "for it, stop it, or choose another --config.name"
            ) from None
        except OSError as error:
            logging.warning("cannot lock %s (%s): start this run once only", directory, error)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        file.seek(0)
        if file.read() != owner:
            file.truncate(0)
            file.write(owner)
            file.flush()
        yield


def contents_of(
    run: RunConfig,
    datas: list[tuple[PreparedData, float]],
    start: StoredModel | None,
    teacher: StoredModel | None,
) -> dict[str, Any]:
    """Hash what a run is trained on and from.

    Args:
        run: the configuration.
        datas: its text.
        start: the model that it starts from, if any.
        teacher: the one that `compression.teacher` names, if any.

    Returns:
        JSON-able: by the names of `_ABOUT`, a hash (None where there is nothing) and a path.
    """
    own = (Path(run.output) / run.name).resolve()
    manifests = [data.manifest for data, _ in datas]
    hashes = {
        "data": [{split: at["sha256"] for split, at in m["splits"].items()} for m in manifests],
        "tokenizer": [manifest["tokenizer_sha256"] for manifest in manifests],
        # A checkpoint of the run itself is part of it.
        "init_from": None
        if start is None or own in start.path.resolve().parents
        else weights_hash(start),
        "teacher": teacher and weights_hash(teacher),
    }
    paths = {
        "data": run.data.path,
        "tokenizer": run.data.path,
        "init_from": start and str(start.path),
        "teacher": teacher and str(teacher.path),
    }
    return {name: {"sha256": hashes[name], "path": paths[name]} for name in _ABOUT}


def weights_hash(model: StoredModel) -> str:
    """Hash the stored weights of a model: equal for copies, whatever their folder is called.

    Of a file beyond 16 MiB a page of every MiB is read: what trained weights differ by, they differ
    by everywhere, and 70B parameters are not read twice.
    """
    root = model.path / "state" if model.format == FORMAT else model.path
    digest = hashlib.sha256()
    for file in [root] if root.is_file() else sorted(root.rglob("*")):
        name = file.relative_to(root).parts
        about = file.suffix in _TEXT and file.name not in _CONFIGS
        if not file.is_file() or (model.format != FORMAT and about):
            continue
        if any(part.startswith(".") for part in name):  # what git and download tools keep
            continue
        size = file.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with file.open("rb") as bytes_of:
            if size <= _WHOLE:
                digest.update(bytes_of.read())
                continue
            for place in (*range(0, size - _SAMPLE, _EVERY), size - _SAMPLE):
                bytes_of.seek(place)
                digest.update(bytes_of.read(_SAMPLE))
    return digest.hexdigest()


def claim(directory: Path, run: RunConfig, contents: dict[str, Any]) -> RunConfig:
    """Write down whose a run directory is, unless it holds the checkpoints of another run.

    Args:
        directory: of the run; must exist.
        run: the configuration.
        contents: from `contents_of`.

    Returns:
        The run, with the `draws` that it began with.

    Raises:
        UserError: there are checkpoints of another run; the message says what differs.
    """
    run = same_run(directory, run, contents)
    for name, values in (("config.json", to_dict(run)), ("contents.json", contents)):
        file, text = directory / name, json.dumps(values, indent=1) + "\n"
        if not file.exists() or file.read_text() != text:
            write_text(file, text)
    return run


def same_run(directory: Path, run: RunConfig, contents: dict[str, Any]) -> RunConfig:
    """Do what `claim` does, but write nothing."""
    if latest(directory) is None or not (directory / "config.json").exists():
        return run
    began = read_config(directory / "config.json")
    begun = {stage for stage in STAGES if latest(directory / stage) is not None}
    there, here = (_settings(config, begun) for config in (began, run))
    recorded = _read(directory / "contents.json")
    if recorded is None:  # before they were recorded, a path stood for its contents
        for settings, config in ((there, began), (here, run)):
            settings["data.path"] = config.data.path
            settings["compression.teacher"] = config.compression.teacher
    names = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
    if names:
        groups = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        each = "; ".join(f"{n} is {there.get(n)} there, {here.get(n)} here" for n in names)
        raise UserError(
            f"{directory} holds a run with another {groups} ({each}); choose another "
            "--config.name, or remove that directory to start afresh"
        )
    for name, about in _ABOUT.items():
        if recorded and recorded[name]["sha256"] != contents[name]["sha256"]:
            was, now = (at[name]["path"] or "none" for at in (recorded, contents))
            changed = f"of {was} has changed" if was == now else f"was {was} and is now {now}"
            raise UserError(
                f"{directory} holds a run with other contents: {about} {changed}; restore it, or "
                "choose another --config.name"
            )
    return dataclasses.replace(run, draws=_read(directory / "config.json").get("draws", 1))


def _settings(run: RunConfig, begun: set[str]) -> dict[str, Any]:
    """What decides the parameters that a run comes to, by dotted names.

    Args:
        run: the configuration.
        begun: the stages that have a checkpoint; settings of others may still be mended.
    """
    names = ("seed", "initializer_range", "compute_dtype", "products")
    kept = {name: getattr(run, name) for name in names}
    gated = {"gates"} if begun & set(GATED) else set()
    for group in ("model", "dmc", "compression", "optimizer", *sorted(begun | gated)):
        settings = run.stage(group) if group in STAGES else getattr(run, group)
        fields = {"": None} if settings is None else to_dict(settings)
        kept |= {f"{group}.{name}".rstrip("."): value for name, value in fields.items()}
    kept["model.kv_heads"] = run.model.kv_heads_by_layer
    kept["guard.spike"] = run.guard.spike  # after how many the run stops may change
    for later in ("teacher", "calibration_windows"):  # known by its contents; after training
        del kept[f"compression.{later}"]
    return kept | {f"data.{n}": getattr(run.data, n) for n in ("length", "batch", "weights")}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {file}: {error}. It says which run this is: restore it, or choose "
            "another --config.name"
        ) from None
