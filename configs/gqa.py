"""A model whose KV heads were averaged, trained on: `configs/gqa.py:CHECKPOINT`.

Grouped-query attention of a pretrained model (Ainslie et al. 2023, arXiv 2305.13245).

Command   python -m dmc_jax.convert --input=MODEL --kv_heads=1 --to=dmc_jax --output=CHECKPOINT
          or, for heads by layer, python -m dmc_jax.search_kv_heads
          python -m dmc_jax.train --config=configs/gqa.py:CHECKPOINT --config.data.path=DATA
Data      text prepared with the model's tokenizer.
Expected  no figures yet: steps and rate are a guess for some 100M parameters, and not tuned.

`--config.compression.distillation=1 --config.compression.teacher=MODEL` lets it learn from the
model that it was. `configs/paper.py:RUN,ratio=4` then makes a DMC model of it: both savings
multiply.
"""

import re
from pathlib import Path

from dmc_jax.checkpoints.models import find_model
from dmc_jax.config import DataConfig, RunConfig, StageConfig, to_config_dict


def get_config(checkpoint: str):
    """The run for the model in a checkpoint."""
    name = re.sub(r"[^\w.-]", "_", Path(checkpoint).expanduser().resolve().stem)
    model = find_model(checkpoint).config
    return to_config_dict(
        RunConfig(
            name=f"{name}_gqa",
            model=model,
            init_from=checkpoint,
            stages="pretrain",
            pretrain=StageConfig(
                steps=600, learning_rate=1e-4, final_learning_rate=1e-5, shape="cosine", warmup=20
            ),
            data=DataConfig(path=f"data/{name}", length=min(1024, model.max_length), batch=8),
            compute_dtype="float32",
            eval_every=100,
            eval_windows=16,
            save_every=50,
        )
    )
