"""How the kernel of attention over pages is cut up; `tuning` keeps what was fastest on a device."""

import dataclasses

from pallas_kernels import tuning


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the kernel is built. Powers of two but for the stages.

    Attributes:
        queries: a block: tokens times the query heads of a KV head.
        slots: a block.
        warps: per program.
        stages: of Triton's software pipeline. Page ids are loaded first and keys and values by
            them, so that a block is on its way for (stages - 1) / 2 turns of the loop.
    """

    queries: int
    slots: int
    warps: int
    stages: int


# For checking rather than for speed.
FLOAT32 = Settings(queries=32, slots=32, warps=4, stages=3)


# What tuning chooses from: none spills registers for H = 128 on a Hopper GPU.
CANDIDATES = tuple(
    Settings(*values)
    for values in ((64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 5), (128, 128, 8, 3))
)


def settings_for(device_kind: str) -> Settings:
    """Read the settings of a device, or the default ones.

    Args:
        device_kind: as JAX names the device.
    """
    return Settings(**tuning.entry("prefill_attention", device_kind))
