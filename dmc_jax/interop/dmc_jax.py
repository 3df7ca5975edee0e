"""Our own checkpoints as one format among others: opened as a `Source`, written from any."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore as ts

from dmc_jax.checkpoints.models import find_checkpoint, tokenizer_path
from dmc_jax.checkpoints.run_directory import load_metadata
from dmc_jax.checkpoints.states import open_for_saving
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
from dmc_jax.data.tokenizer import fingerprint
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

# Tokens per window that evaluation takes by default, where training did not say.
_EVALUATED_LENGTH = 4096


def open_dmc_jax(path: str | os.PathLike) -> Source:
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
        tokenizer = tokenizer_path(ref, metadata)
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


def write_dmc_jax(
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
