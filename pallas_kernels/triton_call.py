"""Calling Triton kernels from JAX, through jax-triton, which only a JAX with CUDA can import."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels import target


def unavailable() -> str | None:
    """Says why this cannot run here; None where it can."""
    device = target.current()
    if device.platform != "gpu" or device.capability is None:
        return f"it needs an NVIDIA GPU, and JAX runs on {device.kind!r} ({device.platform}) here"
    try:
        import jax_triton
    except ImportError as error:
        return f"jax_triton cannot be imported: {error}"
    # Its rule for unused outputs takes one argument less than jax passes since 0.12.
    if (0, 4) <= jax_triton.__version_info__ < (0, 4, 2) and jax.__version_info__ >= (0, 12):
        return (
            f"jax_triton {jax_triton.__version__} does not work with jax {jax.__version__};"
            " jax-triton 0.3.1 does"
        )
    return None


def unavailable_in_place() -> str | None:
    """Says why kernels that change an array in place cannot run here; None where they can."""
    reason = unavailable()
    if reason is not None:
        return reason
    import jax_triton

    # Since 0.4 a kernel gets no pointer to an output that aliases an input; before, it gets both.
    if jax_triton.__version_info__ >= (0, 4):
        return (
            f"jax_triton {jax_triton.__version__} calls kernels that work in place in another way;"
            " they are written for jax-triton 0.3"
        )
    return None


def launch(
    kernel: Callable,
    *inputs: Array,
    out: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    capability: int | None,
    in_place: Mapping[int, int] | None = None,
    **constants: Any,
) -> tuple[Array, ...]:
    """Calls a Triton kernel that takes its inputs, then its outputs, then constants.

    Args:
        kernel: decorated with `triton.jit`.
        *inputs: arrays.
        out: of the outputs.
        grid: programs.
        num_warps: per program.
        num_stages: of the software pipeline.
        capability: to compile for; None: that of the first GPU.
        in_place: input -> output that is the same memory, both counted from 0. The kernel gets the
            pointer twice. XLA makes a copy first where the input is used again.
        **constants: the kernel's `constexpr` arguments.
    """
    # Here, not above: without a GPU build of JAX the import fails.
    import jax_triton

    # Renamed in 0.4. Nothing else in this call differs, as long as nothing is changed in place.
    renamed = "out_type" in inspect.signature(jax_triton.triton_call).parameters
    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=capability,
        **({"input_output_aliases": dict(in_place)} if in_place else {}),
        **{"out_type" if renamed else "out_shape": out},
        **constants,
    )
