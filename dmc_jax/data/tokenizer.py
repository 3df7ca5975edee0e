"""Text to token ids and back: one protocol, SentencePiece here and other formats beside it.

Own SentencePiece models lose nothing, Llama 2's are used as they are; `tokenizer_formats.py` has
`tokenizer.json` and tiktoken files.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import sentencepiece
from jaxtyping import Int32

from dmc_jax.data.tokenizer_formats import (
    JsonTokenizer,
    TiktokenTokenizer,
    encode_around,
    format_of,
)
from dmc_jax.errors import UserError

# What a tokenizer's file is called in other projects' checkpoints, the preferred name first.
TOKENIZER_NAMES = ("tokenizer.model", "tokenizer.json")

_SPACE = "\u2581"  # SentencePiece writes a space as this character inside its pieces
_CHUNK = 2048  # characters a training sentence; the trainer drops those beyond 4,192 bytes


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of `text`, in which the name of a special token means that token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens stand for nothing."""

    def token_bytes(self) -> Int32[np.ndarray, "V"]:
        """Count the UTF-8 bytes of text that each token stands for; see `token_bytes`."""


class SentencePieceTokenizer:
    """A SentencePiece model behind the `Tokenizer` protocol; make one with `load_tokenizer`.

    Attributes:
        vocab_size: number of ids.
        bos_id: beginning of a document.
        eos_id: end of a document.
        pad_id: fills unused places; EOS where a model (such as Llama 2's) defines none, which is
            harmless because padded places never count.
        dummy_prefix: True if the model puts a space before every text, as Llama 2's does.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self.processor = processor
        self.vocab_size = processor.get_piece_size()
        self.bos_id, self.eos_id = processor.bos_id(), processor.eos_id()
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        self.dummy_prefix = "".join(processor.encode("a", out_type=str)).startswith(_SPACE)
        space_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        # A literal U+2581 would come back as a space. Its three bytes come back as themselves; but
        # cutting the text there would earn a model with a dummy prefix a space for every part.
        exact = not self.dummy_prefix and all(map(processor.is_byte, space_bytes))
        self._space_bytes = space_bytes if exact else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""
        if self._space_bytes is None or _SPACE not in text:
            return self.processor.encode(text)
        first, *rest = text.split(_SPACE)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self._space_bytes + self.processor.encode(part)
        return ids

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of `text`, in which the name of a control token means that token."""
        control = filter(self.processor.is_control, range(self.vocab_size))
        special = {self.processor.id_to_piece(token): token for token in control}
        return encode_around(special, text, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens stand for nothing."""
        return self.processor.decode([int(token) for token in ids])

    def token_bytes(self) -> Int32[np.ndarray, "V"]:
        """UTF-8 bytes of text by id."""
        processor = self.processor
        sizes = np.zeros(self.vocab_size, np.int32)
        for token in range(self.vocab_size):
            if processor.is_byte(token):
                sizes[token] = 1
            elif not (
                processor.is_control(token)
                or processor.is_unknown(token)
                or processor.is_unused(token)
            ):
                sizes[token] = len(processor.id_to_piece(token).replace(_SPACE, " ").encode())
        return sizes


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike,
    *,
    threads: int = 2,
    may_be_smaller: bool = False,
) -> None:
    """Train a lossless byte-fallback BPE model: `decode(encode(x)) == x` for any text.

    Ids 0 to 3 are unknown, BOS, EOS and padding, then 256 bytes, then merges and characters.

    Args:
        texts: documents, or a sample of them; whitespace is kept and learnt as it stands.
        vocab_size: number of ids, the 260 fixed ones included.
        path: file to write.
        threads: for counting pairs.
        may_be_smaller: make do with fewer ids where the text yields no more.

    Raises:
        UserError: no text, or a vocabulary too small or too large for it.
    """
    chunks = (text[at : at + _CHUNK] for text in texts for at in range(0, len(text), _CHUNK))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chunks,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            # Identity everywhere: whatever the text holds, the tokens hold.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _CHUNK,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=threads,
            hard_vocab_limit=not may_be_smaller,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"a tokenizer of {vocab_size} ids cannot be trained on this text: choose another "
            f"vocabulary size or give more text (SentencePiece says: {_reason(error)})"
        ) from None
    Path(path).write_bytes(model.getvalue())


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer, told by its contents.

    Args:
        path: a SentencePiece model (one of `train_sentencepiece`, Llama 2's `tokenizer.model`, or
            another), a `tokenizer.json`, or a tiktoken file (Llama 3's `tokenizer.model`). The
            latter two need the libraries tokenizers and tiktoken.

    Returns:
        The tokenizer. With a dummy prefix (Llama 2), decoding an encoding gives the text back;
        `token_bytes` is then approximate.

    Raises:
        UserError: no such file, of no such format, one without BOS and EOS, or a library that is
            not installed.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist: name a tokenizer's file")
    data = path.read_bytes()
    kind = format_of(data)
    if kind is not None:
        return JsonTokenizer(path) if kind == "json" else TiktokenTokenizer(path)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(data)
    except RuntimeError:
        raise UserError(
            f"tokenizer {path} is not a SentencePiece model, nor a tokenizer.json or a tiktoken "
            "file: expected a file such as Llama 2's tokenizer.model"
        ) from None
    if min(processor.bos_id(), processor.eos_id()) < 0:
        raise UserError(
            f"tokenizer {path} has no BOS or no EOS token, which mark the ends of documents: "
            "use a model trained with both"
        )
    return SentencePieceTokenizer(processor)


def format_of_file(path: str | os.PathLike) -> str:
    """Tell the format of a tokenizer's file: sentencepiece (also what is none), json or tiktoken.

    Raises:
        OSError: the file cannot be read.
    """
    return format_of(Path(path).read_bytes()) or "sentencepiece"


def encode_document(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Encode a whole document: `encode_prompt`, then EOS.

    Args:
        tokenizer: any `Tokenizer`.
        text: the document.
        special: names of special tokens in the text mean these tokens.

    Returns:
        Ids, at least two.
    """
    return [*encode_prompt(tokenizer, text, special=special), tokenizer.eos_id]


def encode_prompt(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Encode the beginning of a document: BOS, then its tokens. The only place that adds BOS.

    Args:
        tokenizer: any `Tokenizer`.
        text: the beginning of a document, possibly empty.
        special: names of special tokens in the text mean these tokens; BOS may be one of them.

    Returns:
        Ids, at least one.
    """
    ids = tokenizer.encode_special(text) if special else tokenizer.encode(text)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def token_bytes(tokenizer: Tokenizer) -> Int32[np.ndarray, "V"]:
    """Count the UTF-8 bytes of text that each token stands for.

    Summed over `encode(x)` this is `len(x.encode())`: exactly so for a model without a dummy
    prefix; a model with one (Llama 2) counts one byte more a text, for the space it adds.

    Args:
        tokenizer: from `load_tokenizer`.

    Returns:
        Bytes by id: 0 for control, unknown and unused tokens, 1 for byte tokens.
    """
    return tokenizer.token_bytes()


def fingerprint(path: str | os.PathLike) -> str:
    """Return the hexadecimal SHA-256 of a file.

    Args:
        path: a tokenizer model, or any file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """Cut the C++ file and condition from a SentencePiece message."""
    return str(error).rsplit("] ", 1)[-1].strip() or "no text"
