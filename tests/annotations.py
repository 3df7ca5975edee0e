"""Runs the product's annotations while it is tested: of arguments and of results."""

import sys
from importlib.machinery import PathFinder

from beartype import BeartypeConf, beartype
from jaxtyping import config, install_import_hook

CHECKED = ("pallas_kernels", "dmc_jax")

# An interpreter of pickles: its functions run once an opcode, and what hostile files give them is
# not what they expect. Checked, their tests take nine times as long.
UNCHECKED = ("dmc_jax.interop.pickles",)

# An int where a float is expected is no mistake (PEP 484).
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def run():
    """Has every function of `CHECKED` that is imported from now on run its annotations."""
    install_import_hook(CHECKED, f"{__name__}.checked")
    sys.meta_path.insert(0, _AsWritten)


class _AsWritten:
    """Finds modules of `UNCHECKED` before the hook does."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name in UNCHECKED else None


def checked(function):
    """Fields of dataclasses are not looked at: JAX puts shapes, axes and anything into pytrees."""
    return function if function.__name__ == "__init__" else _check(function)


def look_away(yes):
    """Whether to let everything pass."""
    config.update("jaxtyping_disable", yes)
