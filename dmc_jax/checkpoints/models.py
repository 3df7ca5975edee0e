"""Models from checkpoints, ready to run: our own, or anyone's that `interop` can read.

Whether a path holds a checkpoint of ours is asked here and nowhere else. Only where it does not are
the readers of other formats loaded.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dmc_jax.checkpoints.gates import FILE, StoredGates
from dmc_jax.checkpoints.metadata import FORMAT, Metadata, load_metadata
from dmc_jax.checkpoints.run_directory import CheckpointRef, latest
from dmc_jax.checkpoints.states import load_params
from dmc_jax.config import ModelConfig
from dmc_jax.data.prepared import PreparedData
from dmc_jax.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from dmc_jax.errors import UserError
from dmc_jax.model.llama import abstract_params
from dmc_jax.model.sharding import with_shardings
from dmc_jax.policies.choice import Trained


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model on disk, of any format, with all that is known of it but its parameters."""

    path: Path
    format: str  # dmc_jax | huggingface | meta | megatron | gguf
    metadata: Metadata
    tokenizer: Path | None  # None: it came without one
    tokenizer_sha256: frozenset[str]  # of its tokenizer, in each form that it has; empty: unknown
    read_params: Callable[[Any], Any]  # a tree of `jax.ShapeDtypeStruct` -> of arrays placed so
    notes: tuple[str, ...] = ()  # what the user should know, a sentence each
    gates: StoredGates | None = None  # that came along, with which it compresses

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""
        return self.metadata.model

    @property
    def policy(self) -> Trained:
        """What it was trained for."""
        return self.metadata.policy

    def own_gates(self, policy: str | None) -> StoredGates | None:
        """The gates that came along, unless it shall run with a policy that they are not for.

        Args:
            policy: its name; None: what the model is for.
        """
        return self.gates if self.gates and policy in (None, self.gates.policy.name) else None

    def accepts_tokenizer(self, sha256: str) -> bool:
        """Whether a tokenizer may be its own: False where that is known to be another."""
        return not self.tokenizer_sha256 or sha256 in self.tokenizer_sha256

    def load(self, mesh: Mesh | None = None, dtype: str = "float32") -> "LoadedModel":
        """Read the parameters.

        Args:
            mesh: devices to spread them over; None: the first device.
            dtype: of the matrices, whatever they are stored in. Scales of norms are float32.

        Raises:
            UserError: a damaged checkpoint.
        """
        shapes = abstract_params(self.config)
        shapes = jax.tree_util.tree_map_with_path(functools.partial(_in_dtype, dtype), shapes)
        if mesh is not None:
            shapes = with_shardings(shapes, mesh)
        return LoadedModel(**vars(self), params=self.read_params(shapes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(StoredModel):
    """A model ready to run."""

    params: Any


def find_model(path: str | os.PathLike) -> StoredModel:
    """Open a checkpoint of any format without reading its parameters.

    Args:
        path: of ours, a run directory (the newest step of its furthest stage), a stage of it or a
            step; of others, the folder, or the file of a GGUF model.

    Raises:
        UserError: there is none, or a damaged one.
    """
    path = os.path.expanduser(path)
    ref = latest(path)
    if ref is not None:
        return _ours(ref)
    from dmc_jax.interop.direct import find_foreign  # its readers are many

    model = find_foreign(Path(path))
    if model is None:
        raise UserError(
            f"no complete checkpoint in {path}; expected a run directory, a stage of one "
            "(RUN/finetune) or a step of that (RUN/finetune/600), or a folder with a checkpoint of "
            "Hugging Face, Meta or Megatron, or a GGUF file"
        )
    return model


def open_model(
    path: str | os.PathLike, mesh: Mesh | None = None, dtype: str = "float32"
) -> LoadedModel:
    """Open a checkpoint of any format, ready to run.

    Args:
        path: as in `find_model`.
        mesh: as in `StoredModel.load`.
        dtype: as there.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    return find_model(path).load(mesh, dtype)


def load_tokenizer_of(
    model: StoredModel, path: str | os.PathLike | None = None, add_bos: bool | None = None
) -> Tokenizer:
    """Load the tokenizer that a model was trained with.

    Args:
        model: from `find_model` or `open_model`.
        path: where it is now; None: where it was, or came along.
        add_bos: whether texts begin with BOS; None: as the model has it.

    Raises:
        UserError: no tokenizer there, or another one.
    """
    path = path or model.tokenizer
    if path is None:
        raise UserError(
            f"{model.path} came without a tokenizer that can be read: name one with "
            "--tokenizer=FILE"
        )
    if path == model.tokenizer and not Path(path).is_file():
        raise UserError(
            f"{path}, the tokenizer of {model.path}, is not there any more: say where it is with "
            "--tokenizer=FILE"
        )
    tokenizer = load_tokenizer(path, model.metadata.special_tokens, add_bos)
    if not model.accepts_tokenizer(fingerprint(path)):
        raise UserError(
            f"{path} is not the tokenizer that {model.path} was trained with: name that one with "
            "--tokenizer=FILE"
        )
    return tokenizer


def check_tokenizer_of(model: StoredModel, data: PreparedData) -> None:
    """Refuse text whose ids are not the model's.

    Args:
        model: from `find_model` or `open_model`.
        data: from `open_data`.

    Raises:
        UserError: it was made with another tokenizer.
    """
    if not model.accepts_tokenizer(data.manifest["tokenizer_sha256"]):
        raise UserError(
            f"{data.path} was made with another tokenizer than {model.path} was trained with: "
            f"prepare the text with that one (prepare_data --tokenizer={model.tokenizer})"
        )


def tokenizer_path(ref: CheckpointRef, metadata: Metadata) -> Path | None:
    """Where the tokenizer of a checkpoint is; a converted one names a file beside itself."""
    return (ref.path / metadata.tokenizer).resolve() if metadata.tokenizer else None


def _ours(ref: CheckpointRef) -> StoredModel:
    metadata = load_metadata(ref)
    if metadata.base_sha256 is not None:
        run, made = ref.path.parents[1], metadata.run
        model = made.init_from if made.gates.model == "frozen" else run / "model"
        raise UserError(
            f"{ref.path} holds gates, and no model: name the model that they were made for "
            f"({model}), and beside it --gates={run / FILE}"
        )
    sha256 = metadata.tokenizer_sha256
    return StoredModel(
        path=ref.path,
        format=FORMAT,
        metadata=metadata,
        tokenizer=tokenizer_path(ref, metadata),
        tokenizer_sha256=frozenset([sha256] if sha256 else []),
        read_params=functools.partial(load_params, ref),
    )


def _in_dtype(dtype: str, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    wanted = jnp.float32 if path[-1].key == "scale" else jnp.dtype(dtype)
    return jax.ShapeDtypeStruct(leaf.shape, wanted)
