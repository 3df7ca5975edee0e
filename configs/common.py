"""What the configs share: the paper's recipe (arXiv 2403.09636, section 4) for a named model."""

from ml_collections import config_dict

from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    MeshConfig,
    RunConfig,
    StageConfig,
    to_config_dict,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.model.presets import PRESETS

# 6,000 steps of 1,024 x 4,096 tokens for every +1 of ratio.
STEPS_PER_RATIO = 6_000


def retrofit(
    preset: str, ratio: float, *, rate: float, mesh: MeshConfig, accumulation: int, data: str
) -> config_dict.ConfigDict:
    """The paper's retrofit of a pretrained model to a compression ratio.

    Args:
        preset: name in `PRESETS`.
        ratio: tokens per slot at the end.
        rate: constant learning rate of the zero-out and retrofit stages.
        mesh: devices.
        accumulation: parts that a batch is processed in.
        data: folder made by prepare_data with the model's own tokenizer.
    """
    return to_config_dict(
        RunConfig(
            name=f"{preset}_{ratio:g}x",
            model=PRESETS[preset],
            dmc=DMCSettings(window=12, temperature=0.1, offset=5.0, eps=2**-7),
            compression=CompressionConfig(ratio=ratio),
            data=DataConfig(path=data, length=4096, batch=1024),
            stages="zero_out,retrofit,finetune",
            pretrain=StageConfig(steps=1, learning_rate=rate),  # not among the stages
            zero_out=StageConfig(steps=250, learning_rate=rate),
            retrofit=StageConfig(steps=round(STEPS_PER_RATIO * (ratio - 1)), learning_rate=rate),
            finetune=StageConfig(
                steps=2_000, learning_rate=rate, final_learning_rate=3e-6, shape="linear"
            ),
            mesh=mesh,
            accumulation=accumulation,
        )
    )
