"""Who runs a kernel: by name, or what suits the machine; a name never falls back to another.

An implementation is a module in the folder of its kernel that has a function of the kernel's name.
One that needs a certain machine also has `unavailable`, which says why it cannot run on the present
one.
"""

import dataclasses
import importlib
from collections.abc import Iterable
from types import ModuleType

from pallas_kernels import target

# What XLA makes of plain JAX, which runs everywhere. Where the folder has no such module, that form
# is the caller's own and is not repeated here.
XLA = "xla"


@dataclasses.dataclass(frozen=True)
class Implementations:
    """Those of one kernel.

    Attributes:
        kernel: its function and its folder.
        names: modules of the folder.
    """

    kernel: str
    names: tuple[str, ...]

    def unavailable(self, name: str) -> str | None:
        """Say why an implementation cannot run on this machine; None where it can.

        Args:
            name: in `names`.
        """
        try:
            module = self._module(name)
        except ImportError as error:
            return f"its module cannot be imported: {error}"
        return module.unavailable() if hasattr(module, "unavailable") else None

    def load(self, name: str) -> ModuleType:
        """Import an implementation that can run here.

        Raises:
            ValueError: a name that is not in `names`.
            RuntimeError: it cannot run on this machine, and why.
        """
        if name not in self.names:
            raise ValueError(
                f"no implementation {name!r} of {self.kernel}; there is {', '.join(self.names)}"
            )
        reason = self.unavailable(name)
        if reason is not None:
            raise RuntimeError(
                f"implementation {name!r} of {self.kernel} cannot run here: {reason};"
                f" take {XLA!r}, or leave the choice open"
            )
        return self._module(name)

    def choose(self, name: str | None, *, on_gpu: Iterable[str]) -> str:
        """Name who runs the kernel: what was asked for, else what is best here.

        Args:
            name: `XLA`, one of `names`, or None: on a GPU the first of `on_gpu` that can run there,
                elsewhere and otherwise `XLA`. The machine is `target.current()`.
            on_gpu: names, the best first.

        Raises:
            ValueError, RuntimeError: as `load`.
        """
        if name is None:
            wanted = on_gpu if target.current().platform == "gpu" else ()
            return next((x for x in wanted if x == XLA or self.unavailable(x) is None), XLA)
        if name != XLA:
            self.load(name)
        return name

    def _module(self, name: str) -> ModuleType:
        # When it is used, not before: what one needs may be missing for others.
        return importlib.import_module(f"pallas_kernels.{self.kernel}.{name}")
