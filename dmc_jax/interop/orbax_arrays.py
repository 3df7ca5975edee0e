"""The arrays of a checkpoint of ours, read and written in parts with TensorStore.

Orbax saves whole arrays from memory. A converted model has to be written one tensor at a time, so
Orbax saves a stand-in of one element for every array, and with it all its own files; then the
arrays take their place in the same database, under the same names and in the same format.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dmc_jax.errors import UserError
from dmc_jax.interop.parameters import PART_BYTES


def open_arrays(state: Path, leaves: list[str]) -> dict[str, ts.TensorStore]:
    """Open the parameters of a checkpoint for reading.

    Args:
        state: its folder `state`.
        leaves: dotted paths of parameters, such as "run_0.q.kernel".

    Raises:
        UserError: one of them is not there, or the files are damaged.
    """
    arrays = {leaf: _open(state, leaf, cached=0) for leaf in leaves}
    # Training saves a stack of layers as one piece. Kept once read, it serves all its layers.
    pieces = [
        int(np.prod(array.chunk_layout.read_chunk.shape)) * array.dtype.numpy_dtype.itemsize
        for array in arrays.values()
        if array.chunk_layout.read_chunk.shape[0] > 1 and array.rank > 2
    ]
    largest = max(pieces, default=0)
    if largest <= PART_BYTES:
        return arrays
    return {leaf: _open(state, leaf, cached=2 * largest) for leaf in leaves}


def replace_array(
    state: Path, leaf: str, shape: tuple[int, ...], part: tuple[int, ...]
) -> ts.TensorStore:
    """Put an empty array in the place of a stand-in.

    Args:
        state: the folder `state` of a checkpoint.
        leaf: dotted path of the parameter; the stand-in gives the dtype.
        shape: of the array.
        part: shape of what is written at a time.

    Raises:
        OSError: it cannot be written.
    """
    standing = _open(state, leaf, cached=0).spec().to_json()["metadata"]
    # Trained weights hardly shrink, and compressing them takes longer than writing them.
    metadata = {"compressor": None, "shape": list(shape), "chunks": list(part)}
    spec = _spec(state, leaf) | {"metadata": standing | metadata}
    return _system_errors_of(lambda: ts.open(spec, create=True, delete_existing=True).result())


def write_part(array: ts.TensorStore, index: Any, part: np.ndarray) -> None:
    """Write a part of an array.

    Raises:
        OSError: it cannot be written.
    """
    _system_errors_of(lambda: array[index].write(np.ascontiguousarray(part)).result())


def read_part(array: ts.TensorStore, index: Any, where: Path) -> np.ndarray:
    """Read a part of an array.

    Raises:
        UserError: the files are damaged.
    """
    try:
        return array[index].read().result()
    except ValueError as error:
        raise UserError(f"cannot read {where}: {str(error)[:200]}; it is damaged") from None


def _open(state: Path, leaf: str, cached: int) -> ts.TensorStore:
    context = ts.Context({"cache_pool": {"total_bytes_limit": cached}})
    try:
        return ts.open(_spec(state, leaf), read=True, context=context).result()
    except ValueError as error:
        raise UserError(
            f"cannot read {leaf} in {state}: {str(error)[:200]}; the checkpoint is damaged or of "
            "another model"
        ) from None


def _spec(state: Path, leaf: str) -> dict:
    base = {"driver": "file", "path": f"{state}{os.sep}"}
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"params.{leaf}/"},
    }


def _system_errors_of(action):
    """TensorStore raises a ValueError and spells the system's error number into its text."""
    try:
        return action()
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
