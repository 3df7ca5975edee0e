"""The demo's model: a million parameters, from nothing to 4x in 2,570 steps of 8 x 256 tokens.

Data      python -m dmc_jax.prepare_data --output=data/stdlib
Command   python -m dmc_jax.train --config=configs/tiny_4x.py
Hardware  two CPU cores.
Time      about seven minutes.
Expected  the table in README.md, from benchmarks/demo_train_cpu.json.

The schedule is 20 times shorter than the paper's, so the settings differ: see "Settings beyond the
paper" in README.md. They were chosen by the validation split; the demo reports the test split.
"""

from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    to_config_dict,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.model.presets import PRESETS


def get_config():
    """The run."""
    return to_config_dict(
        RunConfig(
            name="tiny_4x",
            model=PRESETS["tiny"],
            dmc=DMCSettings(window=12, temperature=0.15, offset=2.0, eps=2**-7),
            compression=CompressionConfig(
                ratio=4.0,
                weight=2.0,
                per_layer=True,
                decision_multiplier=6.0,
                distillation=1.0,
                calibration_windows=64,
            ),
            data=DataConfig(path="data/stdlib", length=256, batch=8),
            stages="pretrain,zero_out,retrofit,finetune",
            pretrain=StageConfig(
                steps=1800, learning_rate=3e-3, final_learning_rate=3e-4, shape="cosine", warmup=100
            ),
            zero_out=StageConfig(steps=20, learning_rate=2e-3, warmup=20),
            retrofit=StageConfig(steps=300, learning_rate=2e-3),
            finetune=StageConfig(
                steps=450, learning_rate=2e-3, final_learning_rate=2e-4, shape="cosine"
            ),
            optimizer=OptimizerConfig(),
            compute_dtype="float32",
            remat="dots",
            attention_block=128,
            log_every=100,
            save_every=500,
            eval_every=500,
            eval_windows=128,
        )
    )
