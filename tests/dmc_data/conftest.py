"""A small corpus, prepared once."""

import numpy as np
import pytest

from dmc_jax.data.prepare import prepare
from dmc_jax.inference.text import begin_text, end_text, extend_text

WORDS = ["the", "cache", "merges", "a", "token", "into\n\t", "its", "", "newest", "slot", "x+1"]


def write_corpus(folder, files=60, seed=0):
    """Writes text files of 20 to 200 random words."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        words = rng.choice(WORDS, size=rng.integers(20, 200))
        (folder / f"{number:03}.txt").write_text(" ".join(words) + f"\n{number}\n")
    return folder


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def data(corpus_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(output, source=corpus_folder, vocab_size=320, workers=1, report=lambda _: None)


@pytest.fixture
def make_corpus():
    return write_corpus


@pytest.fixture(scope="session")
def stream_decode():
    """Decodes tokens as they come, as the engine does where no string stops it."""

    def parts(tokenizer, ids):
        state = begin_text(tokenizer, ())
        for token in ids:
            state, ready, _ = extend_text(tokenizer, state, token, ())
            if ready:
                yield ready
        if rest := end_text(tokenizer, state):
            yield rest

    return parts
