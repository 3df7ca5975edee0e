"""Which files hold text: told by their names, found through links, each file once."""

import os
from collections.abc import Iterator
from pathlib import Path

FORMATS = (".txt", ".jsonl", ".ndjson", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KINDS = f"{', '.join(FORMATS)} (the first three also with {', '.join(COMPRESSIONS)})"


def name_parts(name: str) -> tuple[str, str]:
    """Tell a file's format and compression from its name, in small or capital letters.

    Args:
        name: such as "a/b.JSONL.gz".

    Returns:
        One of `FORMATS` and one of `COMPRESSIONS`, such as (".jsonl", ".gz"); "" where the name
        ends in none of them.
    """
    lower = name.lower()
    compression = next((end for end in COMPRESSIONS if lower.endswith(end)), "")
    lower = lower.removesuffix(compression)
    form = next((end for end in FORMATS if lower.endswith(end)), "")
    # Parquet compresses inside; a compressed one could not be read in parts.
    return ("", "") if form == ".parquet" and compression else (form, compression)


def find_files(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """List the files of a folder that hold text, in an order that is the same everywhere.

    Links are followed (the hub's caches consist of them), but every file and folder is entered
    once, so that links in a circle end and no text counts double.

    Args:
        root: the folder.

    Returns:
        Names of files relative to `root`, with "/"; and what was left out, with the reason.

    Raises:
        OSError: a folder cannot be read.
    """
    found: list[str] = []
    left_out: list[tuple[str, str]] = []
    seen = {os.path.realpath(root)}

    def enter(path: Path) -> bool:
        name, real = path.relative_to(root).as_posix(), os.path.realpath(path)
        if Path(os.path.realpath(path.parent)).is_relative_to(real):
            left_out.append((name, "a link to a folder that holds it"))
        elif real in seen:
            left_out.append((name, "the same as another one here"))
        else:
            seen.add(real)
            return True
        return False

    for folder, folders, files in walk(root, follow_links=True):
        folders[:] = [name for name in sorted(folders) if enter(folder / name)]
        for file in sorted(files):
            path = folder / file
            if reason := why_unread(path):
                left_out.append((path.relative_to(root).as_posix(), reason))
            elif enter(path):
                found.append(path.relative_to(root).as_posix())
    return found, left_out


def why_unread(path: Path) -> str:
    """Say why a file is not read; "" where it is."""
    if not name_parts(path.name)[0]:
        return f"{path.suffix or 'a name without a suffix'} is not read"
    if not path.exists():
        return "a link to nothing"
    return "" if path.is_file() else "not a regular file"


def walk(root: Path, follow_links: bool = False) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a folder as `os.walk` does, but raise OSError at a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would otherwise pass over it in silence

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=follow_links):
        yield Path(folder), folders, files
