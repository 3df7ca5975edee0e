"""Gates for a model as it is, in closed form and by distillation: `configs/gates.py:CHECKPOINT`.

Command   python -m dmc_jax.train --config=configs/gates.py:CHECKPOINT --config.data.path=DATA
Takes     a checkpoint of any format, and text prepared with its tokenizer. The gates are written to
          RUN/gates.safetensors once they are solved, and again when they are distilled.
Hardware  any; two CPU cores serve a model of 135M parameters (`smollm2_gates.py`).

`--config.stages=closed_form` leaves distillation out.
"""

import re
from pathlib import Path

from dmc_jax.checkpoints.models import find_model
from dmc_jax.config import (
    DataConfig,
    GatesConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    to_config_dict,
)
from dmc_jax.model.presets import PRESETS


def get_config(checkpoint: str):
    """The run for the model in a checkpoint, or for sizes that have a name."""
    if checkpoint in PRESETS:
        name, model, start = checkpoint, PRESETS[checkpoint], ""
    else:
        name = re.sub(r"[^\w.-]", "_", Path(checkpoint).expanduser().resolve().stem)
        model, start = find_model(checkpoint).config, checkpoint
    return to_config_dict(
        RunConfig(
            name=f"{name}_gates",
            model=model,
            init_from=start,
            stages="closed_form,distill",
            gates=GatesConfig(delay=16, windows=24),
            distill=StageConfig(
                steps=600, learning_rate=1e-3, final_learning_rate=1e-5, shape="cosine", warmup=20
            ),
            data=DataConfig(path=f"data/{name}", length=1024, batch=1),
            optimizer=OptimizerConfig(beta2=0.98, eps=1e-8, weight_decay=0.0),
            compute_dtype="float32",
            products="bfloat16",
            remat="none",
            log_every=10,
            eval_windows=16,
            save_every=50,
        )
    )
