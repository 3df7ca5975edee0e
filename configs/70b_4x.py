"""Llama 2 70B to 4x: 20,250 steps of 1,024 x 4,096 tokens (85B).

Command   python -m dmc_jax.train --config=configs/70b_4x.py --config.init_from=DIR
Hardware  256 H100 80 GB, mesh fsdp 256, three quarters of their memory.
Time      about 4.2 days at 40 % of peak: an estimate by the FLOP count, not a measurement.
Expected  The paper reports that grouped-query attention (8x on its own) and DMC compose.
"""

from dmc_jax.config import load_config


def get_config():
    """The run."""
    return load_config("paper:70b,ratio=4")
