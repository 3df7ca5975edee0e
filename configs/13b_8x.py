"""Llama 2 13B to 8x: 44,250 steps of 1,024 x 4,096 tokens (186B).

Command   python -m dmc_jax.train --config=configs/13b_8x.py --config.init_from=DIR
Hardware  64 H100 80 GB, mesh fsdp 64, three quarters of their memory.
Time      about 7 days at 40 % of peak: an estimate by the FLOP count, not a measurement.
Expected  None published with figures at hand.
"""

from dmc_jax.config import load_config


def get_config():
    """The run."""
    return load_config("paper:13b,ratio=8")
