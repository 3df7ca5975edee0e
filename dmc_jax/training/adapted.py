"""What is trained of a model beside its gates: nothing, factors of low rank, or everything."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmc_jax.config import GatesConfig

_ADAPTED = ("q", "k", "v", "o")  # projections of attention


def begin(gates: GatesConfig, params: Any, key: Array) -> Any:
    """Begin where the model is.

    Args:
        gates: `model` says what is trained, `rank` of what rank factors are.
        params: of the model, as `init_params` gives them.
        key: of the first factors.

    Returns:
        None for a frozen model; for "lora" two factors of every projection of attention, of all
        layers of a stack, as LoRA has them (Hu et al. 2021, arXiv 2106.09685): the first is drawn,
        the second 0; for "all" the parameters in float32.
    """
    if gates.model == "frozen":
        return None
    if gates.model == "all":
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)  # steps donate theirs
    factors: dict[str, Any] = {}
    for stack in sorted(name for name in params if name.startswith("run_")):
        for name in _ADAPTED:
            L, rows, columns = _matrices(name, params[stack][name]["kernel"]).shape
            key, drawn = jax.random.split(key)
            first = jax.random.normal(drawn, (L, rows, gates.rank)) * rows**-0.5
            second = jnp.zeros((L, gates.rank, columns))
            factors.setdefault(stack, {})[name] = {"first": first, "second": second}
    return factors


def adapt(gates: GatesConfig, params: Any, trained: Any) -> Any:
    """Make the model's parameters of those that it had and what was trained of it.

    Args:
        gates: as for `begin`.
        params: of the model as it was.
        trained: as `begin` gave it, some steps later.

    Returns:
        Parameters of the same structure; a projection with factors is its kernel and their product.
    """
    if gates.model == "frozen":
        return params
    if gates.model == "all":
        return trained
    adapted = dict(params)
    for stack, projections in trained.items():
        adapted[stack] = dict(params[stack])
        for name, factors in projections.items():
            kernel = params[stack][name]["kernel"]
            change = jnp.einsum("LIr,LrO->LIO", factors["first"], factors["second"])
            adapted[stack][name] = {"kernel": kernel + change.reshape(kernel.shape)}
    return adapted


def _matrices(name: str, kernel: Array) -> Array:
    """View the kernels of a stack as matrices [L, in, out]: o has two axes in, the others out."""
    rows = kernel.shape[1] * kernel.shape[2] if name == "o" else kernel.shape[1]
    return kernel.reshape(kernel.shape[0], rows, -1)
