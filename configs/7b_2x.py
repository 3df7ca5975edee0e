"""Llama 2 7B to 2x: 8,250 steps of 1,024 x 4,096 tokens (35B).

Command   python -m dmc_jax.train --config=configs/7b_2x.py --config.init_from=DIR
Hardware  64 H100 80 GB, mesh fsdp 64, three quarters of their memory.
Time      about 16 hours at 40 % of peak: an estimate by the FLOP count, not a measurement.
Expected  The paper reports quality kept at 2x.
"""

from dmc_jax.config import load_config


def get_config():
    """The run."""
    return load_config("paper:7b,ratio=2")
