"""Cost of converting: `python -m benchmarks.convert` writes benchmarks/convert_cpu.json.

A model of the shape of Llama 3.2 1B with random bfloat16 weights goes from a Hugging Face folder to
a checkpoint of ours and back, each with `python -m dmc_jax.convert` in a process of its own. Beside
it stand a plain copy of the same files, and the same commands on a tiny model: what starting the
program alone takes, in seconds and in memory.

Memory is the largest resident set of the process. The project's bound for it is 1.3 times the
largest tensor, one file of the input, and what the program takes without a model.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.evaluation.machine import machine
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.parameters import places
from dmc_jax.interop.source import Source, Tensor

SHARD_BYTES = 10**9

# Llama 3.2 1B, sizes from its published config.json.
ONE_BILLION = ModelConfig(
    vocab_size=128_256,
    width=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    mlp_width=8192,
    rope_theta=500_000.0,
    norm_eps=1e-5,
    max_length=131_072,
    tied_embeddings=True,
    rope_scaling=Llama3Scaling(factor=32.0),
)
TINY = dataclasses.replace(ONE_BILLION, vocab_size=256, width=64, layers=2, heads=1, kv_heads=1)


def random_source(config: ModelConfig) -> Source:
    """A model of random weights, drawn as they are read."""
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, dtype, lambda: rng.standard_normal(shape, np.float32).astype(dtype))

    tensors = {name: tensor(place.foreign_shape) for name, place in places(config).items()}
    return Source("random", Path("random"), config, None, 0.0, tensors, ())


# The kernel keeps the peak of a process's memory across `exec` in what it tells the parent, so the
# process itself says what its own was.
_REPORTING = """
import atexit, re, runpy
def report():
    status = open("/proc/self/status").read()
    print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]), flush=True)
atexit.register(report)
runpy.run_module("dmc_jax.convert", run_name="__main__", alter_sys=True)
"""


def run(*arguments: object) -> tuple[float, int]:
    """Seconds and peak resident bytes of `python -m dmc_jax.convert`."""
    command = [sys.executable, "-c", _REPORTING, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.split()[-1])


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    return time.perf_counter() - start


def measure(config: ModelConfig, folder: Path) -> dict:
    """Both directions for one model."""
    source = random_source(config)
    hf, ours, back = folder / "hf", folder / "ours", folder / "back"
    hf.mkdir(parents=True)
    write_huggingface(source, hf, None, lambda _: None, SHARD_BYTES)
    size = sum(tensor.nbytes for tensor in source.tensors.values())
    largest = max(tensor.nbytes for tensor in source.tensors.values())
    shard = max(file.stat().st_size for file in hf.glob("*.safetensors"))
    os.sync()
    copied = copy(hf, folder / "copy")
    result = {
        "parameters": size // 2,
        "bytes": size,
        "largest_tensor_bytes": largest,
        "largest_shard_bytes": shard,
        "copy": {"seconds": copied, "gb_per_second": size / copied / 1e9},
    }
    for name, arguments in {
        "huggingface_to_dmc_jax": (f"--input={hf}", f"--output={ours}"),
        "dmc_jax_to_huggingface": (f"--input={ours}", f"--output={back}"),
    }.items():
        seconds, peak = run(*arguments)
        result[name] = {
            "seconds": seconds,
            "gb_per_second": size / seconds / 1e9,
            "peak_bytes": peak,
        }
    return result


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where to put 10 GB for a while; default: temporary")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        models = {
            "tiny": measure(TINY, Path(scratch, "tiny")),
            "1b": measure(ONE_BILLION, Path(scratch, "1b")),
        }
    large = models["1b"]
    for name in ("huggingface_to_dmc_jax", "dmc_jax_to_huggingface"):
        alone = models["tiny"][name]["peak_bytes"]
        bound = 1.3 * large["largest_tensor_bytes"] + large["largest_shard_bytes"] + alone
        large[name]["peak_without_program_bytes"] = large[name]["peak_bytes"] - alone
        large[name]["bound_bytes"] = bound
        print(
            f"{name}: {large[name]['seconds']:.1f} s, {large[name]['gb_per_second']:.2f} GB/s "
            f"(copying: {large['copy']['gb_per_second']:.2f}); peak "
            f"{large[name]['peak_bytes'] / 1e6:,.0f} MB, of which the program {alone / 1e6:,.0f}; "
            f"bound {bound / 1e6:,.0f}"
        )
    result = {"machine": machine("python -m benchmarks.convert"), "models": models}
    output = Path(__file__).parent / "convert_cpu.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
