"""How the kernel of the cache update is cut up, and where it is faster than XLA's form."""

import dataclasses

from pallas_kernels import tuning


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the kernel is built. Powers of two.

    Attributes:
        entries: of the ring in a tile; a longer ring takes several, one after another.
        tile_per_warp: elements. With 2048, up to W = 16 and H = 128 a row is one warp's, whose
            threads have 16 bytes of channels each: four, or of a ring in bfloat16 eight.
    """

    entries: int
    tile_per_warp: int


# On every device: of this kernel only whether to take it is tuned, by `benchmarks.cache_update`.
SETTINGS = Settings(entries=16, tile_per_warp=2048)


def fastest_form(device_kind: str) -> str:
    """Read which form was the fastest on a device: "xla", or the name of an implementation.

    Args:
        device_kind: as JAX names the device.
    """
    return tuning.entry("cache_update", device_kind)
