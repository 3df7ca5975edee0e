"""Our own checkpoints as one format among others: opened as a `Source`, written from any."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from dmc_jax.checkpoints import digests
from dmc_jax.checkpoints.metadata import FORMAT, Metadata, Origin, load_metadata
from dmc_jax.checkpoints.models import tokenizer_path
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.checkpoints.states import open_for_saving
from dmc_jax.data.tokenizer import fingerprint
from dmc_jax.errors import UserError
from dmc_jax.interop.huggingface import tokenizer_files
from dmc_jax.interop.orbax_arrays import open_arrays, read_part, replace_array, write_part
from dmc_jax.interop.output import copy_tokenizer
from dmc_jax.interop.parameters import (
    Place,
    cast,
    leaf_dtypes,
    leaf_shapes,
    places,
    to_foreign,
    to_ours,
    unflatten,
)
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.policies.dense import Dense


def open_dmc_jax(path: str | os.PathLike) -> Source:
    """Open a checkpoint of ours as every other format is opened.

    Args:
        path: a run directory, a stage of it or a step.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    ref = latest(path)
    if ref is None:
        raise UserError(f"no complete checkpoint of {FORMAT} in {path}")
    metadata = load_metadata(ref)
    digests.check(ref.path, "state/")
    tokenizer = tokenizer_path(ref, metadata)
    shapes = leaf_shapes(metadata.model)
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
    table = sorted(places(metadata.model).items(), key=lambda item: item[1].leaf)
    return Source(
        format=FORMAT,
        path=ref.path,
        config=metadata.model,
        policy=metadata.policy,
        tensors={name: _tensor(ref.path, arrays[p.leaf], p) for name, p in table},
        tokenizer=files,
        special=metadata.special_tokens,
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
    shapes, dtypes = leaf_shapes(source.config), leaf_dtypes(source, dtype)
    metadata = metadata_of(source, dtypes["embedding"])
    tokenizer = copy_tokenizer(source.tokenizer, folder / "tokenizer")
    if tokenizer is not None:
        metadata = dataclasses.replace(
            metadata,
            # Relative to the step's folder, so that the run directory may be moved.
            tokenizer=f"../../tokenizer/{tokenizer}",
            tokenizer_sha256=fingerprint(folder / "tokenizer" / tokenizer),
        )
    stand_ins = {leaf: np.zeros((1,) * len(shapes[leaf]), dtypes[leaf]) for leaf in shapes}
    with open_for_saving(folder, metadata.stage, keep=1) as saver:
        saver.save(metadata.step, {"params": unflatten(stand_ins)}, {}, metadata)
    state = folder.absolute() / metadata.stage / str(metadata.step) / "state"
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
            write_part(arrays[place.leaf], index, cast(part, to, name))
        del whole, part  # before the next is read
        progress(tensor.nbytes)
    digests.record(state.parent)  # anew: the saver saw stand-ins


def metadata_of(source: Source, dtype: np.dtype | None = None) -> Metadata:
    """What a checkpoint of ours with the same model says of itself, but for its tokenizer.

    Args:
        source: the checkpoint; a dense model counts as pretrained, a DMC model as fine-tuned.
        dtype: of the weights, where they are written in another than the source's.
    """
    dtypes = {t.dtype for t in source.tensors.values()} if dtype is None else {np.dtype(dtype)}
    wide = np.dtype(np.float16) in dtypes or np.dtype(ml_dtypes.bfloat16) not in dtypes
    return Metadata(
        stage="pretrain" if isinstance(source.policy, Dense) else "finetune",
        step=0,
        model=source.config,
        policy=source.policy,
        # Float16 has more digits than bfloat16: only float32 takes the weights as they are.
        compute_dtype="float32" if wide else "bfloat16",
        special_tokens=source.special,
        converted_from=Origin(source.format, str(source.path.absolute())),
    )
