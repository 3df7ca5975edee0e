"""Who runs a kernel: what is chosen, what is refused, for all kernels alike."""

import types

import jax
import pytest

from pallas_kernels import target
from pallas_kernels.cache_update import api as cache_update
from pallas_kernels.causal_attention import api as causal_attention
from pallas_kernels.decode_attention import api as decode_attention
from pallas_kernels.implementations import Implementations
from pallas_kernels.prefill_attention import api as prefill_attention
from tests.pallas_kernels import interpreted

every_kernel = pytest.mark.parametrize(
    "api",
    [decode_attention, causal_attention, cache_update, prefill_attention],
    ids=lambda api: api.IMPLEMENTATIONS.kernel,
)
without_a_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A GPU on which every implementation can run, until `unavailable` says otherwise."""
    module = types.ModuleType("any")
    module.unavailable = lambda: None
    monkeypatch.setattr(target, "current", lambda: interpreted.GPU)
    monkeypatch.setattr(Implementations, "_module", lambda self, name: module)
    return module


@every_kernel
def every_name_is_a_module_with_the_function_of_the_kernel_test(api):
    pytest.importorskip("triton", reason="triton is not installed")
    implementations = api.IMPLEMENTATIONS
    for name in implementations.names:
        assert callable(getattr(implementations._module(name), implementations.kernel))


@without_a_gpu
@every_kernel
def without_a_gpu_xla_is_chosen_test(api):
    assert api.choose(None) == "xla"


@every_kernel
def a_name_is_never_replaced_by_another_test(api, on_a_gpu):
    for name in (*api.IMPLEMENTATIONS.names, "xla"):
        assert api.choose(name) == name
    on_a_gpu.unavailable = lambda: "it is gone"
    kernel = api.IMPLEMENTATIONS.kernel
    with pytest.raises(
        RuntimeError, match=f"'triton' of {kernel} cannot run here: it is gone; take 'xla', or"
    ):
        api.choose("triton")


@every_kernel
@pytest.mark.parametrize("name", ["XLA", "pallas", ""])
def an_unknown_name_is_refused_and_the_known_are_listed_test(api, name):
    with pytest.raises(ValueError, match=f"'{name}' of .*; there is reference, .*triton"):
        api.choose(name)


@every_kernel
def what_cannot_be_imported_cannot_run_and_says_why_test(api, monkeypatch):
    def missing(self, name):
        raise ImportError("no such library")

    monkeypatch.setattr(target, "current", lambda: interpreted.GPU)
    monkeypatch.setattr(Implementations, "_module", missing)
    assert api.unavailable("triton") == "its module cannot be imported: no such library"
    assert api.choose(None) == "xla"
