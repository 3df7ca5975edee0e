"""Hugging Face checkpoints: a folder with `config.json` and weights, read without transformers.

Weights are one safetensors file or several with an index, or the same with PyTorch's `.bin`, for
which torch is not needed either. A folder that this project exported from a DMC model also holds
`dmc_config.json`, and comes back as that model.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmc_jax.config import from_dict
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import TOKENIZER_NAMES
from dmc_jax.data.tokenizer_files import COMPANIONS
from dmc_jax.errors import UserError
from dmc_jax.interop.huggingface_config import model_config
from dmc_jax.interop.parameters import check_tensors
from dmc_jax.interop.safetensors_files import open_safetensors, read_json_object
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.interop.torch_files import open_torch_file
from dmc_jax.policies.choice import Trained
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC

DMC_CONFIG = "dmc_config.json"
DMC_FORMAT = "dmc_jax.dmc"
DMC_VERSION = 1


def is_huggingface(path: str | os.PathLike) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint: by its names and its config's."""
    path = Path(path)
    names = ("model.safetensors", "pytorch_model.bin")
    weights = [path / name for name in (*names, *(f"{name}.index.json" for name in names))]
    return (path / "config.json").is_file() and any(file.is_file() for file in weights)


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
    config, notes = model_config(str(path / "config.json"), read_json_object(path / "config.json"))
    tensors = check_tensors(str(path), config, _open_weights(path))
    return Source(
        format="huggingface",
        path=path,
        config=config,
        policy=_policy(path / DMC_CONFIG),
        tensors=tensors,
        tokenizer=tokenizer_files(path),
        notes=notes,
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


def _policy(file: Path) -> Trained:
    """Read `dmc_config.json`; without one the model is dense."""
    if not os.path.lexists(file):
        return Dense()
    raw = read_json_object(file)
    if (raw.pop("format", None), raw.pop("version", None)) != (DMC_FORMAT, DMC_VERSION):
        raise UserError(f"{file}: expected format {DMC_FORMAT} version {DMC_VERSION}")
    threshold = raw.pop("threshold", None)
    if type(threshold) not in (int, float) or not abs(threshold) < 1e30:
        raise UserError(f"{file}: threshold is {threshold!r}; expected a number")
    missing = sorted({"window", "temperature", "offset", "eps"} - set(raw))
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}")
    try:
        return DMC(from_dict(DMCSettings, raw), float(threshold))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


# ---- weights ----------------------------------------------------------------------------------


def _open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file or of the files of an index, preferred as transformers does."""
    for name, open_file in (
        ("model.safetensors", open_safetensors),
        ("pytorch_model.bin", _open_bin),
    ):
        if (path / name).is_file():
            return open_file(path / name)
        if (path / f"{name}.index.json").is_file():
            return _open_shards(path / f"{name}.index.json", Path(name).suffix, open_file)
    raise UserError(
        f"{path} has no weights: expected model.safetensors or pytorch_model.bin, or an index of "
        "several such files"
    )


def _open_shards(
    index: Path, suffix: str, open_file: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which must agree with it."""
    weight_map = read_json_object(index).get("weight_map")
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
    tensors: dict[str, Tensor] = {}
    found_in: dict[str, str] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not (index.parent / file).is_file():
            raise UserError(f"{index} names {file}, which is not there: fetch it again")
        for name, tensor in open_file(index.parent / file).items():
            if name in tensors:
                raise UserError(
                    f"{index.parent}: {name[:100]!r} is both in {found_in[name]} and in {file}"
                )
            tensors[name], found_in[name] = tensor, file
    for name, file in weight_map.items():
        if found_in.get(name) != file:
            where = f"it is in {found_in[name]}" if name in found_in else "it is in none of them"
            raise UserError(f"{index} says that {name[:100]!r} is in {file}; {where}")
    return tensors


def _open_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file."""
    found = open_torch_file(file)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise UserError(f"{file}: expected a dictionary of tensors by name")
    return found
