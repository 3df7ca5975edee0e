"""All commands under one name: `dmc COMMAND --flag=value` is `python -m dmc_jax.COMMAND ...`.

Each says more with --help.
"""

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

# In the order in which a newcomer meets them.
COMMANDS = (
    "prepare_data",
    "plan",
    "train",
    "evaluate",
    "decode",
    "chat",
    "serve",
    "arena",
    "convert",
    "search_kv_heads",
)


def main() -> int:
    """Run the command that the command line names, or list them all.

    Returns:
        The exit code where no command has ended the process with its own.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        lines = (f"  {command:<17}{_summary(command)}" for command in COMMANDS)
        print(__doc__, *lines, sep="\n")
        return 0
    if name not in COMMANDS:
        expected = ", ".join(COMMANDS)
        print(f"error: there is no command {name!r}; expected one of {expected}", file=sys.stderr)
        return 2
    del sys.argv[1]
    runpy.run_module(f"dmc_jax.{name}", run_name="__main__", alter_sys=True)
    return 0


def _summary(command: str) -> str:
    """What the module says of itself, up to how to call it; read, since importing it takes long."""
    source = Path(importlib.util.find_spec(f"dmc_jax.{command}").origin).read_text()
    return ast.get_docstring(ast.parse(source)).split(":")[0]


if __name__ == "__main__":
    sys.exit(main())
