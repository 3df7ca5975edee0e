"""What figures were measured on."""

import os
import platform
import re

import jax


def machine(command: str) -> dict:
    """What figures were measured on, for the JSON files that hold them.

    Args:
        command: what was typed. Of a path that begins at the root only the name is kept: the rest
            says where things lie here.
    """
    command = re.sub(r"(?<![^\s=,:])/(?:[^\s=,:/]+/)*([^\s=,:/]+)/?", r"\1", command)
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "command": command,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
