"""Without a GPU, tests that are parametrised by `implementation` run GPU kernels interpreted.

With one, they run on it.
"""

import importlib

import jax
import pytest

from pallas_kernels import target
from pallas_kernels.decode_attention import api
from tests.pallas_kernels import interpreted

LAUNCH = {"triton": interpreted.launch_triton, "pallas_gpu": interpreted.launch_pallas}


@pytest.fixture
def exact_products():
    """A GPU truncates float32 in matrix products, unless it is told not to."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def interpreted_without_a_gpu(request, monkeypatch):
    """Does nothing for other tests."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    name = parameters.get("implementation")
    if name not in LAUNCH:
        return
    if jax.default_backend() == "gpu":
        reason = api.unavailable(name)
        if reason is not None:
            pytest.skip(f"{name}: {reason}")
        return
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module(f"pallas_kernels.decode_attention.{name}")
    monkeypatch.setattr(target, "current", lambda: interpreted.GPU)
    monkeypatch.setattr(module, "unavailable", lambda: None)
    monkeypatch.setattr(module, "launch", LAUNCH[name])
