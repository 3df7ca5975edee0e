"""Rows of every format equal those that were written; a bad one is told and the next one read."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dmc_jax.data.rows import Row, rows
from dmc_jax.errors import UserError

TEXTS = [f"text {n}\u2028 é\n" * 50 for n in range(400)]
JSONL = "".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) + "\n" for text in TEXTS)


def compressed(suffix):
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]


def read(path, *fields):
    return list(rows(path, fields or ("text",)))


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def compressed_rows_equal_plain_ones_test(tmp_path, suffix):
    compress = compressed(suffix)
    plain = read(write(tmp_path / "a.jsonl", JSONL.encode()))
    assert [row.value for row in plain] == TEXTS
    assert read(write(tmp_path / f"a.NDJSON{suffix}", compress(JSONL.encode()))) == plain
    text = write(tmp_path / f"a.txt{suffix.upper()}", compress(b"one\n") + compress(b"two\n"))
    assert read(text) == [Row(0, b"one\ntwo\n")]  # what is joined is read to its end
    assert read(write(tmp_path / f"none.txt{suffix}", compress(b""))) == [Row(0, b"")]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def damaged_compressed_files_are_refused_by_name_test(tmp_path, suffix):
    whole = compressed(suffix)(JSONL.encode())
    for content in (whole[: len(whole) // 2], whole[:-1], b"no such thing"):
        path = write(tmp_path / f"a.jsonl{suffix}", content)
        with pytest.raises(UserError, match=f"a.jsonl{suffix} is not a readable {suffix} file"):
            read(path)


def zst_files_of_the_longest_window_are_read_test(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    packed = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=long).stream_writer(
        packed, closefd=False
    ) as w:
        w.write(JSONL.encode())
    assert len(read(write(tmp_path / "a.jsonl.zst", packed.getvalue()))) == len(TEXTS)


@pytest.mark.parametrize(
    ("name", "library"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def a_missing_library_is_named_test(tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)  # as if not installed
    with pytest.raises(UserError, match=f"{name}: .*pip install {library}"):
        read(write(tmp_path / name, b""))


def json_that_python_minds_is_read_or_told_of_in_its_row_test(tmp_path):
    deep = b"[" * 100_000 + b"]" * 100_000
    lines = [
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"text": "b", "n": -1e999, "m": NaN}',
        b'{"text": "c", "n": ' + deep + b"}",
        b"",
        b'\xef\xbb\xbf{"text": "d\\u2028"}\r',
        b'{"text": "e"',
        b'{"text": "\xff"}',
        b"[1]",
        b'{"txt": "f"}',
        b'{"text": "g"}',
    ]
    found = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert [(row.number, row.value) for row in found if not row.fault] == [
        (1, "a"),
        (2, "b"),
        (5, "d\u2028"),
        (10, "g"),
    ]
    faults = {row.number: row.fault for row in found if row.fault}
    assert faults[3] == "JSON that is nested too deeply"
    assert faults[6].startswith("not JSON (Expecting ',' delimiter)")
    assert faults[7].startswith("not UTF-8 text (byte 10)")
    assert faults[8] == "expected a JSON object, got a list"
    assert faults[9] == "no field text; its fields are txt"


def parquet_rows_of_every_text_type_equal_those_written_test(tmp_path):
    for kind in (
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ):
        table = pyarrow.table({"n": range(400), "text": pyarrow.array(TEXTS).cast(kind)})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=37)
        found = read(tmp_path / "a.parquet")
        assert [row.value.decode() for row in found] == TEXTS
        assert [row.number for row in found] == list(range(1, 401))


def parquet_that_is_not_utf8_or_no_text_is_told_of_in_its_row_test(tmp_path):
    raw = pyarrow.array([b"a", b"\xff", None, b"b"])
    text = pyarrow.StringArray.from_buffers(4, *raw.buffers()[1:], raw.buffers()[0])
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    assert [row.value for row in read(tmp_path / "a.parquet")] == [b"a", b"\xff", None, b"b"]
    nested = pyarrow.ListArray.from_arrays([0, 1, 2, 3, 4], text)
    parquet.write_table(pyarrow.table({"text": nested}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [row.value for row in found] == [["a"], None, [None], ["b"]]
    assert found[1].fault.startswith("not UTF-8 text (byte 0)")


def a_parquet_file_that_is_damaged_or_lacks_the_column_is_refused_by_name_test(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": TEXTS}), path, compression="zstd")
    with pytest.raises(UserError, match="a.parquet: no column text; its columns are body"):
        read(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[20:60] = bytes(40)
    for content in (b"PAR1", b"", whole[: len(whole) // 2], bytes(flipped)):
        with pytest.raises(UserError, match=r"a.parquet is not a readable .parquet file"):
            read(write(path, content), "body")


def long_parquet_rows_are_held_a_row_group_at_a_time_test(tmp_path):
    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(tmp_path / "a.parquet", schema, compression="none") as writer:
        for group in range(40):
            texts = [f"{group} {row} ".ljust(1_000_000, "x") for row in range(5)]
            writer.write_table(pyarrow.table({"text": texts}))
    program = """if True:
        import pathlib, sys
        import pyarrow
        from dmc_jax.data.rows import rows
        size = sum(len(row.value) for row in rows(pathlib.Path(sys.argv[1]), ("text",)))
        assert size == 200_000_000, size
        print(pyarrow.default_memory_pool().max_memory())
    """
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.parquet"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(done.stdout) < 30_000_000
