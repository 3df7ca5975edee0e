"""Several processes that train one run, and all of them end: none outlives its time."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from dmc_jax.config import to_dict

ROOT = Path(__file__).parents[1]
SECONDS = 600  # that any of them may take


@dataclasses.dataclass
class Process:
    """One of them, and the file that it writes to."""

    popen: subprocess.Popen
    said: Path
    until: float

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        try:
            code = self.popen.wait(max(0.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"it did not end: {self.said.read_text()}") from None
        return code, self.said.read_text()

    def errors(self) -> list[str]:
        """The lines of its mistakes and failures."""
        lines = self.said.read_text().splitlines()
        return [line for line in lines if line.startswith("error: ")]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("", 0))
        return place.getsockname()[1]


@contextlib.contextmanager
def started(run, folder, count=2, devices=2, flags=(), environment=None, program=None):
    """Starts `python -m dmc_jax.train` for a run, or a program in its place, `count` times.

    Args:
        run: its RunConfig, or one for each.
        folder: for what they say; made if missing.
        count: of processes; 1 is not told of any others.
        devices: of each.
        flags: for each; beside those with which they find each other.
        environment: more variables, by process; then they are given no such flags.
        program: Python code.
    """
    folder.mkdir(exist_ok=True)
    coordinator = f"127.0.0.1:{free_port()}"
    variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, *(["-c", program] if program else ["-m", "dmc_jax.train"])]
    runs = run if isinstance(run, list) else [run] * count
    processes = []
    try:
        for number, each in enumerate(runs):
            config = folder / f"{number}.json"
            config.write_text(json.dumps(to_dict(each)))
            told = ["--peer_timeout=10", "--start_timeout=60", f"--config={config}", *flags]
            if count > 1 and environment is None:
                told += [f"--coordinator={coordinator}", f"--processes={count}"]
                told += [f"--process={number}"]
            said = folder / f"{number}.txt"
            with said.open("w") as output:
                popen = subprocess.Popen(
                    [*command, *told],
                    cwd=folder,
                    env=variables | (environment[number] if environment else {}),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            processes.append(Process(popen, said, time.monotonic() + SECONDS))
        yield processes
    finally:
        for process in processes:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()


def trained(run, folder, **how) -> list[str]:
    """Trains a run to its end; gives what the processes said."""
    with started(run, folder, **how) as processes:
        ends = [process.end() for process in processes]
    assert [code for code, _ in ends] == [0] * len(ends), ends
    return [said for _, said in ends]


def wait_for(condition, processes, seconds=SECONDS):
    """Waits for something that living processes do."""
    until = time.monotonic() + seconds
    while not condition():
        dead = [
            process.said.read_text() for process in processes if process.popen.poll() is not None
        ]
        assert not dead and time.monotonic() < until, dead
        time.sleep(0.01)
