"""Settings of the GPU kernels: how many slots at a time, how many warps, how far ahead to load.

`tuned/<device>.json` keeps what was fastest on a device, `tuned/default.json` what to take on a
device without such a file; both say where each entry comes from. To make an entry, time every
candidate on that device (see `fastest`) and `save` the winner. Here are the candidates of decode
attention; other kernels keep theirs beside them.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

_FOLDER = Path(__file__).parent / "tuned"

Candidate = TypeVar("Candidate")

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
            itemsize: bytes of an element of the pool.
        """
        return min(max(self.block_bytes // (width * itemsize), _LEAST_BLOCK), _MOST_BLOCK)


# What tuning chooses from. All keep at least 64 KiB per multiprocessor on their way on a GPU with
# 228 KiB of shared memory: 4.8 TB/s times a latency of a microsecond is 36 KiB for each of 132.
CANDIDATES = tuple(
    Settings(*values)
    for values in (
        (16384, 4, 5, 2),
        (16384, 4, 5, 3),
        (16384, 4, 7, 2),
        (16384, 8, 5, 2),
        (8192, 4, 5, 4),
        (8192, 4, 7, 4),
        (8192, 2, 5, 4),
    )
)


def settings_for(implementation: str, device_kind: str) -> Settings:
    """Reads the settings of decode attention on a device, or the default ones.

    Args:
        implementation: "triton" or "pallas_gpu".
        device_kind: as JAX names the device.
    """
    return Settings(**entry(implementation, device_kind))


def entry(name: str, device_kind: str) -> Any:
    """Reads what is kept under a name for a device, or else for any.

    Args:
        name: of an entry of `tuned/default.json`.
        device_kind: as JAX names the device.
    """
    return (_read(_FOLDER / "default.json") | _read(file_of(device_kind)))[name]


def file_of(device_kind: str) -> Path:
    """The file with the settings measured on a device; it need not exist."""
    return _FOLDER / f"{re.sub('[^A-Za-z0-9]+', '_', device_kind).strip('_').lower()}.json"


def fastest(
    time: Callable[[Candidate], Iterable[float]], candidates: Iterable[Candidate] = CANDIDATES
) -> Candidate:
    """Picks the setting with the least product of its times.

    The product, not the sum: so a workload counts as much as another that takes ten times longer.

    Args:
        time: runs the kernel with a setting on every workload that matters, in the same order, and
            returns seconds each, greater than 0.
        candidates: to choose from; of equals the first is taken.
    """
    return min(candidates, key=lambda settings: sum(math.log(t) for t in time(settings)))


def save(device_kind: str, source: str, chosen: Mapping[str, Any]) -> Path:
    """Writes entries of a device's file, for this process too; its other entries stay.

    Args:
        device_kind: as JAX names the device.
        source: how they were found: what was timed, when, with which versions.
        chosen: dataclasses, or what JSON can hold, by name.

    Returns:
        The file.
    """
    file = file_of(device_kind)
    content = dict(_read(file))
    content["source"] = content.get("source", {}) | dict.fromkeys(chosen, source)
    for name, value in chosen.items():
        content[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    file.write_text(json.dumps(content, indent=2) + "\n")
    _read.cache_clear()
    return file


@functools.cache
def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}
