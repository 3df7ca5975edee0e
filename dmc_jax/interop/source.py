"""What every foreign format is read into: a model's sizes, and its tensors not read yet.

Each reader (`huggingface`, `meta`, `megatron`, `gguf`) opens a checkpoint as a `Source`, whose
tensors have the names and the layout of Hugging Face's Llama. So one table leads from there to our
parameters, and one tensor at a time has to be in memory.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmc_jax.checkpoints.gates import StoredGates
from dmc_jax.config import ModelConfig
from dmc_jax.data.tokenizer_files import SpecialTokens
from dmc_jax.policies.choice import Trained


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, still on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of NumPy, or of ml_dtypes
    read: Callable[[], np.ndarray]  # gives an array of that shape and dtype, in C order

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that was recognised and checked, but for the contents of its tensors."""

    format: str  # dmc_jax | huggingface | meta | megatron | gguf
    path: Path
    config: ModelConfig
    policy: Trained  # that the model was trained for
    tensors: dict[str, Tensor]  # by name, such as "model.layers.0.self_attn.q_proj.weight"
    tokenizer: tuple[Path, ...]  # files to go along with the weights; the one to load comes first
    special: SpecialTokens | None = None  # how texts are marked; None: as the tokenizer's files say
    notes: tuple[str, ...] = ()  # what the user should know, a sentence each
    gates: StoredGates | None = None  # with which a dense model compresses
