"""The rows of one file, read a few at a time: text, JSON lines or parquet, compressed or not.

What is wrong with one row is told in the row, and the next one can still be read; what is wrong
with the file is an error.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dmc_jax.data.listing import name_parts
from dmc_jax.errors import UserError

_PARQUET_ROWS = 16  # read at a time: enough to be fast, few enough for rows of megabytes
_ZST_READ = 1 << 14  # compressed bytes at a time: they may stand for a thousand times as many
_ZST_WINDOW = 1 << 31  # `zstd --long=31`, the most there is, is common for large corpora
_LONGEST_INT = 4300  # digits; Python refuses to read more
_JSON_KINDS = {
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    dict: "an object",
}


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        number: from 1; 0 for a file that is one text.
        value: what the wanted field holds: text (str, or bytes that should be UTF-8) or anything.
        fault: why the row cannot be read, where it cannot.
    """

    number: int
    value: object = None
    fault: str = ""


def rows(path: Path, fields: tuple[str, ...]) -> Iterator[Row]:
    """Read the rows of a file; never holds more than a few (of parquet: than one row group).

    Args:
        path: a file; `name_parts` of its name says how it is read: as text where it does not.
        fields: the field to read of .jsonl and .parquet files; the first one that is there.

    Returns:
        The rows in order. Blank lines of .jsonl count, but are no rows.

    Raises:
        UserError: the file is damaged, lacks the field in every row, or needs a library that is
            not installed.
    """
    form, compression = name_parts(path.name)
    if form == ".parquet":
        return _parquet_rows(path, fields)
    if form in (".jsonl", ".ndjson"):
        return _json_rows(path, compression, fields)
    return _text_row(path, compression)


def _text_row(path: Path, compression: str) -> Iterator[Row]:
    with _opened(path, compression) as file:
        yield Row(0, file.read())


def _json_rows(path: Path, compression: str, fields: tuple[str, ...]) -> Iterator[Row]:
    with _opened(path, compression) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_row(number, line, fields)


def _json_row(number: int, line: bytes, fields: tuple[str, ...]) -> Row:
    try:
        # utf-8-sig: files that were joined may each bring a byte-order mark.
        row = json.loads(line.decode("utf-8-sig"), parse_int=_number)
    except UnicodeDecodeError as error:
        return Row(number, fault=not_utf8(error))
    except json.JSONDecodeError as error:
        return Row(number, fault=f"not JSON ({error.msg}); expected an object a line")
    except RecursionError:
        return Row(number, fault="JSON that is nested too deeply")
    if not isinstance(row, dict):
        return Row(number, fault=f"expected a JSON object, got {kind_of(row)}")
    for field in fields:
        if field in row:
            return Row(number, row[field])
    return Row(number, fault=f"no field {' or '.join(fields)}; its fields are {', '.join(row)}")


def _parquet_rows(path: Path, fields: tuple[str, ...]) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet needs pyarrow; run `pip install pyarrow`, "
            "or convert the file to .jsonl"
        ) from None
    with (
        _damage_told(path, pyarrow.ArrowException),
        parquet.ParquetFile(path, memory_map=True) as table,
    ):
        names = table.schema_arrow.names
        field = next((field for field in fields if field in names), None)
        if field is None:
            raise UserError(
                f"{path}: no column {' or '.join(fields)}; its columns are {', '.join(names)}"
            )
        number = 0
        # A batch that crossed into the next row group would hold both.
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(_PARQUET_ROWS, [group], [field], use_threads=False):
                column = batch.column(0)
                with contextlib.suppress(pyarrow.ArrowNotImplementedError):  # not a text column
                    # As bytes: text that is not UTF-8 would fail for the whole batch.
                    column = column.cast(pyarrow.large_binary())
                for value in column:
                    number += 1
                    yield _parquet_row(number, value)


def _parquet_row(number: int, value) -> Row:
    try:
        return Row(number, value.as_py())
    except UnicodeDecodeError as error:  # in a part of a nested value
        return Row(number, fault=not_utf8(error))


def not_utf8(error: UnicodeDecodeError) -> str:
    """Say where bytes are not UTF-8."""
    return f"not UTF-8 text (byte {error.start}); convert it to UTF-8 or leave it out"


def kind_of(value: object) -> str:
    """Name the kind of a JSON or parquet value as a user knows it."""
    return _JSON_KINDS.get(type(value), f"a {type(value).__name__}")


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INT else float(digits)


@contextlib.contextmanager
def _damage_told(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Turn a library's complaint about a file's contents into a `UserError` that names the file."""
    try:
        yield
    except (*damage, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's complaint, not one about the contents
        kind = path.suffix.lower()
        raise UserError(f"{path} is not a readable {kind} file, or cut short ({error})") from None


@contextlib.contextmanager
def _opened(path: Path, compression: str) -> Iterator[BinaryIO]:
    openers = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
    with (
        _damage_told(path, EOFError, zlib.error, lzma.LZMAError),
        openers[compression](path, "rb") as file,
    ):
        yield file


def _open_zst(path: Path, mode: str) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path}: reading .zst needs zstandard; run `pip install zstandard`, or decompress it"
        ) from None
    return io.BufferedReader(_ZstFile(open(path, mode), zstandard))


class _ZstFile(io.RawIOBase):
    """A .zst file's contents. The library's own reader takes a file that is cut short as whole."""

    def __init__(self, file: io.BufferedReader, zstandard):
        self._file, self._zstandard = file, zstandard
        self._ready = memoryview(b"")
        self._chunks = self._decompressed()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompressed(self) -> Iterator[bytes]:
        decompressor = self._zstandard.ZstdDecompressor(max_window_size=_ZST_WINDOW)
        frame = None
        try:
            while chunk := self._file.read(_ZST_READ):
                while chunk:
                    frame = frame or decompressor.decompressobj()
                    yield frame.decompress(chunk)
                    chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        if frame is not None:
            raise EOFError("the file ends within a frame")
