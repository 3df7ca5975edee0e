"""Windows equal a slow loop's; streams are complete, repeatable, resumable and shared by hosts."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.data.loader import evaluation_batches, training_batches, windows
from dmc_jax.data.prepared import PreparedData
from dmc_jax.errors import UserError

LENGTHS = [7, 2, 40, 3, 3, 19, 2, 25, 60, 5]  # 166 tokens


def make(lengths, *, split="train", first_id=100, name="made-up"):
    """Data in memory whose token at place p is first_id + p, so that each is recognisable."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = (first_id + np.arange(offsets[-1])).astype("<u4")
    manifest = {"vocab_size": 1 << 20, "tokenizer_sha256": "same", "pad_id": 3}
    return PreparedData(
        Path(name), manifest, Path("tokenizer.model"), {split: tokens}, {split: offsets}
    )


def slow_window(data, index, length):
    """The window by its definition, one token at a time."""
    tokens, offsets = data.tokens["train"], data.documents["train"].tolist()
    owner = [d for d in range(len(offsets) - 1) for _ in range(offsets[d], offsets[d + 1])]
    names = ("tokens", "targets", "positions", "segment_ids", "loss_mask")
    window = {name: [] for name in names}
    position, segment, inputs = 0, 1, []
    for place in range(index * length, (index + 1) * length):
        if place + 1 >= len(tokens):
            row = (3, 3, 0, 0, 0.0)
        else:
            if inputs and owner[place] != inputs[-1]:
                position, segment = 0, segment + 1
            same = owner[place + 1] == owner[place]
            row = (tokens[place], tokens[place + 1], position, segment, float(same))
            position += 1
            inputs.append(owner[place])
        for name, value in zip(names, row, strict=True):
            window[name].append(value)
    return window | {"window": index, "documents": [inputs[0], inputs[-1]], "corpus": 0}


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12),
    length=st.integers(1, 30),
    pad_last=st.booleans(),
)
def every_window_equals_the_slow_loop_test(lengths, length, pad_last):
    data = make(lengths)
    length = length if pad_last else min(length, sum(lengths) - 1)
    source = windows(data, "train", length, pad_last=pad_last)
    inputs = sum(lengths) - 1
    assert len(source) == (-(-inputs // length) if pad_last else inputs // length)
    for index in range(len(source)):
        assert_same(source[index], slow_window(data, index, length))


def a_hand_written_window_test():
    window = windows(make([3, 2, 4]), "train", 4)[1]
    assert_same(
        window,
        {
            "tokens": [104, 105, 106, 107],  # the end of document 1, then document 2
            "targets": [105, 106, 107, 108],
            "positions": [0, 0, 1, 2],
            "segment_ids": [1, 2, 2, 2],
            "loss_mask": [0, 1, 1, 1],
            "window": 1,
            "documents": [1, 2],
            "corpus": 0,
        },
    )
    assert [window[name].dtype.name for name in ("tokens", "loss_mask", "window")] == [
        "int32",
        "float32",
        "int64",
    ]


def each_epoch_has_every_window_once_in_another_order_test():
    data = make(LENGTHS)  # 33 windows of 5
    seen = [
        w
        for b in take(training_batches([(data, 1)], length=5, batch=3, seed=1), 22)
        for w in b["window"].tolist()
    ]
    first, second = seen[:33], seen[33:]
    assert sorted(first) == sorted(second) == list(range(33))
    assert first != second
    assert first != list(range(33))


def the_seed_alone_decides_the_order_test():
    data = make(LENGTHS)
    order = [
        [
            b["window"].tolist()
            for b in take(training_batches([(data, 1)], length=5, batch=3, seed=s), 33)
        ]
        for s in (0, 0, 1)
    ]
    assert order[0] == order[1]
    assert order[0] != order[2]
    # Grain alone would shuffle epoch 1 of seed 0 as epoch 0 of seed 1.
    assert order[0][11:22] != order[2][:11]


@pytest.mark.parametrize("weights", [(1,), (0.7, 0.3)])
def a_resumed_stream_equals_the_unbroken_one_test(weights):
    corpora = [(make(LENGTHS, name=str(n)), weight) for n, weight in enumerate(weights)]

    def stream():
        return iter(training_batches(corpora, length=5, batch=4, seed=3))

    unbroken = list(itertools.islice(stream(), 25))
    stopped = stream()
    for _ in range(9):
        next(stopped)
    state = stopped.get_state()
    resumed = stream()
    next(resumed)  # wherever it was
    resumed.set_state(state)
    for expected in unbroken[9:]:
        assert_same(next(resumed), expected)


@pytest.mark.parametrize("hosts", [2, 3])
@pytest.mark.parametrize("weights", [(1,), (0.7, 0.3)])
def rows_of_all_hosts_in_order_are_the_batch_of_one_host_test(hosts, weights):
    corpora = [(make(LENGTHS), weight) for weight in weights]
    options = {"length": 5, "batch": 6, "seed": 3}
    alone = take(training_batches(corpora, **options), 12)
    shards = [
        take(training_batches(corpora, **options, host_index=h, host_count=hosts), 12)
        for h in range(hosts)
    ]
    for expected, *parts in zip(alone, *shards, strict=True):
        assert parts[0]["tokens"].shape == (6 // hosts, 5)
        assert_same(expected, {k: np.concatenate([p[k] for p in parts]) for k in expected})


def corpora_are_drawn_in_proportion_and_completely_test():
    corpora = [(make(LENGTHS, first_id=1000 * n), weight) for n, weight in enumerate((5, 3, 2))]
    batches = take(training_batches(corpora, length=5, batch=10, seed=0), 100)
    corpus = np.concatenate([batch["corpus"] for batch in batches])
    window = np.concatenate([batch["window"] for batch in batches])
    np.testing.assert_allclose(np.bincount(corpus) / 1000, [0.5, 0.3, 0.2], atol=0.01)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    np.testing.assert_array_equal(tokens[:, 0], 1000 * corpus + 5 * window)
    for number in range(3):
        assert sorted(window[corpus == number][:33]) == list(range(33))
    assert (window[corpus == 0][:33] != window[corpus == 1][:33]).any()


@pytest.mark.parametrize("limit", [None, 8, 9, 1000])
def evaluation_reads_every_window_once_in_order_in_batches_of_one_shape_test(limit):
    data = make([*LENGTHS, 2], split="test")  # 167 inputs: 33 windows of 5 and one of 2
    batches = list(evaluation_batches(data, "test", length=5, batch=4, limit=limit))
    count = min(limit or 34, 34)
    assert {batch["tokens"].shape for batch in batches} == {(4, 5)}
    window = np.concatenate([batch["window"] for batch in batches])
    blank = -(-count // 4) * 4 - count
    assert window.tolist() == [*range(count), *[-1] * blank]
    mask = np.concatenate([batch["loss_mask"] for batch in batches])
    segments = np.concatenate([batch["segment_ids"] for batch in batches])
    assert (mask[count:] == 0).all()
    assert (segments[count:] == 0).all()
    if count == 34:
        assert mask.sum() == 168 - len([*LENGTHS, 2])  # every token but each document's first


def impossible_requests_are_refused_test():
    data = make(LENGTHS)
    other = make(LENGTHS, name="other")
    other.manifest["tokenizer_sha256"] = "another"
    good = {"length": 5, "batch": 4, "seed": 0}
    cases = [
        ([(data, 1)], {"length": 166}, "has 166 tokens, too few for a window of 166 tokens"),
        ([(data, 1)], {"length": 0}, "window length: expected 1"),
        ([(data, 1)], {"host_count": 3}, "batch of 4 windows: expected .* 3 hosts"),
        ([(data, 1)], {"batch": 0}, "batch of 0 windows"),
        ([(data, 1)], {"host_count": 2, "host_index": 2}, "host 2 of 2: expected 0 to 1"),
        ([(data, 1)], {"seed": -1}, "seed: expected 0 or more"),
        ([(data, 1)], {"split": "dev"}, "no split 'dev' in made-up: choose one of train"),
        ([(data, 0)], {}, "weight of made-up: expected a positive number, got 0"),
        ([(data, 1), (other, 1)], {}, "other .* different tokenizers"),
        ([], {}, "no training data"),
    ]
    for corpora, change, message in cases:
        with pytest.raises(UserError, match=message):
            training_batches(corpora, **(good | change))
    with pytest.raises(UserError, match="evaluation limit: expected 1"):
        evaluation_batches(data, "train", length=5, batch=4, limit=0)
    with pytest.raises(UserError, match="no split 'test'"):
        windows(data, "test", 5)


def prepared_text_comes_back_from_its_windows_test(data):
    batches = list(evaluation_batches(data, "validation", length=16, batch=4))
    tokens = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in batches])
    np.testing.assert_array_equal(tokens, data.tokens["validation"][1:])
