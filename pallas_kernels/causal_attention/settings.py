"""How the kernels of causal attention are cut up; `tuning` keeps what was fastest on a device."""

import dataclasses
from collections.abc import Mapping

from pallas_kernels import tuning


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one kernel is built.

    Attributes:
        queries: a block; a power of two, and a multiple of the other or a divisor of it.
        keys: a block.
        warps: per program.
        stages: of Triton's software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """The blocks of all kernels.

    Attributes:
        forward: `triton.attend`; queries a multiple of keys.
        key_gradients: `triton.key_gradients`; keys a multiple of queries.
        query_gradients: `triton.query_gradients`; queries a multiple of keys.
    """

    forward: Blocks
    key_gradients: Blocks
    query_gradients: Blocks


# For checking rather than for speed, so not tuned.
FLOAT32 = Settings(
    forward=Blocks(32, 32, 4, 2),
    key_gradients=Blocks(16, 32, 8, 2),
    query_gradients=Blocks(32, 16, 8, 2),
)

# What tuning chooses from, for each kernel: none spills registers for H = 128 on a Hopper GPU.
CANDIDATES: Mapping[str, tuple[Blocks, ...]] = {
    kernel: tuple(Blocks(*values) for values in candidates)
    for kernel, candidates in {
        "forward": (
            (128, 64, 8, 3),
            (128, 64, 8, 2),
            (64, 64, 4, 3),
            (64, 64, 4, 2),
            (64, 32, 4, 4),
        ),
        "key_gradients": ((32, 128, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 3)),
        "query_gradients": ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)),
    }.items()
}


def settings_for(device_kind: str) -> Settings:
    """Read the settings of a device, or the default ones.

    Args:
        device_kind: as JAX names the device.
    """
    return from_json(tuning.entry("causal_attention", device_kind))


def from_json(content: Mapping[str, Mapping[str, int]]) -> Settings:
    """Read settings as `tuning` keeps them."""
    return Settings(**{kernel: Blocks(**blocks) for kernel, blocks in content.items()})
