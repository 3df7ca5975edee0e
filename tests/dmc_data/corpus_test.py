"""Which documents a corpus has, in which order and split, and which input it refuses."""

import hashlib
import json
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from dmc_jax.data.corpus import SPLITS, Document, documents, listing_digest, open_corpus
from dmc_jax.errors import UserError


def read(path, **options):
    return list(documents(open_corpus(path), **options))


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def standard_library_is_source_without_tests_packages_or_build_files_test():
    corpus = open_corpus()
    parts = {part for file in corpus.files for part in file.split("/")}
    assert {"argparse.py", "pydoc_data", "LICENSE.txt"} <= parts
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any("_sysconfigdata" in part for part in parts)
    found = list(documents(corpus))
    splits = Counter()
    for document in found:
        splits[document.split] += len(document.text)
    total = sum(splits.values())
    assert 8e6 < total < 20e6
    assert 0.8 * total < splits["train"] < 0.97 * total
    assert all(splits[split] > 0.01 * total for split in ("validation", "test"))


def documents_keep_their_text_exactly_and_come_in_the_same_order_every_time_test(tmp_path):
    texts = {f"deep/{n}.txt": f"  line {n}\r\n\té\u2581\n\n" for n in range(20)}
    (tmp_path / "deep").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "ignored.md").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    found = read(tmp_path)
    assert {document.name: document.text for document in found} == texts
    assert found == read(tmp_path)
    assert [document.name for document in found] != sorted(texts)


def texts_by_split(path, **options):
    """The plain texts of each split, sorted."""
    found = {split: [] for split in SPLITS}
    for document in read(path, **options):
        found[document.split].append(document.text.strip())
    return {split: sorted(texts) for split, texts in found.items()}


def a_document_keeps_its_split_however_it_is_stored_test(tmp_path):
    texts = [f"line {n}\nand another" for n in range(300)]
    expected = texts_by_split(write_jsonl(tmp_path / "all.jsonl", texts))
    assert 250 < len(expected["train"]) < 290
    assert min(len(expected["validation"]), len(expected["test"])) >= 5
    # Renamed, in another order, with a line more.
    renamed = write_jsonl(tmp_path / "other.jsonl", texts[::-1])
    assert texts_by_split(renamed) == expected
    more = texts_by_split(write_jsonl(tmp_path / "more.jsonl", ["new", *texts]))
    assert sum(map(len, more.values())) == 301
    assert all(set(expected[split]) <= set(more[split]) for split in SPLITS)
    # In shards, and as text files of either line end.
    for name in ("shards", "windows", "tables"):
        (tmp_path / name).mkdir()
    for shard in range(7):
        write_jsonl(tmp_path / f"shards/{shard}.jsonl", texts[shard::7])
        table = pyarrow.table({"text": texts[shard::7]})
        parquet.write_table(table, tmp_path / f"tables/{shard}.parquet")
    for number, text in enumerate(texts):
        windows = b"\xef\xbb\xbf" + text.encode().replace(b"\n", b"\r\n") + b"\r\n"
        (tmp_path / f"windows/{number}.txt").write_bytes(windows)
    assert texts_by_split(tmp_path / "shards") == expected
    assert texts_by_split(tmp_path / "tables") == expected
    stored = texts_by_split(tmp_path / "windows")
    assert {s: sorted(t.replace("\r\n", "\n") for t in stored[s]) for s in SPLITS} == expected


def equal_documents_are_in_one_split_test(tmp_path):
    found = read(write_jsonl(tmp_path / "all.jsonl", [f"text {n % 50}" for n in range(200)]))
    assert len({(d.text, d.split) for d in found}) == len({d.key for d in found}) == 50


def splits_stay_what_they_were_test(tmp_path):
    """Another rule would put what was tested on into training; this one was computed by hand."""
    for text in ("a", "cache", "line\nline", "é"):
        digest = hashlib.sha256(b"document\0" + text.encode()).hexdigest()
        share = int(digest[:16], 16) / 2**64
        expected = "train" if share < 0.9 else "validation" if share < 0.95 else "test"
        (found,) = read(write_jsonl(tmp_path / "one.jsonl", [text]))
        assert (found.split, found.key) == (expected, digest)


def rows_of_a_single_file_are_split_one_by_one_test(tmp_path):
    texts = [f"text {n}" for n in range(100)]
    found = read(write_jsonl(tmp_path / "all.jsonl", texts))
    assert [document.text for document in found] == texts
    assert [document.name for document in found] == [f"all.jsonl#{n + 1}" for n in range(100)]
    assert {document.split for document in found} == {"train", "validation", "test"}


def parquet_rows_equal_the_same_rows_as_jsonl_test(tmp_path):
    texts = [f"text {n}\n" for n in range(10)]
    parquet.write_table(pyarrow.table({"text": texts, "n": range(10)}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [document.text for document in found] == texts
    assert isinstance(found[0], Document)
    assert found[0].name == "a.parquet#1"


def a_limit_gives_a_prefix_within_it_test(tmp_path, make_corpus):
    folder = make_corpus(tmp_path / "texts")
    everything, limited = read(folder), read(folder, limit_bytes=5000)
    assert limited == everything[: len(limited)]
    size = sum(len(document.text.encode()) for document in limited)
    assert size <= 5000 < size + len(everything[len(limited)].text.encode())


def a_changed_file_changes_the_listing_digest_test(tmp_path, make_corpus):
    folder = make_corpus(tmp_path / "texts", files=3)
    before = listing_digest(open_corpus(folder))
    assert before == listing_digest(open_corpus(folder))
    (folder / "000.txt").write_text("other")
    assert before != listing_digest(open_corpus(folder))


def bad_rows_are_refused_by_name_or_passed_over_test(tmp_path):
    cases = {
        "nul.txt": (b"a\0b", "nul.txt: holds a NUL byte"),
        "latin.txt": (b"caf\xe9", r"latin.txt: not UTF-8 text \(byte 3\)"),
        "half.jsonl": (b'{"text": "\\ud800"}\n', "half.jsonl:1: half a surrogate"),
        "nul.jsonl": (b'{"text": "\\u0000"}\n', "nul.jsonl:1: holds a NUL"),
        "number.jsonl": (b'{"text": 5}\n', "number.jsonl:1: expected text, got a number"),
        "null.jsonl": (b'{"text": null}\n', "null.jsonl:1: expected text, got null"),
        "broken.jsonl": (b'{"text": "a"}\n{oops\n', "broken.jsonl:2: not JSON"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    faults = []
    left = list(documents(open_corpus(tmp_path), bad_row=faults.append))
    assert [document.text for document in left] == ["a"]
    assert len(faults) == len(cases)


def a_byte_order_mark_is_no_part_of_any_text_test(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "text\\ufeff"}\n{"text": "\\ufefftext\\ufeff"}\n'
    )
    parquet.write_table(pyarrow.table({"text": ["\ufefftext\ufeff"]}), tmp_path / "c.parquet")
    assert [document.text for document in read(tmp_path)] == ["text\ufeff"] * 4


def the_field_is_chosen_test(tmp_path):
    rows = [{"text": "no", "body": "yes"}, {"body": "yes too"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = open_corpus(tmp_path / "a.jsonl", text_field="body")
    assert [document.text for document in documents(corpus)] == ["yes", "yes too"]
    with pytest.raises(
        UserError, match="a.jsonl:2: no field text or messages; its fields are body"
    ):
        read(tmp_path / "a.jsonl")


def missing_and_empty_corpora_are_refused_test(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found none$"):
        open_corpus(tmp_path)
    (tmp_path / "a.pdf").write_text("a")
    with pytest.raises(UserError, match=r"found none; left out: 1 \(.pdf is not read\): a.pdf"):
        open_corpus(tmp_path)
    with pytest.raises(UserError, match=r"a.pdf: .pdf is not read; expected one of .txt"):
        open_corpus(tmp_path / "a.pdf")
