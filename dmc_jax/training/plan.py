"""What a run would take of machines that are not here: memory, traffic, time, money.

Two forms of the bytes of a step: `absent.compile_step` asks XLA; `estimate` is arithmetic, fitted
to what XLA said of Llama 2 7B, 13B and 70B and Llama 3.1 8B on meshes of 8 to 256 H100, and tested
against it. The estimate finds a mesh and an accumulation that fit; XLA, where it can be asked, has
the last word.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dmc_jax.config import GATED, MERGING, MeshConfig, RunConfig
from dmc_jax.errors import UserError
from dmc_jax.model.llama import abstract_params
from dmc_jax.model.sharding import AXES, leaf_path, mesh_sizes
from dmc_jax.training import absent
from dmc_jax.training.checks import check_mesh
from dmc_jax.training.flops import model_flops, step_flops
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import abstract_state

_SECONDS_A_DAY = 86_400
_MOST_TENSOR = 8  # devices of a host, beyond which activations would cross the network

# Passes over a layer's matrix for which it is gathered: forward, again, and backward; what comes
# after `down` is never needed again.
_GATHERS = 3
_GATHERS_OF_DOWN = 2
# Passes of activations over `tensor` in a layer.
_SCATTERED, _GATHERED = 5, 9

# Fitted, bytes where a number takes 2: of each parameter of a layer, gathered; and of each token,
# for every channel of its width, of its queries, and, where tokens merge, of its keys.
_OF_LAYER, _OF_WIDTH, _OF_QUERIES, _OF_KEYS = 5.0, 24.0, 24.0, 30.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """What there is, and what it costs."""

    gpus: int
    memory: int  # bytes of a device, as JAX sees them
    fraction: float = 0.75  # of them that JAX takes: XLA_PYTHON_CLIENT_MEM_FRACTION
    peak: float = 989.4e12  # FLOP/s of a device in bfloat16
    mfu: float = 0.4  # share of it that goes into the model
    price: float = 2.5  # dollars for a device and hour

    def __post_init__(self):
        for name, holds, expected in (
            ("gpus", self.gpus >= 1, "1 or more"),
            ("memory", self.memory >= 1, "a size such as 79GiB"),
            ("memory_fraction", 0 < self.fraction <= 1, "a share above 0, 1 at most"),
            ("tflops", 0 < self.peak < math.inf, "TFLOP/s of a device"),
            ("mfu", 0 < self.mfu <= 1, "a share above 0, 1 at most"),
            ("price", 0 <= self.price < math.inf, "dollars for a device and hour"),
        ):
            if not holds:
                raise UserError(f"--{name}: expected {expected}")


class Need(NamedTuple):
    """Bytes that the step takes of each device."""

    parameters: int
    optimizer: int
    gradients: int  # summed over the parts of a batch, in float32
    temporaries: int  # all else
    moved: dict[str, int]  # that a device receives in a step, by kind of collective

    @property
    def total(self) -> int:
        """All that must be held at a time."""
        return self.parameters + self.optimizer + self.gradients + self.temporaries


def plan(
    run: RunConfig, machine: Machine, mesh: MeshConfig | None = None, *, compiled: bool = False
) -> dict[str, Any]:
    """Say whether a run fits, what would, and what it takes.

    Args:
        run: the configuration.
        machine: to run on.
        mesh: to use; None: the config's.
        compiled: whether to ask XLA, which `absent.prepare` allowed; else by arithmetic.

    Returns:
        Plain values, as the command writes them: `asked`, the run with the accumulation that it
        has; `fitting`, the mesh and the accumulation that fit with the least traffic, None where
        nothing does; tokens, time and money.

    Raises:
        UserError: `mesh` is no mesh of so many devices, or does not divide a parameter; the run
            has stages that this knows nothing of.
    """
    stage, limit = neediest_stage(run), int(machine.fraction * machine.memory)
    need = functools.partial(by_compiler, memory=machine.memory) if compiled else estimate
    try:
        asked = on_mesh(run, mesh or run.mesh, machine.gpus)
        asked = _told(asked, need(asked, stage), limit)
    except UserError as fault:
        if mesh is not None:
            raise
        asked = {"fits": False, "refused": str(fault)}
    candidates = () if asked["fits"] else fitting_runs(run, stage, machine.gpus, limit)
    others = (_told(candidate, need(candidate, stage), limit) for candidate in candidates)
    fitting = asked if asked["fits"] else next((one for one in others if one["fits"]), None)
    return {
        "name": run.name,
        "gpus": machine.gpus,
        "memory_bytes": machine.memory,
        "memory_fraction": machine.fraction,
        "stage": stage,
        "by": f"XLA for {absent.KIND}, jax {jax.__version__}" if compiled else "arithmetic",
        "asked": asked,
        "fitting": fitting,
        **costs(run, stage, machine),
    }


def _told(run: RunConfig, found: Need, limit: int) -> dict[str, Any]:
    """What a run on a mesh needs, as plain values."""
    return {
        "mesh": {axis: getattr(run.mesh, axis) for axis in AXES},
        "accumulation": run.accumulation,
        "bytes": {name: getattr(found, name) for name in (*Need._fields[:-1], "total")},
        "fits": found.total <= limit,
        "bytes_received_a_step": found.moved,
    }


def neediest_stage(run: RunConfig) -> str:
    """Name the stage whose step takes most: one that merges, where there is one.

    Raises:
        UserError: stages of gates, or a teacher, which this knows nothing of.
    """
    if run.stage_names[0] in GATED:
        raise UserError(f"plan knows stages that train the whole model, not {run.stages}")
    if run.compression.distillation:
        raise UserError(
            "plan knows nothing of what a teacher takes: --config.compression.distillation=0"
        )
    return next((stage for stage in run.stage_names if stage in MERGING), run.stage_names[0])


def on_mesh(run: RunConfig, mesh: MeshConfig, gpus: int) -> RunConfig:
    """Put a run on a mesh of so many devices, all of whose axes become numbers.

    Raises:
        UserError: the mesh has another number of devices, or does not divide parameters or windows.
    """
    run = dataclasses.replace(run, mesh=MeshConfig(*mesh_sizes(mesh, gpus)))
    check_mesh(run, _abstract(run))
    return run


def fitting_runs(run: RunConfig, stage: str, gpus: int, limit: int) -> Iterator[RunConfig]:
    """Yield the run on meshes and with accumulations that fit by arithmetic, the best first.

    `fsdp` alone moves the least as long as every device has a window; parts of a batch cost a
    gathering of all parameters each, so the fewest that fit. `tensor` comes where that is not
    enough.

    Args:
        run: the configuration.
        stage: whose step must fit.
        gpus: how many there are.
        limit: bytes of each.
    """
    for tensor in (n for n in (1, 2, 4, 8) if gpus % n == 0 and n <= _MOST_TENSOR):
        mesh = MeshConfig(data=1, fsdp=gpus // tensor, tensor=tensor)
        for accumulation in (2**n for n in range(run.data.batch.bit_length())):
            try:
                parted = dataclasses.replace(run, accumulation=accumulation)
                candidate = on_mesh(parted, mesh, gpus)
            except UserError:
                continue
            if estimate(candidate, stage).total <= limit:
                yield candidate


def by_compiler(run: RunConfig, stage: str, *, memory: int) -> Need:
    """Ask XLA what a step takes of each device."""
    parameters, optimizer, gradients = held(run)
    found = absent.compile_step(run, stage, memory)
    # The arguments are parameters, optimizer state and, of a few MB, the batch.
    others = found.arguments - parameters - optimizer + found.temporaries - gradients
    return Need(parameters, optimizer, gradients, others, found.moved)


def held(run: RunConfig) -> tuple[int, int, int]:
    """Count the bytes of parameters, optimizer state and gradients on each device, exactly."""
    optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
    state = abstract_state(run.model, optimizer, _abstract(run))

    def count(tree):
        leaves = jax.tree.leaves(tree)
        shards = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        return sum(n * leaf.dtype.itemsize for n, leaf in zip(shards, leaves, strict=True))

    return count(state.params), count(state.optimizer), count(state.params)


def estimate(run: RunConfig, stage: str) -> Need:
    """Work out what a step takes of each device, without a compiler.

    Raises:
        UserError: the run does not compute whole layers again, which is all that this knows.
    """
    if run.remat != "full":
        raise UserError(
            f"without JAX's CUDA plugin (`make cuda-plugin`) plan knows remat=full alone, not "
            f"{run.remat}"
        )
    parameters, optimizer, gradients = held(run)
    c, width = run.model, jnp.dtype(run.compute_dtype).itemsize
    tensor, shares = run.mesh.tensor, run.mesh.data * run.mesh.fsdp
    tokens = run.data.batch // run.accumulation // shares * run.data.length
    layer = _largest_layer(run) / tensor
    queries = c.heads * c.head_dim / tensor
    keys = max(c.kv_heads_by_layer) * c.head_dim
    keys /= tensor if max(c.kv_heads_by_layer) % tensor == 0 else 1
    numbers = _OF_LAYER * layer + tokens * (_OF_WIDTH * c.width + _OF_QUERIES * queries)
    numbers += tokens * _OF_KEYS * keys * (stage in MERGING)
    split = tensor if c.width % tensor == 0 else 1
    kept = tokens * c.layers * c.width / split * width  # what enters each layer
    once_more = gradients if run.accumulation > 1 else 0  # of the newest part, to be added
    temporaries = once_more + int(kept + numbers * width / 2)
    return Need(parameters, optimizer, gradients, temporaries, _traffic(run, tokens, gradients))


def _traffic(run: RunConfig, tokens: int, gradients: int) -> dict[str, int]:
    """What a device receives in a step, by kind; tokens are those of a part on a device."""
    width = jnp.dtype(run.compute_dtype).itemsize
    data, fsdp, tensor = (getattr(run.mesh, axis) for axis in AXES)
    gathered = summed = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(run.model)):
        path = leaf_path(path)
        if leaf.ndim < 2 or path.endswith("scale"):
            continue
        others = leaf.size / tensor * (fsdp - 1) / fsdp  # that lie on other devices
        times = _GATHERS_OF_DOWN if path.endswith("down/kernel") else _GATHERS
        gathered += others * (4 if path == "embedding" else times * width)
        summed += others * 4
    stream = run.model.layers * tokens * run.model.width * width * (tensor - 1) / tensor
    moved = {
        "all-gather": gathered + _GATHERED * stream,
        "reduce-scatter": summed + _SCATTERED * stream,
        "all-reduce": 2 * gradients * (data > 1),
    }
    times = {"all-reduce": 1 if run.draws > 2 else run.accumulation}
    return {kind: int(times.get(kind, run.accumulation) * n) for kind, n in moved.items() if n}


def _largest_layer(run: RunConfig) -> float:
    """Parameters of one layer of the stack with the largest."""
    params = abstract_params(run.model)
    stacks = (stack for name, stack in params.items() if name.startswith("run_"))
    return max(sum(x.size / x.shape[0] for x in jax.tree.leaves(stack)) for stack in stacks)


def costs(run: RunConfig, stage: str, machine: Machine) -> dict[str, Any]:
    """Count work, time and money of a run's stages, by the FLOPs of the model and the stated MFU.

    Args:
        run: the configuration.
        stage: whose step is compared with a dense one.
        machine: its rates.
    """
    steps = sum(run.stage(name).steps for name in run.stage_names)
    tokens = steps * run.data.batch * run.data.length
    needed = model_flops(run.model, run.data.length)
    rate = machine.gpus * machine.peak * machine.mfu / needed
    days = tokens / rate / _SECONDS_A_DAY
    # Without a kernel's calls in it, whose products cannot be seen.
    seen = dataclasses.replace(run, attention="xla", pretrain=run.stage(stage))
    of_step = step_flops(seen, stage)
    return {
        "steps": steps,
        "tokens": tokens,
        "model_flops_a_token": needed,
        "flops_a_step": of_step,
        "flops_of_dmc_over_dense": of_step / step_flops(seen, "pretrain"),
        "mfu": machine.mfu,
        "tokens_a_second": rate,
        "days": days,
        "dollars_a_gpu_hour": machine.price,
        "dollars": days * 24 * machine.gpus * machine.price,
    }


def _abstract(run: RunConfig) -> AbstractMesh:
    return AbstractMesh(tuple(getattr(run.mesh, axis) for axis in AXES), AXES)
