"""A tiny corpus, and a model retrofitted on it as a user would."""

import pytest

from dmc_jax.training.loop import train
from tests.tiny_run import make_data, tiny_run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("corpus"), 320, seed=0)


@pytest.fixture(scope="session")
def other_data(tmp_path_factory):
    """The same kind of text, another tokenizer of the same size."""
    return make_data(tmp_path_factory.mktemp("other"), 320, seed=1)


@pytest.fixture(scope="session")
def model_config(data):
    return tiny_run(data, "", kv_heads=(2, 1)).model


@pytest.fixture(scope="session")
def finished_run(data, tmp_path_factory):
    """A run's directory with two stages: a dense model and one that merges."""
    return train(tiny_run(data, tmp_path_factory.mktemp("runs")), quiet=True)
