"""Hugging Face checkpoints: a folder with `config.json` and weights, read without transformers.

Weights are one safetensors file or several with an index, or the same with PyTorch's `.bin`, for
which torch is not needed either. A folder that this project exported from a DMC model also holds
`dmc_config.json`, and comes back as that model; one exported with gates comes back with them.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import TOKENIZER_NAMES
from dmc_jax.data.tokenizer_files import COMPANIONS
from dmc_jax.errors import UserError
from dmc_jax.fields import from_dict
from dmc_jax.interop.gates import gates_of
from dmc_jax.interop.huggingface_config import model_config
from dmc_jax.interop.parameters import (
    canonical_name,
    canonical_tensors,
    check_tensors,
    frequency_notes,
)
from dmc_jax.interop.safetensors_files import (
    listing,
    open_safetensors,
    read_json_object,
    with_aliases,
)
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.interop.torch_files import open_torch_file
from dmc_jax.policies.choice import Trained
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC

DMC_CONFIG = "dmc_config.json"
DMC_FORMAT = "dmc_jax.dmc"
DMC_VERSION = 1

_KINDS = ("model.safetensors", "pytorch_model.bin")  # files of weights, the preferred one first
_NUMBERED = re.compile(r"(model|pytorch_model)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def is_huggingface(path: str | os.PathLike) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint: by its names and its config's."""
    path = Path(path)
    if not (path / "config.json").is_file():
        return False
    named = [path / name for kind in _KINDS for name in (kind, f"{kind}.index.json")]
    return any(file.is_file() for file in named) or any(
        file.suffix == ".safetensors" or _NUMBERED.fullmatch(file.name) for file in path.iterdir()
    )


def open_huggingface(path: str | os.PathLike) -> Source:
    """Open a checkpoint, checking everything but the contents of its tensors.

    Args:
        path: the folder.

    Raises:
        UserError: no such checkpoint, another architecture, or files that are damaged or
            contradict each other.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is no Hugging Face checkpoint: it has no config.json; name the folder of the "
            "downloaded repository"
        )
    raw = read_json_object(path / "config.json")
    config, notes = model_config(str(path / "config.json"), raw)
    tensors, found = _open_weights(path)
    tensors = canonical_tensors(str(path), tensors)
    config, tensors, settled = _settle_head(str(path), config, tensors)
    disagreeing = frequency_notes(config, tensors)
    tensors = check_tensors(str(path), config, tensors)
    return Source(
        format="huggingface",
        path=path,
        config=config,
        policy=_policy(path / DMC_CONFIG, raw.get("dmc")),
        tensors=tensors,
        tokenizer=tokenizer_files(path),
        notes=(*notes, *found, *settled, *disagreeing),
        gates=gates_of(path, raw, config),
    )


def tokenizer_files(path: Path) -> tuple[Path, ...]:
    """The tokenizer's files in a folder, the one to load first; () where there is none."""
    found = [path / name for name in TOKENIZER_NAMES if (path / name).is_file()]
    if not found:
        return ()
    return (*found, *(path / n for n in COMPANIONS if (path / n).is_file()))


def dmc_config_json(policy: DMC) -> dict[str, Any]:
    """`dmc_config.json`: what makes a dense Llama's weights a DMC model."""
    return {
        "format": DMC_FORMAT,
        "version": DMC_VERSION,
        **dataclasses.asdict(policy.settings),
        "threshold": policy.threshold,
    }


def _policy(file: Path, inside: Any) -> Trained:
    """Read `dmc_config.json`, or what config.json repeats of it; without either it is dense.

    Args:
        file: it.
        inside: the field `dmc` of config.json, which the remote code computes by.

    Raises:
        UserError: another format, or the two disagree.
    """
    inside = {k: v for k, v in inside.items() if k != "warning"} if isinstance(inside, dict) else {}
    named = os.path.lexists(file)
    where = str(file) if named else f"{file.with_name('config.json')}, dmc"
    raw = read_json_object(file) if named else dict(inside)
    if not raw and not named:
        return Dense()
    for name in sorted({*raw, *inside} if inside else ()):
        if raw.get(name) != inside.get(name):
            raise UserError(
                f"{file.name} says {name} {raw.get(name)!r:.60}, config.json beside it (dmc) "
                f"{inside.get(name)!r:.60}, in {file.parent}: change both"
            )
    if (raw.pop("format", None), raw.pop("version", None)) != (DMC_FORMAT, DMC_VERSION):
        raise UserError(f"{where}: expected format {DMC_FORMAT} version {DMC_VERSION}")
    threshold = raw.pop("threshold", None)
    if type(threshold) not in (int, float) or not abs(threshold) < 1e30:
        raise UserError(f"{where}: threshold is {threshold!r}; expected a number")
    missing = sorted({"window", "temperature", "offset", "eps"} - set(raw))
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    try:
        return DMC(from_dict(DMCSettings, raw), float(threshold))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# ---- weights ----------------------------------------------------------------------------------


def _settle_head(
    where: str, config: ModelConfig, tensors: dict[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor], tuple[str, ...]]:
    """Decide on the head of a model whose config ties it to the embedding, and say so."""
    if not config.tied_embeddings or _HEAD not in tensors:
        return config, tensors, ()
    others = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
    if _EMBEDDING not in tensors:
        note = f"{where} stores the embedding as {_HEAD} alone, to which its config ties it"
        return config, {_EMBEDDING: tensors[_HEAD], **others}, (note,)
    if _equal(tensors[_HEAD], tensors[_EMBEDDING]):
        return config, others, ()
    note = (
        f"{where}: tie_word_embeddings is true, but {_HEAD} is stored too and differs from "
        f"{_EMBEDDING}: it is kept, as a head of its own"
    )
    return dataclasses.replace(config, tied_embeddings=False), tensors, (note,)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and np.array_equal(one.read(), other.read()))


def _open_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of one file or of several, preferred as transformers does, and notes."""
    for name in _KINDS:
        if (path / name).is_file():
            return _open_file(path / name), ()
        if (path / f"{name}.index.json").is_file():
            return _open_shards(path / f"{name}.index.json", Path(name).suffix), ()
    for name in _KINDS:
        numbered = _numbered_shards(path, Path(name).suffix)
        if numbered:
            note = f"{path} has no {name}.index.json: all its {len(numbered)} shards are read"
            return _merged({file: _open_file(path / file) for file in numbered}, path), (note,)
    others = _other_weights(path)
    if len(others) == 1:
        note = f"{path} has no model.safetensors: {others[0]} is read"
        return _open_file(path / others[0]), (note,)
    raise UserError(
        f"{path} has no weights: expected model.safetensors or pytorch_model.bin, an index of "
        f"several such files, or files numbered as in model-00001-of-00002.safetensors; found "
        f"{listing(path)}"
    )


def _numbered_shards(path: Path, suffix: str) -> list[str]:
    """Names of shards that say how many they are, all of them; [] where there are none.

    Raises:
        UserError: some are missing, or there are two sets.
    """
    names = sorted(file.name for file in path.iterdir() if file.name.endswith(suffix))
    found = [(name, match) for name in names if (match := _NUMBERED.fullmatch(name))]
    if not found:
        return []
    sets = {(match[1], match[3]) for _, match in found}
    if len(sets) > 1:
        raise UserError(f"{path} has no index, and shards of {len(sets)} sets: {listing(path)}")
    count, there = int(found[0][1][3]), {int(match[2]) for _, match in found}
    missing = [number for number in range(1, count + 1) if number not in there]
    if missing or len(found) != count:
        raise UserError(
            f"{path} has {len(found)} of {count} shards: those missing have the numbers "
            f"{', '.join(map(str, missing[:9]))}{' ...' if len(missing) > 9 else ''}"
        )
    return [name for name, _ in found]


def _other_weights(path: Path) -> list[str]:
    """Files of weights with a name of their own; adapters and Meta's layout are none."""
    return sorted(
        file.name
        for file in path.glob("*.safetensors")
        if not _NUMBERED.fullmatch(file.name)
        and not file.name.startswith(("adapter", "consolidated", "model.safetensors"))
    )


def _merged(files: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """All tensors of several files.

    Raises:
        UserError: a tensor is in two of them.
    """
    tensors: dict[str, Tensor] = {}
    found_in: dict[str, str] = {}
    for file, found in files.items():
        for name, tensor in found.items():
            if name in tensors:
                raise UserError(
                    f"{folder}: {name[:100]!r} is both in {found_in[name]} and in {file}"
                )
            tensors[name], found_in[name] = tensor, file
    return tensors


def _open_shards(index: Path, suffix: str) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which must agree with it."""
    content = read_json_object(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is no table of tensors and files")
    for file in weight_map.values():
        # A plain name, so that nothing outside the folder is ever opened.
        plain = isinstance(file, str) and file.isprintable() and not set(file) & set("/\\:")
        if not plain or not file.endswith(suffix) or len(file) > 200:
            raise UserError(
                f"{index} names the file {str(file)[:100]!r}; expected the name of a {suffix} file "
                "in the same folder"
            )
    files = dict.fromkeys(weight_map.values())
    for file in files:
        if not (index.parent / file).is_file():
            raise UserError(
                f"{index} names {file}, which is not there; there are {listing(index.parent)}"
            )
        files[file] = _open_file(index.parent / file)
    tensors = with_aliases(_merged(files, index.parent), content.get("metadata"))
    for name, file in weight_map.items():
        if name in files[file] or (name not in tensors and canonical_name(name) == _HEAD):
            continue  # whether a head is needed, the model's config says
        if name not in tensors:
            raise UserError(f"{index} says that {name[:100]!r} is in {file}; it is in none of them")
        others = [other for other, found in files.items() if name in found]
        if others:
            raise UserError(f"{index} says that {name[:100]!r} is in {file}; it is in {others[0]}")
    return tensors


def _open_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or a PyTorch file."""
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    found = open_torch_file(file)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise UserError(f"{file}: expected a dictionary of tensors by name")
    return found
