"""What lies beside a tokenizer and says how a model marks its texts, in Hugging Face's files.

tokenizer_config.json     names of BOS, EOS and padding, whether BOS is added, added tokens
special_tokens_map.json   the same names, in older checkpoints
added_tokens.json         ids of added tokens, in older checkpoints
generation_config.json    ids that end a text
config.json               likewise (the model's own configuration)
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmc_jax.errors import UserError
from dmc_jax.files import lfs_pointer

# What goes along with a tokenizer, where it is there.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_MOST_IDS = 2**31
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer")


@dataclass(frozen=True)
class SpecialTokens:
    """How a model marks its texts.

    Attributes:
        bos_id: beginning of a text; -1: it has none.
        eos_ids: each of them ends a text; the first one ends a document in training data.
        pad_id: fills unused places.
        add_bos: whether every text begins with BOS.
    """

    bos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    add_bos: bool


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a finished tokenizer."""

    content: str
    special: bool  # stands for nothing in text


@dataclass(frozen=True)
class Beside:
    """What the files beside a tokenizer say; None or empty where they do not."""

    where: Path  # their folder
    names: Mapping[str, str]  # bos_token, eos_token, pad_token
    add_bos: bool | None = None
    llama_class: bool = False  # of a class of tokenizers that add BOS where nothing else is said
    added: Mapping[int, AddedToken] | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


def read_beside(tokenizer: str | os.PathLike) -> Beside:
    """Read what lies beside a tokenizer's file.

    Args:
        tokenizer: the file.

    Raises:
        UserError: a file that is damaged, or holds a field of another type than it should.
    """
    folder = Path(tokenizer).parent
    config, older, added, generation, model = (
        read_json_object(folder / name)
        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "generation_config.json",
            "config.json",
        )
    )
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        name = _content(config.get(key)) or _content(older.get(key))
        if name is not None:
            names[key] = name
    add_bos = config.get("add_bos_token")
    if add_bos is not None and type(add_bos) is not bool:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: add_bos_token is {add_bos!r:.60}; expected true "
            "or false"
        )
    eos_ids = [
        *_ids(folder / "generation_config.json", generation, "eos_token_id"),
        *_ids(folder / "config.json", model, "eos_token_id"),
    ]
    bos_ids = [
        *_ids(folder / "generation_config.json", generation, "bos_token_id"),
        *_ids(folder / "config.json", model, "bos_token_id"),
    ]
    return Beside(
        where=folder,
        names=names,
        add_bos=add_bos,
        llama_class=config.get("tokenizer_class") in _LLAMA_CLASSES,
        added=_added_tokens(folder, config, older, added),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
    )


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; an empty one where there is no file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    if pointer := lfs_pointer(data):
        raise UserError(f"{file} {pointer}")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise UserError(f"{file} is not JSON: {reason}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def copy_with_companions(tokenizer: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a tokenizer's file and what lies beside it and belongs to it.

    Ids that end a text and stand in the model's config.json alone join generation_config.json, for
    a model's configuration does not go along.

    Args:
        tokenizer: the file.
        target: the file to make, in a folder that exists. Other files keep their names.

    Raises:
        OSError: they cannot be copied.
        UserError: as in `read_beside`.
    """
    tokenizer, target = Path(tokenizer), Path(target)
    shutil.copyfile(tokenizer, target)
    for name in COMPANIONS:
        file = tokenizer.parent / name
        if file.is_file() and not (target.parent / name).exists():
            shutil.copyfile(file, target.parent / name)
    eos_ids = read_beside(tokenizer).eos_ids
    if set(eos_ids) != set(read_beside(target).eos_ids):
        file = target.parent / "generation_config.json"
        write_json(file, read_json_object(file) | {"eos_token_id": list(eos_ids)})


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as people read it."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(token: Any) -> str | None:
    """The text of a token that is given as text, or as an object with more about it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _ids(file: Path, values: Mapping[str, Any], name: str) -> list[int]:
    """Ids in a field that holds one, a list of them or null."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and abs(token) < _MOST_IDS for token in ids):
        raise UserError(f"{file}: {name} is {value!r:.60}; expected a token id or a list of them")
    return [token for token in ids if token >= 0]  # -1 stands for none


def _added_tokens(
    folder: Path, config: Mapping[str, Any], older: Mapping[str, Any], ids: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """Added tokens by id; tokenizer_config.json outranks added_tokens.json."""
    more = [*_several(config), *_several(older)]
    names = {_content(table.get(key)) for table in (config, older) for key in table}
    special = {name for name in (*names, *map(_content, more)) if name}
    found = {}
    for content, token in ids.items():
        if type(token) is not int or not 0 <= token < _MOST_IDS:
            raise UserError(
                f"{folder / 'added_tokens.json'}: {content!r:.60} has {token!r:.60}; expected an id"
            )
        found[token] = AddedToken(content, content in special)
    decoder = config.get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        content = _content(entry)
        if content is None or not (token.isdecimal() and len(token) < 10):
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has {token!r:.60}: "
                f"{entry!r:.60}; expected an id and an object with its content"
            )
        flag = isinstance(entry, dict) and entry.get("special")
        found[int(token)] = AddedToken(content, bool(flag) or content in special)
    return found


def _several(table: Mapping[str, Any]) -> list[Any]:
    more = table.get("additional_special_tokens") or table.get("extra_special_tokens") or []
    return list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
