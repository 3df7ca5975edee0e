"""How the kernel of attention over pages is cut up."""

import dataclasses


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


# On every device.
SETTINGS = Settings(queries=64, slots=64, warps=4, stages=3)

# For checking rather than for speed.
FLOAT32 = Settings(queries=32, slots=32, warps=4, stages=3)
