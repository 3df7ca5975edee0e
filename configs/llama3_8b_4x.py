"""Llama 3.1 8B to 4x: 20,250 steps of 1,024 x 4,096 tokens (85B).

Command   python -m dmc_jax.train --config=configs/llama3_8b_4x.py --config.init_from=DIR
Hardware  64 H100 80 GB, mesh fsdp 64 x tensor 1.
Time      about 45 hours at 40 % of peak: an estimate by the FLOP count, not a measurement.
Expected  None: the paper retrofits Llama 2. Rate and schedule are those of the 7B.
"""

from configs.common import retrofit
from dmc_jax.config import MeshConfig


def get_config():
    """The run."""
    return retrofit(
        "llama3_8b",
        ratio=4.0,
        rate=3e-05,
        mesh=MeshConfig(data=-1, fsdp=64, tensor=1),
        accumulation=8,
        data="data/llama3",
    )
