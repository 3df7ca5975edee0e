"""What was fastest on a device: the entries of `tuned/<device>.json`.

`tuned/default.json` says what to take on a device without such a file; both say where each entry
comes from. To make an entry, time every candidate on that device (see `fastest`) and `save` the
winner. What an entry means, and the candidates, stand in the `settings` of its kernel.
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


def entry(name: str, device_kind: str) -> Any:
    """Read what is kept under a name for a device, or else for any.

    Args:
        name: of an entry of `tuned/default.json`.
        device_kind: as JAX names the device.
    """
    return (_read(_FOLDER / "default.json") | _read(file_of(device_kind)))[name]


def file_of(device_kind: str) -> Path:
    """The file with the settings measured on a device; it need not exist."""
    return _FOLDER / f"{re.sub('[^A-Za-z0-9]+', '_', device_kind).strip('_').lower()}.json"


def fastest(
    time: Callable[[Candidate], Iterable[float]], candidates: Iterable[Candidate]
) -> Candidate:
    """Pick the setting with the least product of its times.

    The product, not the sum: so a workload counts as much as another that takes ten times longer.

    Args:
        time: runs the kernel with a setting on every workload that matters, in the same order, and
            returns seconds each, greater than 0.
        candidates: to choose from; of equals the first is taken.
    """
    return min(candidates, key=lambda settings: sum(math.log(t) for t in time(settings)))


def save(device_kind: str, source: str, chosen: Mapping[str, Any]) -> Path:
    """Write entries of a device's file, for this process too; its other entries stay.

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
