"""safetensors files, read with nothing taken on trust and written tensor by tensor.

    8 bytes          length of the header, little-endian
    header           JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__"}
    data             the tensors' bytes, little-endian, without gaps

Source: the format's description at https://huggingface.co/docs/safetensors. A file is only ever
read where its header, once checked against the file's length, says that a tensor lies.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dmc_jax.errors import UserError
from dmc_jax.files import lfs_pointer
from dmc_jax.interop.source import Tensor

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_MOST_AXES = 8


# ---- reading ----------------------------------------------------------------------------------


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """List the tensors of a file, whose header is checked and whose data is not read.

    Args:
        file: a `.safetensors` file.

    Raises:
        UserError: not such a file, truncated, or a header that contradicts itself or the file.
    """
    size, start, header = _read_header(file)
    metadata = header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _check_entry(file, name, entry)
        spans.append((begin, end, name))
        tensors[name] = _tensor(file, start + begin, dtype, shape)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "follows a gap"
            raise _bad(file, f"{name[:100]!r} {what} (byte {begin} of the data, not {position})")
        position = end
    if start + position != size:
        apart = size - start - position
        raise _bad(
            file,
            f"its header describes {position:,} bytes of data, the file has {size - start:,}, "
            f"{abs(apart):,} {'more' if apart > 0 else 'fewer'}",
        )
    return with_aliases(tensors, metadata)


def with_aliases(tensors: dict[str, Tensor], metadata: Any) -> dict[str, Tensor]:
    """Add tensors that were left out because they share the memory of another one.

    Args:
        tensors: by name.
        metadata: such as `safetensors.torch.save_model` writes for tied weights: the name that was
            left out, and the one that stands for both.

    Returns:
        All of them; what in `metadata` speaks of something else is ignored.
    """
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    found = {
        name: tensors[other]
        for name, other in pairs
        if isinstance(other, str) and other in tensors and name not in tensors
    }
    return tensors | found


def parse_json(file: Path, data: bytes) -> Any:
    """Parse JSON from a stranger: no doubled keys, no NaN, no exhausted stack.

    Args:
        file: where it is from, for messages.
        data: UTF-8.

    Raises:
        UserError: it is not such JSON.
    """

    def unique(pairs):
        keys: dict = {}
        for key, value in pairs:
            if key in keys:
                raise ValueError(f"{key[:100]!r} appears twice")
            keys[key] = value
        return keys

    def no_constant(name):
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise UserError(f"{file}: its JSON cannot be read ({reason})") from None


def read_json_object(file: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        UserError: the file is not there, is no JSON, or holds something else.
    """
    try:
        if file.stat().st_size > _HEADER_LIMIT:
            raise UserError(f"{file} has {file.stat().st_size:,} bytes: no such JSON file")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    if pointer := lfs_pointer(data):
        raise UserError(f"{file} {pointer}")
    found = parse_json(file, data)
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def listing(folder: Path) -> str:
    """Name what is in a folder, some of it where that is much."""
    names = sorted(child.name[:100] for child in folder.iterdir())
    return (", ".join(names[:8]) or "nothing") + (
        f" and {len(names) - 8} more" if len(names) > 8 else ""
    )


def _read_header(file: Path) -> tuple[int, int, dict]:
    """File size, first byte of the data, and the header."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size < 8:
                raise _bad(file, f"it has only {size} bytes")
            head = opened.read(200)
            if pointer := lfs_pointer(head):
                raise UserError(f"{file} {pointer}")
            opened.seek(8)
            length = int.from_bytes(head[:8], "little")
            if length > min(size - 8, _HEADER_LIMIT):
                raise _bad(
                    file,
                    f"it claims a header of {length:,} bytes; the file has {size:,}, and a "
                    f"header at most {_HEADER_LIMIT:,} (it begins with {head[:16]!r})",
                )
            header = parse_json(file, opened.read(length))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    if not isinstance(header, dict):
        raise _bad(file, f"its header is a {type(header).__name__}, not an object")
    return size, 8 + length, header


def _check_entry(file: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    where = repr(name[:100])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(file, f"{where} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _bad(file, f"{where} has the unknown dtype {str(dtype)[:50]!r}")
    if not _naturals(shape) or len(shape) > _MOST_AXES:
        raise _bad(file, f"{where} has a shape that is no list of at most {_MOST_AXES} sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _bad(file, f"{where} has data_offsets that are no pair of positions")
    begin, end = offsets
    wanted = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise _bad(
            file, f"{where} takes {wanted:,} bytes by its shape and {end - begin:,} by its offsets"
        )
    return _DTYPES[dtype], tuple(shape), begin, end


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _tensor(file: Path, begin: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    def read() -> np.ndarray:
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        try:
            data = np.fromfile(file, np.uint8, math.prod(shape) * dtype.itemsize, offset=begin)
            return data.view(dtype).reshape(shape)
        except (OSError, ValueError) as error:  # it was whole when its header was checked
            raise UserError(f"cannot read {file}: {error}; was it changed meanwhile?") from None

    return Tensor(shape, dtype, read)


def _bad(file: Path, what: str) -> UserError:
    return UserError(f"{file} is not a sound safetensors file: {what}")


# ---- writing ----------------------------------------------------------------------------------


def write_safetensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int], object],
) -> None:
    """Write tensors one after the other, so that one at a time is in memory.

    Args:
        file: to write.
        tensors: by name; written in this order.
        progress: called with the bytes of every tensor.

    Raises:
        OSError: they could not be written.
    """
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            array = np.ascontiguousarray(tensor.read())
            opened.write(memoryview(array.reshape(-1).view(np.uint8)))
            del array  # before the next is read
            progress(tensor.nbytes)


def split_into_shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Share tensors out among files, in order.

    Args:
        tensors: by name.
        limit: bytes of a file; a larger tensor gets one of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def shard_names(count: int) -> Iterable[str]:
    """The usual names of that many files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
