"""Calling Triton kernels from JAX: compiled by jax-triton, called through XLA's FFI.

jax-triton's own call is of XLA's legacy kind, which never becomes part of a command buffer (a CUDA
graph): a decoding step would fall apart into as many graphs as it has kernels of ours. The handler
that is called here comes with JAX's CUDA plugin and can be captured.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels import target

_HANDLER = "triton_kernel_call_ffi"
_ALIGNED = 16  # bytes, as XLA's allocator aligns every array


def unavailable() -> str | None:
    """Say why this cannot run here; None where it can."""
    device = target.current()
    if device.platform != "gpu" or device.capability is None:
        return f"it needs an NVIDIA GPU, and JAX runs on {device.kind!r} ({device.platform}) here"
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return f"jax_triton cannot be imported: {error}"
    return None


def launch(
    kernel: Callable,
    *inputs: Array,
    out: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    capability: int,
    in_place: Mapping[int, int] | None = None,
    **constants: Any,
) -> tuple[Array, ...]:
    """Call a Triton kernel that takes its inputs, then its outputs, then constants.

    The kernel is compiled while the call is traced.

    Args:
        kernel: decorated with `triton.jit`.
        *inputs: arrays.
        out: of the outputs.
        grid: programs, up to three numbers.
        num_warps: per program.
        num_stages: of the software pipeline.
        capability: to compile for, 90 for compute capability 9.0.
        in_place: input -> output that is the same memory, both counted from 0. The kernel gets the
            pointer twice. XLA makes a copy first where the input is used again.
        **constants: the kernel's `constexpr` arguments.
    """
    # Here, not above: without a GPU build of JAX these imports fail.
    from jax_triton import triton_lib
    from jaxlib import gpu_triton

    arrays = [jax.core.ShapedArray(x.shape, x.dtype) for x in (*inputs, *out)]
    compiled, _ = triton_lib.get_or_create_triton_kernel(
        triton_lib.get_cuda_backend,
        "cuda",
        kernel,
        [triton_lib.get_triton_type(x) for x in arrays],
        [],
        num_warps=num_warps,
        num_stages=num_stages,
        num_ctas=1,
        compute_capability=capability,
        enable_fp_fusion=True,
        metaparams=constants,
        dump=False,
    )
    call = gpu_triton.TritonKernelCall(
        compiled,
        *(*grid, 1, 1)[:3],
        [gpu_triton.create_array_parameter(0, _ALIGNED) for _ in arrays],
    )
    return jax.ffi.ffi_call(
        _HANDLER, out, input_output_aliases=dict(in_place) if in_place else None
    )(*inputs, opaque=zlib.compress(call.to_proto(kernel.__name__, b"")))
