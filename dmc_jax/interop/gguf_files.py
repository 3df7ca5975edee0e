"""GGUF files, read with nothing taken on trust: metadata by key, and tensors not read yet.

    "GGUF", version (u32), numbers of tensors and of keys (u64)
    keys       name, type (u32), value; strings and arrays begin with their lengths (u64)
    tensors    name, number of axes (u32), sizes from the fastest (u64), type (u32), offset (u64)
    data       the tensors' bytes in the same order, each padded to `general.alignment` bytes

Source: docs/gguf.md of https://github.com/ggml-org/ggml; all numbers are little-endian. The package
gguf says how large the blocks of a quantised type are and dequantises them. Its own reader takes a
file's lengths on trust, so that a hundred bytes can fill the memory: the header is read here.
"""

import dataclasses
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dmc_jax.errors import UserError
from dmc_jax.files import lfs_pointer
from dmc_jax.interop.fields import shown
from dmc_jax.interop.parameters import PART_BYTES
from dmc_jax.interop.source import Tensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # the same but for the byte order that 3 allows
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_FLOATS = {
    0: ("F32", np.dtype("<f4")),
    1: ("F16", np.dtype("<f2")),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
_MOST_AXES = 4  # the format's own limit
_INSTALL = "pip install 'gguf>=0.19,<0.20'"


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What the header of a file says."""

    path: Path
    metadata: dict[str, Any]  # bool, int, float, str; arrays of strings are lists, others NumPy's
    tensors: dict[str, Tensor]  # by their names in the file; quantised ones are read as float32
    types: dict[str, str]  # of the tensors, such as Q4_1


@dataclasses.dataclass(frozen=True)
class _Type:
    """How a tensor's numbers are stored: `size` bytes for every `block` of them in a row."""

    name: str
    block: int
    size: int
    dtype: np.dtype  # of the array that is read
    decode: Callable[[np.ndarray], np.ndarray]  # of bytes [rows, n], to numbers


def open_gguf_file(path: Path) -> GGUFFile:
    """Read the header of a file, and check that the data it describes is there.

    Raises:
        UserError: no such file or a damaged one, of another version, with a tensor of an unknown
            type, or quantised where the package gguf is not installed.
    """
    try:
        with path.open("rb") as opened:
            head = opened.read(200)
            if pointer := lfs_pointer(head):
                raise UserError(f"{path} {pointer}")
            if not head.startswith(MAGIC):
                raise UserError(
                    f"{path} is no GGUF file: it begins with {head[:8]!r}, expected {MAGIC!r}"
                )
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


class _Cursor:
    """A place in the bytes of a file; nothing is read beyond their end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, len(MAGIC)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        begin, left = self.at, len(self.data) - self.at
        if count > left:
            raise bad(
                self.path,
                f"{count:,} bytes should follow at byte {begin:,} of its header, the file has "
                f"{left:,} more: is it cut short?",
            )
        self.at += count
        return self.data[begin : self.at]

    def integer(self, size: int) -> int:
        """The next unsigned number of that many bytes."""
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        """The next string."""
        begin = self.at
        try:
            return self.take(self.integer(8)).decode()
        except UnicodeDecodeError:
            raise bad(self.path, f"the text at byte {begin:,} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """The next value of metadata."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.integer(4), self.integer(8)
            if inner == _STRING:
                return [self.string() for _ in range(count)]
            return np.frombuffer(
                self.take(count * self._dtype(inner, key).itemsize), _SCALARS[inner]
            )
        dtype = self._dtype(kind, key)
        value = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
        # The shortest decimal that is this float32: 1e-05, as its writer meant, not 9.9999997e-06.
        return float(str(value)) if kind == 6 else value.item()

    def _dtype(self, kind: int, key: str) -> np.dtype:
        if kind not in _SCALARS:
            raise bad(self.path, f"{key[:80]!r} has type {kind}, which GGUF does not define")
        return _SCALARS[kind]


def _read_header(path: Path, data: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(path, data)
    version = cursor.integer(4)
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = "big-endian" if swapped in _VERSIONS else f"of version {version}"
        raise UserError(
            f"{path} is {found}; little-endian GGUF of version 2 or 3 can be read: convert the "
            "model anew with llama.cpp"
        )
    tensor_count, key_count = cursor.integer(8), cursor.integer(8)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        if key in metadata:
            raise bad(path, f"the key {key[:80]!r} appears twice")
        metadata[key] = cursor.value(cursor.integer(4), key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise bad(path, f"general.alignment is {shown(alignment)}; expected a power of two")

    tensors, types, kinds, position = {}, {}, {}, 0  # position: in the data, in bytes
    entries = [_entry(cursor) for _ in range(tensor_count)]
    start = _aligned(cursor.at, alignment)
    for name, shape, number, offset in entries:
        if name in tensors:
            raise bad(path, f"the tensor {name[:80]!r} appears twice")
        if number not in kinds:
            kinds[number] = _type(path, name, number)
        kind = kinds[number]
        if shape[-1] % kind.block:
            raise bad(
                path,
                f"{name[:80]!r} has rows of {shape[-1]}, {kind.name} has blocks of {kind.block}",
            )
        if offset != position:
            raise bad(path, f"{name[:80]!r} is at byte {offset:,} of the data, not {position:,}")
        nbytes = math.prod(shape) // kind.block * kind.size
        if start + offset + nbytes > len(data):
            raise bad(
                path,
                f"{name[:80]!r} should end at byte {start + offset + nbytes:,}, the file has "
                f"{len(data):,}: is it cut short?",
            )
        tensors[name], types[name] = _tensor(path, start + offset, shape, kind), kind.name
        position += _aligned(nbytes, alignment)
    return GGUFFile(path, metadata, tensors, types)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """A line of the table of tensors: name, shape in NumPy's order, number of the type, offset."""
    name, axes = cursor.string(), cursor.integer(4)
    if not 1 <= axes <= _MOST_AXES:
        raise bad(cursor.path, f"{name[:80]!r} has {axes} axes; expected 1 to {_MOST_AXES}")
    shape = tuple(cursor.integer(8) for _ in range(axes))[::-1]
    if not 0 < math.prod(shape) < 2**63:
        raise bad(cursor.path, f"{name[:80]!r} has an impossible shape, {list(shape)}")
    return name, shape, cursor.integer(4), cursor.integer(8)


def _type(path: Path, tensor: str, number: int) -> _Type:
    """Look a type up; the package gguf knows the quantised ones."""
    if number in _FLOATS:
        name, dtype = _FLOATS[number]
        return _Type(name, 1, dtype.itemsize, dtype, lambda data: data.view(dtype))
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{path} is quantised ({tensor[:80]!r} has type {number}), which the library gguf "
            f"reads: {_INSTALL}"
        ) from None
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)  # is it one that it can?
    except (ValueError, KeyError, NotImplementedError):
        names = {member.value: member.name for member in gguf.GGMLQuantizationType}
        known = f" ({names[number]})" if number in names else ""
        raise UserError(
            f"{path}: {tensor[:80]!r} has type {number}{known}, which the installed library gguf "
            "does not dequantise: quantise the model to another type, or try a newer gguf"
        ) from None

    def decode(data: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # a damaged scale may be infinite, which is then seen
            return gguf.dequantize(data, kind)

    return _Type(kind.name, block, size, np.dtype(np.float32), decode)


def _tensor(path: Path, begin: int, shape: tuple[int, ...], kind: _Type) -> Tensor:
    rows, row_bytes = math.prod(shape[:-1]), shape[-1] // kind.block * kind.size
    # Dequantising takes several times the memory of its result, so it is done in parts.
    step = max(1, PART_BYTES // (shape[-1] * kind.dtype.itemsize))

    def read() -> np.ndarray:
        array = np.empty((rows, shape[-1]), kind.dtype)
        try:
            with path.open("rb") as opened:
                opened.seek(begin)
                for row in range(0, rows, step):
                    part = array[row : row + step]
                    data = np.fromfile(opened, np.uint8, len(part) * row_bytes)
                    part[...] = kind.decode(data.reshape(len(part), row_bytes))
        except (OSError, ValueError) as error:  # it was whole when its header was checked
            raise UserError(f"cannot read {path}: {error}; was it changed meanwhile?") from None
        return array.reshape(shape)

    return Tensor(shape, kind.dtype, read)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def bad(path: Path, what: str) -> UserError:
    """The error for a file that contradicts itself."""
    return UserError(f"{path} is not a sound GGUF file: {what}")
