"""A file or a folder that is whole under its name, or not there at all: the one writer of such."""

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: no mistake of the user's


def user_cache(name: str) -> Path:
    """Name this package's folder for something in the user's cache; it may not exist.

    That is `$XDG_CACHE_HOME/dmc_jax/NAME`, or in ~/.cache.

    Raises:
        RuntimeError: the user has no home.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return cache.expanduser() / "dmc_jax" / name


@contextlib.contextmanager
def appears_when_complete(output: str | os.PathLike) -> Iterator[Path]:
    """Give a hidden path beside `output`; the file or folder made there takes that name on success.

    Otherwise it disappears, and what had the name before still has it.

    Args:
        output: the file or folder to make. A file of that name is replaced, a folder only if empty;
            a link stays and what it leads to is made.

    Raises:
        OSError: it cannot be made (which is known at once for a mount point and a folder that has
            something in it), or something has been put there meanwhile.
    """
    output = Path(os.path.realpath(output))
    if os.path.ismount(output):
        raise OSError(f"{output} is a mount point, which cannot be replaced: name a folder in it")
    if output.is_dir() and any(output.iterdir()):
        raise OSError(f"{output} has something in it: name another folder, or empty this one")
    output.parent.mkdir(parents=True, exist_ok=True)
    # The name tells whose it is, so that what a killed process left can be cleared away.
    prefix = f".{output.name}.partial-{socket.gethostname()}-"
    for left in output.parent.iterdir():
        owner = left.name.removeprefix(prefix)
        if left.name.startswith(prefix) and owner.isdecimal() and not _is_running(int(owner)):
            _remove(left)
    partial = output.with_name(f"{prefix}{os.getpid()}")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # a crash must not leave the name without the bytes
        os.replace(partial, output)
    except BaseException:
        with contextlib.suppress(OSError):  # which would hide the reason
            _remove(partial)
        raise


def write_text(output: str | os.PathLike, text: str) -> None:
    """Write a text file that is whole or as it was before.

    Args:
        output: the file.
        text: all of it.

    Raises:
        OSError: it cannot be written.
    """
    with appears_when_complete(output) as partial:
        partial.write_text(text, encoding="utf-8")


def lfs_pointer(head: bytes) -> str | None:
    """Say what is wrong with a file that is a Git LFS pointer; None where it is none.

    A clone without Git LFS holds such a text of three lines in place of a large file.

    Args:
        head: the file's first bytes, 200 or more where it has them.

    Returns:
        A phrase to follow the file's name.
    """
    if not head.startswith(b"version https://git-lfs"):
        return None
    size = re.search(rb"^size (\d{1,18})$", head, re.MULTILINE)
    whole = f", which has {int(size[1]):,} bytes" if size else ""
    return (
        "is a Git LFS pointer (it begins with 'version https://git-lfs'), not the file that it "
        f"stands for{whole}: fetch that with `git lfs pull` in its folder"
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
