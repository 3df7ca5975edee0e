"""How benchmarks take time on a device, and what they compare it with.

A single call of a kernel takes less time than the host takes to ask for it. So calls are chained:
one compiled program makes many of them, each with the result of the one before as its queries, so
that neither the host nor the compiler can let two overlap or leave one out. The wall time of the
whole program over its calls is the time of a call. Nothing is subtracted: programs are long enough
(`PROGRAM_SECONDS`) for starting one and waiting for it to be lost in them. Whatever the device does
between two kernels is in the figure, as it is between those of a decoding step.

A call of a chain reads other memory than the call before, and comes back to the same one only after
`COLD_BYTES`, which is several times the L2 of any GPU of today. So all is read from memory.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import target, tuning

COLD_BYTES = 2**28
PROGRAM_SECONDS = 0.02
SAMPLES = 5

# The loop around the calls copies the queries once a turn: at least so many calls share that.
_LEAST_CALLS_A_TURN = 4
_MOST_BUFFERS = 32  # every call of a turn is compiled on its own
_LEAST_SECONDS = 5e-6  # that a call is expected to take, however little it reads
_MOST_TURNS = 2000
_COPIES = 20

_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "jax-cuda12-plugin", "jax-cuda13-plugin")


class Timing(NamedTuple):
    """Seconds a call, over several runs of a program; and how many calls that makes."""

    median: float
    least: float
    greatest: float
    calls: int


# ---- time -------------------------------------------------------------------------------------


def buffers_for(call_bytes: int, cold_bytes: int = COLD_BYTES) -> int:
    """Sets of buffers to take turns with, so that none is in a cache when it is read again.

    Args:
        call_bytes: that a call reads.
        cold_bytes: to read before the same again; what takes more than 32 calls is read earlier.
    """
    return max(1, min(-(-cold_bytes // call_bytes), _MOST_BUFFERS))


def time_chain(
    call: Callable[[Any, Any, Any], Any],
    start: Any,
    shared: Any,
    sets: Sequence[Any],
    *,
    expected: float,
) -> tuple[Any, Timing]:
    """Time calls of which each gets the result of the one before.

    Args:
        call: call(x, shared, one of `sets`) gives something of the shape and dtype of x.
        start: the first x.
        shared: arrays that every call gets.
        sets: arrays that calls get in turn: see `buffers_for`.
        expected: seconds that a call may take, which sets how many are made.

    Returns:
        (the result of the first call, the time). The first call is one of those that are timed.
    """
    a_turn = len(sets) * -(-_LEAST_CALLS_A_TURN // len(sets))
    turns = PROGRAM_SECONDS / (a_turn * max(expected, _LEAST_SECONDS))
    # Known when the program is compiled: else the device asks the host after every turn.
    turns = min(max(round(turns), 1), _MOST_TURNS)

    @jax.jit
    def program(x, shared, sets):
        first = call(x, shared, sets[0])

        def turn(_, x):
            for one in itertools.islice(itertools.cycle(sets), a_turn):
                x = call(x, shared, one)
            return x

        return first, jax.lax.fori_loop(0, turns, turn, first)

    arguments = start, shared, list(sets)
    first, _ = jax.block_until_ready(program(*arguments))  # compiles
    calls = 1 + turns * a_turn
    return first, _sampled(lambda: program(*arguments), calls)


def _sampled(run: Callable[[], Any], calls: int) -> Timing:
    seconds = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - start) / calls)
    return Timing(statistics.median(seconds), min(seconds), max(seconds), calls)


# ---- what memory can do -----------------------------------------------------------------------


def copy_rates(size: int = 2**30) -> dict[str, float]:
    """Bytes a second of copying, bytes read plus bytes written.

    Args:
        size: bytes of the buffer, several times the L2.

    Returns:
        "copy": one buffer to another, as often as the host asks for it; "kernel": a kernel that
        inverts a bit of every word, chained.
    """
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    copy = jax.jit(jnp.copy)

    def ask():
        for _ in range(_COPIES):  # the device takes longer than the host, and keeps the order
            result = copy(x)
        return result

    @jax.jit
    def chain(x):
        # One a turn, and none before its turn: several in a row would be made one.
        return jax.lax.fori_loop(0, _COPIES, lambda _, x: jax.lax.optimization_barrier(x ^ 1), x)

    rates = {}
    for name, run in (("copy", ask), ("kernel", lambda: chain(x))):
        jax.block_until_ready(run())  # compiles
        rates[name] = 2 * size / _sampled(run, _COPIES).median
    return rates


# ---- where, and what came of it ---------------------------------------------------------------


def machine(command: str) -> dict[str, Any]:
    """What figures were measured on, for the JSON files that hold them.

    Args:
        command: what was typed.
    """
    device, packages = jax.local_devices()[0], {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    memory = device.memory_stats() or {}
    return {
        "command": command,
        "device": device.device_kind,
        "platform": device.platform,
        "multiprocessors": target.current().cores,
        "memory_for_jax_bytes": memory.get("bytes_limit"),
        "runtime": device.client.platform_version.splitlines()[0],
        "host_cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
    }


def source(command: str) -> str:
    """Say in a line what settings come from: command, device, versions.

    Args:
        command: that timed them.
    """
    packages = machine("")["packages"]
    versions = (f"{name} {version}" for name, version in packages.items() if version)
    return ", ".join((command, target.current().kind, *versions))


def in_a_line(error: Exception) -> str:
    """The beginning of an error, for tables and files."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def result_file(name: str) -> Path:
    """Where figures of this device go: `benchmarks/<device>/NAME` in the current directory."""
    return Path("benchmarks") / tuning.file_of(jax.local_devices()[0].device_kind).stem / name


def write_json(file: Path, content: Any) -> None:
    """Write a file as a whole: whoever is stopped meanwhile leaves the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)
