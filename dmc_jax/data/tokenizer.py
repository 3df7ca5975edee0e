"""Text to token ids and back: one protocol, SentencePiece here and other formats beside it.

Own SentencePiece models lose nothing, Llama 2's are used as they are; `tokenizer_formats.py` has
`tokenizer.json` and tiktoken files.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import sentencepiece
from jaxtyping import Int32, Integer

from dmc_jax.data.tokenizer_files import SpecialTokens, read_beside
from dmc_jax.data.tokenizer_formats import JsonTokenizer, TiktokenTokenizer, format_of
from dmc_jax.data.tokenizer_marks import Marked
from dmc_jax.errors import UserError
from dmc_jax.files import lfs_pointer

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

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " T"]) -> str:
        """Return the text of `ids`; control tokens stand for nothing."""

    def token_bytes(self) -> Int32[np.ndarray, "V"]:
        """Count the UTF-8 bytes of text that each token stands for; see `token_bytes`."""


class SentencePieceTokenizer(Marked):
    """A SentencePiece model behind the `Tokenizer` protocol; make one with `load_tokenizer`."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self.processor = processor
        super().__init__(processor.get_piece_size())
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

    def _own_special(self) -> dict[str, int]:
        control = filter(self.processor.is_control, range(self.own_size))
        return {self.processor.id_to_piece(token): token for token in control}

    def _decode_own(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def _begins_word(self, token: int) -> bool:
        return self.processor.id_to_piece(token).startswith(_SPACE)

    def _id_of(self, name: str) -> int | None:
        token = self.processor.piece_to_id(name)
        return token if self.processor.id_to_piece(token) == name else None

    def _own_name(self, token: int) -> str | None:
        return self.processor.id_to_piece(token)

    def _own_marks(self) -> SpecialTokens:
        eos = self.processor.eos_id()
        return SpecialTokens(
            bos_id=self.processor.bos_id(),
            eos_ids=(eos,) if eos >= 0 else (),
            pad_id=self.processor.pad_id(),
            add_bos=True,
        )

    def _own_bytes(self) -> Int32[np.ndarray, "V"]:
        processor = self.processor
        sizes = np.zeros(self.own_size, np.int32)
        for token in range(self.own_size):
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


def load_tokenizer(
    path: str | os.PathLike, special: SpecialTokens | None = None, add_bos: bool | None = None
) -> Tokenizer:
    """Load a tokenizer, told by its contents.

    Args:
        path: a SentencePiece model (one of `train_sentencepiece`, Llama 2's `tokenizer.model`, or
            another), a `tokenizer.json`, or a tiktoken file (Llama 3's `tokenizer.model`). The
            latter two need the libraries tokenizers and tiktoken. What lies beside it in Hugging
            Face's files is read too; see `tokenizer_files`.
        special: how a checkpoint says that texts are marked, which outranks these files.
        add_bos: whether texts begin with BOS, whatever any file says.

    Returns:
        The tokenizer. With a dummy prefix (Llama 2), decoding an encoding gives the text back;
        `token_bytes` is then approximate.

    Raises:
        UserError: no such file, of no such format, damaged files beside it, one whose EOS is not
            known, or a library that is not installed.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist: give a SentencePiece model file")
    tokenizer = _load(path)
    tokenizer.read_marks(read_beside(path), path)
    if special is not None:
        tokenizer.special = special
    if add_bos is not None:
        if add_bos and tokenizer.bos_id < 0:
            raise UserError(f"add_bos: tokenizer {path} has no BOS token")
        tokenizer.special = dataclasses.replace(tokenizer.special, add_bos=add_bos)
    return tokenizer


def _load(path: Path) -> Marked:
    """Load the file alone."""
    data = path.read_bytes()
    if pointer := lfs_pointer(data):
        raise UserError(f"tokenizer {path} {pointer}")
    kind = format_of(data)
    if kind is not None:
        return JsonTokenizer(path) if kind == "json" else TiktokenTokenizer(path)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if not _has_all_parts(data):
            raise RuntimeError
        processor.load_from_serialized_proto(data)
    except RuntimeError:
        raise UserError(
            f"tokenizer {path} is not a SentencePiece model, nor a tokenizer.json or a tiktoken "
            f"file, or it is cut short: its {len(data):,} bytes begin with {data[:24]!r}; expected "
            "a file such as Llama 2's tokenizer.model"
        ) from None
    return SentencePieceTokenizer(processor)


def _has_all_parts(data: bytes) -> bool:
    """Whether a serialized model has its pieces (1), trainer (2) and normalizer (3), each whole.

    A file that is cut between two pieces would be a smaller model without any of its settings.
    Source: sentencepiece_model.proto, and the wire format of protocol buffers.
    """
    at, found = 0, set()
    while at < len(data):
        head, at = _varint(data, at)
        if head & 7 != 2:  # all fields are messages, which come with their lengths
            return False
        length, at = _varint(data, at)
        at += length
        found.add(head >> 3)
    return at == len(data) and {1, 2, 3} <= found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, and where the next thing begins."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            break
    return value, at


def format_of_file(path: str | os.PathLike) -> str:
    """Tell the format of a tokenizer's file: sentencepiece (also what is none), json or tiktoken.

    Raises:
        OSError: the file cannot be read.
    """
    return format_of(Path(path).read_bytes()) or "sentencepiece"


def encode_document(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Encode a whole document: as `encode_prompt` does, but nothing for an empty text; then EOS.

    Args:
        tokenizer: any `Tokenizer`.
        text: the document.
        special: names of special tokens in the text mean these tokens.

    Returns:
        Ids, at least one.
    """
    return [*_begun(tokenizer, text, special), tokenizer.eos_id]


def encode_prompt(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Encode the beginning of a document: its tokens, after BOS where the model has it so.

    Args:
        tokenizer: any `Tokenizer`.
        text: the beginning of a document, possibly empty.
        special: names of special tokens in the text mean these tokens; BOS may be one of them.

    Returns:
        Ids, at least one: an empty text is BOS in any case, or EOS where there is no BOS.
    """
    first = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id
    return _begun(tokenizer, text, special) or [first]


def _begun(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    """The ids of a text after BOS where the model has it so. The only place that adds BOS."""
    ids = tokenizer.encode_special(text) if special else tokenizer.encode(text)
    # One that does not say is of a model that begins texts with BOS, as Llamas do.
    adds = getattr(tokenizer, "add_bos", True) and ids[:1] != [tokenizer.bos_id]
    return [tokenizer.bos_id, *ids] if adds else ids


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """List the tokens that end a text: all that the model has, or EOS where it says no more."""
    return getattr(tokenizer, "eos_ids", (tokenizer.eos_id,))


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
