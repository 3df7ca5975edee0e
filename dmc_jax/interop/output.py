"""A converted checkpoint's folder: whole under its name, or not there at all."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from dmc_jax.commands import stop_requests
from dmc_jax.data.tokenizer import format_of_file
from dmc_jax.errors import UserError
from dmc_jax.files import appears_when_complete

# Beside the weights: tokenizer, configuration, and what file systems add.
_SPARE_BYTES = 50_000_000


@contextlib.contextmanager
def new_folder(output: Path, size: int) -> Iterator[Path]:
    """Give a hidden folder beside `output` that takes its name on success and else disappears.

    Args:
        output: the folder to make; nothing may be there yet.
        size: bytes that will be written.

    Raises:
        UserError: something is there, the folder cannot be made, or the disk has no room for it.
    """
    output = Path(os.path.abspath(output))
    if os.path.lexists(output):
        raise UserError(f"{output} exists: choose another output, or remove it")
    parent = next(folder for folder in output.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < size + _SPARE_BYTES:
        raise UserError(
            f"{output} needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: make "
            "room, or choose an output elsewhere"
        )
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(appears_when_complete(output))
            folder.mkdir()
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from None
        yield folder


def copy_tokenizer(files: tuple[Path, ...], folder: Path) -> str | None:
    """Copy a tokenizer's files.

    Args:
        files: the one to load first; may be empty.
        folder: where to; made if missing.

    Returns:
        The name there of the file to load; None where there is none.

    Raises:
        OSError: they cannot be copied.
    """
    if not files:
        return None
    folder.mkdir(exist_ok=True)
    # Prepared data calls its tokenizer tokenizer.model, whatever the format.
    first = "tokenizer.json" if format_of_file(files[0]) == "json" else "tokenizer.model"
    shutil.copyfile(files[0], folder / first)
    for file in files[1:]:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return first


@contextlib.contextmanager
def progress_of(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a bar in a terminal, and elsewhere a line for every quarter.

    Args:
        what: shown before the bar.
        total: bytes.

    Yields:
        A function to call with the bytes of every step.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came since the last step.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        bar.update(count)
        if bar.disable and 4 * before // max(total, 1) < 4 * done // max(total, 1):
            print(f"{what}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", flush=True)
        if asked:
            raise KeyboardInterrupt

    hidden = not sys.stderr.isatty()
    with (
        # Between two tensors no thread of Orbax or TensorStore is left to write into a folder that
        # is being removed.
        stop_requests("stopping after this tensor") as asked,
        tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=hidden) as bar,
    ):
        yield advance
        if asked:
            raise KeyboardInterrupt
