"""Writes files as torch.save does, from the description of the format; shares nothing with readers.

A pickle of protocol 2, instruction by instruction, whose tensors are persistent ids, and a zip with
one uncompressed member a storage. It can also write what torch never would.
"""

import dataclasses
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

STORAGE_TYPES = {
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass
class Raw:
    """Instructions as they stand."""

    code: bytes


@dataclasses.dataclass
class Call:
    """`module.name(*arguments)`, or `__new__` of it, and a state set on the result."""

    target: str  # "module name"
    arguments: tuple = ()
    state: Any = None
    new: bool = False


@dataclasses.dataclass
class Global:
    """A global by itself."""

    target: str


@dataclasses.dataclass
class Ordered:
    """An OrderedDict; torch gives those of modules an attribute, too."""

    items: dict


@dataclasses.dataclass
class View:
    """A tensor over part of a storage; offset and strides in elements. Anything may be wrong."""

    storage: np.ndarray
    shape: tuple
    strides: tuple
    offset: int = 0
    claimed: int | None = None  # elements of the storage, if not the true number
    key: str | None = None  # of the storage, if not the next number


def name(target: str) -> bytes:
    module, attribute = target.split(" ")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


class Writer:
    """Collects storages while it turns a value into instructions."""

    def __init__(self):
        self.storages: dict[str, bytes] = {}
        self.keys: dict[int, str] = {}  # by id of the array: one storage each
        self.alive: list[np.ndarray] = []  # so that no id comes twice

    def code(self, value: Any) -> bytes:
        match value:
            case Raw(code):
                return code
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                if -(2**31) <= value < 2**31:
                    return b"J" + struct.pack("<i", value)
                size = value.bit_length() // 8 + 1
                return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                text = value.encode("utf-8", "surrogatepass")
                return b"X" + struct.pack("<I", len(text)) + text
            case bytes():
                return self.code(Call("_codecs encode", (value.decode("latin1"), "latin1")))
            case tuple():
                return b"(" + b"".join(map(self.code, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.code, value)) + b"e"
            case dict():
                pairs = (self.code(key) + self.code(item) for key, item in value.items())
                return b"}(" + b"".join(pairs) + b"u"
            case Ordered(items):
                made = self.code(Call("collections OrderedDict")) + self.code(items)[1:]
                return made + self.code({"_metadata": Call("collections OrderedDict")}) + b"b"
            case Global(target):
                return name(target)
            case Call(target, arguments, state, new):
                made = name(target) + self.code(arguments) + (b"\x81" if new else b"R")
                return made if state is None else made + self.code(state) + b"b"
            case np.ndarray():
                if not value.flags.c_contiguous:
                    raise ValueError("say with a View how it lies in its storage")
                strides = tuple(step // value.itemsize for step in value.strides)
                return self.tensor(View(value, value.shape, strides))
            case View():
                return self.tensor(value)
        raise TypeError(type(value))

    def tensor(self, view: View) -> bytes:
        key = view.key
        if key is None:
            key = self.keys.setdefault(id(view.storage), str(len(self.storages)))
            self.storages[key] = view.storage.tobytes()
            self.alive.append(view.storage)
        size = view.storage.size if view.claimed is None else view.claimed
        kind = Global(f"torch {STORAGE_TYPES[view.storage.dtype.name]}")
        storage = Raw(self.code(("storage", kind, key, "cpu", size)) + b"Q")
        hooks = Call("collections OrderedDict")
        arguments = (storage, view.offset, view.shape, view.strides, False, hooks)
        return self.code(Call("torch._utils _rebuild_tensor_v2", arguments))


def pickle_of(value: Any, writer: Writer | None = None) -> bytes:
    return b"\x80\x02" + (writer or Writer()).code(value) + b"."


def save_zip(path, members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def save(path, value: Any, root: str = "archive") -> None:
    """What torch.save(value, path) would write; arrays stand for tensors."""
    writer = Writer()
    data = pickle_of(value, writer)
    members = {f"{root}/data.pkl": data, f"{root}/byteorder": b"little"}
    members |= {f"{root}/data/{key}": storage for key, storage in writer.storages.items()}
    save_zip(path, members | {f"{root}/version": b"3\n"})


def bf16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights of a size at which a random model's logits are neither flat nor huge."""
    return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(ml_dtypes.bfloat16)
