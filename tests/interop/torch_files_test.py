"""Files of torch.save: what torch writes comes back, what it never writes is refused unrun."""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dmc_jax.errors import UserError
from dmc_jax.interop.pickles import Name, Record
from dmc_jax.interop.torch_files import open_torch_file
from tests.interop.torch_zip import (
    STORAGE_TYPES,
    Call,
    Global,
    Ordered,
    Raw,
    View,
    pickle_of,
    save,
    save_zip,
)

NUMBERS = np.arange(24, dtype=np.float32)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file.pth"


def as_read(file, value, **options):
    save(file, value)
    return open_torch_file(file, **options)


# ---- what torch writes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORAGE_TYPES)
def tensors_of_every_dtype_come_back_test(file, name):
    dtype = np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
    array = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    tensor = as_read(file, {"weight": array})["weight"]
    assert (tensor.shape, tensor.dtype) == ((3, 4), dtype)
    result = tensor.read()
    assert result.dtype == dtype and result.flags.c_contiguous
    np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize(
    "view, expected",
    [
        (View(NUMBERS, (4, 6), (6, 1)), NUMBERS.reshape(4, 6)),
        (View(NUMBERS, (6, 4), (1, 6)), NUMBERS.reshape(4, 6).T),
        (View(NUMBERS, (3, 2), (6, 2), 7), NUMBERS.reshape(4, 6)[1:, 1:5:2]),
        (View(NUMBERS, (), (), 23), NUMBERS[23]),
        (View(NUMBERS, (1, 1), (1000, 1000), 5), NUMBERS[5:6, None]),
        (View(NUMBERS, (0, 3), (3, 1), 24), np.zeros((0, 3), np.float32)),
    ],
)
def views_of_a_storage_come_back_in_c_order_test(file, view, expected):
    result = as_read(file, view).read()
    assert result.flags.c_contiguous and result.shape == expected.shape
    np.testing.assert_array_equal(result, expected)


def big_endian_files_come_back_test(file):
    for array in (NUMBERS, NUMBERS.astype(ml_dtypes.bfloat16)):
        swapped = array.view(f"u{array.itemsize}").byteswap().tobytes()
        data = pickle_of(array)
        save_zip(file, {"a/data.pkl": data, "a/byteorder": b"big", "a/data/0": swapped})
        np.testing.assert_array_equal(open_torch_file(file).read(), array)


def members_beyond_four_gigabytes_would_be_found_test(file):
    """In the 64-bit form of the format, which torch uses for large files."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", pickle_of(NUMBERS)), ("data/0", NUMBERS.tobytes())):
            with archive.open(zipfile.ZipInfo(f"a/{name}"), "w", force_zip64=True) as member:
                member.write(data)
    np.testing.assert_array_equal(open_torch_file(file).read(), NUMBERS)


def plain_values_come_back_and_objects_are_records_test(file):
    value = {
        "numbers": [0, -1, 2**31, -(2**40), 2**63, 0.25, True, False, None],
        "text": ("", "é\ud800", ()),
        3: Ordered({"weight": NUMBERS}),
        "args": Call("argparse Namespace", (), {"lr": 0.5, "dtype": Global("torch float16")}, True),
        "extra": Call("_io BytesIO", (), (b"\x00\xff", 0, None), True),
        "parameter": Call("torch._utils _rebuild_parameter", (NUMBERS, True, None)),
    }
    allowed = ("argparse Namespace", "torch float16", "_io BytesIO", "_codecs encode")
    result = as_read(file, value, allowed=allowed)
    assert result["numbers"] == value["numbers"] and result["text"] == value["text"]
    assert type(result[3]) is dict and list(result[3]) == ["weight"]
    args = result["args"]
    assert type(args) is Record and args.state == {"lr": 0.5, "dtype": Name("torch float16")}
    assert type(result["extra"]) is Record and result["extra"].state[0].arguments[0] == "\x00\xff"
    np.testing.assert_array_equal(result["parameter"].read(), NUMBERS)


def tensors_stay_on_disk_until_they_are_read_test(file):
    tensor = as_read(file, NUMBERS)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="changed or went away"):
        tensor.read()
    file.unlink()
    with pytest.raises(UserError, match="changed or went away"):
        tensor.read()


def torch_reads_what_the_test_writes_and_we_read_what_torch_writes_test(file):
    torch = pytest.importorskip("torch")
    matrix = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    module = torch.nn.Linear(3, 2)
    saved = {"a": matrix[1:, ::2], "b": matrix.T, "c": torch.tensor(2.0), "m": module.state_dict()}
    torch.save(saved | {"p": module.weight}, file)
    ours = open_torch_file(file)
    for name in "abc":
        expected = saved[name].float().numpy()
        np.testing.assert_array_equal(ours[name].read().astype(np.float32), expected)
    np.testing.assert_array_equal(ours["p"].read(), module.weight.detach().numpy())
    np.testing.assert_array_equal(ours["m"]["bias"].read(), module.bias.detach().numpy())

    value = {"x": View(NUMBERS, (3, 2), (6, 2), 7), "m": Ordered({"w": NUMBERS}), "n": [1, 2**40]}
    save(file, value)
    theirs = torch.load(file, weights_only=True)
    np.testing.assert_array_equal(theirs["x"].numpy(), open_torch_file(file)["x"].read())
    np.testing.assert_array_equal(theirs["m"]["w"].numpy(), NUMBERS)
    assert theirs["n"] == value["n"]


# ---- what torch never writes ------------------------------------------------------------------


class Shell:
    """Pickled by Python itself: runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def refused(file, match, code=None, allowed=(), **members):
    """Writes a file around a pickle, opens it, and expects one clear error."""
    if code is not None:
        members = {"data.pkl": code, "data/0": NUMBERS.tobytes()} | members
    if members:
        save_zip(file, {f"archive/{member}": data for member, data in members.items()})
    with pytest.raises(UserError, match=match) as error:
        open_torch_file(file, allowed)
    assert str(file) in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("protocol", range(6))
def a_pickle_that_calls_a_shell_is_refused_and_nothing_is_run_test(file, tmp_path, protocol):
    canary = tmp_path / "canary"
    code = pickle.dumps(Shell(f"touch {canary}"), protocol)
    refused(file, "posix.system|instruction", code)
    assert not canary.exists()


@pytest.mark.parametrize(
    "target",
    [
        "os system",
        "builtins eval",
        "builtins getattr",
        "builtins __import__",
        "torch.serialization load",
        "torch._utils _rebuild_tensor_v2.__globals__",
        "torch ReLU",
        "argparse ArgumentParser",
        "collections OrderedDict.fromkeys",
        "_io FileIO",
        "_io open",
        "numpy load",
        "megatron.core.enums __builtins__",
    ],
)
def any_other_global_is_refused_by_name_test(file, target):
    from dmc_jax.interop.megatron import _ALLOWED

    # Called, as an argument of something harmless, as a state, and merely named.
    call = Call(target, ("echo",))
    for value in (
        call,
        Call("collections OrderedDict", (call,)),
        Call("argparse Namespace", (), {"x": call}, new=True),
        [Global(target)],
    ):
        refused(file, target.replace(" ", "."), pickle_of(value), _ALLOWED)


BOMB = b"K\x01" + b"q\x00h\x00\x86" * 60 + b"q\x00"  # a tuple of 2^60 ones


@pytest.mark.parametrize(
    "code",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02}q\x00",
        b"\x80\x02h\x07.",  # memo that was never set
        b"\x80\x02K\x01R.",
        b"\x80\x02K\x01K\x02R.",  # call of a number
        b"\x80\x02]K\x01K\x02s.",  # item of a list
        b"\x80\x02}K\x01a.",  # append to a dictionary
        b"\x80\x02}(K\x01u.",  # a key without value
        b"\x80\x02K\x01}b.",  # state of a number
        b"\x80\x02t.",
        b"\x80\x02(((.",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + BOMB + b"R.",
        b"\x80\x02ccollections\nOrderedDict\n}\x81.",
        b"\x80\x02ccollections\nOrderedDict\n}b.",  # state of a class
        b"\x80\x02K\x01Q.",
        b"\x80\x02" + BOMB + b"Q.",
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + BOMB + b"h\x00K\x18tQ.",
        b"\x80\x02\xff\xfe.",
        b"\x80\x02c\xff\n\xff\n.",
        b"\x80\x02\x8a\xff" + b"\x7f" * 10 + b".",
    ],
)
def a_damaged_pickle_is_one_clear_error_test(file, code):
    refused(file, "damaged|outside", code)


@pytest.mark.parametrize(
    "code, match",
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", None),  # two billionth place of the memo
        (b"\x80\x02" + b")" + b"\x85" * 200_000 + b".", None),
        (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", None),
        (b"\x80\x02" + BOMB + b".", None),
        (b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.", "key of type tuple"),
        (b"\x80\x02}\x8a\x09" + b"\x01" * 9 + b"K\x01s.", "key of type int"),
        (b"\x80\x02}G\x00\x00\x00\x00\x00\x00\x00\x00K\x01s.", "key of type float"),
        (b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "'a' twice"),
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "integer of"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),  # BYTEARRAY8
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "FRAME|damaged"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02P1\n.", "PERSID"),
        (b"I1\n.", "INT"),
        (b"\x80\x02" + b"(" * 2_000_001 + b".", "instructions"),
        (b"\x80\x02" + b"N" * (32 * 2**20), "bytes"),
    ],
    ids=range(16),
)
def a_pickle_made_to_exhaust_the_machine_does_not_test(file, code, match):
    if match is None:  # harmless here: nested or wide, but small
        save_zip(file, {"archive/data.pkl": code})
        assert open_torch_file(file) is not None
    else:
        refused(file, match, code)


@pytest.mark.parametrize(
    "view, match",
    [
        (View(NUMBERS, (4, 6), (6, 1), claimed=25), "96 bytes, and 25 elements"),
        (View(NUMBERS, (4, 6), (6, 1), claimed=2**62), "96 bytes"),
        (View(NUMBERS, (4, 6), (6, 1), claimed=-1), "96 bytes"),
        (View(NUMBERS, (4, 6), (6, 1), key="1"), "'1' is missing"),
        (View(NUMBERS, (4, 6), (6, 1), key="../data.pkl"), "is missing"),
        (View(NUMBERS, (4, 6), (6, 1), key=0), "damaged"),
        (View(NUMBERS, (4, 6), (6, 1), 1), "beyond"),
        (View(NUMBERS, (4, 6), (7, 1)), "beyond"),
        (View(NUMBERS, (25,), (1,)), "beyond"),
        (View(NUMBERS, (2**62, 2**62), (0, 0)), "beyond"),
        (View(NUMBERS, (25,), (0,)), "beyond"),
        (View(NUMBERS, (4, 6), (-6, 1), 18), "strides"),
        (View(NUMBERS, (-4, -6), (6, 1)), "shape"),
        (View(NUMBERS, (4, 6), (6, 1), -1), "offset -1"),
        (View(NUMBERS, (4, 6), (6,)), "damaged"),
        (View(NUMBERS, (4, 6.0), (6, 1)), "damaged"),
        (View(NUMBERS, (True, 6), (6, 1)), "damaged"),
        (View(NUMBERS, "46", (6, 1)), "damaged"),
        (View(NUMBERS, (1,) * 9, (1,) * 9), "damaged"),
        (View(NUMBERS, (Raw(BOMB), 6), (6, 1)), "damaged"),
    ],
)
def a_tensor_that_reaches_beyond_its_storage_is_refused_test(file, view, match):
    refused(file, match, pickle_of({"weight": view}))


# ---- the archive ------------------------------------------------------------------------------


def other_files_are_told_apart_test(file, tmp_path):
    refused(file, "No such file")
    refused(tmp_path, "directory")
    file.write_bytes(b"")
    refused(file, "no zip archive")
    file.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"more")
    refused(file, "before 1.6")
    file.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    refused(file, "damaged or cut short")
    refused(file, "no data.pkl", **{"version": b"3"})
    save_zip(file, {"a/data.pkl": b"\x80\x02N.", "b/data.pkl": b"\x80\x02N."})
    refused(file, "no data.pkl")
    save_zip(file, {"data.pkl": b"\x80\x02N."})
    refused(file, "no data.pkl")
    refused(file, "byte order", b"\x80\x02N.", byteorder=b"middle" * 1000)


def members_that_torch_never_writes_are_refused_test(file):
    good = {"archive/data.pkl": b"\x80\x02N."}
    for name in ("/etc/passwd", "archive/../../x", "archive\\..\\x"):
        save_zip(file, good | {name: b"x"})
        refused(file, "outside of the archive")
    save_zip(file, good, zipfile.ZIP_DEFLATED)
    refused(file, "compressed")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    refused(file, "one name")


def every_truncation_of_a_file_is_refused_test(file):
    save(file, {"weight": NUMBERS})
    data = file.read_bytes()
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        refused(file, "archive")


def sizes_and_places_that_the_archive_claims_are_checked_test(file):
    save(file, {"weight": NUMBERS})
    data = file.read_bytes()
    entry = data.index(b"PK\x01\x02")
    # Compressed size, size, both, and the place of the local header.
    for offsets in ((20,), (24,), (20, 24), (42,)):
        for claim in (len(data) - 1, 2**31, 2**32 - 2):
            changed = bytearray(data)
            for offset in offsets:
                changed[entry + offset : entry + offset + 4] = struct.pack("<I", claim)
            file.write_bytes(changed)
            refused(file, "two sizes|is not where|damaged")
