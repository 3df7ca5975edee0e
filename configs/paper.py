"""The paper's retrofit (arXiv 2403.09636, section 4): `--config=configs/paper.py:7b,ratio=8`.

Command   python -m dmc_jax.train --config=paper:MODEL,ratio=R,gpus=G --config.init_from=DIR
          python -m dmc_jax.train --config=paper:CHECKPOINT,ratio=R
Models    those of the tables below, or the model in a checkpoint of any format, from which the run
          then starts. R is tokens per slot at the end.
Hardware  G GPUs of 80 GB, all of them along fsdp; without it the most of the table. They fit in the
          three quarters of the memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION=0.75, its
          default), as `python -m dmc_jax.plan` has it; on other machines it says what would.

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

# model: constant learning rate of zero-out and retrofit, folder made by prepare_data with the
# model's own tokenizer
MODELS = {
    "7b": (3e-5, "data/llama2"),
    "13b": (3e-5, "data/llama2"),
    "70b": (1.5e-5, "data/llama2"),
    "llama3_8b": (3e-5, "data/llama3"),
}
# model: GPUs, and in how many parts they process a batch: the fewest that fit.
PARTS = {
    "7b": {8: 8, 16: 4, 64: 1},
    "13b": {8: 16, 16: 8, 64: 1},
    "70b": {64: 4, 256: 1},
    "llama3_8b": {8: 8, 16: 4, 64: 1},
}
# Of a checkpoint: as for 7B, on whatever devices there are, eight windows at a time.
_RATE, _PARTS = MODELS["7b"][0], 128


def get_config(arguments: str = ""):
    """The run of a model, a ratio and GPUs, `MODEL,ratio=R,gpus=G`, or `CHECKPOINT,ratio=R`."""
    model, ratio, gpus = _parse(arguments)
    if model in MODELS:
        rate, data = MODELS[model]
        sizes, start, accumulation = PRESETS[model], "", PARTS[model][gpus]
    else:
        from dmc_jax.checkpoints.models import find_model  # reads what the named models need not

        sizes, start = find_model(model).config, model
        model = re.sub(r"[^\w.-]", "_", Path(model).expanduser().resolve().stem)
        rate, accumulation, data = _RATE, _PARTS, f"data/{model}"
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
            mesh=MeshConfig(data=-1, fsdp=gpus),
            accumulation=accumulation,
            eval_every=500,
        )
    )


def _parse(arguments: str) -> tuple[str, float, int]:
    found = re.fullmatch(r"(.+?),ratio=(\d+\.?\d*)(?:,gpus=(\d+))?", arguments)
    known = found and (found[1] in MODELS or Path(found[1]).expanduser().exists())
    if not known or float(found[2]) <= 1:
        raise UserError(
            "config: the paper's recipe takes paper:MODEL,ratio=R with a model of "
            f"{', '.join(MODELS)}, or the path of a checkpoint, and a ratio above 1, such as "
            f"paper:7b,ratio=8 or paper:7b,ratio=8,gpus=16; got {arguments!r}"
        )
    model, planned = found[1], PARTS.get(found[1], {1: _PARTS})
    gpus = int(found[3] or max(planned))
    if gpus not in planned or (found[3] and model not in PARTS):
        there = f"{' or '.join(map(str, planned))} GPUs" if model in PARTS else "no GPUs"
        raise UserError(
            f"config: {model} is planned for {there}, not {gpus}: `python -m dmc_jax.plan "
            f"--config=paper:{model},ratio={found[2]} --gpus={gpus}` says which --config.mesh and "
            "--config.accumulation fit"
        )
    return model, float(found[2]), gpus
