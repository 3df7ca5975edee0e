"""What a GPU is told to do with a 7B model, by XLA's real compiler for it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def on_an_absent_gpu(folder, program, *, layers, ratio, size):
    there = importlib.util.find_spec
    if there("jax_plugins") is None or there("jax_plugins.xla_cuda12") is None:
        pytest.skip("JAX's CUDA plugin is not there; `make test-all` installs it")
    command = [sys.executable, "-m", "tests.pallas_kernels.absent_gpu"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [*command, program, *map(str, (layers, ratio, size)), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("layers, ratio, batch", [(2, 1, 8), (2, 8, 64), (32, 8, 272)])
def a_step_is_one_graph_and_computes_every_product_once_test(tmp_path, layers, ratio, batch):
    found = on_an_absent_gpu(tmp_path, "read_tokens", layers=layers, ratio=ratio, size=batch)
    assert (found["graphs"], found["outside_of_graphs"]) == (1, 0)
    # Queries, keys and values are one product; gates and what they let through are another.
    assert found["products"] == 4 * layers + 1
    # Attention takes two kernels, the update of the cache one; the plan of all layers is one.
    assert found["own_kernels"] == 3 * layers + 1
    # XLA's own are the norms, the sums of the residual stream and what is between gate and up; one
    # of those outside of layers says how many pages a sequence had before its prompt was cut.
    assert found["launches"] <= 12 * layers + 32
    assert found["large_copies"] == 0
    assert found["temporary_bytes"] < 0.5e9


@pytest.mark.slow
@pytest.mark.parametrize("ratio, tokens", [(1, 512), (8, 512)])
def a_layer_reads_a_prompt_without_asking_the_host_test(tmp_path, ratio, tokens):
    found = on_an_absent_gpu(tmp_path, "_run_layer", layers=1, ratio=ratio, size=tokens)
    assert found["loops"] == 0
    assert found["own_kernels"] == 1
    assert found["large_copies"] == 0
