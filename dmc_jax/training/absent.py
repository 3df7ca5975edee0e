"""A training step compiled for GPUs that are not here: what XLA would take of each of them.

JAX's CUDA plugin compiles for devices that are only described to it, and needs neither CUDA nor a
GPU: XLA's real passes and schedule, without autotuning. Fake CPU devices mislead: another compiler
holds other things, and knows no reduce-scatter.
"""

import collections
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from dmc_jax.config import RunConfig
from dmc_jax.model.sharding import AXES, make_mesh
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import abstract_batch, abstract_state
from dmc_jax.training.step import make_train_step

KIND = "NVIDIA H100 80GB HBM3"
_CORES = 132
_A_HOST = 8  # GPUs

# As XLA describes an H100 to itself. The versions decide what it captures in graphs.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_MOVES = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


class Compiled(NamedTuple):
    """What a program takes of each device, in bytes."""

    arguments: int
    temporaries: int
    moved: dict[str, int]  # what a device receives in a step, by kind of collective


def prepare() -> str | None:
    """Make the plugin importable, in a process that has not used JAX yet.

    `make cuda-plugin` lays it beside the environment: wherever JAX finds it on its own, it tells
    on every start that there is no GPU.

    Returns:
        Why nothing can be compiled here; None where it can.
    """
    os.environ |= {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no CUDA
        "TRITON_DEFAULT_FP_FUSION": "1",  # or Triton 3.9 warns that 3.10 changes it
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    jax.config.update("jax_platforms", "cpu")  # a GPU that is here is left to others
    beside = Path(sys.prefix) / "cuda-plugin"
    if beside.is_dir() and str(beside) not in sys.path:
        sys.path.append(str(beside))
    there = importlib.util.find_spec("jax_plugins") is not None
    found = [name for name in _PLUGINS if there and importlib.util.find_spec(name) is not None]
    if not found:
        return "JAX's CUDA plugin is not there; `make cuda-plugin` installs it"
    package = f"jax-{found[0].removeprefix('jax_plugins.xla_')}-plugin"
    version = importlib.metadata.version(package)
    if version != jax.__version__:
        return f"{package} is {version}, jax {jax.__version__}; `make cuda-plugin` installs its own"
    import jaxlib.gpu_triton

    if not hasattr(jaxlib.gpu_triton, "TritonKernelCall"):  # it looked before the plugin was there
        importlib.reload(jaxlib.gpu_triton)
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:  # a step without the kernels would be another
        return f"jax_triton cannot be imported: {error}"
    return None


def compile_step(run: RunConfig, stage: str, memory: int) -> Compiled:
    """Compile the step of a stage for as many H100 as the run's mesh has devices.

    Args:
        run: the configuration; every axis of its mesh is a number of devices.
        stage: one of its stages that are steps of the whole model.
        memory: bytes of a device, by which XLA's passes go.

    Raises:
        RuntimeError: what `prepare` says.
    """
    from jax.experimental import topologies

    sizes = tuple(getattr(run.mesh, axis) for axis in AXES)
    devices = math.prod(sizes)
    hosts = f"1x{devices // _A_HOST}x{_A_HOST}" if devices % _A_HOST == 0 else f"1x1x{devices}"
    described = re.sub(r"(device_memory_size:) \d+", rf"\1 {memory}", H100)
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=described, topology=hosts
    )
    mesh = make_mesh(run.mesh, list(topology.devices))
    device = AbstractDevice(device_kind=KIND, num_cores=_CORES, platform="gpu")
    # Kernels are built for the device of the abstract mesh; automatic, as the mesh of training is.
    types = (AxisType.Auto,) * len(AXES)
    optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
    with use_abstract_mesh(AbstractMesh(sizes, AXES, axis_types=types, abstract_device=device)):
        step = make_train_step(run, stage, mesh, optimizer)
        state = abstract_state(run.model, optimizer, mesh)
        batch = abstract_batch(run.data.batch, run.data.length, mesh)
        compiled = step.lower(state, batch, None).compile()
    found = compiled.memory_analysis()
    given = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Compiled(given, found.temp_size_in_bytes, bytes_moved(compiled.as_text()))


def bytes_moved(program: str) -> dict[str, int]:
    """Count what each device receives when a compiled program runs, loops as often as they run.

    All-reduces count twice, as a ring does them: a reduce-scatter and an all-gather.

    Args:
        program: optimised HLO, as text.

    Returns:
        Bytes by kind of collective; a gather counts what it adds to the device's own part.

    Raises:
        ValueError: a collective in a loop of which XLA does not know how often it runs.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[2]
            entry = name if found[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    moved: collections.Counter[str] = collections.Counter()

    def walk(name: str, times: int | None) -> None:
        for line in bodies.get(name, ()):
            if found := _MOVES.search(line):
                if times is None:
                    raise ValueError(f"{found[2]} in a loop that runs nobody knows how often")
                moved[found[2]] += times * _received(*found.groups())
            if body := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                walk(body[1], times * int(trips[1]) if trips and times is not None else None)
            elif re.search(r" (call|conditional|async-start)\(", line):
                for called in re.findall(r"(?:to_apply|calls|computation)=%?([\w.\-]+)", line):
                    walk(called, times)

    walk(entry, 1)
    return dict(moved)


def _received(result: str, kind: str, started: str | None) -> int:
    arrays = [
        _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, sizes.split(","))))
        for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    ]
    if kind == "all-reduce":
        return 2 * sum(arrays)
    if not started:
        return sum(arrays)
    if kind == "collective-permute":
        return arrays[0]
    # A started one has its operands beside its results.
    half = len(arrays) // 2
    return abs(sum(arrays[:half]) - sum(arrays[half:]))
