"""The paper's retrofit (arXiv 2403.09636, section 4): `--config=configs/paper.py:7b,ratio=8`.

Command   python -m dmc_jax.train --config=configs/paper.py:MODEL,ratio=R --config.init_from=DIR
Models    those of the table below; R is tokens per slot at the end.

`7b_8x.py` and its like name the runs that have been published or planned for.
"""

import re

from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    MeshConfig,
    RunConfig,
    StageConfig,
    to_config_dict,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.model.presets import PRESETS

# 6,000 steps of 1,024 x 4,096 tokens for every +1 of ratio.
STEPS_PER_RATIO = 6_000

# model: constant learning rate of zero-out and retrofit, mesh (fsdp, tensor), parts that a batch is
# processed in, folder made by prepare_data with the model's own tokenizer
MODELS = {
    "7b": (3e-5, (64, 1), 4, "data/llama2"),
    "13b": (3e-5, (64, 1), 8, "data/llama2"),
    "70b": (1.5e-5, (32, 8), 16, "data/llama2"),
    "llama3_8b": (3e-5, (64, 1), 8, "data/llama3"),
}


def get_config(arguments: str = ""):
    """The run of a model and a ratio, `MODEL,ratio=R`."""
    model, ratio = _parse(arguments)
    rate, (fsdp, tensor), accumulation, data = MODELS[model]
    return to_config_dict(
        RunConfig(
            name=f"{model}_{ratio:g}x",
            model=PRESETS[model],
            dmc=DMCSettings(window=12, temperature=0.1, offset=5.0, eps=2**-7),
            compression=CompressionConfig(ratio=ratio),
            data=DataConfig(path=data, length=4096, batch=1024),
            stages="zero_out,retrofit,finetune",
            zero_out=StageConfig(steps=250, learning_rate=rate),
            retrofit=StageConfig(steps=round(STEPS_PER_RATIO * (ratio - 1)), learning_rate=rate),
            finetune=StageConfig(
                steps=2_000, learning_rate=rate, final_learning_rate=3e-6, shape="linear"
            ),
            mesh=MeshConfig(data=-1, fsdp=fsdp, tensor=tensor),
            accumulation=accumulation,
        )
    )


def _parse(arguments: str) -> tuple[str, float]:
    found = re.fullmatch(r"(\w+),ratio=(\d+\.?\d*)", arguments)
    if found and found[1] in MODELS and float(found[2]) > 1:
        return found[1], float(found[2])
    raise UserError(
        f"config: the paper's recipe takes paper:MODEL,ratio=R with a model of {', '.join(MODELS)} "
        f"and a ratio above 1, such as paper:7b,ratio=8; got {arguments!r}"
    )
