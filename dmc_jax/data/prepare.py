"""Text to a folder of tokens: train a tokenizer if asked, tokenise in parallel, all or nothing."""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from dmc_jax.data.corpus import (
    SPLITS,
    Corpus,
    Document,
    documents,
    listing_digest,
    open_corpus,
    unit_hash,
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
from dmc_jax.data.tokenizer import (
    Tokenizer,
    encode_document,
    fingerprint,
    load_tokenizer,
    train_sentencepiece,
)
from dmc_jax.errors import UserError
from dmc_jax.files import appears_when_complete

DEFAULT_VOCAB_SIZE = 1024
_SAMPLE_BYTES = 4_000_000  # text the tokenizer is trained on
_SAMPLE_PIECE = 8192  # characters drawn together
_BATCH_BYTES = 250_000  # text handed to a worker at a time


def prepare(
    output: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    vocab_size: int | None = None,
    workers: int = 1,
    limit_mb: float | None = None,
    report: Callable[[str], None] = print,
) -> PreparedData:
    """Tokenise a corpus into a folder, which appears only when it is complete.

    Args:
        output: the folder to make. If it exists and was made from the same request, it is opened
            as it is.
        source: a file or folder of text (see `open_corpus`); None is the default corpus.
        tokenizer: file of one to use; None trains one on the training split.
        vocab_size: ids of the tokenizer to train; None is 1024. Not to be given with `tokenizer`.
        workers: processes that tokenise; 1 is this one. Others are started afresh, so a script
            that asks for them must guard its own start with `if __name__ == "__main__"`.
        limit_mb: text to use at most, in 10^6 bytes; None is all of it.
        report: called with lines about the progress.

    Returns:
        The opened folder.

    Raises:
        UserError: bad text or arguments, a split without documents, or an `output` that exists and
            was not made from this request.
        OSError: the disk is full, or a worker process died.
    """
    output = Path(os.path.abspath(output))
    _check_arguments(tokenizer, vocab_size, workers, limit_mb)
    if tokenizer is not None:
        load_tokenizer(tokenizer)  # a bad one is refused before any work
    corpus = open_corpus(source)
    request = {
        "source": corpus.source,
        "files": listing_digest(corpus),
        "limit_mb": limit_mb,
        "tokenizer": fingerprint(tokenizer) if tokenizer else None,
        "vocab_size": None if tokenizer else vocab_size or DEFAULT_VOCAB_SIZE,
    }
    if _is_prepared(output, request):
        report(f"already prepared: {output}")
        return open_data(output)
    with appears_when_complete(output) as folder:
        folder.mkdir()
        _fill(folder, corpus, request, tokenizer, workers, report)
    return open_data(output)


def _fill(
    folder: Path,
    corpus: Corpus,
    request: dict,
    tokenizer: str | os.PathLike | None,
    workers: int,
    report: Callable[[str], None],
) -> None:
    """Write every file of a prepared folder, the manifest last."""
    limit_bytes = None if request["limit_mb"] is None else request["limit_mb"] * 1e6
    totals = _scan(corpus, limit_bytes, wanted=0 if tokenizer else _SAMPLE_BYTES)
    if tokenizer:
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    else:
        report(f"training a tokenizer of {request['vocab_size']} ids")
        train_sentencepiece(totals.sample, request["vocab_size"], folder / TOKENIZER)
    loaded = load_tokenizer(folder / TOKENIZER)
    found = documents(corpus, limit_bytes)
    tokenised = _tokenise(found, folder / TOKENIZER, loaded.vocab_size, workers)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": corpus.source,
        "tokenizer_sha256": fingerprint(folder / TOKENIZER),
        "vocab_size": loaded.vocab_size,
        "bos_id": loaded.bos_id,
        "eos_id": loaded.eos_id,
        "pad_id": loaded.pad_id,
        "dtype": tokens_dtype(loaded.vocab_size).str,
        "splits": _write_splits(folder, _with_progress(tokenised, totals.size, report)),
        "request": request,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _check_arguments(
    tokenizer: object, vocab_size: int | None, workers: int, limit_mb: float | None
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


def _is_prepared(output: Path, request: dict) -> bool:
    """Say whether `output` is there already; raise if something else is."""
    manifest = read_manifest(output)
    if manifest is None:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(f"{output} exists and is not prepared data: choose another output")
        return False
    differing = [key for key in request if manifest["request"].get(key) != request[key]]
    if differing:
        raise UserError(
            f"{output} was prepared from another request ({', '.join(differing)} changed): "
            "choose another output, or delete it"
        )
    return True


@dataclass
class _Totals:
    size: int = 0  # bytes of text
    documents: collections.Counter = field(default_factory=collections.Counter)  # by split
    sample: list[str] = field(default_factory=list)  # training text for a tokenizer


def _scan(corpus: Corpus, limit_bytes: float | None, wanted: int) -> _Totals:
    """Read everything once: find bad input before any work, and draw the tokenizer's sample."""
    available = sum((corpus.root / file).stat().st_size for file in corpus.files)
    share = wanted / max(1, min(available, limit_bytes or available))
    totals, room = _Totals(), wanted
    for document in documents(corpus, limit_bytes):
        totals.size += len(document.text.encode())
        totals.documents[document.split] += 1
        if document.split != "train" or room <= 0:
            continue
        for at in range(0, len(document.text), _SAMPLE_PIECE):
            if unit_hash("sample", f"{document.name}:{at}") < share:
                totals.sample.append(document.text[at : at + _SAMPLE_PIECE])
                room -= len(totals.sample[-1])
    if not totals.size:
        raise UserError(f"corpus {corpus.source} is empty: no text in {len(corpus.files)} files")
    if len(totals.documents) < len(SPLITS):
        counts = ", ".join(f"{split} {totals.documents[split]}" for split in SPLITS)
        unit = "document" if corpus.split_by_document else "file"
        raise UserError(
            f"corpus {corpus.source} is too small to split: {counts} documents; splits are drawn "
            f"by {unit} (90/5/5), so give more {unit}s, or one .jsonl file of many documents"
        )
    return totals


@dataclass(frozen=True)
class _Tokenised:
    split: str
    size: int  # bytes of text
    tokens: np.ndarray  # [n], BOS and EOS included


def _tokenise(
    found: Iterable[Document], model: Path, vocab_size: int, workers: int
) -> Iterator[_Tokenised]:
    """Tokenise documents in order, keeping only a few batches in memory."""
    dtype = tokens_dtype(vocab_size)
    batches = _batches(found)
    if workers == 1:
        tokenizer = load_tokenizer(model)
        for batch in batches:
            yield from _encode(tokenizer, dtype, batch)
        return
    # Spawned, not forked: the parent may hold threads (JAX, a notebook) that a fork would break.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (str(model), dtype)
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


_worker: tuple[Tokenizer, np.dtype]  # exists in worker processes only


def _start_worker(model: str, dtype: np.dtype) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _worker = load_tokenizer(model), dtype


def _encode_in_worker(batch: list[Document]) -> list[_Tokenised]:
    return _encode(*_worker, batch)


def _encode(tokenizer: Tokenizer, dtype: np.dtype, batch: list[Document]) -> list[_Tokenised]:
    return [
        _Tokenised(
            document.split,
            len(document.text.encode()),
            np.array(encode_document(tokenizer, document.text), dtype),
        )
        for document in batch
    ]


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
            "bytes_per_token": split.size / split.offsets[-1],
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
