"""The arena on SmolLM2 135M, with the gates that come along.

Command   python -m dmc_jax.arena --config=configs/arena_smollm2.py
Takes     the folders smollm2, data/code and data/english that configs/smollm2_gates.py names
Hardware  any; some hours on two CPU cores, most of them for TOVA and H2O, which read token by token
"""

from dmc_jax.config import to_config_dict
from dmc_jax.evaluation.arena_config import ArenaConfig, TextConfig


def get_config():
    """The contests."""
    return to_config_dict(
        ArenaConfig(
            name="arena_smollm2",
            checkpoint="smollm2",
            gates=("smollm2_135m_dms", "smollm2_135m_dmc_delay16"),
            kv_dtypes=("float32", "int8"),
            text=TextConfig(data="data/code,data/english"),
        )
    )
