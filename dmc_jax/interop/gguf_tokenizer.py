"""The tokenizer in a GGUF file's metadata, as the files that our tokenizers are read from.

A byte-level one (`gpt2`) becomes a tokenizer.json, for which the file names how text is cut before
merging, and a SentencePiece one (`llama`) becomes such a model. The rules are llama.cpp's:
src/llama-vocab.cpp of https://github.com/ggml-org/llama.cpp.
"""

import collections
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from dmc_jax.data.tokenizer_formats import LLAMA3_PATTERN
from dmc_jax.errors import UserError
from dmc_jax.files import appears_when_complete, user_cache
from dmc_jax.interop.fields import Fields, shown
from dmc_jax.interop.gguf_files import GGUFFile
from dmc_jax.interop.tokenizer_export import added_token, byte_letters, byte_level_json

_KEYS = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # types, those of SentencePiece
_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (LLAMA3_PATTERN,)
# What cuts a text before merging: each pattern in turn, within the pieces of the one before.
_CUTS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """What both kinds of tokenizers have."""

    where: Path
    metadata: dict[str, Any]
    tokens: list[str]
    types: list[int]

    def token_id(self, name: str) -> int | None:
        """The id that the metadata gives a special token, None where it gives none."""
        token = self.metadata.get(f"{_KEYS}{name}_token_id")
        if token is None:
            return None
        if type(token) is not int or not 0 <= token < len(self.tokens):
            raise UserError(
                f"{self.where}: {_KEYS}{name}_token_id is {shown(token)}, there are "
                f"{len(self.tokens)} tokens"
            )
        return token


def unpacked_tokenizer(file: GGUFFile) -> tuple[Path, ...]:
    """Write a file's tokenizer into the user's cache folder, where it is not there yet.

    There it has a folder of `user_cache("tokenizers")` that is named by the contents.

    Returns:
        The tokenizer's file and those beside it; () where the metadata has no tokenizer.

    Raises:
        UserError: of a kind that cannot be read, damaged, or a cache that cannot be written.
    """
    kind = Fields(str(file.path), file.metadata).text(_KEYS + "model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return ()
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{file.path}: the tokenizer ({_KEYS}model) is {shown(kind)}; gpt2 and llama can "
            "be read"
        )
    vocabulary = _vocabulary(file)
    contents = _byte_level(vocabulary) if kind == "gpt2" else _sentencepiece(vocabulary)
    contents |= _marks(vocabulary, kind)
    digest = hashlib.sha256()
    for name, data in contents.items():
        digest.update(f"{name} {len(data)}\n".encode() + data)
    try:
        folder = user_cache("tokenizers") / digest.hexdigest()[:16]
        for name, data in contents.items():
            kept = folder / name
            if not kept.is_file() or kept.read_bytes() != data:
                with appears_when_complete(kept) as partial:
                    partial.write_bytes(data)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{file.path}: its tokenizer cannot be written to the user's cache ({error}): set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return tuple(folder / name for name in contents)


def _vocabulary(file: GGUFFile) -> _Vocabulary:
    tokens = file.metadata.get(_KEYS + "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{file.path}: {_KEYS}tokens is no list of texts, or an empty one")
    types = file.metadata.get(_KEYS + "token_type")
    types = [1] * len(tokens) if types is None else _numbers(file, "token_type", len(tokens))
    used = (token for token, kind in zip(tokens, types, strict=True) if kind != _UNUSED)
    for token, count in collections.Counter(used).items():
        if not token or count > 1:
            raise UserError(f"{file.path}: the token {token[:60]!r} is empty or there twice")
    return _Vocabulary(file.path, file.metadata, tokens, types)


def _numbers(file: GGUFFile | _Vocabulary, name: str, count: int) -> list:
    """An array of the metadata with one number a token."""
    where = file.path if isinstance(file, GGUFFile) else file.where
    values = file.metadata.get(_KEYS + name)
    if not isinstance(values, np.ndarray) or len(values) != count or not np.isfinite(values).all():
        raise UserError(f"{where}: {_KEYS}{name} is no array of {count} numbers, one a token")
    return values.tolist()


def _marks(vocabulary: _Vocabulary, kind: str) -> dict[str, bytes]:
    """The files that say how texts are marked, and the chat template."""
    metadata, tokens = vocabulary.metadata, vocabulary.tokens
    ids = {name: vocabulary.token_id(name) for name in ("bos", "eos", "eot", "eom")}
    ids["unk"], ids["pad"] = vocabulary.token_id("unknown"), vocabulary.token_id("padding")
    adds = kind == "llama" or _CUTS[metadata[_KEYS + "pre"]] is _LLAMA3
    adds = metadata.get(_KEYS + "add_bos_token", adds)
    template = metadata.get("tokenizer.chat_template")
    if type(adds) is not bool or not isinstance(template, str | None):
        raise UserError(
            f"{vocabulary.where}: {_KEYS}add_bos_token is no truth value, or "
            "tokenizer.chat_template no text"
        )
    named = {
        f"{name}_token": tokens[ids[name]]
        for name in ("bos", "eos", "unk", "pad")
        if ids[name] is not None
    }
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    config = named | {"add_bos_token": adds} | ({"chat_template": template} if template else {})
    generation = {"bos_token_id": ids["bos"], "eos_token_id": list(dict.fromkeys(ends))}
    return {
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json(generation),
    }


def _byte_level(vocabulary: _Vocabulary) -> dict[str, bytes]:
    """tokenizer.json for byte-level BPE."""
    where, metadata = vocabulary.where, vocabulary.metadata
    pre = Fields(str(where), metadata).text(_KEYS + "pre")
    if pre not in _CUTS:
        raise UserError(
            f"{where}: how text is cut before merging ({_KEYS}pre) is {shown(pre)}; those that can "
            f"be read are {', '.join(_CUTS)}"
        )
    used = [
        (token, name, kind)
        for token, (name, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind != _UNUSED
    ]
    ids = {name: token for token, name, _ in used}
    merges = metadata.get(_KEYS + "merges")
    if not isinstance(merges, list):
        raise UserError(f"{where}: {_KEYS}merges is no list of texts")
    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        if not {first, second, first + second} <= ids.keys():
            raise UserError(
                f"{where}: {_KEYS}merges has {merge[:60]!r}; expected two tokens that make a third"
            )
        pairs.append([first, second])
    added = [
        added_token(token, name, kind != _USER_DEFINED)
        for token, name, kind in used
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    letters = set(byte_letters())
    plain = (name for _, name, kind in used if kind == 1)
    strange = next((name for name in plain if not letters.issuperset(name)), None)
    if strange is not None:
        raise UserError(
            f"{where}: the token {strange[:60]!r} is not written in the letters of bytes, as those "
            "of a gpt2 tokenizer are"
        )
    content = byte_level_json(_CUTS[pre], ids, pairs, added, _CUTS[pre] is _LLAMA3)
    return {"tokenizer.json": _json(content)}


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, bytes]:
    """A SentencePiece model, whose merges follow from the scores of its pieces."""
    # Comes with sentencepiece; what it needs comes with Orbax.
    from sentencepiece import sentencepiece_model_pb2

    where, tokens, types = vocabulary.where, vocabulary.tokens, vocabulary.types
    proto = sentencepiece_model_pb2.ModelProto()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in types
    for name in ("unk", "bos", "eos", "pad"):
        token = vocabulary.token_id({"unk": "unknown", "pad": "padding"}.get(name, name))
        if name == "unk" and token is None and _UNKNOWN in types:
            token = types.index(_UNKNOWN)
        setattr(trainer, f"{name}_id", -1 if token is None else token)
        if token is not None:
            setattr(trainer, f"{name}_piece", tokens[token])
    normalizer.name = "identity"
    flags = {"add_space_prefix": True, "remove_extra_whitespaces": False}
    given = {name: vocabulary.metadata.get(_KEYS + name, value) for name, value in flags.items()}
    if not all(type(value) is bool for value in given.values()):
        raise UserError(f"{where}: {' or '.join(_KEYS + name for name in flags)} is no truth value")
    normalizer.add_dummy_prefix = given["add_space_prefix"]
    normalizer.remove_extra_whitespaces = given["remove_extra_whitespaces"]
    normalizer.escape_whitespaces = True
    scores = _numbers(vocabulary, "scores", len(tokens))
    for name, score, kind in zip(tokens, scores, types, strict=True):
        if kind not in range(1, 7):
            raise UserError(f"{where}: the token {name[:60]!r} has type {kind}; expected 1 to 6")
        # Tokens that were added to a SentencePiece model are spelled with spaces.
        piece = name.replace(" ", _SPACE) if kind == _USER_DEFINED else name
        proto.pieces.add(piece=piece, score=score, type=kind)
    data = proto.SerializeToString(deterministic=True)
    try:
        sentencepiece.SentencePieceProcessor().load_from_serialized_proto(data)
    except RuntimeError as error:
        raise UserError(
            f"{where}: its tokens make no SentencePiece model ({str(error)[:200]})"
        ) from None
    return {"tokenizer.model": data}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()
