"""Tokenizers of other libraries behind the same protocol: `tokenizer.json` and tiktoken files.

Their libraries are optional and imported where a file asks for one. Special tokens that a text
happens to spell are read as that text, as SentencePiece does. `Marked` is what all kinds share:
special tokens, as the files beside them say, and tokens added to a finished tokenizer.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from dmc_jax.data.tokenizer_files import SpecialTokens
from dmc_jax.data.tokenizer_marks import Marked
from dmc_jax.errors import UserError

_BYTE_PIECE = r"<0x[0-9A-Fa-f]{2}>"
_SPACE = "\u2581"  # a space in the pieces of tokenizers that were SentencePiece models

# BOS and EOS, in the order in which they are looked for: Llama 3, Llama 2 and Mistral, others.
_ENDS = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<bos>", "<eos>"),
    ("<|im_start|>", "<|im_end|>"),
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
)
_PADDING = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]")

# Llama 3's: how text is cut before byte pairs are merged, and its 256 special tokens (as Llama 3.1
# names them; they have the same places in 3.0, which reserves some).
LLAMA3_PATTERN = "|".join(
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
# Longer runs of spaces or of others exhaust the stack of tiktoken's pattern matcher; Llama 3's own
# code cuts them there too.
_LONGEST_RUN = 25_000
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
_TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")


class LibraryMissing(UserError):
    """A tokenizer that cannot be looked into here, since its library is not installed."""


class JsonTokenizer(Marked):
    """A `tokenizer.json` of Hugging Face's tokenizers library."""

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError:
            raise _library_missing(path, "tokenizers") from None
        text = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"tokenizer {path} cannot be read by the tokenizers library: {str(error)[:200]}"
            ) from None
        self._tokenizer.encode_special_tokens = True  # as plain text, where a text spells them
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._in_file = self._tokenizer.get_added_tokens_decoder()
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._is_byte_level = '"ByteLevel"' in text
        super().__init__(max(self._vocabulary.values(), default=-1) + 1)
        self._closing = None  # ids that end a run of bytes, where a decoder reads runs as a whole
        if '"ByteFallback"' in text:
            pieces = self._vocabulary.items()
            special = {token for token, added in self._in_file.items() if added.special}
            plain = (token for piece, token in pieces if not re.fullmatch(_BYTE_PIECE, piece))
            self._closing = frozenset(plain) - special

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def in_byte_run(self, token: int) -> bool:
        """Whether what a token stands for depends on all the bytes around it, to either side.

        The decoder ByteFallback makes characters of a run of bytes if it is valid as a whole, and
        else of none of them. Tokens that stand for nothing do not end a run.
        """
        added = self.added.get(token)
        closes = self._closing is None or token in self._closing
        return not closes and (added is None or added.special)

    def _encode_special_own(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def _decode_own(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _id_of(self, name: str) -> int | None:
        return self._vocabulary.get(name)

    def _own_name(self, token: int) -> str | None:
        return self._tokenizer.id_to_token(token)

    def _own_marks(self) -> SpecialTokens:
        """BOS and EOS by their usual names; BOS is added where the file's post-processor does."""
        known = self._vocabulary
        pairs = [(bos, eos) for bos, eos in _ENDS if bos in known and eos in known]
        bos, eos = (known[name] for name in pairs[0]) if pairs else (-1, None)
        if eos is None:
            eos = next((known[name] for _, name in _ENDS if name in known), None)
        pad = next((known[name] for name in _PADDING if name in known), -1)
        if self._tokenizer.post_processor is None:
            # Llamas that were SentencePiece models have BOS before every text.
            add_bos = not self._is_byte_level
        else:
            marked = self._tokenizer.encode("a").ids
            add_bos = len(marked) > len(self.encode("a")) and marked[0] != self.encode("a")[0]
            bos = marked[0] if add_bos and bos < 0 else bos
        return SpecialTokens(bos, () if eos is None else (eos,), pad, add_bos)

    def _own_bytes(self) -> Int32[np.ndarray, "V"]:
        sizes = np.zeros(self.own_size, np.int32)
        for piece, token in self._vocabulary.items():
            if token in self._in_file:
                special = self._in_file[token].special
                sizes[token] = 0 if special else len(self._in_file[token].content.encode())
            elif self._is_byte_level:
                sizes[token] = len(piece)  # this alphabet has one letter for every byte
            elif re.fullmatch(_BYTE_PIECE, piece):
                sizes[token] = 1
            else:
                sizes[token] = len(piece.replace(_SPACE, " ").encode())
        return sizes


class TiktokenTokenizer(Marked):
    """Llama 3's `tokenizer.model`: tiktoken's byte pairs, to which Llama's specials are added.

    Attributes:
        pieces: bytes of the ordinary tokens, by id; the special ones follow.
    """

    def __init__(self, path: Path):
        try:
            import tiktoken
        except ImportError:
            raise _library_missing(path, "tiktoken") from None
        self.pieces = _read_ranks(path)
        self._encoding = tiktoken.Encoding(
            name=path.name,
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks={piece: rank for rank, piece in enumerate(self.pieces)},
            special_tokens=self._own_special(),
        )
        super().__init__(len(self.pieces) + len(LLAMA3_SPECIAL_TOKENS))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""
        return [
            token for part in short_runs(text) for token in self._encoding.encode_ordinary(part)
        ]

    def _own_special(self) -> dict[str, int]:
        return {name: len(self.pieces) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}

    def _decode_own(self, ids: list[int]) -> str:
        data = b"".join(self.pieces[token] for token in ids if token < len(self.pieces))
        return data.decode(errors="replace")

    def _id_of(self, name: str) -> int | None:
        if name in LLAMA3_SPECIAL_TOKENS:
            return len(self.pieces) + LLAMA3_SPECIAL_TOKENS.index(name)
        return None

    def _own_name(self, token: int) -> str | None:
        return LLAMA3_SPECIAL_TOKENS[token - len(self.pieces)]

    def _own_marks(self) -> SpecialTokens:
        """Meta's own: a base model ends with the first EOS, messages and turns with the others."""
        ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        return SpecialTokens(
            bos_id=len(self.pieces),
            eos_ids=tuple(self._id_of(name) for name in ends),
            pad_id=-1,
            add_bos=True,
        )

    def _own_bytes(self) -> Int32[np.ndarray, "V"]:
        sizes = np.zeros(self.own_size, np.int32)
        sizes[: len(self.pieces)] = [len(piece) for piece in self.pieces]
        return sizes


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
        return "json" if isinstance(parsed, dict) and "model" in parsed else None
    return None


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
    return LibraryMissing(f"tokenizer {path} needs the library {library}: pip install {library}")
