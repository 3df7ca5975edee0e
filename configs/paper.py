"""The paper's retrofit (arXiv 2403.09636, section 4): `--config=configs/paper.py:7b,ratio=8`.

Command   python -m dmc_jax.train --config=configs/paper.py:MODEL,ratio=R --config.init_from=DIR
          python -m dmc_jax.train --config=configs/paper.py:CHECKPOINT,ratio=R
Models    those of the table below, or the model in a checkpoint of any format, from which the run
          then starts. R is tokens per slot at the end.

`7b_8x.py` and its like name the runs that have been published or planned for.
"""

import re
from pathlib import Path

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
# Of a checkpoint: as for 7B, on whatever devices there are, eight windows at a time.
_RATE, _PARTS = MODELS["7b"][0], 128


def get_config(arguments: str = ""):
    """The run of a model and a ratio, `MODEL,ratio=R`, or of a checkpoint, `PATH,ratio=R`."""
    model, ratio = _parse(arguments)
    if model in MODELS:
        rate, (fsdp, tensor), accumulation, data = MODELS[model]
        sizes, start = PRESETS[model], ""
    else:
        from dmc_jax.checkpoints.models import find_model  # reads what the named models need not

        sizes, start = find_model(model).config, model
        model = re.sub(r"[^\w.-]", "_", Path(model).expanduser().resolve().stem)
        rate, (fsdp, tensor), accumulation, data = _RATE, (1, 1), _PARTS, f"data/{model}"
    return to_config_dict(
        RunConfig(
            name=f"{model}_{ratio:g}x",
            model=sizes,
            init_from=start,
            dmc=DMCSettings(window=12, temperature=0.1, offset=5.0, eps=2**-7),
            compression=CompressionConfig(ratio=ratio),
            data=DataConfig(path=data, length=min(4096, sizes.max_length), batch=1024),
            stages="zero_out,retrofit,finetune",
            zero_out=StageConfig(steps=250, learning_rate=rate),
            retrofit=StageConfig(steps=round(STEPS_PER_RATIO * (ratio - 1)), learning_rate=rate),
            finetune=StageConfig(
                steps=2_000, learning_rate=rate, final_learning_rate=3e-6, shape="linear"
            ),
            mesh=MeshConfig(data=-1, fsdp=fsdp, tensor=tensor),
            accumulation=accumulation,
            eval_every=500,
        )
    )


def _parse(arguments: str) -> tuple[str, float]:
    found = re.fullmatch(r"(.+),ratio=(\d+\.?\d*)", arguments)
    known = found and (found[1] in MODELS or Path(found[1]).expanduser().exists())
    if known and float(found[2]) > 1:
        return found[1], float(found[2])
    raise UserError(
        "config: the paper's recipe takes paper:MODEL,ratio=R with a model of "
        f"{', '.join(MODELS)}, or the path of a checkpoint, and a ratio above 1, such as "
        f"paper:7b,ratio=8; got {arguments!r}"
    )
