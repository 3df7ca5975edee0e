"""Whether a program that a model wrote comes to its end: run in a process that may do little.

It has so many seconds and bytes, and no environment, input, file to write or process to start; no
network either where the system lets one cut that off (Linux, by unshare), and root's rights are
given up first. This stops mistakes. Code that means harm can still read what its user can, and lie
about its own tests: run models that nobody trusts in a container.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dmc_jax.errors import UserError

SECONDS = 5  # of CPU time; a problem of a benchmark takes a fraction of one
MEMORY = 2**30

_WALL = 4  # seconds of time for each of CPU time: the machine may be busy
_PROGRAM = Path(__file__).with_name("limited_process.py")
_NO_NETWORK = ("unshare --net --", "unshare --user --net --")  # as root, and as anyone

# What must hold before anything else is run.
_PROBE = """
import os, sys
assert set(os.environ) <= {"LC_CTYPE"}, os.environ  # which Python itself may set
assert os.listdir() == [] and sys.stdin.read() == "" and os.geteuid() != 0
try:
    os.fork()
except OSError:
    pass
else:
    os._exit(1)
"""


def verdict(program: str, *, seconds: int = SECONDS, memory: int = MEMORY) -> str:
    """Run a Python program, which sees the standard library alone.

    Args:
        program: its text.
        seconds: of CPU time.
        memory: bytes of address space.

    Returns:
        "passed" if it came to its end; "timed out"; or "failed", as when it raises, exits by
        itself, or asks for what it may not have.

    Raises:
        UserError: nothing can be run under limits here.
    """
    return _run(program, isolation(), seconds, memory)[0]


@functools.cache
def isolation() -> tuple[str, ...]:
    """Find what cuts a process off the network.

    Returns:
        The beginning of a command; empty where the system does not let one.

    Raises:
        UserError: limits do not hold on this machine.
    """
    for text in (*_NO_NETWORK, ""):
        command = text.split()
        if command:
            where = shutil.which(command[0])
            if where is None:
                continue
            command[0] = where
        found, said = _run(_PROBE, command, SECONDS, MEMORY, stderr=subprocess.PIPE)
        if found == "passed":
            return tuple(command)
    last = (said.strip().splitlines() or [found])[-1]
    raise UserError(
        "code that a model wrote is only run under limits, which do not hold on this machine "
        f"({last}): use Linux, as a user who may start processes"
    )


def _run(
    program: str, prefix: Sequence[str], seconds: int, memory: int, stderr: int = subprocess.DEVNULL
) -> tuple[str, str]:
    """Find the verdict, and what the program wrote to `stderr` where that is a pipe."""
    word = secrets.token_hex(16)
    reader, writer = os.pipe()
    limits = map(str, (writer, seconds, memory))
    with open(reader, "rb", buffering=0) as pipe, tempfile.TemporaryDirectory() as folder:
        os.set_blocking(reader, False)
        os.chmod(folder, 0o755)  # whoever runs there may look
        with open(writer, "wb"):
            process = subprocess.Popen(
                [*prefix, sys.executable, "-I", "-S", "-B", str(_PROGRAM), *limits],
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[writer],
                start_new_session=True,
            )
        said = b""
        try:
            text = f"{word}\n{program}".encode(errors="replace")
            _, said = process.communicate(text, _WALL * seconds)
        except subprocess.TimeoutExpired:
            return "timed out", ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode == -signal.SIGXCPU:
            return "timed out", ""
        came = pipe.read(len(word) + 1) == word.encode()
        return "passed" if came else "failed", (said or b"").decode(errors="replace")
