"""Llama 3.1 8B to 4x: 20,250 steps of 1,024 x 4,096 tokens (85B).

Command   python -m dmc_jax.train --config=configs/llama3_8b_4x.py --config.init_from=DIR
Hardware  64 H100 80 GB, mesh fsdp 64, three quarters of their memory.
Time      about 46 hours at 40 % of peak: an estimate by the FLOP count, not a measurement.
Expected  None: the paper retrofits Llama 2. Rate and schedule are those of the 7B.
"""

from dmc_jax.config import load_config


def get_config():
    """The run."""
    return load_config("paper:llama3_8b,ratio=4")
