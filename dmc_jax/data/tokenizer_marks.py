"""How a model marks its texts, by tokenizers of all kinds: BOS, EOS, padding, added tokens."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

from dmc_jax.data.tokenizer_files import AddedToken, Beside, SpecialTokens
from dmc_jax.errors import UserError


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

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of `text`, in which the name of a special token means that token."""
        added = {entry.content: token for token, entry in self.added.items()}
        return encode_around(self._own_special() | added, text, self._encode_special_own)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " T"]) -> str:
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

    def _own_special(self) -> dict[str, int]:
        """Ids by names of special tokens that `_encode_special_own` does not find itself."""
        return {}

    def _encode_special_own(self, text: str) -> list[int]:
        return self.encode(text)

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


def encode_around(
    special: Mapping[str, int], text: str, encode: Callable[[str], list[int]]
) -> list[int]:
    """Encode a text in which names of tokens mean these tokens; the longest name counts.

    Args:
        special: ids of tokens by their names.
        text: any.
        encode: of the text around them.
    """
    if not special:
        return encode(text)
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    parts = re.split(f"({names})", text)  # texts at even places, names at odd ones
    return [
        token
        for place, part in enumerate(parts)
        for token in ([special[part]] if place % 2 else encode(part) if part else [])
    ]
