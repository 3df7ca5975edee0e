"""Our own checkpoints, read without the config file that made them, and written from any other."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh

from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    from_dict,
    to_dict,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from dmc_jax.errors import UserError
from dmc_jax.interop.huggingface import tokenizer_files
from dmc_jax.interop.orbax_arrays import open_arrays, read_part, replace_array, write_part
from dmc_jax.interop.output import copy_tokenizer
from dmc_jax.interop.parameters import (
    Place,
    leaf_dtypes,
    leaf_shapes,
    places,
    to_foreign,
    to_ours,
    unflatten,
)
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.model.llama import init_params
from dmc_jax.training.checkpoint import (
    CheckpointRef,
    latest,
    load_metadata,
    load_params,
    open_for_saving,
)
from dmc_jax.training.sharding import with_shardings

# Tokens per window that evaluation takes by default, where training did not say.
_EVALUATED_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    ref: CheckpointRef
    config: ModelConfig
    params: Any
    settings: DMCSettings | None  # None: a dense model
    threshold: float  # of hard decisions, calibrated at the end of the retrofit
    data: Path  # prepared folder it was trained on
    tokenizer: Path | None  # None: it was converted from a checkpoint without one
    metadata: dict


def find_checkpoint(path: str | os.PathLike) -> CheckpointRef:
    """The newest complete checkpoint of a run directory, a stage of it, or a step itself.

    Raises:
        UserError: there is none.
    """
    ref = latest(path)
    if ref is None:
        raise UserError(
            f"no complete checkpoint in {path}; expected a run directory, a stage of one "
            "(RUN/finetune) or a step of that (RUN/finetune/600)"
        )
    return ref


def load_own_tokenizer(model: LoadedModel, path: str | os.PathLike | None = None) -> Tokenizer:
    """The tokenizer that a model was trained with.

    Args:
        model: from `load_model`.
        path: where it is now; None: where it was in training.

    Raises:
        UserError: no tokenizer there, or another one.
    """
    path = path or model.tokenizer
    if path is None:
        raise UserError(
            f"{model.ref.path} was converted from a checkpoint without a tokenizer: name one with "
            "--tokenizer=FILE"
        )
    tokenizer = load_tokenizer(path)
    expected = model.metadata["tokenizer_sha256"]
    if expected is not None and fingerprint(path) != expected:
        raise UserError(
            f"{path} is not the tokenizer that {model.ref.path} was trained with: name that one "
            "with --tokenizer=FILE"
        )
    return tokenizer


def load_model(path: str | os.PathLike, mesh: Mesh | None = None) -> LoadedModel:
    """Load sizes, parameters and DMC settings of a checkpoint.

    Args:
        path: as in `find_checkpoint`.
        mesh: devices to spread the parameters over; None: the first device.

    Returns:
        The model; its parameters are float32, whatever they are stored in.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    ref = find_checkpoint(path)
    metadata = load_metadata(ref)
    config = from_dict(ModelConfig, metadata["run"]["model"])
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    if mesh is not None:
        shapes = with_shardings(shapes, mesh)
    settings = from_dict(DMCSettings, metadata["run"]["dmc"])
    return LoadedModel(
        ref=ref,
        config=config,
        params=load_params(ref, shapes),
        settings=settings if metadata["mode"] == "dmc" else None,
        threshold=metadata["threshold"],
        data=Path(metadata["data"]),
        tokenizer=_tokenizer_path(ref, metadata),
        metadata=metadata,
    )


def _tokenizer_path(ref: CheckpointRef, metadata: dict) -> Path | None:
    """Where the tokenizer is; a converted checkpoint names one beside itself."""
    return (ref.path / metadata["tokenizer"]).resolve() if metadata["tokenizer"] else None


# ---- as one format among others ---------------------------------------------------------------


def open_native(path: str | os.PathLike) -> Source:
    """Open a checkpoint of ours as every other format is opened.

    Args:
        path: as in `find_checkpoint`.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    ref = find_checkpoint(path)
    metadata = load_metadata(ref)
    try:
        config = from_dict(ModelConfig, metadata["run"]["model"])
        settings = from_dict(DMCSettings, metadata["run"]["dmc"])
        mode, threshold = metadata["mode"], float(metadata["threshold"])
        tokenizer = _tokenizer_path(ref, metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the metadata of {ref.path} is damaged: {error!r}") from None
    shapes = leaf_shapes(config)
    arrays = open_arrays(ref.path / "state", list(shapes))
    for leaf, array in arrays.items():
        if array.shape != shapes[leaf]:
            raise UserError(
                f"{ref.path}: {leaf} has shape {list(array.shape)}, the model's sizes ask for "
                f"{list(shapes[leaf])}"
            )
    files: tuple[Path, ...] = ()
    if tokenizer is not None and tokenizer.is_file():
        beside = tokenizer_files(tokenizer.parent)
        files = (tokenizer, *(file for file in beside if file != tokenizer))
    # In the order of our leaves: the layers of a stack are read one after the other.
    table = sorted(places(config).items(), key=lambda item: item[1].leaf)
    return Source(
        format="orbax",
        path=ref.path,
        config=config,
        settings=settings if mode == "dmc" else None,
        threshold=threshold,
        tensors={name: _tensor(ref.path, arrays[p.leaf], p) for name, p in table},
        tokenizer=files,
    )


def _tensor(where: Path, array: ts.TensorStore, place: Place) -> Tensor:
    dtype = np.dtype(array.dtype.numpy_dtype)

    def read_rows(begin: int, end: int) -> np.ndarray:
        rows = slice(begin, end)
        index = rows if place.layer is None else (place.layer, rows)
        return read_part(array, index, where)

    return Tensor(place.foreign_shape, dtype, lambda: to_foreign(place, read_rows, dtype))


def write_native(
    source: Source, folder: Path, dtype: np.dtype | None, progress: Callable[[int], object]
) -> None:
    """Write any checkpoint as one of ours, tensor by tensor.

    The dtype of the file is that of the weights; whoever loads it gets float32 parameters.

    Args:
        source: what to write.
        folder: an empty run directory. A dense model becomes its `pretrain/0`, a DMC model its
            `finetune/0`; the tokenizer goes to `tokenizer/`.
        dtype: of the file; None: as in the source.
        progress: called with the bytes of every tensor read.

    Raises:
        OSError: the disk is full.
        UserError: the source is damaged.
    """
    stage = "pretrain" if source.settings is None else "finetune"
    tokenizer = copy_tokenizer(source.tokenizer, folder / "tokenizer")
    shapes, dtypes = leaf_shapes(source.config), leaf_dtypes(source, dtype)
    stand_ins = {leaf: np.zeros((1,) * len(shapes[leaf]), dtypes[leaf]) for leaf in shapes}
    with open_for_saving(folder, stage, keep=1) as saver:
        about = _metadata(source, stage, folder, tokenizer, str(dtypes["embedding"]))
        saver.save(0, {"params": unflatten(stand_ins)}, {}, about)
    state = folder.absolute() / stage / "0" / "state"
    table, arrays = places(source.config), {}
    for name, tensor in source.tensors.items():
        place = table[name]
        stacked = place.layer is not None
        to = dtypes[place.leaf]
        step = min(place.rows(to.itemsize), place.shape[0])
        if place.leaf not in arrays:
            part = (*(1,) * stacked, step, *place.shape[1:])
            arrays[place.leaf] = replace_array(state, place.leaf, shapes[place.leaf], part)
        whole = tensor.read()
        for begin in range(0, place.shape[0], step):
            end = min(begin + step, place.shape[0])
            rows = slice(begin, end)
            index = (place.layer, rows) if stacked else rows
            part = to_ours(place, whole, begin, end)
            write_part(arrays[place.leaf], index, part.astype(to, copy=False))
        del whole, part  # before the next is read
        progress(tensor.nbytes)


def _metadata(source: Source, stage: str, folder: Path, tokenizer: str | None, dtype: str) -> dict:
    """What training writes beside the arrays (see `stages.describe`), for a converted model."""
    none = StageConfig(steps=1, learning_rate=0.0)
    run = RunConfig(
        name="converted",
        model=source.config,
        dmc=source.settings or DMCSettings(),
        compression=CompressionConfig(),
        pretrain=none,
        zero_out=none,
        retrofit=none,
        finetune=none,
        data=DataConfig(path="", length=max(2, min(source.config.max_length, _EVALUATED_LENGTH))),
        stages=stage,
        compute_dtype="float32" if dtype == "float32" else "bfloat16",
    )
    return {
        "format": "dmc_jax",
        "stage": stage,
        "step": 0,
        "mode": "dense" if source.settings is None else "dmc",
        "threshold": source.threshold,
        "run": to_dict(run),
        "data": "",
        # Relative to the step's folder, so that the run directory may be moved.
        "tokenizer": f"../../tokenizer/{tokenizer}" if tokenizer else "",
        "tokenizer_sha256": fingerprint(folder / "tokenizer" / tokenizer) if tokenizer else None,
        "converted_from": {"format": source.format, "path": str(source.path.absolute())},
    }
