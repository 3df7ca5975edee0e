"""Compiles what the engine runs of a 7B model for an H100 that is not there; prints what came out.

JAX's CUDA plugin compiles for a GPU that is described to it, without autotuning. XLA writes down
what it will launch: its thunks. Run by `gpu_program_test`, in a process of its own, since XLA reads
its flags once.
"""

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

_LARGE = 2**20  # numbers
_SEATS = 64  # of the cache that a prompt is read into


def main(program: str, layers: int, ratio: int, size: int, folder: Path) -> None:
    """Print, as JSON, how many of what a program launches.

    Args:
        program: "read_tokens", a decoding step of `size` sequences; or "_run_layer", a layer that
            reads `size` tokens of a prompt.
        layers: of the model.
        ratio: tokens a slot.
        size: of the batch or the chunk.
        folder: for what XLA writes.
    """
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no CUDA
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # or Triton 3.9 warns that 3.10 changes it
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from benchmarks.end_to_end_step import Run, Setup, random_params, step_shapes
    from dmc_jax.inference.layers import _run_layer
    from dmc_jax.inference.prefill import attend_chunk
    from dmc_jax.inference.programs import read_tokens
    from dmc_jax.model.presets import PRESETS
    from dmc_jax.training.absent import H100, KIND
    from tests.pallas_kernels.lowered import on

    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=H100, topology="1x1x1"
    )
    there = SingleDeviceSharding(topology.devices[0])
    config = dataclasses.replace(PRESETS["7b"], layers=layers)
    setup = Setup(config, jax.eval_shape(random_params, config), page=16, steps=16, rate=1.0)

    def put(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)

    def shape(*sizes, dtype="int32"):
        return put(jax.ShapeDtypeStruct(sizes, dtype))

    batch = size if program == "read_tokens" else _SEATS
    with on(KIND):
        arguments, options, _ = step_shapes(setup, Run(1024, 2048, ratio, batch, None))
        params, config, cache, *others = arguments
        policy = put(options["policy"])
        if program == "read_tokens":
            lowered = read_tokens.lower(
                put(params), config, *map(put, (cache, *others)), **options | {"policy": policy}
            )
        else:
            x = shape(1, size, config.width, dtype="bfloat16")
            lowered = _run_layer.lower(
                *(put(params["layer_0"]), None, shape(), x, put(cache)),
                {"policy": policy, "counts": shape(1), "seats": shape(1)},
                config=config,
                kv_heads=config.kv_heads_by_layer[0],
                make_attend=attend_chunk,
            )
        compiled = lowered.compile()
    (thunks,) = folder.glob(f"*{program}*thunk_sequence_after_thunk_passes.txt")
    lines = thunks.read_text().splitlines()
    kinds = [found[1] for line in lines if (found := re.search(r"\d+: (k\w+)", line))]
    text = compiled.as_text()
    print(
        json.dumps(
            {
                "graphs": kinds.count("kCommandBuffer"),
                "outside_of_graphs": sum(line[:1].isdigit() for line in lines) - 1,
                "launches": len(kinds) - kinds.count("kCommandBuffer"),
                "loops": kinds.count("kWhile") + kinds.count("kConditional"),
                "own_kernels": text.count('custom_call_target="triton_kernel_call_ffi"'),
                "products": sum("gemm" in line or "Gemm" in line for line in lines),
                "large_copies": sum(
                    math.prod(map(int, sizes.split(","))) >= _LARGE
                    for sizes in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
                ),
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
