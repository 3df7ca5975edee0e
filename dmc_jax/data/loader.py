"""Tokens to batches: fixed windows over the flat token file, shuffled, mixed and shared by Grain.

Everything is random access: window i is a slice of the file, the training stream is a function of
(seed, index), and the state of an iterator is one index. So a resumed run sees exactly what an
unbroken one would, on any number of hosts.
"""

import sys
from collections.abc import Sequence

import grain
import numpy as np

from dmc_jax.data.prepared import PreparedData
from dmc_jax.errors import UserError

# Batches read ahead, in threads. Grain's own default is 500 of them: gigabytes for long windows.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)

Window = dict[str, np.ndarray]


class _Windows:
    """Random access to the windows of a split; see `windows`."""

    def __init__(self, data: PreparedData, split: str, length: int, pad_last: bool, corpus: int):
        # Plain views of the mapped files: slicing a np.memmap itself is several times slower.
        self._tokens = np.asarray(data.tokens[split])
        self._documents = np.asarray(data.documents[split])
        self._length, self._corpus = length, corpus
        self._pad_id = data.manifest["pad_id"]
        # The last token is never an input: it has no target.
        inputs = len(self._tokens) - 1
        self._count = -(-inputs // length) if pad_last else inputs // length
        self._name = f"windows({data.path}, {split}, {length})"

    def __repr__(self) -> str:
        return self._name

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Window:
        length = self._length
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        start = index * length
        read = np.asarray(self._tokens[start : start + length + 1], np.int32)
        used = len(read) - 1
        # Documents are numbered from the one that holds the first token.
        first, last, last_target = (
            np.searchsorted(self._documents, (start, start + used - 1, start + used), "right") - 1
        )
        begins = np.zeros(used + 1, bool)
        begins[self._documents[first + 1 : last_target + 1] - start] = True
        place = np.arange(used)
        window = self.blank()
        window["tokens"][:used] = read[:-1]
        window["targets"][:used] = read[1:]
        window["positions"][:used] = place - np.maximum.accumulate(np.where(begins[:-1], place, 0))
        window["segment_ids"][:used] = 1 + np.cumsum(begins[:-1])
        window["loss_mask"][:used] = ~begins[1:]
        window["window"][...] = index
        window["documents"][:] = first, last
        return window

    def blank(self) -> Window:
        """Return a window of padding, which counts for nothing."""
        length = self._length
        return {
            "tokens": np.full(length, self._pad_id, np.int32),
            "targets": np.full(length, self._pad_id, np.int32),
            "positions": np.zeros(length, np.int32),
            "segment_ids": np.zeros(length, np.int32),
            "loss_mask": np.zeros(length, np.float32),
            "window": np.array(-1, np.int64),
            "documents": np.full(2, -1, np.int64),
            "corpus": np.array(self._corpus, np.int64),
        }


class _Padded:
    """The first `used` windows, then blank ones up to `count`."""

    def __init__(self, source: _Windows, used: int, count: int):
        self._source, self._used, self._count = source, used, count

    def __repr__(self) -> str:
        return f"first {self._used} of {self._source!r}"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Window:
        return self._source[index] if index < self._used else self._source.blank()


class _HostRows:
    """One host's rows of every global batch of an endless stream, as a stream of their own."""

    def __init__(self, stream: grain.MapDataset, batch: int, host_index: int, host_count: int):
        self._stream, self._batch = stream, batch
        self._rows = batch // host_count
        self._first = host_index * self._rows

    def __repr__(self) -> str:
        return f"rows {self._first}+{self._rows} of each {self._batch} of {self._stream!r}"

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, index: int) -> Window:
        step, row = divmod(index, self._rows)
        return self._stream[step * self._batch + self._first + row]


def windows(
    data: PreparedData, split: str, length: int, *, pad_last: bool = False, corpus: int = 0
) -> _Windows:
    """Cut a split into windows of fixed length, which may hold parts of several documents.

    Window i reads tokens [i * length, (i + 1) * length + 1) and is a dict of new arrays:

        tokens       int32 [T]    inputs
        targets      int32 [T]    the token after each input
        positions    int32 [T]    from 0 at the window's start and at every document's start
        segment_ids  int32 [T]    1, 2, ... for each document in the window; 0 is padding
        loss_mask    float32 [T]  0 for padding and where the target starts another document
        window       int64 []     i; -1 for a blank window
        documents    int64 [2]    first and last document among the inputs; -1 for a blank window
        corpus       int64 []     `corpus`

    Args:
        data: from `open_data`.
        split: "train", "validation" or "test".
        length: T, in tokens.
        pad_last: keep the incomplete last window, padded (evaluation), instead of dropping it.
        corpus: a number to mark the windows with, where several corpora are mixed.

    Returns:
        A sequence with `len` and random access.

    Raises:
        UserError: an unknown split, or one that does not fill a window (with `pad_last`: one that
            has no token to predict).
    """
    _check_split(data, split)
    if length < 1:
        raise UserError(f"window length: expected 1 token or more, got {length}")
    tokens = len(data.tokens[split])
    if (2 if pad_last else length + 1) > tokens:
        wanted = "a token to predict" if pad_last else f"a window of {length} tokens and its target"
        raise UserError(
            f"split {split!r} of {data.path} has {tokens} tokens, too few for {wanted}: "
            f"{'' if pad_last else 'shorten the window or '}prepare more text"
        )
    return _Windows(data, split, length, pad_last, corpus)


def training_batches(
    datas_with_weights: Sequence[tuple[PreparedData, float]],
    *,
    length: int,
    batch: int,
    seed: int,
    host_index: int = 0,
    host_count: int = 1,
    split: str = "train",
) -> grain.IterDataset:
    """Make the endless stream of training batches.

    Each corpus is visited in epochs, every epoch in another order drawn from the seed, and corpora
    take turns in proportion to their weights. That one stream is cut into global batches; a host
    gets its own consecutive rows of each, so the hosts' rows, in order, are the global batch, and
    `get_state` and `set_state` of the iterator mean the same on any number of hosts.

    Args:
        datas_with_weights: corpora and how often to draw from each, relative to the others.
        length: tokens a window.
        batch: windows in a global batch.
        seed: any integer of 0 or more.
        host_index: which host this is, from 0.
        host_count: number of hosts.
        split: the split to read.

    Returns:
        A dataset; `iter` of it gives dicts as `windows` describes, with a leading axis of
        `batch / host_count`.

    Raises:
        UserError: a batch that hosts cannot share evenly, weights that are not positive, corpora
            with different tokenizers, or a window that does not fit.
    """
    _check_training(datas_with_weights, batch, seed, host_index, host_count)
    streams = []
    for number, (data, _) in enumerate(datas_with_weights):
        source = windows(data, split, length, corpus=number)
        # Grain shuffles epoch e with seed + e. Hashing keeps runs with neighbouring seeds, and
        # corpora of one run, from repeating each other's orders an epoch later.
        start = np.random.SeedSequence([seed, number]).generate_state(1)[0]
        streams.append(grain.MapDataset.source(source).shuffle(seed=int(start)).repeat())
    stream = streams[0]
    if len(streams) > 1:
        stream = grain.MapDataset.mix(streams, [float(weight) for _, weight in datas_with_weights])
    rows = grain.MapDataset.source(_HostRows(stream, batch, host_index, host_count))
    return rows.batch(batch // host_count, drop_remainder=True).to_iter_dataset(_READ_AHEAD)


def evaluation_batches(
    data: PreparedData, split: str, *, length: int, batch: int, limit: int | None = None
) -> grain.IterDataset:
    """Make one ordered pass over a split, in batches of constant shape.

    Args:
        data: from `open_data`.
        split: "train", "validation" or "test".
        length: tokens a window; the incomplete last window is padded.
        batch: windows a batch; the last batch is filled with blank windows, whose masks are 0.
        limit: windows to read at most; None is all.

    Returns:
        A dataset; `iter` of it gives dicts as `windows` describes, with a leading axis of `batch`.

    Raises:
        UserError: an unknown or empty split, or sizes below 1.
    """
    source = windows(data, split, length, pad_last=True)
    for name, value in (("batch", batch), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"evaluation {name}: expected 1 window or more, got {value}")
    used = len(source) if limit is None else min(limit, len(source))
    padded = _Padded(source, used, -(-used // batch) * batch)
    return grain.MapDataset.source(padded).batch(batch).to_iter_dataset(_READ_AHEAD)


def _check_split(data: PreparedData, split: str) -> None:
    if split not in data.tokens:
        raise UserError(
            f"no split {split!r} in {data.path}: choose one of {', '.join(data.tokens)}"
        )


def _check_training(
    datas_with_weights: Sequence[tuple[PreparedData, float]],
    batch: int,
    seed: int,
    host_index: int,
    host_count: int,
) -> None:
    if not datas_with_weights:
        raise UserError("no training data: give at least one prepared folder")
    first = datas_with_weights[0][0]
    for data, weight in datas_with_weights:
        if not 0 < weight < float("inf"):
            raise UserError(f"weight of {data.path}: expected a positive number, got {weight}")
        if data.manifest["tokenizer_sha256"] != first.manifest["tokenizer_sha256"]:
            raise UserError(
                f"{data.path} ({data.vocab_size} ids) and {first.path} ({first.vocab_size} ids) "
                "were made with different tokenizers and cannot be mixed: prepare both with the "
                "same --tokenizer"
            )
    if not 0 <= host_index < host_count:
        raise UserError(f"host {host_index} of {host_count}: expected 0 to {host_count - 1}")
    if batch < 1 or batch % host_count:
        raise UserError(
            f"batch of {batch} windows: expected a positive multiple of the {host_count} hosts"
        )
    if seed < 0:
        raise UserError(f"seed: expected 0 or more, got {seed}")
