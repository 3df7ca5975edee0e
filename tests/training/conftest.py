"""A tiny prepared corpus and a run small enough to train within a test."""

import dataclasses
import functools

import numpy as np
import pytest

from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.prepare import prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder of made-up arithmetic, tokenized with 280 ids."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(60):
        lines = [f"{a} plus {b} is {a + b}." for a, b in rng.integers(0, 50, size=(40, 2))]
        (folder / f"{i:03d}.txt").write_text("\n".join(lines))
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(output, source=folder, vocab_size=280, workers=1, report=lambda _: None)
    return output


@pytest.fixture
def tiny_run(make_tiny_run, tmp_path):
    """Two layers, eight heads, four stages of a few steps each."""
    return make_tiny_run(tmp_path)


@pytest.fixture(scope="session")
def make_tiny_run(prepared):
    """Output folder to tiny run: for fixtures that live longer than a test."""
    return functools.partial(tiny_run_in, prepared)


def tiny_run_in(prepared, output):
    stage = StageConfig(steps=4, learning_rate=3e-3)
    return RunConfig(
        name="run",
        output=str(output),
        model=ModelConfig(
            vocab_size=280,
            width=32,
            layers=2,
            heads=8,
            kv_heads=4,
            head_dim=8,
            mlp_width=32,
            rope_theta=100.0,
            norm_eps=1e-5,
            max_length=32,
            tied_embeddings=False,
        ),
        dmc=DMCSettings(window=4, temperature=0.5, offset=1.0),
        compression=CompressionConfig(ratio=3.0, weight=2.0, decision_multiplier=3.0),
        data=DataConfig(path=str(prepared), length=32, batch=8),
        stages="pretrain,zero_out,retrofit,finetune",
        pretrain=stage,
        zero_out=stage,
        retrofit=dataclasses.replace(stage, steps=6),
        finetune=dataclasses.replace(stage, shape="cosine", warmup=2),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        compute_dtype="float32",
        attention_block=16,
        log_every=1,
        save_every=2,
        eval_windows=8,
    )
