"""A product of activations and a matrix, with the gradient that training wants of it."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def project(
    equation: str,
    x: Array,
    kernel: Array,
    products: DTypeLike | None = None,
    sums: DTypeLike | None = None,
) -> Array:
    """Compute `einsum(equation, x, kernel)`, in the dtype of `x` where nothing else is asked for.

    Its gradient for the kernel is accumulated and kept in float32, and asked for as
    `x^T dy`: the order that autodiff chooses, `(dy^T x)^T`, costs XLA for CPU a transposed copy.

    Args:
        equation: of two operands, such as "BTD,DF->BTF".
        x: activations.
        kernel: the matrix, of any dtype.
        products: dtype of what is multiplied, here and for the gradients, where it is another than
            that of `x`; sums keep the latter.
        sums: dtype of the result, where it is another than that of `x`.
    """
    x_axes, kernel_axes = equation.split("->")[0].split(",")
    # `einsum` sums over several axes in an order of its own, for which XLA transposes the kernel.
    summed = [axis for axis in x_axes if axis in kernel_axes]
    axes = [x_axes.index(a) for a in summed], [kernel_axes.index(a) for a in summed]
    operands = _narrowed(x, products, x, kernel)
    return jax.lax.dot_general(*operands, (axes, ((), ())), preferred_element_type=sums or x.dtype)


def _narrowed(x, products, *operands):
    return [operand.astype(products or x.dtype) for operand in operands]


def _project_forward(equation, x, kernel, products, sums):
    return project(equation, x, kernel, products, sums), (x, kernel)


def _project_backward(equation, products, sums, residuals, dy):
    x, kernel = residuals
    (x_axes, kernel_axes), y_axes = equation.split("->")[0].split(","), equation.split("->")[1]
    narrow_x, narrow_kernel, dy = _narrowed(x, products, x, kernel, dy)
    dx = jnp.einsum(
        f"{y_axes},{kernel_axes}->{x_axes}", dy, narrow_kernel, preferred_element_type=x.dtype
    )
    dkernel = jnp.einsum(
        f"{x_axes},{y_axes}->{kernel_axes}", narrow_x, dy, preferred_element_type=jnp.float32
    )
    return dx, dkernel.astype(kernel.dtype)


project.defvjp(_project_forward, _project_backward)
