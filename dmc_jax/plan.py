"""Say what a run takes of machines: `python -m dmc_jax.plan --config=7b_8x --gpus=8`.

Bytes of each device, whether they fit, which mesh and accumulation would; what devices send each
other; tokens, days and dollars at a stated utilisation and price; what DMC costs over dense. No GPU
is needed. Where JAX's CUDA plugin is at hand (`make cuda-plugin`), XLA compiles the real step for
as many H100; elsewhere it is arithmetic, within an eighth of that for recipes like those here.

Exit codes: 0 it fits, or something would; 1 nothing does; 2 bad input or flags.
"""

import json
import logging as standard_logging
import re
from typing import Any

from absl import flags

from dmc_jax import commands
from dmc_jax.config import MeshConfig, RunConfig, load_config, named_configs
from dmc_jax.errors import UserError
from dmc_jax.fields import describe_fields, from_dict
from dmc_jax.files import write_text
from dmc_jax.inference.prompts import parse_bytes
from dmc_jax.training import absent
from dmc_jax.training.plan import Machine, plan

_CONFIG = commands.define_config(
    load_config,
    f"Python file with a function get_config(), or a name: {', '.join(named_configs())}. Some take "
    "arguments: paper:7b,ratio=8.",
    describe_fields(RunConfig),
)
_GPUS = flags.DEFINE_integer("gpus", 8, "Devices, in hosts of 8.")
_MEMORY = flags.DEFINE_string(
    "memory", "79.1GiB", "Of a device, as JAX sees it: an H100 of 80 GB has 79.1 GiB."
)
_FRACTION = flags.DEFINE_float(
    "memory_fraction", 0.75, "Of it that JAX takes: XLA_PYTHON_CLIENT_MEM_FRACTION."
)
_MESH = flags.DEFINE_string("mesh", "", "DATAxFSDPxTENSOR, such as 1x8x1; empty: the config's.")
_MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak that goes into the model: a guess.")
_TFLOPS = flags.DEFINE_float("tflops", 989.4, "Peak of a device in bfloat16: of an H100 SXM.")
_PRICE = flags.DEFINE_float("price", 2.5, "Dollars for a device and hour.")
_COMPILE = flags.DEFINE_bool("compile", True, "Ask XLA where it can be asked.")
_OUTPUT = flags.DEFINE(commands.PATH, "output", "", "JSON file to write too.")


def main() -> int:
    """Plan, print, write."""
    standard_logging.getLogger("jax").setLevel("ERROR")  # it tells of a GPU that it lacks
    if _CONFIG.value is None:
        raise UserError("--config is missing: give the path or the name of one, --config=7b_8x")
    reason = absent.prepare() if _COMPILE.value else "--nocompile"
    run = from_dict(RunConfig, _CONFIG.value.to_dict())
    machine = Machine(
        gpus=_GPUS.value,
        memory=parse_bytes(_MEMORY.value),
        fraction=_FRACTION.value,
        peak=_TFLOPS.value * 1e12,
        mfu=_MFU.value,
        price=_PRICE.value,
    )
    found = plan(run, machine, _mesh(_MESH.value), compiled=reason is None)
    if reason is not None and _COMPILE.value:
        commands.show_notes([f"by arithmetic: {reason}"])
    print("\n".join(lines(found)))
    if _OUTPUT.value:
        write_text(_OUTPUT.value, json.dumps(found, indent=1) + "\n")
    return 0 if found["fitting"] else 1


def lines(found: dict[str, Any]) -> list[str]:
    """Say in words what `training.plan.plan` found."""
    limit = found["memory_fraction"] * found["memory_bytes"]
    told = [
        f"{found['name']} on {found['gpus']} GPUs, {_gib(limit)} of each "
        f"({found['memory_fraction']:.0%} of {_gib(found['memory_bytes'])}), by {found['by']}",
        f"as it is: {_told(found['asked'])}",
    ]
    if found["fitting"] is None:
        told.append("nothing fits: take more GPUs, or a larger --memory_fraction")
    elif found["fitting"] is not found["asked"]:
        told.append(f"what fits: {_told(found['fitting'])}")
    if found["fitting"]:
        moved = found["fitting"]["bytes_received_a_step"]
        kinds = ", ".join(f"{kind} {_gib(size)}" for kind, size in moved.items())
        told.append(f"received by each GPU a step: {kinds or 'nothing'}")
    told += [
        f"work: {found['tokens'] / 1e9:.1f} G tokens in {found['steps']:,} steps of "
        f"{found['flops_a_step']:.3g} FLOPs, DMC {found['flops_of_dmc_over_dense']:.3f} of dense",
        f"at {found['mfu']:.0%} of the peak: {found['tokens_a_second']:,.0f} tokens/s, "
        f"{found['days']:.1f} days, ${found['dollars']:,.0f} at "
        f"${found['dollars_a_gpu_hour']:.2f} a GPU and hour",
    ]
    return told


def _told(option: dict[str, Any]) -> str:
    if "refused" in option:
        return f"refused: {option['refused']}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in option["mesh"].items())
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in option["bytes"].items())
    fits = "fits" if option["fits"] else "does not fit"
    return f"mesh {mesh}, accumulation {option['accumulation']}: {parts}: {fits}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _mesh(text: str) -> MeshConfig | None:
    if not text:
        return None
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise UserError(f"--mesh: expected DATAxFSDPxTENSOR, such as 1x8x1, got {text!r}")
    return MeshConfig(*map(int, text.split("x")))


if __name__ == "__main__":
    commands.run(main)
