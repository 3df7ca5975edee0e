"""A tiny corpus, and a model retrofitted on it as a user would."""

import dataclasses

import numpy as np
import pytest

from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.prepare import prepare
from dmc_jax.training.loop import train

WORDS = ["the", "cache", "merges", "a", "token", "into\n\t", "its", "newest", "slot", "é+1"]


def make_data(folder, vocab_size, seed):
    rng = np.random.default_rng(seed)
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        text = " ".join(rng.choice(WORDS, size=rng.integers(20, 90)))
        (texts / f"{number:02}.txt").write_text(f"{text}\n{number}\n")
    return prepare(
        folder / "data", source=texts, vocab_size=vocab_size, workers=1, report=lambda _: None
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("corpus"), 320, seed=0)


@pytest.fixture(scope="session")
def other_data(tmp_path_factory):
    """The same kind of text, another tokenizer of the same size."""
    return make_data(tmp_path_factory.mktemp("other"), 320, seed=1)


@pytest.fixture(scope="session")
def model_config():
    return ModelConfig(
        vocab_size=320,
        width=16,
        layers=2,
        heads=2,
        kv_heads=(2, 1),
        head_dim=8,
        mlp_width=24,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=64,
        tied_embeddings=True,
    )


@pytest.fixture(scope="session")
def finished_run(data, model_config, tmp_path_factory):
    """A run's directory with two stages: a dense model and one that merges."""
    stage = StageConfig(steps=2, learning_rate=1e-3)
    run = RunConfig(
        name="small",
        model=dataclasses.replace(model_config, kv_heads=2),  # equal layers compile once
        dmc=DMCSettings(window=1, offset=0.0),
        compression=CompressionConfig(ratio=2.0),
        pretrain=stage,
        zero_out=stage,
        retrofit=stage,
        finetune=stage,
        data=DataConfig(path=str(data.path), length=32, batch=8),
        stages="pretrain,retrofit",
        output=str(tmp_path_factory.mktemp("runs")),
        compute_dtype="float32",
        remat="none",
        log_every=1,
        eval_windows=8,
    )
    return train(run, quiet=True)
