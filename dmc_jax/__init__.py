"""Dynamic Memory Compression for Llama in JAX: `import dmc_jax as dmc`.

A name below is looked up when it is first used, so that importing the package loads no JAX.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

# The public face: where each name is defined, and as what. `__init__.pyi` says it to type checkers.
_DEFINED = {
    "Engine": ("dmc_jax.inference.engine", "Engine"),
    "RunConfig": ("dmc_jax.config", "RunConfig"),
    "SamplingParams": ("dmc_jax.inference.sampling", "SamplingParams"),
    "evaluate": ("dmc_jax.evaluation.perplexity", "evaluate"),
    "load": ("dmc_jax.checkpoints.models", "open_model"),
    "train": ("dmc_jax.training.loop", "train"),
}

__all__ = ["__version__", *_DEFINED]


def __getattr__(name: str):
    if name not in _DEFINED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _DEFINED[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """Keeps `train` and `evaluate` what they are, although commands lie in modules of these names.

    Python makes a module that it has imported an attribute of its package: not in place of a name
    of the public face. `importlib.import_module("dmc_jax.train")` gives the command.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _DEFINED and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
