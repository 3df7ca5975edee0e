"""The folder of tokens that `prepare` writes and training reads: what is in it, and opening it.

manifest.json             what this is, where it came from, sizes and hashes
tokenizer.model           the tokenizer, whatever its format
<split>.tokens            token ids, flat, little-endian uint16 or uint32
<split>.documents.npy     int64 [documents + 1]: where each document starts, then the end
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmc_jax.data.corpus import SPLITS
from dmc_jax.data.tokenizer import fingerprint
from dmc_jax.errors import UserError

FORMAT = "dmc_jax.tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
_COMMAND = "python -m dmc_jax.prepare_data --output=DIR"


@dataclass(frozen=True)
class PreparedData:
    """Tokens on disk, memory-mapped.

    Attributes:
        path: the folder.
        manifest: the contents of manifest.json.
        tokenizer_path: the tokenizer the tokens were made with.
        tokens: by split, token ids, uint16 or uint32 [tokens].
        documents: by split, offsets into `tokens`, int64 [documents + 1]; no document is empty, but
            the test split may have none.
    """

    path: Path
    manifest: Mapping
    tokenizer_path: Path
    tokens: Mapping[str, np.ndarray]
    documents: Mapping[str, np.ndarray]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.manifest["vocab_size"]


def tokens_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest of little-endian uint16 and uint32 that holds every id.

    Args:
        vocab_size: number of ids.

    Returns:
        The dtype of the token files.
    """
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def open_data(path: str | os.PathLike, *, check_contents: bool = False) -> PreparedData:
    """Open a folder written by `prepare`, checking that it is whole.

    Args:
        path: the folder.
        check_contents: also hash every token file (reads all of it).

    Returns:
        The data; token files are memory-mapped, nothing of their size is read.

    Raises:
        UserError: not such a folder, a newer format, a truncated or changed file, or a tokenizer
            that is not the one the tokens were made with.
    """
    path = Path(os.path.expanduser(path))
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path} is not a prepared data folder; make one with `{_COMMAND}`")
    tokenizer = path / TOKENIZER
    if not tokenizer.is_file() or fingerprint(tokenizer) != manifest["tokenizer_sha256"]:
        raise UserError(
            f"{tokenizer} does not match the data: it is missing or not the tokenizer the tokens "
            f"were made with; restore it, or prepare again with `{_COMMAND}`"
        )
    tokens, documents = {}, {}
    for split in SPLITS:
        expected = manifest["splits"][split]
        tokens[split] = _open_tokens(path / f"{split}.tokens", manifest["dtype"], expected)
        documents[split] = _open_documents(path / f"{split}.documents.npy", expected)
        if check_contents and fingerprint(path / f"{split}.tokens") != expected["sha256"]:
            raise _damaged(path / f"{split}.tokens", "its contents have changed")
    return PreparedData(path, manifest, tokenizer, tokens, documents)


def read_manifest(path: Path) -> dict | None:
    """Read and check manifest.json.

    Args:
        path: the folder.

    Returns:
        Its contents, or None if the folder has no such file.

    Raises:
        UserError: the file is unreadable or of another format.
    """
    try:
        manifest = json.loads(Path(os.path.expanduser(path), MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise _damaged(path / MANIFEST, f"it is not JSON ({error})") from None
    found = (manifest.get("format"), manifest.get("format_version")) if manifest else None
    if found != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{path / MANIFEST}: expected format {FORMAT} version {FORMAT_VERSION}, found {found}; "
            f"prepare the data again with `{_COMMAND}`"
        )
    return manifest


def _open_tokens(path: Path, dtype: str, expected: Mapping) -> np.ndarray:
    size = path.stat().st_size if path.is_file() else 0
    wanted = expected["tokens"] * np.dtype(dtype).itemsize
    if size != wanted:
        raise _damaged(path, f"expected {wanted} bytes, found {size}")
    if not size:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _open_documents(path: Path, expected: Mapping) -> np.ndarray:
    try:
        offsets = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, FileNotFoundError) as error:
        raise _damaged(path, str(error)) from None
    if offsets.shape != (expected["documents"] + 1,) or offsets[-1] != expected["tokens"]:
        raise _damaged(
            path, f"expected {expected['documents']} documents over {expected['tokens']} tokens"
        )
    return offsets


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is damaged or truncated: {what}; delete the folder and prepare it again with "
        f"`{_COMMAND}`"
    )
