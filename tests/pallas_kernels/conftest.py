"""Without a GPU, tests that are parametrised by an implementation run GPU kernels interpreted.

With one, they run on it.
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
def interpreted_without_a_gpu(request, monkeypatch):
    """Does nothing for other tests."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    for parameter, kernel in KERNELS.items():
        if parameters.get(parameter) == "triton":
            interpreted.let_run(kernel, parameters[parameter], monkeypatch)
