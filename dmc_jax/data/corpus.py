"""Where text comes from: this Python's own library, or files of the user's.

A corpus is a list of files visited in a fixed pseudo-random order (by a hash of each name), so that
any prefix of it is a fair sample; `documents` streams it and never holds more than one document.
Which split a document is in depends on its text alone.
"""

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dmc_jax.data.chat import Render
from dmc_jax.data.listing import KINDS, find_files, walk, why_unread
from dmc_jax.data.rows import kind_of, not_utf8, rows
from dmc_jax.errors import UserError

SPLITS = ("train", "validation", "test")
SHARES = {"train": 0.90, "validation": 0.05, "test": 0.05}  # of documents

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
        fields: of .jsonl and .parquet files: the first one that is there holds the text.
        left_out: files and links of the folder that are not read, with the reason.
    """

    source: str
    root: Path
    files: tuple[str, ...]
    fields: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: file name relative to the corpus, with `#row` (from 1) in a .jsonl or .parquet file.
        split: "train", "validation" or "test": which one its text alone decides.
        text: the text exactly as found, newlines included, but for a byte-order mark at its start;
            never empty.
        key: the same for documents of the same text and, but by chance, for no other; 64 hex
            digits.
        chat: a conversation, which its template has framed and given special tokens.
    """

    name: str
    split: str
    text: str
    key: str
    chat: bool = False


def open_corpus(path: str | os.PathLike | None = None, *, text_field: str | None = None) -> Corpus:
    """List a corpus without reading its text.

    Args:
        path: a .txt, .jsonl, .ndjson or .parquet file, which may be compressed, or a folder
            searched for them recursively, through links too. None is the default corpus: the source
            and documentation of the running Python's library.
        text_field: the field of .jsonl and .parquet files that holds the text, or a conversation;
            None is "text" or else "messages".

    Returns:
        The corpus, its files in an order that depends on their names alone.

    Raises:
        UserError: the path does not exist, has an unknown suffix, or holds no usable file.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        names, left_out = _stdlib_files(root), []
        source = f"python-stdlib {platform.python_version()}"
    else:
        # Not resolved: the hub's caches link names to files that are called by their hashes.
        given = Path(os.path.abspath(os.path.expanduser(path)))
        source = str(given)
        if not given.exists():
            raise UserError(f"corpus {path} does not exist: give an existing file or folder")
        if given.is_dir():
            root, (names, left_out) = given, find_files(given)
        else:
            root, names, left_out = given.parent, [given.name], []
            if reason := why_unread(given):
                raise UserError(
                    f"corpus {source}: {reason}; expected one of {KINDS}, or a folder of them"
                )
    if not names:
        passed = "".join(f"; left out: {line}" for line in describe_left_out(left_out))
        raise UserError(f"corpus {source}: expected files {KINDS} and found none{passed}")
    names.sort(key=lambda name: (unit_hash("order", name), name))
    fields = (text_field,) if text_field else ("text", "messages")
    return Corpus(source, root, tuple(names), fields, tuple(left_out))


def describe_left_out(left_out: Iterable[tuple[str, str]], names: int = 5) -> list[str]:
    """Say which files are left out of a corpus and why: a line a reason, with its first names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out:
        by_reason.setdefault(reason, []).append(name)
    return [
        f"{len(found)} ({reason}): {', '.join(found[:names])}{', ...' * (len(found) > names)}"
        for reason, found in sorted(by_reason.items())
    ]


def documents(
    corpus: Corpus,
    limit_bytes: float | None = None,
    *,
    bad_row: Callable[[str], None] | None = None,
    render: Render | None = None,
) -> Iterator[Document]:
    """Stream the documents of a corpus in its fixed order; empty texts are passed over.

    Args:
        corpus: from `open_corpus`.
        limit_bytes: stop before the document that would take the UTF-8 total past this; None reads
            everything.
        bad_row: called with what is wrong with a row that has no usable text, and where; the row is
            then passed over. None: it is refused.
        render: gives the text of a conversation.

    Yields:
        Documents.

    Raises:
        UserError: a file is damaged, or a row is binary, not UTF-8, malformed or lacks its text,
            naming file and row.
    """
    left = float("inf") if limit_bytes is None else limit_bytes
    for file in corpus.files:
        for row in rows(corpus.root / file, corpus.fields):
            at = f"{row.number}" * bool(row.number)
            try:
                if row.fault:
                    raise ValueError(row.fault)
                text, key = _text_and_key(row.value, render)
            except ValueError as error:
                (bad_row or _refuse)(f"{corpus.root / file}{at and ':'}{at}: {error}")
                continue
            left -= len(text.encode())
            if left < 0:
                return
            if text:
                name = f"{file}{at and '#'}{at}"
                yield Document(name, _split(key), text, key, isinstance(row.value, list))


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
        name = file.encode(errors="surrogateescape")
        digest.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
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
    return _unit(digest)


def _unit(digest: bytes) -> float:
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _split(key: str) -> str:
    share = _unit(bytes.fromhex(key))
    in_train, in_validation = SHARES["train"], SHARES["train"] + SHARES["validation"]
    return "train" if share < in_train else "validation" if share < in_validation else "test"


def _key(text: str) -> str:
    """SHA-256 of a text.

    Line ends and the whitespace around it do not count: they are what changes when text is stored
    in another way, and the document must keep its split.
    """
    plain = text.replace("\r\n", "\n").strip()
    return hashlib.sha256(f"document\0{plain}".encode()).hexdigest()


def _text_and_key(value: object, render: Render | None) -> tuple[str, str]:
    """The text of a row's value, and the key of what it says.

    Raises:
        ValueError: it has none.
    """
    if isinstance(value, list):
        if render is None:
            raise ValueError(
                "a conversation, whose text depends on the model's chat template: give a tokenizer "
                "that has one beside it with --tokenizer"
            )
        text = _checked(render(value))
        # What was said decides the split, not how a template puts it; parquet has every field in
        # every message.
        said = [{name: part for name, part in m.items() if part is not None} for m in value]
        return text, _key(json.dumps(said, sort_keys=True, default=str))
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(error)) from None
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {kind_of(value)}")
    text = _checked(value.removeprefix("\ufeff"))
    return text, _key(text)


def _checked(text: str) -> str:
    """Return `text` if UTF-8 can carry it and it looks like no binary file."""
    if "\0" in text:
        raise ValueError("holds a NUL byte, so it is binary, not text; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"half a surrogate pair at character {error.start}"
        raise ValueError(f"{where}; mend the text or leave it out") from None
    return text


def _refuse(fault: str) -> None:
    raise UserError(fault)


def _stdlib_files(root: Path) -> list[str]:
    found = []
    for folder, folders, files in walk(root):
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
