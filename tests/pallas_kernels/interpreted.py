"""Kernels on a machine without their device: interpreted, one program after another.

Triton interprets every kernel of a process in which TRITON_INTERPRET is set; here one kernel at a
time is wrapped instead, so that the same process can also compile it. Triton's interpreter expects
torch tensors, but of what these can do it asks little enough for `_Tensor`.

Pallas interprets TPU kernels itself: with the memories of a TPU, where what nobody wrote is NaN and
what is not there cannot be read, and with copies that come when they are waited for.
"""

import contextlib
import importlib
import threading
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import target
from pallas_kernels.implementations import Implementations

# Few cores, so that programs have several items each, and items several blocks.
GPU = target.Target(platform="gpu", kind="interpreted", cores=2, capability=90)
TPU = target.Target(platform="tpu", kind="interpreted", cores=1, capability=None)

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "int32": "i32", "uint16": "u16", "int8": "i8"}

# Triton's interpreter keeps the index of the program that it is running in a global.
_one_at_a_time = threading.Lock()


def let_run(kernel, name, monkeypatch):
    """Lets a test run an implementation: on a GPU as it is, or it is skipped; else interpreted."""
    if jax.default_backend() == "gpu":
        reason = Implementations(kernel, (name,)).unavailable(name)
        if reason is not None:
            pytest.skip(f"{name}: {reason}")
        return
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module(f"pallas_kernels.{kernel}.{name}")
    monkeypatch.setattr(target, "current", lambda: GPU)
    monkeypatch.setattr(module, "unavailable", lambda: None)
    monkeypatch.setattr(module, "launch", launch_triton)


@contextlib.contextmanager
def on_a_tpu(monkeypatch):
    """Runs kernels for TPUs in this context: on a TPU as they are, else interpreted."""
    if jax.default_backend() == "gpu":
        pytest.skip("kernels for TPUs are interpreted on a CPU")
    if jax.default_backend() == "tpu":
        yield
        return
    monkeypatch.setattr(target, "current", lambda: TPU)
    with pltpu.force_tpu_interpret_mode():
        yield


def launch_triton(
    kernel, *inputs, out, grid, num_warps, num_stages, capability, in_place=None, **constants
):
    """Stands in for `triton_call.launch`, eagerly and under jit."""
    # The interpreter multiplies the bits of bfloat16 matrices as if they were integers.
    if "WIDEN" in constants:
        constants["WIDEN"] = True

    def run(*arrays):
        return _interpret(kernel, arrays, out, grid, in_place or {}, constants)

    return jax.pure_callback(run, out, *inputs)


def _interpret(kernel, inputs, out, grid, in_place, constants):
    """Runs a Triton kernel on NumPy arrays; what it does not write of new ones stays poison."""
    import triton.language as tl
    from triton.runtime import interpreter

    # `tl.max` and `tl.sum` are kernels themselves, and not interpreted ones; `tl.reduce` will be.
    reductions = {
        "max": lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max),
        "sum": lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine),
        "cumsum": lambda x, axis: tl.associative_scan(x, axis, tl.standard._sum_combine),
    }
    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        # The interpreter cuts off the bits that a GPU rounds to nearest even.
        if (source, target) == (tl.float32, tl.bfloat16):
            return x.astype(ml_dtypes.bfloat16).view(np.uint16)
        return convert(x, source, target, mode)

    arrays = [np.array(x, order="C") for x in inputs]
    memory = {output: arrays[input] for input, output in in_place.items()}
    arrays += [memory[i] if i in memory else _poison(x) for i, x in enumerate(out)]
    with (
        _one_at_a_time,
        mock.patch.multiple(tl, **reductions),
        mock.patch.object(interpreter, "_convert_float", rounded),
        # Unlike a GPU, NumPy warns of log2(0), which is minus infinity as it should be.
        np.errstate(all="ignore"),
    ):
        interpreter.InterpretedFunction(kernel.fn)[grid](*map(_Tensor, arrays), **constants)
    return tuple(arrays[len(inputs) :])


def _poison(x):
    nowhere = np.nan if jax.numpy.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min
    return np.full(x.shape, nowhere, x.dtype)


class _Tensor:
    """As much of a torch tensor as the interpreter asks for; all memory is the host's."""

    def __init__(self, array):
        self.array, self.dtype = array, _DTYPES[str(array.dtype)]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, size, device):
        return _Tensor(self.array[:0])

    def set_(self, storage, offset, size, stride):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def copy_(self, other):
        assert other.array is self.array
