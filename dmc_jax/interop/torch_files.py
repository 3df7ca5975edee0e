"""Files of torch.save read without torch: a zip of one pickle and uncompressed storages.

Nothing in the file is run (see `pickles`), and tensors stay on disk until they are read. Each read
maps the part of the file that it needs and no longer, so that memory holds what the caller keeps.
"""

import os
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dmc_jax.errors import UserError
from dmc_jax.files import lfs_pointer
from dmc_jax.interop.pickles import MAX_BYTES, Name, read_pickle
from dmc_jax.interop.source import Tensor

_STORAGES = {
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch HalfStorage": np.dtype(np.float16),
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch ShortStorage": np.dtype(np.int16),
    "torch IntStorage": np.dtype(np.int32),
    "torch LongStorage": np.dtype(np.int64),
    "torch BoolStorage": np.dtype(np.bool_),
}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip member, without its name
_ENCRYPTED = 0x1  # flag of a zip member
_MAX_AXES = 8


class _Member(NamedTuple):
    """Where a member of the archive is in the file."""

    start: int  # bytes
    size: int  # bytes


class _Storage(NamedTuple):
    start: int  # bytes
    size: int  # elements
    dtype: np.dtype


def open_torch_file(path: str | os.PathLike, allowed: Collection[str] = ()) -> Any:
    """Open a file that torch.save wrote, of torch 1.6 or newer.

    Args:
        path: the file.
        allowed: globals, such as "argparse Namespace", that the file may name besides those of
            tensors and ordered dictionaries. They are not imported; see `pickles.Record`.

    Returns:
        The object saved: dictionaries, lists, tuples and plain values. Tensors and parameters are
        `Tensor`; ordered dictionaries are plain ones; other objects are `Record` or `Name`.

    Raises:
        UserError: no such file, another format, a damaged file, or one that names anything else.
    """
    path = Path(path)
    members = _members(path)
    root = _root(path, members)
    swap = _big_endian(path, members.get(f"{root}/byteorder"))

    def storage(identity):
        return _storage(path, identity, members, root)

    def tensor(storage, offset, shape, strides, *_):  # then: gradient, hooks, metadata
        return _tensor(path, storage, offset, shape, strides, swap)

    def parameter(value, *_):
        return value

    return read_pickle(
        _contents(path, members[f"{root}/data.pkl"], MAX_BYTES + 1),
        str(path),
        allowed={*allowed, *_STORAGES},
        builders={
            "torch._utils _rebuild_tensor_v2": tensor,
            "torch._utils _rebuild_parameter": parameter,
            "collections OrderedDict": lambda: {},
        },
        persistent=storage,
    )


# ---- the archive ------------------------------------------------------------------------------


def _members(path: Path) -> dict[str, _Member]:
    """Every member of the archive by name, with its place checked against the file's size."""
    try:
        with open(path, "rb") as file:
            head = file.read(200)
            if pointer := lfs_pointer(head):
                raise UserError(f"{path} {pointer}")
            if head[:2] != b"PK":
                raise UserError(_not_an_archive(path, head))
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            members = {entry.filename: _member(path, file, entry, size) for entry in entries}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # zipfile fails on hostile bytes in more ways than it documents
        raise UserError(
            f"{path}: the zip archive is damaged or cut short ({type(error).__name__}): copy or "
            "download it again"
        ) from None
    if len(members) < len(entries):
        raise UserError(f"{path}: two members of the archive have one name")
    return members


def _not_an_archive(path: Path, head: bytes) -> str:
    if head[:1] == b"\x80":
        return (
            f"{path} is in the format of torch before 1.6, which is not read: load it with torch "
            "and torch.save it again"
        )
    return f"{path} is not a file of torch.save: it is no zip archive"


def _member(path: Path, file: Any, entry: zipfile.ZipInfo, file_size: int) -> _Member:
    name = entry.filename
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise UserError(f"{path}: a member named {name!r:.80} lies outside of the archive")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
        raise UserError(
            f"{path}: the member {name!r:.80} is compressed or encrypted, which torch.save never "
            "does: it was repacked by another program"
        )
    if entry.compress_size != entry.file_size:
        raise UserError(f"{path}: the member {name!r:.80} has two sizes")
    header = b""
    if 0 <= entry.header_offset <= file_size - _LOCAL_HEADER.size:
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER.size)
    mark, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if mark != b"PK\x03\x04" or start + entry.file_size > file_size:
        raise UserError(
            f"{path}: the member {name!r:.80} of {entry.file_size} bytes is not where the archive "
            "says: copy or download it again"
        )
    return _Member(start, entry.file_size)


def _root(path: Path, members: dict[str, _Member]) -> str:
    """The one folder that everything in the archive is in."""
    roots = {name.split("/")[0] for name in members}
    root = next(iter(roots)) if len(roots) == 1 else ""
    if f"{root}/data.pkl" not in members:
        raise UserError(f"{path} is a zip archive, but not one of torch.save: no data.pkl in it")
    return root


def _contents(path: Path, member: _Member, limit: int) -> bytes:
    """The first `limit` bytes of a member, or all of it."""
    with open(path, "rb") as file:
        file.seek(member.start)
        return file.read(min(member.size, limit))


def _big_endian(path: Path, member: _Member | None) -> bool:
    """True if storages hold big-endian numbers; older files do not say and are little-endian."""
    if member is None:
        return False
    order = _contents(path, member, 16)
    if order not in (b"little", b"big"):
        raise UserError(f"{path}: the byte order is {order!r}; expected little or big")
    return order == b"big"


# ---- tensors ----------------------------------------------------------------------------------


def _storage(path: Path, identity: Any, members: dict[str, _Member], root: str) -> _Storage:
    """The storage of a persistent id ("storage", type, key, device, elements)."""
    kind, type_name, key, _, size = identity
    if kind != "storage" or type(type_name) is not Name or type_name.name not in _STORAGES:
        raise UserError(f"{path}: something other than a tensor is stored outside of the pickle")
    if type(key) is not str or type(size) is not int:
        raise TypeError("a storage without name or size")
    if f"{root}/data/{key}" not in members:
        raise UserError(f"{path}: the tensor storage {key!r:.80} is missing")
    dtype = _STORAGES[type_name.name]
    member = members[f"{root}/data/{key}"]
    if size * dtype.itemsize != member.size:
        raise UserError(
            f"{path}: the tensor storage {key!r:.80} has {member.size} bytes, and {size} elements "
            f"of {dtype} were expected: copy or download it again"
        )
    return _Storage(member.start, size, dtype)


def _tensor(path: Path, storage: Any, offset: Any, shape: Any, strides: Any, swap: bool) -> Tensor:
    """A tensor over a storage; offset and strides in elements, all checked against it."""
    if type(storage) is not _Storage or not len(shape) == len(strides) <= _MAX_AXES:
        raise TypeError("a tensor without storage, or of odd shape")
    # Types come first: what a hostile file puts here may be too large to print.
    numbers = (offset, *shape, *strides)
    if type(shape) is not tuple or any(type(number) is not int for number in numbers):
        raise TypeError("a tensor whose sizes are no integers")
    if min(numbers) < 0:
        raise UserError(f"{path}: a tensor of shape {shape} has strides {strides}, offset {offset}")
    count = 1
    for length in shape:
        count *= length
    span = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if count > 0 and (offset + span > storage.size or count > storage.size):
        raise UserError(
            f"{path}: a tensor of shape {shape}, strides {strides} and offset {offset} reaches "
            f"beyond its storage of {storage.size} elements"
        )

    def read() -> np.ndarray:
        if count == 0:
            return np.zeros(shape, storage.dtype)
        start = storage.start + offset * storage.dtype.itemsize
        return _read(path, start, span, shape, strides, storage.dtype, swap)

    return Tensor(shape, storage.dtype, read)


def _read(
    path: Path,
    start: int,
    span: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype,
    swap: bool,
) -> np.ndarray:
    """Maps `span` elements from byte `start` and views them in `shape`; a copy only if it must."""
    try:
        mapped = np.memmap(path, np.uint8, "r", offset=start, shape=(span * dtype.itemsize,))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: changed or went away while it was read ({error})") from None
    steps = tuple(stride * dtype.itemsize for stride in strides)
    # An unsigned integer of the same size can be byte-swapped whatever the dtype.
    array = np.ndarray(shape, f"u{dtype.itemsize}", buffer=mapped, strides=steps)
    if swap:
        array = array.byteswap()
    return np.require(array, requirements=["C", "ALIGNED"]).view(dtype)
