"""A folder that is whole under its name, or not there at all."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def appears_when_complete(output: Path) -> Iterator[Path]:
    """Give a hidden sibling of `output` that takes its name on success and else disappears.

    Args:
        output: the folder to make; an empty one may be there.

    Raises:
        OSError: it cannot be made, or something has been put there meanwhile.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    # The name tells whose it is, so that what a killed process left can be cleared away.
    prefix = f".{output.name}.partial-{socket.gethostname()}-"
    for left in output.parent.iterdir():
        owner = left.name.removeprefix(prefix)
        if left.name.startswith(prefix) and owner.isdecimal() and not _is_running(int(owner)):
            shutil.rmtree(left)
    folder = output.with_name(f"{prefix}{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
