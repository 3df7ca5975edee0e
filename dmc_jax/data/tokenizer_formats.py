"""Tokenizers of other libraries behind the same protocol: `tokenizer.json` and tiktoken files.

Their libraries are optional and imported where a file asks for one. Special tokens that a text
happens to spell are read as that text, as SentencePiece does; BOS and EOS are known by their names.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from dmc_jax.errors import UserError

_BYTE_PIECE = r"<0x[0-9A-Fa-f]{2}>"
_SPACE = "\u2581"  # a space in the pieces of tokenizers that were SentencePiece models

# BOS and EOS, in the order in which they are looked for: Llama 3, Llama 2 and Mistral, others.
_ENDS = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<bos>", "<eos>"),
)
_PADDING = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]")

# Llama 3's: how text is cut before byte pairs are merged, and its 256 special tokens.
_LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_LLAMA3_SPECIAL = 256
# Those that a text may name, by their place among them.
_LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
}
# Longer runs of spaces or of others exhaust the stack of tiktoken's pattern matcher; Llama 3's own
# code cuts them there too.
_LONGEST_RUN = 25_000
_TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")


class JsonTokenizer:
    """A `tokenizer.json` of Hugging Face's tokenizers library.

    Attributes: as in `SentencePieceTokenizer`.
    """

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError:
            raise _library_missing(path, "tokenizers") from None
        text = path.read_text()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"tokenizer {path} cannot be read by the tokenizers library: {str(error)[:200]}"
            ) from None
        self._tokenizer.encode_special_tokens = True  # as plain text, where a text spells them
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id = _ends(path, vocabulary)
        self.pad_id = next((vocabulary[p] for p in _PADDING if p in vocabulary), self.eos_id)
        self._vocabulary = vocabulary
        self._is_byte_level = '"ByteLevel"' in text
        self._closing = None  # ids that end a run of bytes, where a decoder reads runs as a whole
        if '"ByteFallback"' in text:
            special = {token for token, added in self._added.items() if added.special}
            plain = (t for piece, t in vocabulary.items() if not re.fullmatch(_BYTE_PIECE, piece))
            self._closing = frozenset(plain) - special

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of `text`, in which the name of an added token means that token."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens stand for nothing."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def in_byte_run(self, token: int) -> bool:
        """Whether what a token stands for depends on all the bytes around it, to either side.

        The decoder ByteFallback makes characters of a run of bytes if it is valid as a whole, and
        else of none of them. Tokens that stand for nothing do not end a run.
        """
        return self._closing is not None and token not in self._closing

    def token_bytes(self) -> Int32[np.ndarray, "V"]:
        """UTF-8 bytes of text by id."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, token in self._vocabulary.items():
            if token in self._added:
                special = self._added[token].special
                sizes[token] = 0 if special else len(self._added[token].content.encode())
            elif self._is_byte_level:
                sizes[token] = len(piece)  # this alphabet has one letter for every byte
            elif re.fullmatch(_BYTE_PIECE, piece):
                sizes[token] = 1
            else:
                sizes[token] = len(piece.replace(_SPACE, " ").encode())
        return sizes


class TiktokenTokenizer:
    """Llama 3's `tokenizer.model`: tiktoken's byte pairs, to which Llama's specials are added.

    Attributes: as in `SentencePieceTokenizer`.
    """

    def __init__(self, path: Path):
        try:
            import tiktoken
        except ImportError:
            raise _library_missing(path, "tiktoken") from None
        self._pieces = _read_ranks(path)
        ordinary = len(self._pieces)
        names = {i: f"<|special_{i}|>" for i in range(_LLAMA3_SPECIAL)} | _LLAMA3_NAMES
        self._special = {name: ordinary + i for i, name in names.items()}
        self._encoding = tiktoken.Encoding(
            name=path.name,
            pat_str=_LLAMA3_PATTERN,
            mergeable_ranks={piece: rank for rank, piece in enumerate(self._pieces)},
            special_tokens=self._special,
        )
        self.vocab_size = ordinary + _LLAMA3_SPECIAL
        self.bos_id, self.eos_id = ordinary, ordinary + 1
        self.pad_id = self.eos_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""
        return [
            token for part in short_runs(text) for token in self._encoding.encode_ordinary(part)
        ]

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of `text`, in which the name of a special token means that token."""
        return encode_around(self._special, text, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens stand for nothing."""
        data = b"".join(self._pieces[token] for token in ids if token < len(self._pieces))
        return data.decode(errors="replace")

    def token_bytes(self) -> Int32[np.ndarray, "V"]:
        """UTF-8 bytes of text by id."""
        sizes = np.zeros(self.vocab_size, np.int32)
        sizes[: len(self._pieces)] = [len(piece) for piece in self._pieces]
        return sizes


def encode_around(
    special: Mapping[str, int], text: str, encode: Callable[[str], list[int]]
) -> list[int]:
    """Encode a text in which names of tokens mean these tokens; the longest name counts.

    Args:
        special: ids of tokens by their names.
        text: any.
        encode: of the text around them.
    """
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    parts = re.split(f"({names})", text)  # texts at even places, names at odd ones
    return [
        token
        for place, part in enumerate(parts)
        for token in ([special[part]] if place % 2 else encode(part) if part else [])
    ]


def short_runs(text: str) -> Iterator[str]:
    """Cut a text within its long runs of spaces or of others, and nowhere else."""
    longer = f"{{{_LONGEST_RUN + 1},}}"
    start = 0
    for run in re.finditer(rf"(?<!\s)\s{longer}|(?<!\S)\S{longer}", text):
        for end in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[start:end]
            start = end
    yield text[start:]


def format_of(data: bytes) -> str | None:
    """Tell which kind of tokenizer a file's contents are: json | tiktoken | None (another)."""
    if _TIKTOKEN_LINE.fullmatch(data[:1000].split(b"\n")[0].strip()):
        return "tiktoken"
    if data.lstrip()[:1] == b"{":
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return "json" if "model" in parsed else None
    return None


def _ends(path: Path, vocabulary: dict[str, int]) -> tuple[int, int]:
    for bos, eos in _ENDS:
        if bos in vocabulary and eos in vocabulary:
            return vocabulary[bos], vocabulary[eos]
    known = ", ".join(f"{bos} and {eos}" for bos, eos in _ENDS)
    raise UserError(
        f"tokenizer {path} has no BOS and EOS tokens of a known name ({known}), which mark the "
        "ends of documents"
    )


def _read_ranks(path: Path) -> list[bytes]:
    """Pieces by rank; every rank from 0 must be there."""
    pieces: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        found = _TIKTOKEN_LINE.fullmatch(line.strip())
        if found is None and line.strip():
            raise UserError(f"tokenizer {path}, line {number + 1}: expected `BASE64 RANK`")
        if found is not None:
            pieces[int(found[2])] = base64.b64decode(found[1])
    if sorted(pieces) != list(range(len(pieces))) or len(set(pieces.values())) != len(pieces):
        raise UserError(f"tokenizer {path}: ranks or pieces are missing or doubled; fetch it again")
    return [pieces[rank] for rank in range(len(pieces))]


def _library_missing(path: Path, library: str) -> UserError:
    return UserError(f"tokenizer {path} needs the library {library}: pip install {library}")
