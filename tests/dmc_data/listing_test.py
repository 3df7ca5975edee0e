"""Files are told by their names, found through links, and read once."""

import os

import pytest

from dmc_jax.data.corpus import documents, open_corpus
from dmc_jax.data.listing import find_files, name_parts
from dmc_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.txt", (".txt", "")),
        ("A.TXT", (".txt", "")),
        ("a.b.JSONL", (".jsonl", "")),
        ("a.ndjson.zst", (".ndjson", ".zst")),
        ("a.Jsonl.GZ", (".jsonl", ".gz")),
        ("a.txt.bz2", (".txt", ".bz2")),
        ("a.parquet", (".parquet", "")),
        ("a.parquet.gz", ("", "")),
        ("a.gz", ("", ".gz")),
        ("txt", ("", "")),
        ("a.json", ("", "")),
    ],
)
def formats_are_told_by_name_test(name, parts):
    assert name_parts(name) == parts


def a_hub_cache_is_read_by_its_links_and_each_text_once_test(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/main/data"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number in range(3):
        (blobs / f"hash{number}").write_text(f"text {number}")
        (snapshot / f"{number}.txt").symlink_to(os.path.relpath(blobs / f"hash{number}", snapshot))
    (tmp_path / "snapshots/older").symlink_to("main")
    for corpus in (tmp_path, tmp_path / "snapshots/older", snapshot):
        texts = {document.text for document in documents(open_corpus(corpus))}
        assert texts == {"text 0", "text 1", "text 2"}
    (one,) = documents(open_corpus(snapshot / "1.txt"))
    assert one.text == "text 1"
    assert dict(find_files(tmp_path)[1]) == {
        **{f"blobs/hash{number}": "a name without a suffix is not read" for number in range(3)},
        "snapshots/older": "the same as another one here",
    }


def circles_and_what_is_no_file_are_left_out_with_the_reason_test(tmp_path):
    inside, beside = tmp_path / "corpus/inside", tmp_path / "beside"
    inside.mkdir(parents=True)
    beside.mkdir()
    (tmp_path / "secret.txt").write_text("not part of it")
    (inside / "a.txt").write_text("a")
    (beside / "b.txt").write_text("b")
    (inside / "up").symlink_to("..")
    (inside / "above").symlink_to("../..")
    (inside / "self").symlink_to("self")
    (inside / "beside").symlink_to("../../beside")
    (beside / "back").symlink_to("../corpus")
    (inside / "again.txt").symlink_to("a.txt")
    (inside / "gone.txt").symlink_to("nowhere")
    os.mkfifo(inside / "pipe.txt")
    found, left_out = find_files(tmp_path / "corpus")
    assert found == ["inside/a.txt", "inside/beside/b.txt"]
    assert dict(left_out) == {
        "inside/up": "a link to a folder that holds it",
        "inside/above": "a link to a folder that holds it",
        "inside/self": "a name without a suffix is not read",
        "inside/beside/back": "the same as another one here",
        "inside/again.txt": "the same as another one here",
        "inside/gone.txt": "a link to nothing",
        "inside/pipe.txt": "not a regular file",
    }
    with pytest.raises(UserError, match=r"pipe.txt: not a regular file"):
        open_corpus(inside / "pipe.txt")
