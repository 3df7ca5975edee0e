"""Several runs of a door for one import of it, which takes longer than most of them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Each run is a fork, so a process with its own flags and exit code. JAX starts its threads, which a
# fork would miss, with its first array; those of NumPy sleep.
_FORKS = """
import importlib, json, os, sys, warnings
from dmc_jax import commands

door, outputs, runs = importlib.import_module(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
codes = []
for number, arguments in enumerate(runs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        for stream in (1, 2):
            file = os.open(f"{outputs}/{number}.{stream}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream)
        sys.argv = [door.__file__, *arguments]
        commands.run(door.main)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def runs_of(
    door: str, *runs: list, folder: Path = ROOT, warnings: str = "error"
) -> list[subprocess.CompletedProcess]:
    """Runs `python -m dmc_jax.DOOR` once for each list of arguments, one after another.

    Args:
        door: name of the command.
        runs: command lines.
        folder: that the commands run in.
        warnings: what Python does with them.
    """
    arguments = [[str(argument) for argument in run] for run in runs]
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, "-W", warnings, "-c", _FORKS]
        done = subprocess.run(
            [*command, f"dmc_jax.{door}", outputs, json.dumps(arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            check=True,
        )
        return [
            subprocess.CompletedProcess(
                run, code, *(Path(outputs, f"{number}.{stream}").read_text() for stream in (1, 2))
            )
            for number, (run, code) in enumerate(
                zip(arguments, json.loads(done.stdout), strict=True)
            )
        ]
