"""Text to a folder of tokens: train a tokenizer if asked, tokenise in parallel, all or nothing."""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from dmc_jax.data.chat import load_chat_template
from dmc_jax.data.corpus import (
    SHARES,
    SPLITS,
    Document,
    describe_left_out,
    listing_digest,
    open_corpus,
)
from dmc_jax.data.prepared import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    PreparedData,
    open_data,
    read_manifest,
    tokens_dtype,
)
from dmc_jax.data.survey import Survey, Texts, change_of_text, split_documents, survey
from dmc_jax.data.tokenizer import (
    encode_document,
    fingerprint,
    load_tokenizer,
    train_sentencepiece,
)
from dmc_jax.data.tokenizer_files import copy_with_companions
from dmc_jax.errors import UserError
from dmc_jax.files import appears_when_complete

DEFAULT_VOCAB_SIZE = 1024
ON_BAD_ROW = ("error", "skip")
# What requests meant before they had these fields.
_FORMER_REQUEST = {"on_bad_row": "error", "special_tokens": False}
_TRAINING_SAMPLE = 4_000_000  # characters that a tokenizer is trained on
_TEST_SAMPLE = 500_000  # characters that a given one is tried on
_BATCH_BYTES = 250_000  # text handed to a worker at a time


def prepare(
    output: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    vocab_size: int | None = None,
    workers: int = 1,
    limit_mb: float | None = None,
    text_field: str | None = None,
    validation: str | os.PathLike | None = None,
    on_bad_row: str = "error",
    special_tokens: bool = False,
    report: Callable[[str], None] = print,
) -> PreparedData:
    """Tokenise a corpus into a folder, which appears only when it is complete.

    Args:
        output: the folder to make. If it exists and was made from the same request, it is opened
            as it is.
        source: a file or folder of text (see `open_corpus`); None is the default corpus.
        tokenizer: file of one to use; None trains one on the training split.
        vocab_size: ids of the tokenizer to train; None is 1024, or as many as the text yields. Not
            to be given with `tokenizer`.
        workers: processes that tokenise; 1 is this one. Others are started afresh, so a script
            that asks for them must guard its own start with `if __name__ == "__main__"`.
        limit_mb: text of `source` to use at most, in 10^6 bytes; None is all of it.
        text_field: the field of .jsonl and .parquet files that holds the text, or a conversation
            (a list of objects with "role" and "content", to be rendered by the chat template beside
            `tokenizer`); None is "text" or else "messages".
        validation: text of the validation split; None draws it from `source`. What `source` has of
            it is left out of the other splits.
        on_bad_row: "error" refuses a row without usable text; "skip" passes over it and counts.
        special_tokens: where a text spells a special token, such as "</s>", it means the token;
            otherwise it means these characters. In conversations it always means the token.
        report: called with lines about the progress.

    Returns:
        The opened folder.

    Raises:
        UserError: bad text or arguments, no documents to train on or to validate with, or an
            `output` that exists and was not made from this request.
        OSError: the disk is full, or a worker process died.
    """
    output = Path(os.path.abspath(os.path.expanduser(output)))
    _check_arguments(tokenizer, vocab_size, workers, limit_mb, on_bad_row)
    if tokenizer is not None:
        tokenizer = Path(os.path.expanduser(tokenizer))
        load_tokenizer(tokenizer)  # a bad one is refused before any work
    texts = Texts(
        open_corpus(source, text_field=text_field),
        None if validation is None else open_corpus(validation, text_field=text_field),
        None if limit_mb is None else limit_mb * 1e6,
        on_bad_row == "skip",
        tokenizer and load_chat_template(tokenizer),
    )
    request = {
        "source": texts.corpus.source,
        "files": listing_digest(texts.corpus),
        "limit_mb": limit_mb,
        "text_field": text_field,
        "validation": texts.validation and texts.validation.source,
        "validation_files": texts.validation and listing_digest(texts.validation),
        "on_bad_row": on_bad_row,
        "special_tokens": special_tokens,
        "tokenizer": fingerprint(tokenizer) if tokenizer else None,
        "vocab_size": None if tokenizer else vocab_size or DEFAULT_VOCAB_SIZE,
    }

    def tell(line: str) -> None:
        report(line.encode(errors="backslashreplace").decode())  # names may hold what no text can

    if _is_prepared(output, request):
        data = open_data(output)
        old = "" if "split" in data.manifest else "; its splits were drawn by name, not by content"
        tell(f"already prepared: {output}{old}")
        return data
    for line in _left_out(texts):
        tell(f"left out: {line}")
    with appears_when_complete(output) as folder:
        folder.mkdir()
        _fill(folder, texts, request, tokenizer, vocab_size is None, workers, tell)
    return open_data(output)


def _fill(
    folder: Path,
    texts: Texts,
    request: dict,
    tokenizer: Path | None,
    may_be_smaller: bool,
    workers: int,
    report: Callable[[str], None],
) -> None:
    """Write every file of a prepared folder, the manifest last."""
    found = survey(texts, _TEST_SAMPLE if tokenizer else _TRAINING_SAMPLE)
    for line in _passed_over(found):
        report(line)
    if tokenizer:
        copy_with_companions(tokenizer, folder / TOKENIZER)
    else:
        wanted = request["vocab_size"]
        report(f"training a tokenizer of {wanted} ids")
        train_sentencepiece(found.sample, wanted, folder / TOKENIZER, may_be_smaller=may_be_smaller)
    loaded = load_tokenizer(folder / TOKENIZER)
    if tokenizer and (change := change_of_text(loaded, found.sample)):
        report(f"note: {change}")
    if not tokenizer and loaded.vocab_size < wanted:
        report(f"the text yields a tokenizer of {loaded.vocab_size} ids only")
    documents = split_documents(texts, Survey())
    encode = _Encode(folder / TOKENIZER, tokens_dtype(loaded.vocab_size), request["special_tokens"])
    tokenised = _tokenise(documents, encode, workers)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": texts.corpus.source,
        "split": {"by": "content", "shares": SHARES, "validation": request["validation"]},
        "left_out": _left_out(texts),
        "bad_rows": found.bad_rows,
        "in_validation": found.in_validation,
        "tokenizer_sha256": fingerprint(folder / TOKENIZER),
        "vocab_size": loaded.vocab_size,
        "bos_id": loaded.bos_id,
        "eos_id": loaded.eos_id,
        "pad_id": loaded.pad_id,
        "dtype": tokens_dtype(loaded.vocab_size).str,
        "splits": _write_splits(folder, _with_progress(tokenised, found.size, report)),
        "request": request,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _left_out(texts: Texts) -> list[str]:
    """Lines that say which files are not read, and why."""
    corpora = [corpus for corpus in (texts.corpus, texts.validation) if corpus]
    return [line for corpus in corpora for line in describe_left_out(corpus.left_out)]


def _passed_over(found: Survey) -> Iterator[str]:
    if found.bad_rows:
        yield f"skipped {found.bad_rows} bad rows, the first: {found.first_fault}"
    if found.in_validation:
        yield f"left out {found.in_validation} documents that the validation set has too"
    if not found.documents["test"]:
        yield "the test split is empty: no document fell to it"


def _check_arguments(
    tokenizer: object,
    vocab_size: int | None,
    workers: int,
    limit_mb: float | None,
    on_bad_row: str,
) -> None:
    if tokenizer is not None and vocab_size is not None:
        raise UserError(
            "both a tokenizer and a vocabulary size were given: a tokenizer brings its own size, "
            "so give one of them"
        )
    if vocab_size is not None and vocab_size < 1:
        raise UserError(f"vocabulary size: expected a positive number, got {vocab_size}")
    if workers < 1:
        raise UserError(f"workers: expected 1 or more, got {workers}")
    if limit_mb is not None and not limit_mb > 0:
        raise UserError(f"limit_mb: expected a positive number of megabytes, got {limit_mb}")
    if on_bad_row not in ON_BAD_ROW:
        raise UserError(f"on_bad_row: expected one of {', '.join(ON_BAD_ROW)}, got {on_bad_row!r}")


def _is_prepared(output: Path, request: dict) -> bool:
    """Say whether `output` is there already; raise if something else is."""
    manifest = read_manifest(output)
    if manifest is None:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(f"{output} exists and is not prepared data: choose another output")
        return False
    former = _FORMER_REQUEST | manifest["request"]
    differing = [key for key in request if former.get(key) != request[key]]
    if differing:
        raise UserError(
            f"{output} was prepared from another request ({', '.join(differing)} changed): "
            "choose another output, or delete it"
        )
    return True


@dataclass(frozen=True)
class _Tokenised:
    split: str
    size: int  # bytes of text
    tokens: np.ndarray  # [n], BOS and EOS included


@dataclass
class _Encode:
    """Documents to tokens; each process loads its own tokenizer, once."""

    model: Path
    dtype: np.dtype
    special_tokens: bool

    def __post_init__(self):
        self._tokenizer = load_tokenizer(self.model)

    def __reduce__(self):
        return _Encode, (self.model, self.dtype, self.special_tokens)

    def __call__(self, batch: list[Document]) -> list[_Tokenised]:
        return [
            _Tokenised(document.split, len(document.text.encode()), np.array(ids, self.dtype))
            for document in batch
            for ids in [self._ids(document)]
        ]

    def _ids(self, document: Document) -> list[int]:
        if document.chat:
            return self._tokenizer.encode_special(document.text)
        return encode_document(self._tokenizer, document.text, special=self.special_tokens)


def _tokenise(found: Iterable[Document], encode: _Encode, workers: int) -> Iterator[_Tokenised]:
    """Tokenise documents in order, keeping only a few batches in memory."""
    batches = _batches(found)
    if workers == 1:
        for batch in batches:
            yield from encode(batch)
        return
    # Spawned, not forked: the parent may hold threads (JAX, a notebook) that a fork would break.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (encode,)
    )
    try:
        waiting = collections.deque(
            pool.submit(_encode_in_worker, batch)
            for batch in itertools.islice(batches, 3 * workers)
        )
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(
                pool.submit(_encode_in_worker, batch) for batch in itertools.islice(batches, 1)
            )
    except concurrent.futures.process.BrokenProcessPool:
        raise OSError(
            "a tokenising process died (out of memory?); try again with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in found:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_encode: _Encode  # exists in worker processes only


def _start_worker(encode: _Encode) -> None:
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _encode = encode


def _encode_in_worker(batch: list[Document]) -> list[_Tokenised]:
    return _encode(batch)


@dataclass
class _Split:
    """A split being written."""

    file: BinaryIO
    size: int = 0  # bytes of text
    offsets: array = field(default_factory=lambda: array("q", [0]))
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def _write_splits(folder: Path, tokenised: Iterable[_Tokenised]) -> dict:
    """Write tokens and offsets; return the manifest's entry for each split."""
    with contextlib.ExitStack() as stack:
        splits = {
            name: _Split(stack.enter_context((folder / f"{name}.tokens").open("wb")))
            for name in SPLITS
        }
        for document in tokenised:
            split = splits[document.split]
            raw = document.tokens.tobytes()
            split.file.write(raw)
            split.digest.update(raw)
            split.size += document.size
            split.offsets.append(split.offsets[-1] + len(document.tokens))
    for name, split in splits.items():
        np.save(folder / f"{name}.documents.npy", np.frombuffer(split.offsets, np.int64))
    return {
        name: {
            "tokens": split.offsets[-1],
            "documents": len(split.offsets) - 1,
            "bytes": split.size,
            "bytes_per_token": split.size / max(1, split.offsets[-1]),
            "sha256": split.digest.hexdigest(),
        }
        for name, split in splits.items()
    }


def _with_progress(
    tokenised: Iterator[_Tokenised], total: int, report: Callable[[str], None]
) -> Iterator[_Tokenised]:
    """Show a bar in a terminal, and elsewhere a line for every quarter of the text."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising") as bar:
            for document in tokenised:
                yield document
                bar.update(document.size)
        return
    done = 0
    for document in tokenised:
        yield document
        before, done = done, done + document.size
        if 4 * before // total < 4 * done // total:
            report(f"tokenised {done / 1e6:.1f} of {total / 1e6:.1f} MB")
