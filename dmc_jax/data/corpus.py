"""Where text comes from: this Python's own library, or files of the user's.

A corpus is a list of files visited in a fixed pseudo-random order (by a hash of each name), so that
any prefix of it is a fair sample; `documents` streams it and never holds more than one file.
"""

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dmc_jax.errors import UserError

SPLITS = ("train", "validation", "test")

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
# Tests repeat themselves; installed packages and build files differ from machine to machine.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    ["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"]
)
_STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Corpus:
    """Files to read, in order.

    Attributes:
        source: what was asked for: an absolute path, or the name and version of the library.
        root: the folder that file names are relative to.
        files: POSIX paths relative to `root`, in the order they are read.
        split_by_document: True for a single file, whose documents are split one by one.
    """

    source: str
    root: Path
    files: tuple[str, ...]
    split_by_document: bool


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: file name relative to the corpus, with `#row` (from 1) in a .jsonl or .parquet file.
        split: "train", "validation" or "test".
        text: the text exactly as found, newlines included; never empty.
    """

    name: str
    split: str
    text: str


def open_corpus(path: str | os.PathLike | None = None) -> Corpus:
    """List a corpus without reading its text.

    Args:
        path: a .txt, .jsonl or .parquet file, or a folder searched for them recursively. None is
            the default corpus: the source and documentation of the running Python's library.

    Returns:
        The corpus, its files in an order that depends on their names alone.

    Raises:
        UserError: the path does not exist, has an unknown suffix, or holds no usable file.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        names = _stdlib_files(root)
        source = f"python-stdlib {platform.python_version()}"
    else:
        given = Path(path).resolve()
        source = str(given)
        if not given.exists():
            raise UserError(f"corpus {path} does not exist: give an existing file or folder")
        root = given if given.is_dir() else given.parent
        names = _user_files(given) if given.is_dir() else [given.name]
    kinds = _STDLIB_SUFFIXES if path is None else _SUFFIXES
    if not names or not all(name.endswith(kinds) for name in names):
        raise UserError(f"corpus {source}: expected {', '.join(kinds)} files and found none")
    names.sort(key=lambda name: (unit_hash("order", name), name))
    return Corpus(
        source, root, tuple(names), split_by_document=root.joinpath(names[0]) == Path(source)
    )


def documents(corpus: Corpus, limit_bytes: float | None = None) -> Iterator[Document]:
    """Stream the documents of a corpus in its fixed order; empty texts are passed over.

    Args:
        corpus: from `open_corpus`.
        limit_bytes: stop before the document that would take the UTF-8 total past this; None reads
            everything.

    Yields:
        Documents with their splits: by file, or by document when the corpus is a single file.

    Raises:
        UserError: a file is binary, not UTF-8, malformed or lacks its text, naming file and row.
    """
    left = float("inf") if limit_bytes is None else limit_bytes
    for file in corpus.files:
        for name, text in _read(corpus.root / file, file):
            left -= len(text.encode())
            if left < 0:
                return
            if text:
                yield Document(name, _split(name if corpus.split_by_document else file), text)


def listing_digest(corpus: Corpus) -> str:
    """Fingerprint the names, sizes and times of a corpus's files, to notice when it has changed.

    Args:
        corpus: from `open_corpus`.

    Returns:
        A hexadecimal SHA-256. Contents are not read.
    """
    digest = hashlib.sha256()
    for file in corpus.files:
        stat = (corpus.root / file).stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def unit_hash(purpose: str, name: str) -> float:
    """Map a name to a number in [0, 1) that looks random but is the same everywhere.

    Args:
        purpose: names with different purposes get independent numbers.
        name: any text.

    Returns:
        The leading 53 bits of a SHA-256, as a fraction.
    """
    digest = hashlib.sha256(f"{purpose}\0{name}".encode(errors="surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _split(name: str) -> str:
    share = unit_hash("split", name)
    return "train" if share < 0.9 else "validation" if share < 0.95 else "test"


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    def refuse(error: OSError) -> None:
        raise error  # os.walk would otherwise pass over an unreadable folder in silence

    for folder, folders, files in os.walk(root, onerror=refuse):
        yield Path(folder), folders, files


def _user_files(root: Path) -> list[str]:
    return [
        (folder / file).relative_to(root).as_posix()
        for folder, _, files in _walk(root)
        for file in files
        if file.endswith(_SUFFIXES)
    ]


def _stdlib_files(root: Path) -> list[str]:
    found = []
    for folder, folders, files in _walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in _STDLIB_SKIPPED_FOLDERS and not name.startswith(_STDLIB_SKIPPED_PREFIXES)
        ]
        found += [
            (folder / file).relative_to(root).as_posix()
            for file in files
            if file.endswith(_STDLIB_SUFFIXES) and not file.startswith(_STDLIB_SKIPPED_PREFIXES)
        ]
    return found


def _read(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """Yield (document name, text) of one file."""
    if path.suffix == ".jsonl":
        return _read_jsonl(path, name)
    if path.suffix == ".parquet":
        return _read_parquet(path, name)
    return iter([(name, _decode(path.read_bytes(), str(path)))])


def _read_jsonl(path: Path, name: str) -> Iterator[tuple[str, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            decoded = _decode(line, where)
            if not decoded.strip():
                continue
            try:
                row = json.loads(decoded)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: not JSON ({error.msg}); expected an object with a text field a line"
                ) from None
            text = row.get("text") if isinstance(row, dict) else None
            yield f"{name}#{number}", _checked(text, where)


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet needs pyarrow; run `pip install pyarrow`, "
            "or convert the file to .jsonl"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise UserError(
                    f"{path}: no column named text; its columns are "
                    + ", ".join(table.schema_arrow.names)
                )
            number = 0
            for batch in table.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{name}#{number}", _checked(text, f"{path}, row {number}")
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from None


def _decode(raw: bytes, where: str) -> str:
    try:
        return _checked(raw.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text (byte {error.start}); convert it to UTF-8 or leave it out"
        ) from None


def _checked(text: object, where: str) -> str:
    """Return `text` if it is text that UTF-8 can carry and that looks like no binary file."""
    if not isinstance(text, str):
        raise UserError(f'{where}: expected a string under "text", got {type(text).__name__}')
    if "\0" in text:
        raise UserError(f"{where}: holds a NUL byte, so it is binary, not text; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half a surrogate pair at character {error.start}; mend the text or "
            f"leave it out"
        ) from None
    return text
