"""A tiny corpus, and the run of a tiny model on it."""

import jax
import numpy as np

from dmc_jax.checkpoints.states import open_for_saving, quiet_orbax
from dmc_jax.config import CompressionConfig, DataConfig, ModelConfig, RunConfig, StageConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.prepare import prepare
from dmc_jax.model.llama import init_params
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.stages import describe
from dmc_jax.training.state import state_of

WORDS = ["the", "cache", "merges", "a", "token", "into\n\t", "its", "newest", "slot", "é+1"]


def write_texts(folder, seed=0, words=(20, 90)):
    """Writes forty texts of random words."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(40):
        text = " ".join(rng.choice(WORDS, size=rng.integers(*words)))
        (folder / f"{number:02}.txt").write_text(f"{text}\n{number}\n")
    return folder


def make_data(folder, vocab_size, seed, **texts):
    source = write_texts(folder / "texts", seed, **texts)
    return prepare(
        folder / "data", source=source, vocab_size=vocab_size, workers=1, report=lambda _: None
    )


def tiny_run(data, output, kv_heads=2, max_length=64):
    """A dense stage and one that merges, two steps each."""
    stage = StageConfig(steps=2, learning_rate=1e-3)
    return RunConfig(
        name="small",
        model=ModelConfig(
            vocab_size=320,
            width=16,
            layers=2,
            heads=2,
            kv_heads=kv_heads,
            head_dim=8,
            mlp_width=24,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            max_length=max_length,
            tied_embeddings=True,
        ),
        dmc=DMCSettings(window=1, offset=0.0),
        compression=CompressionConfig(ratio=2.0),
        pretrain=stage,
        zero_out=stage,
        retrofit=stage,
        finetune=stage,
        data=DataConfig(path=str(data.path), length=32, batch=8),
        stages="pretrain,retrofit",
        output=str(output),
        compute_dtype="float32",
        remat="none",
        log_every=1,
        eval_windows=8,
    )


def save_model(data, folder, **sizes):
    """Writes a dense model that attends to something: its weights are larger than fresh ones."""
    run = tiny_run(data, "", **sizes)
    params = init_params(run.model, jax.random.key(0))
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim > 2 else x, params)
    quiet_orbax()
    with open_for_saving(folder, "pretrain", keep=1) as saver:
        state = state_of(params, make_optimizer(run.optimizer, 1.0))
        saver.save(0, state, {}, describe(run, "pretrain", 0, data))
    return folder
