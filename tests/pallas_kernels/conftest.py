"""Tests that are parametrised by an implementation run kernels on their device, where it is here.

Elsewhere they run them interpreted.
"""

import jax
import pytest

from tests.pallas_kernels import interpreted

# What a test calls the parameter that names an implementation.
KERNELS = {"implementation": "decode_attention", "update": "cache_update"}


@pytest.fixture
def exact_products():
    """A GPU truncates float32 in matrix products, unless it is told not to."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True)
def interpreted_without_the_device(request, monkeypatch):
    """Does nothing for other tests."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    for parameter, kernel in KERNELS.items():
        if parameters.get(parameter) == "triton":
            interpreted.let_run(kernel, parameters[parameter], monkeypatch)
    if parameters.get("implementation") != "tpu":
        yield
        return
    with interpreted.on_a_tpu(monkeypatch):
        yield
