"""How the kernels of decode attention are cut up; `tuning` keeps what was fastest on a device."""

import dataclasses

from pallas_kernels import tuning

# Slots that a kernel takes at a time: no fewer than a matrix product of tensor cores needs, and no
# more than keep the scores in registers.
_LEAST_BLOCK, _MOST_BLOCK = 16, 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a kernel is built and spread over a device.

    Attributes:
        block_bytes: keys (and as many values) that a program takes at a time.
        warps: per program.
        stages: of Triton's software pipeline. Page ids are loaded first and keys and values by
            them, so that a block is on its way for (stages - 1) / 2 turns of the loop: 5 keeps
            two blocks in shared memory, 7 keeps three.
        programs_per_core: resident on a multiprocessor at a time.
    """

    block_bytes: int
    warps: int
    stages: int
    programs_per_core: int

    def block(self, width: int, itemsize: int) -> int:
        """Slots a block.

        Args:
            width: head width in the kernel, a power of two.
            itemsize: bytes of an element of the pool; one of int8 is two where products take it,
                and registers are what a larger block would lack.
        """
        slots = self.block_bytes // (width * max(itemsize, 2))
        return min(max(slots, _LEAST_BLOCK), _MOST_BLOCK)


# What tuning chooses from. All keep at least 64 KiB per multiprocessor on their way on a GPU with
# 228 KiB of shared memory: 4.8 TB/s times a latency of a microsecond is 36 KiB for each of 132.
CANDIDATES = tuple(
    Settings(*values)
    for values in (
        (16384, 4, 5, 2),
        (16384, 4, 7, 2),
        (16384, 8, 5, 2),
        (8192, 4, 5, 4),
        (8192, 4, 7, 4),
        (8192, 2, 5, 4),
    )
)


def settings_for(device_kind: str) -> Settings:
    """Read the settings of a device, or the default ones.

    Args:
        device_kind: as JAX names the device.
    """
    return Settings(**tuning.entry("decode_attention", device_kind))
