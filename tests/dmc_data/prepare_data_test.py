"""A prepared folder is complete or absent, is what its manifest says, and damage is noticed."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from dmc_jax.data import prepare as prepare_module
from dmc_jax.data.corpus import SPLITS, documents, open_corpus
from dmc_jax.data.prepare import prepare
from dmc_jax.data.prepared import open_data, tokens_dtype
from dmc_jax.data.tokenizer import load_tokenizer
from dmc_jax.errors import UserError
from tests.doors import runs_of

ROOT = Path(__file__).parents[2]


def quiet(_):
    pass


def run_door(*arguments):
    command = [sys.executable, "-W", "error", "-m", "dmc_jax.prepare_data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def folder_hashes(path):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.name != "manifest.json"
    }


def every_document_is_bos_its_text_eos_in_its_split_test(data, corpus_folder):
    tokenizer = load_tokenizer(data.tokenizer_path)
    found = list(documents(open_corpus(corpus_folder)))
    for split in SPLITS:
        texts = [document.text for document in found if document.split == split]
        offsets, tokens = data.documents[split], data.tokens[split]
        assert len(offsets) - 1 == len(texts)
        for text, begin, end in zip(texts, offsets, offsets[1:], strict=False):
            assert tokens[begin] == tokenizer.bos_id
            assert tokens[end - 1] == tokenizer.eos_id
            assert tokenizer.decode(tokens[begin:end]) == text


def manifest_states_what_the_files_hold_test(data, corpus_folder):
    manifest = json.loads((data.path / "manifest.json").read_text())
    assert manifest["source"] == str(corpus_folder)
    assert (manifest["vocab_size"], manifest["dtype"]) == (320, "<u2")
    hashes = folder_hashes(data.path)
    assert manifest["tokenizer_sha256"] == hashes["tokenizer.model"]
    found = list(documents(open_corpus(corpus_folder)))
    for split, facts in manifest["splits"].items():
        size = sum(len(d.text.encode()) for d in found if d.split == split)
        assert facts["sha256"] == hashes[f"{split}.tokens"]
        assert facts["tokens"] == len(data.tokens[split])
        assert facts["bytes"] == size
        assert facts["bytes_per_token"] == pytest.approx(size / facts["tokens"])


def several_processes_write_the_same_files_as_one_test(data, corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 2000)  # several batches for each
    other = prepare(tmp_path / "two", source=corpus_folder, vocab_size=320, workers=2, report=quiet)
    assert folder_hashes(other.path) == folder_hashes(data.path)


def the_tokenizer_is_trained_on_the_training_split_alone_test(corpus_folder, tmp_path, monkeypatch):
    seen = []
    real = prepare_module.train_sentencepiece
    monkeypatch.setattr(
        prepare_module,
        "train_sentencepiece",
        lambda texts, *rest, **options: real(seen.extend(texts) or seen, *rest, **options),
    )
    prepare(tmp_path / "out", source=corpus_folder, vocab_size=320, workers=1, report=quiet)
    found = documents(open_corpus(corpus_folder))
    assert seen == [document.text for document in found if document.split == "train"]


def a_given_tokenizer_is_used_as_it_is_test(data, make_corpus, tmp_path):
    source = make_corpus(tmp_path / "other", seed=5)
    other = prepare(
        tmp_path / "out", source=source, tokenizer=data.tokenizer_path, workers=1, report=quiet
    )
    assert other.tokenizer_path.read_bytes() == data.tokenizer_path.read_bytes()
    assert other.vocab_size == 320


def an_exception_leaves_nothing_and_a_rerun_works_test(corpus_folder, tmp_path, monkeypatch):
    options = {"source": corpus_folder, "vocab_size": 320, "workers": 1, "report": quiet}
    real = prepare_module.encode_document
    calls = iter(range(1000))

    def full_disk(tokenizer, text, **options):
        if next(calls) == 20:
            raise OSError("No space left on device")
        return real(tokenizer, text, **options)

    monkeypatch.setattr(prepare_module, "encode_document", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert prepare(tmp_path / "out", **options).vocab_size == 320


def a_worker_that_dies_is_a_failure_not_a_hang_test(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_start_worker", int)  # fails on a worker's arguments
    with pytest.raises(OSError, match="process died .* fewer workers"):
        prepare(tmp_path / "out", source=corpus_folder, vocab_size=320, workers=2, report=quiet)
    assert list(tmp_path.iterdir()) == []


def a_killed_run_leaves_nothing_finished_and_the_next_clears_up_test(corpus_folder, tmp_path):
    program = """if True:
        import sys, time
        from dmc_jax.data import prepare as module
        def stall(tokenizer, text, special):
            print("tokenising", flush=True)
            time.sleep(60)
        module.encode_document = stall
        module.prepare(sys.argv[1], source=sys.argv[2], vocab_size=320, workers=1)
    """
    command = [sys.executable, "-c", program, str(tmp_path / "out"), str(corpus_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while "tokenising" not in (line := process.stdout.readline().split()):
            assert line, "the program ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == [".out.partial"]
    prepare(tmp_path / "out", source=corpus_folder, vocab_size=320, workers=1, report=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def the_same_request_is_kept_and_another_refused_test(corpus_folder, tmp_path):
    options = {"source": corpus_folder, "vocab_size": 320, "workers": 1}
    lines = []
    first = prepare(tmp_path / "out", **options, report=quiet)
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    prepare(tmp_path / "out", **options, report=lines.append)
    assert lines == [f"already prepared: {tmp_path / 'out'}"]
    assert (first.path / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"another request \(vocab_size changed\)"):
        prepare(tmp_path / "out", **(options | {"vocab_size": 330}), report=quiet)
    with pytest.raises(UserError, match=r"another request \(limit_mb changed\)"):
        prepare(tmp_path / "out", **options, limit_mb=1, report=quiet)


def foreign_folders_are_left_alone_test(corpus_folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not prepared data"):
        prepare(tmp_path, source=corpus_folder, report=quiet)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def bad_arguments_and_small_corpora_are_refused_test(corpus_folder, make_corpus, tmp_path, data):
    cases = [
        ({"workers": 0}, "workers: expected 1 or more"),
        ({"limit_mb": 0}, "limit_mb: expected a positive"),
        ({"vocab_size": 0}, "vocabulary size: expected a positive"),
        ({"vocab_size": 9, "tokenizer": data.tokenizer_path}, "both a tokenizer and a vocab"),
        ({"tokenizer": corpus_folder / "000.txt"}, "not a SentencePiece model"),
        ({"vocab_size": 50_000}, "50000 ids cannot be trained"),
        (
            {"source": make_corpus(tmp_path / "two", files=2)},
            "too small to split: train .* by a hash of their text",
        ),
        ({"source": corpus_folder / "000.txt"}, "too small to split: .* --validation"),
        ({"limit_mb": 1e-6}, "is empty: no text"),
        ({"on_bad_row": "warn"}, "on_bad_row: expected one of error, skip"),
        ({"validation": tmp_path / "nowhere"}, "nowhere does not exist"),
    ]
    for change, message in cases:
        options = {"source": corpus_folder, "workers": 1, "report": quiet} | change
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def a_validation_set_of_ones_own_is_that_and_nothing_of_it_is_trained_on_test(tmp_path):
    texts = [f"text number {n} of some\n" for n in range(60)]
    source = write_jsonl(tmp_path / "all.jsonl", texts)
    own = [*texts[:10], "another text\n"]
    lines = []
    data = prepare(
        tmp_path / "out",
        source=source,
        validation=write_jsonl(tmp_path / "own.jsonl", own),
        report=lines.append,
    )
    tokenizer = load_tokenizer(data.tokenizer_path)

    def texts_of(split):
        ends = data.documents[split]
        return [
            tokenizer.decode(data.tokens[split][begin:end])
            for begin, end in itertools.pairwise(ends)
        ]

    assert texts_of("validation") == own
    found = list(documents(open_corpus(source)))[10:]
    assert texts_of("test") == [d.text for d in found if d.split == "test"]
    assert texts_of("train") == [d.text for d in found if d.split != "test"]
    assert "left out 10 documents that the validation set has too" in lines
    assert data.manifest["in_validation"] == 10
    assert data.manifest["split"]["validation"] == str(tmp_path / "own.jsonl")


def one_text_is_enough_to_train_on_with_a_validation_set_of_ones_own_test(tmp_path):
    (tmp_path / "all.txt").write_text("to be or not to be\n" * 50)
    (tmp_path / "own.txt").write_text("that is the question\n" * 10)
    lines = []
    data = prepare(
        tmp_path / "out",
        source=tmp_path / "all.txt",
        validation=tmp_path / "own.txt",
        report=lines.append,
    )
    assert [data.manifest["splits"][split]["documents"] for split in SPLITS] == [1, 1, 0]
    assert "the test split is empty: no document fell to it" in lines
    assert len(open_data(data.path, check_contents=True).tokens["test"]) == 0


def bad_rows_are_skipped_and_counted_where_that_is_asked_test(corpus_folder, tmp_path):
    good = [path.read_text() for path in sorted(corpus_folder.iterdir())]
    source = write_jsonl(tmp_path / "all.jsonl", good)
    clean = prepare(tmp_path / "clean", source=source, report=quiet)
    rows = source.read_text().splitlines(keepends=True)
    source.write_text("".join(["{oops\n", *rows[:30], '{"text": 5}\n', *rows[30:]]))
    with pytest.raises(UserError, match="all.jsonl:1: not JSON"):
        prepare(tmp_path / "out", source=source, report=quiet)
    lines = []
    data = prepare(tmp_path / "out", source=source, on_bad_row="skip", report=lines.append)
    first = f"{source}:1: not JSON"
    assert any(line.startswith(f"skipped 2 bad rows, the first: {first}") for line in lines)
    assert data.manifest["bad_rows"] == 2
    assert folder_hashes(data.path) == folder_hashes(clean.path)
    source.write_text("{oops\n")
    with pytest.raises(UserError, match="no text in 1 files; 1 bad rows, such as .*all.jsonl:1"):
        prepare(tmp_path / "none", source=source, on_bad_row="skip", report=quiet)


def files_left_out_are_listed_with_the_reason_test(make_corpus, tmp_path):
    source = make_corpus(tmp_path / "texts")
    for name in ("a.pdf", "b.pdf", "readme"):
        (source / name).write_text("no")
    (source / "\udcff.md").write_text("a name that is not UTF-8")
    lines = []
    data = prepare(tmp_path / "out", source=source, report=lines.append)
    assert "left out: 2 (.pdf is not read): a.pdf, b.pdf" in lines
    assert "left out: 1 (a name without a suffix is not read): readme" in lines
    assert "left out: 1 (.md is not read): \\udcff.md" in lines
    assert len(data.manifest["left_out"]) == 3


def the_default_vocabulary_is_as_large_as_a_small_text_yields_test(make_corpus, tmp_path):
    source = make_corpus(tmp_path / "texts", files=40)
    assert sum(path.stat().st_size for path in source.iterdir()) < 40_000
    lines = []
    data = prepare(tmp_path / "out", source=source, report=lines.append)
    assert 260 < data.vocab_size < 1024
    assert f"the text yields a tokenizer of {data.vocab_size} ids only" in lines
    tokenizer = load_tokenizer(data.tokenizer_path)
    assert tokenizer.decode(tokenizer.encode("\tnew wörds")) == "\tnew wörds"


def a_tokenizer_that_changes_text_is_told_of_test(corpus_folder, tmp_path):
    def trained(name, **options):
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus_folder / "000.txt"),
            model_prefix=str(tmp_path / name),
            model_type="bpe",
            vocab_size=290,
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
        return tmp_path / f"{name}.model"

    def notes(tokenizer):
        lines = []
        output = tmp_path / f"prepared {tokenizer.stem}"
        prepare(output, source=corpus_folder, tokenizer=tokenizer, report=lines.append)
        return [line for line in lines if line.startswith("note:")]

    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    assert notes(trained("exact", **exact)) == []
    (note,) = notes(trained("normalising"))
    assert re.search("does not give the text back: .* such as '.*  .*' to", note)


def a_home_directory_is_written_as_a_tilde_test(make_corpus, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_corpus(tmp_path / "texts")
    shutil.copyfile(data.tokenizer_path, tmp_path / "tokenizer.model")
    made = prepare("~/out", source="~/texts", tokenizer="~/tokenizer.model", report=quiet)
    assert made.path == tmp_path / "out"
    assert open_data("~/out").manifest == made.manifest


def folders_from_before_splits_went_by_content_still_open_and_are_kept_test(data, tmp_path):
    old = shutil.copytree(data.path, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    for name in ("split", "left_out", "bad_rows", "in_validation"):
        del manifest[name]
    for name in (
        "text_field",
        "validation",
        "validation_files",
        "on_bad_row",
        "special_tokens",
    ):
        del manifest["request"][name]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert open_data(old, check_contents=True).vocab_size == data.vocab_size
    lines = []
    prepare(old, source=manifest["source"], vocab_size=320, report=lines.append)
    assert lines == [f"already prepared: {old}; its splits were drawn by name, not by content"]


def damage_is_noticed_on_opening_test(data, tmp_path):
    def damaged(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(data.path, tmp_path / "copy")
        change(tmp_path / "copy")
        return tmp_path / "copy"

    def flip(path):
        raw = bytearray((path / "train.tokens").read_bytes())
        raw[10] ^= 1
        (path / "train.tokens").write_bytes(raw)

    def renumber(path):
        manifest = json.loads((path / "manifest.json").read_text()) | {"format_version": 99}
        (path / "manifest.json").write_text(json.dumps(manifest))

    cases = [
        (lambda p: os.truncate(p / "train.tokens", 10), "train.tokens is damaged .* found 10"),
        (lambda p: (p / "test.tokens").unlink(), "test.tokens is damaged .* found 0"),
        (lambda p: os.truncate(p / "test.documents.npy", 20), "test.documents.npy is damaged"),
        (
            lambda p: np.save(p / "test.documents.npy", np.arange(2)),
            "test.documents.npy .* expected",
        ),
        (lambda p: (p / "tokenizer.model").write_text("x"), "does not match the data"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (renumber, "expected format dmc_jax.tokens version 1, found .*99"),
        (flip, "its contents have changed"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            open_data(damaged(change), check_contents=True)
    with pytest.raises(UserError, match="not a prepared data folder; make one with `python -m"):
        open_data(tmp_path)
    open_data(data.path, check_contents=True)


def token_files_use_two_bytes_while_ids_fit_test():
    assert [tokens_dtype(size).str for size in (320, 65536, 65537)] == ["<u2", "<u2", "<u4"]


def the_command_prepares_and_says_how_much_test(corpus_folder, tmp_path):
    flags = (f"--output={tmp_path / 'out'}", f"--input={corpus_folder}", "--vocab_size=320")
    done = run_door(*flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "training a tokenizer of 320 ids" in done.stdout
    assert "validation:" in done.stdout
    assert open_data(tmp_path / "out").vocab_size == 320
    again = run_door(*flags)
    assert again.returncode == 0
    assert again.stdout.startswith("already prepared")


def the_command_answers_mistakes_in_one_line_test():
    cases = [
        ([], 2, "--output must be given"),
        (["--output=x", "--bogus"], 2, "Unknown command line flag 'bogus'"),
        (["--output=x", "stray"], 2, "unexpected argument 'stray'"),
        (["--output=x", "--vocab_size=many"], 2, "--vocab_size=many"),
        (["--output=x", "--input=/nowhere"], 2, "corpus /nowhere does not exist"),
        (["--output=/dev/null/x"], 1, "/dev/null"),
    ]
    results = runs_of("prepare_data", *(arguments for arguments, *_ in cases))
    for done, (_, code, message) in zip(results, cases, strict=True):
        assert done.returncode == code, done
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
