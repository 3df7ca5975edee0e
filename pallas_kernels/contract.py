"""What all kernels ask of their arguments: axes that agree, and dtypes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def check_axes(arrays: Mapping[str, tuple[Any, str]]) -> dict[str, int]:
    """Hold arrays against their axis letters.

    Args:
        arrays: by name, each with its axes, such as "B T K H".

    Returns:
        The size of every axis.

    Raises:
        ValueError: too many or too few axes, one of another size than in an array before, an empty
            one.
    """
    sizes: dict[str, tuple[str, int]] = {}  # axis -> who said so first, and what
    for name, (array, axes) in arrays.items():
        shape = tuple(array.shape)
        if len(shape) != len(axes.split()):
            raise ValueError(f"{name} must be [{axes}], got shape {shape}")
        for axis, size in zip(axes.split(), shape, strict=True):
            first, expected = sizes.setdefault(axis, (name, size))
            if size != expected:
                raise ValueError(
                    f"{name} must be [{axes}] with {axis} = {expected} as in {first},"
                    f" got shape {shape}"
                )
            if size == 0:
                raise ValueError(f"{name} is empty: {axis} = 0 in shape {shape}")
    return {axis: size for axis, (_, size) in sizes.items()}


def check_dtypes(arrays: Mapping[str, Any], *allowed: Any) -> None:
    """Refuse arrays of other dtypes.

    Raises:
        ValueError: one is.
    """
    dtypes: Sequence[jnp.dtype] = tuple(map(jnp.dtype, allowed))
    for name, array in arrays.items():
        if array.dtype not in dtypes:
            names = " or ".join(dtype.name for dtype in dtypes)
            raise ValueError(f"{name} must be {names}, got {array.dtype}")


def check_pools(k_pages: Any, v_pages: Any, k_scale: Any, v_scale: Any) -> tuple[Any, Any] | None:
    """Refuse pools of unequal or other dtypes, int8 without scales, and scales of anything else.

    Returns:
        (k_scale, v_scale), or None.

    Raises:
        ValueError: they are refused.
    """
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(f"k_pages is {k_pages.dtype} but v_pages {v_pages.dtype}: must be equal")
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    given = [scale is not None for scale in scales.values()]
    if given != [k_pages.dtype == jnp.int8] * 2:
        raise ValueError(
            "k_scale and v_scale go with pages of int8, and with no others, and k_pages is "
            f"{k_pages.dtype}"
        )
    if not all(given):
        check_dtypes({"k_pages": k_pages}, *FLOATS)
        return None
    check_axes({"k_pages": (k_pages, "P page H")} | {n: (x, "P page") for n, x in scales.items()})
    check_dtypes(scales, *FLOATS)
    return k_scale, v_scale


def check_groups(sizes: Mapping[str, int]) -> None:
    """Refuse N query heads that K KV heads cannot share evenly.

    Raises:
        ValueError: they cannot.
    """
    N, K = sizes["N"], sizes["K"]
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} KV heads: {N} % {K} != 0")
