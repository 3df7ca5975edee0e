"""Tokenizers of other libraries behind the same protocol: `tokenizer.json` and tiktoken files.

Their libraries are optional and imported where a file asks for one. Special tokens that a text
happens to spell are read as that text, as SentencePiece does. `Marked` is what all kinds share:
special tokens, as the files beside them say, and tokens added to a finished tokenizer.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from dmc_jax.data.tokenizer_files import AddedToken, Beside, SpecialTokens
from dmc_jax.errors import UserError

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


class Marked:
    """What tokenizers of all kinds share; each of them tells its own ends and pieces.

    Attributes:
        vocab_size: number of ids, those of added tokens included.
        own_size: ids without those.
        special: how texts are marked.
        added: tokens that the tokenizer's own file does not have.
        dummy_prefix: whether a space is put before every text, as Llama 2's tokenizer does.
    """

    special: SpecialTokens
    dummy_prefix = False

    def __init__(self, known: int):
        """Begin with a tokenizer's own ids, 0 to `known` - 1."""
        self.vocab_size = self.own_size = known
        self.added: Mapping[int, AddedToken] = {}

    @property
    def bos_id(self) -> int:
        """Beginning of a text; -1: there is no such token."""
        return self.special.bos_id

    @property
    def eos_id(self) -> int:
        """End of a document."""
        return self.special.eos_ids[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        return self.special.eos_ids

    @property
    def pad_id(self) -> int:
        """Fills unused places; EOS where there is none, which is harmless: they never count."""
        return self.special.pad_id

    @property
    def add_bos(self) -> bool:
        """Whether every text begins with BOS."""
        return self.special.add_bos

    def read_marks(self, beside: Beside, path: Path) -> None:
        """Take up what lies beside the file; it outranks what the file itself says.

        Args:
            beside: what lies there.
            path: the tokenizer's file, for messages.

        Raises:
            UserError: a token that is named is not there, or no end of texts is known.
        """
        # What has an id of the tokenizer's own is in it already.
        added = beside.added or {}
        self.added = {token: entry for token, entry in added.items() if token >= self.own_size}
        self.vocab_size = max([self.own_size, *(token + 1 for token in self.added)])
        own = self._own_marks()
        bos = self._named(beside, "bos_token", path)
        eos = self._named(beside, "eos_token", path)
        pad = self._named(beside, "pad_token", path)
        bos = next((t for t in (bos, own.bos_id, beside.bos_id) if t is not None and t >= 0), -1)
        eos_ids = [token for token in (eos,) if token is not None] or list(own.eos_ids)
        eos_ids = tuple(dict.fromkeys([*eos_ids, *beside.eos_ids]))
        if not eos_ids:
            raise UserError(
                f"tokenizer {path} has no EOS token of a known name, and no file beside it names "
                'one: put {"eos_token": NAME} in tokenizer_config.json there'
            )
        pad = own.pad_id if pad is None else pad
        add_bos = own.add_bos or beside.llama_class if beside.add_bos is None else beside.add_bos
        self.special = SpecialTokens(
            bos, eos_ids, pad if pad >= 0 else eos_ids[0], add_bos and bos >= 0
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens and unknown ids stand for nothing."""
        text, run = "", []
        for token in map(int, ids):
            added = self.added.get(token)
            if 0 <= token < self.own_size:
                run.append(token)
            elif added is not None and not added.special:
                text, run = text + self._decode_run(run, not text) + added.content, []
        return text + self._decode_run(run, not text)

    def token_bytes(self) -> Int32[np.ndarray, "V"]:
        """Count the UTF-8 bytes of text by id."""
        sizes = np.zeros(self.vocab_size, np.int32)
        sizes[: self.own_size] = self._own_bytes()
        for token, added in self.added.items():
            sizes[token] = 0 if added.special else len(added.content.encode())
        return sizes

    def name_of(self, token: int) -> str | None:
        """Return how a special or added token is written; None where there is no such id."""
        if token in self.added:
            return self.added[token].content
        return self._own_name(token) if 0 <= token < self.own_size else None

    def _decode_run(self, ids: list[int], first: bool) -> str:
        """Decode ids of the tokenizer's own; only a text's first run loses a dummy prefix."""
        text = self._decode_own(ids) if ids else ""
        dropped = self.dummy_prefix and not first and ids and self._begins_word(ids[0])
        return " " + text if dropped else text

    def _begins_word(self, token: int) -> bool:
        return False

    def _named(self, beside: Beside, key: str, path: Path) -> int | None:
        """The id of a token that the files beside the tokenizer name."""
        name = beside.names.get(key)
        if name is None:
            return None
        found = self._id_of(name)
        if found is None:
            found = next((t for t, added in self.added.items() if added.content == name), None)
        if found is None and key != "pad_token":  # that one is often made up, and never needed
            raise UserError(
                f"{beside.where}: its files say that {key} is {name[:60]!r}, which {path.name} "
                "does not have, and no file lists it as an added token"
            )
        return found

    def _own_marks(self) -> SpecialTokens:
        raise NotImplementedError

    def _own_bytes(self) -> Int32[np.ndarray, "V"]:
        raise NotImplementedError

    def _decode_own(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _id_of(self, name: str) -> int | None:
        raise NotImplementedError

    def _own_name(self, token: int) -> str | None:
        raise NotImplementedError


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

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

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
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
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
            special_tokens={
                name: len(self.pieces) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)
            },
        )
        super().__init__(len(self.pieces) + len(LLAMA3_SPECIAL_TOKENS))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""
        return self._encoding.encode_ordinary(text)

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
