"""Which documents a corpus has, in which order and split, and which input it refuses."""

import json
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from dmc_jax.data.corpus import Document, documents, listing_digest, open_corpus
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


def splits_depend_on_the_file_name_alone_test(tmp_path, make_corpus):
    few = {d.name: d.split for d in read(make_corpus(tmp_path / "few", files=50))}
    many = {d.name: d.split for d in read(make_corpus(tmp_path / "many", files=800, seed=1))}
    assert few.items() <= many.items()
    shares = Counter(many.values())
    assert 680 < shares["train"] < 760
    assert min(shares["validation"], shares["test"]) > 20


def rows_of_one_file_among_several_share_its_split_test(tmp_path):
    for number in range(30):
        write_jsonl(tmp_path / f"{number}.jsonl", ["a", "b", "c"])
    by_file = {}
    for document in read(tmp_path):
        by_file.setdefault(document.name.split("#")[0], set()).add(document.split)
    assert len(by_file) == 30
    assert all(len(splits) == 1 for splits in by_file.values())


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


def bad_files_are_refused_by_name_test(tmp_path):
    cases = {
        "nul.txt": (b"a\0b", "nul.txt: holds a NUL byte"),
        "latin.txt": (b"caf\xe9", r"latin.txt: not UTF-8 text \(byte 3\)"),
        "broken.jsonl": (b'{"text": "a"}\n{oops\n', "broken.jsonl:2: not JSON"),
        "lacking.jsonl": (b'{"text": "a"}\n\n{"txt": "b"}\n', "lacking.jsonl:3: expected a string"),
        "array.jsonl": (b"[1]\n", "array.jsonl:1: expected a string"),
        "half.jsonl": (b'{"text": "\\ud800"}\n', "half.jsonl:1: half a surrogate"),
        "nul.jsonl": (b'{"text": "\\u0000"}\n', "nul.jsonl:1: holds a NUL"),
        "broken.parquet": (b"PAR1", "broken.parquet: not a readable parquet"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


def parquet_without_a_text_column_or_value_is_refused_test(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column named text; its columns are body"):
        read(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet, row 2: expected a string"):
        read(tmp_path / "b.parquet")


def missing_and_empty_corpora_are_refused_test(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found none"):
        open_corpus(tmp_path)
    (tmp_path / "a.pdf").write_text("a")
    with pytest.raises(UserError, match=r"expected .txt, .jsonl, .parquet files"):
        open_corpus(tmp_path / "a.pdf")
