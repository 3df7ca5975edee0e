"""Tokenizers as transformers reads them: tokenizer.json and its configuration, for any kind.

A SentencePiece model or a tiktoken file alone is guessed about there, differently by version. So an
export says it all: the same pieces as `tokenizer.json`, and by which rule texts are marked.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmc_jax.data.tokenizer import (
    Marked,
    SentencePieceTokenizer,
    SpecialTokens,
    TiktokenTokenizer,
    load_tokenizer,
)
from dmc_jax.data.tokenizer_files import read_json_object, write_json
from dmc_jax.data.tokenizer_formats import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIAL_TOKENS,
    LibraryMissing,
)

_SPACE = "\u2581"
_GENERIC = "PreTrainedTokenizerFast"  # reads tokenizer.json as it stands, in every version
_NEVER = -1e6  # log-probability, far below any piece's
_UNIGRAM, _BPE = 1, 2  # model types of SentencePiece


def write_tokenizer_files(
    folder: Path, name: str, special: SpecialTokens | None, max_length: int
) -> SpecialTokens | None:
    """Complete the tokenizer of an export, so that transformers gives the ids that we do.

    A text that holds a literal U+2581 is the exception for SentencePiece models: it is a space
    there, as for the model's own pieces.

    Args:
        folder: with the tokenizer's files.
        name: of the one to load.
        special: how texts are marked; None: as these files say.
        max_length: tokens that the model knows.

    Returns:
        How texts are marked; None where the tokenizer's library is not installed.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    try:
        tokenizer = load_tokenizer(folder / name, special)
        by_itself = load_tokenizer(folder / name).special
    except LibraryMissing:
        return special  # it is passed on unread
    config = read_json_object(folder / "tokenizer_config.json")
    wanted = {}
    if "tokenizer_class" not in config:
        wanted["tokenizer_class"] = _GENERIC
        wanted |= {"clean_up_tokenization_spaces": False, "model_max_length": max_length}
        if not (folder / "tokenizer.json").exists():
            content = _as_json(tokenizer)
            if content is None:
                del wanted["tokenizer_class"]
            else:
                write_json(folder / "tokenizer.json", content)
    ours = tokenizer.special
    if "add_bos_token" not in config or by_itself.add_bos != ours.add_bos:
        wanted |= {"add_bos_token": ours.add_bos}
    for key, token in (("bos_token", ours.bos_id), ("eos_token", ours.eos_ids[0])):
        if key not in config and (piece := tokenizer.name_of(token)) is not None:
            wanted[key] = piece
    changed = {key: value for key, value in wanted.items() if key == "add_bos_token"}
    if config | {k: v for k, v in wanted.items() if k not in config} | changed != config:
        write_json(folder / "tokenizer_config.json", wanted | config | changed)
    generation = read_json_object(folder / "generation_config.json")
    ends = {"bos_token_id": ours.bos_id if ours.bos_id >= 0 else None, "eos_token_id": ids_of(ours)}
    if generation | ends != generation:
        write_json(folder / "generation_config.json", generation | ends)
    return ours


def ids_of(special: SpecialTokens) -> int | list[int]:
    """EOS as these files hold it: one id, or the list of several."""
    return special.eos_ids[0] if len(special.eos_ids) == 1 else list(special.eos_ids)


def _as_json(tokenizer: Marked) -> dict[str, Any] | None:
    """`tokenizer.json` of another kind of tokenizer; None for what it cannot express."""
    if isinstance(tokenizer, TiktokenTokenizer):
        parts = _tiktoken(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        parts = _sentencepiece(tokenizer)
    else:
        return None
    return parts and parts | {"post_processor": _opening(tokenizer)}


def _opening(tokenizer: Marked) -> dict[str, Any] | None:
    """What puts BOS before every text."""
    name = tokenizer.name_of(tokenizer.bos_id)
    if not tokenizer.add_bos or name is None:
        return None
    bos, text = (
        {"SpecialToken": {"id": name, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, bos, second],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }


def added_token(token: int, content: str, special: bool = True) -> dict[str, Any]:
    """An entry of `added_tokens` in tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": content, **flags, "special": special}


# ---- byte-level ---------------------------------------------------------------------------------


def byte_level_json(
    cuts: Sequence[str],
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Sequence[Mapping[str, Any]],
    whole_first: bool,
) -> dict[str, Any]:
    """What tokenizer.json says of byte-level BPE, but for what marks the beginning of a text.

    Args:
        cuts: patterns by which a text is cut before merging, each within the pieces of the last.
        vocabulary: ids of tokens, spelled in `byte_letters`.
        merges: pairs of tokens in their order.
        added: entries of `added_token`.
        whole_first: a piece of text that is a token is that token, whatever the merges make of it.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in cuts
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, byte_level | {"use_regex": False}],
        },
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_first,
            "vocab": dict(vocabulary),
            "merges": [list(pair) for pair in merges],
        },
    }


def _tiktoken(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    letters = byte_letters()
    ranks = {piece: rank for rank, piece in enumerate(tokenizer.pieces)}
    merges = []
    for piece in tokenizer.pieces:
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in ranks and b in ranks]
        merges += sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))

    def spelt(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    first = len(ranks)
    return byte_level_json(
        [LLAMA3_PATTERN],
        {spelt(piece): rank for piece, rank in ranks.items()},
        [(spelt(a), spelt(b)) for a, b in merges],
        [added_token(first + i, name) for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)],
        whole_first=True,
    )


def byte_letters() -> list[str]:
    """A printable letter for every byte, those of GPT-2's tokenizer (its `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


# ---- SentencePiece ------------------------------------------------------------------------------


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    # Comes with sentencepiece; what it needs comes with Orbax.
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.processor.serialized_model_proto())
    kind, pieces = proto.trainer_spec.model_type, proto.pieces
    if kind not in (_UNIGRAM, _BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        return None
    Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
    added = [
        added_token(token, piece.piece, piece.type != Piece.USER_DEFINED)
        for token, piece in enumerate(pieces)
        if piece.type in (Piece.CONTROL, Piece.UNKNOWN, Piece.USER_DEFINED)
    ]
    known = {entry["content"] for entry in added}
    for token, entry in sorted(tokenizer.added.items()):
        if entry.content not in known:
            added.append(added_token(token, entry.content, entry.special))
    unknown = proto.trainer_spec.unk_id
    matched = (Piece.NORMAL, Piece.USER_DEFINED)
    if kind == _BPE:
        normal = {piece.piece: -piece.score for piece in pieces if piece.type == Piece.NORMAL}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unknown].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: token for token, piece in enumerate(pieces)},
            "merges": _merges(normal),
        }
    else:
        model = {
            "type": "Unigram",
            "unk_id": unknown,
            # Text that spells a control or byte token is text; the score keeps it so.
            "vocab": [[p.piece, p.score if p.type in matched else _NEVER] for p in pieces],
            "byte_fallback": proto.trainer_spec.byte_fallback,
        }
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *(strip if tokenizer.dummy_prefix else []),
            ],
        },
        "model": model,
    }


def _merges(order: dict[str, float]) -> list[list[str]]:
    """Pairs in the order in which SentencePiece merges them: by the rank of what they make."""
    merges = []
    for piece in sorted(order, key=order.__getitem__):
        for at in range(1, len(piece)):
            if piece[:at] in order and piece[at:] in order:
                merges.append([piece[:at], piece[at:]])
    return merges


def _normalizer(spec: Any) -> dict[str, Any]:
    """What SentencePiece does to a text before it looks for pieces, in its order."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        for runs, left in ((r"\A +| +\z", ""), (" {2,}", " ")):  # of spaces, and nothing else
            steps.append({"type": "Replace", "pattern": {"Regex": runs}, "content": left})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    if spec.escape_whitespaces:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}
