"""Llama 2 7B to 8x: 44,250 steps of 1,024 x 4,096 tokens (186B).

Command   python -m dmc_jax.train --config=configs/7b_8x.py --config.init_from=DIR
Hardware  64 H100 80 GB, mesh fsdp 64, three quarters of their memory.
Time      about 3.6 days at 40 % of peak: an estimate by the FLOP count, not a measurement.
Expected  NVIDIA's Llama-2-7B-DMC-8x card: MMLU 5-shot 46.7 -> 41.8, GSM8K 5-shot 11.9 -> 9.7,
HellaSwag 10-shot 78.8 -> 78.2, PIQA 0-shot 78.2 -> 79.8.
"""

from dmc_jax.config import load_config


def get_config():
    """The run."""
    return load_config("paper:7b,ratio=8")
