"""Tensors put together from the shards of tensor parallelism, still on disk."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dmc_jax.errors import UserError
from dmc_jax.interop.parameters import WRAPPERS
from dmc_jax.interop.source import Tensor

_WEIGHT_DTYPES = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32)))


def concatenated(parts: Sequence[Tensor], axis: int) -> Tensor:
    """The parts one after another along `axis`; a single part is itself."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)

    def read() -> np.ndarray:
        # Part by part into the whole: never all parts and the whole in memory at once.
        whole = np.empty(shape, parts[0].dtype)
        first = 0
        for part in parts:
            last = first + part.shape[axis]
            whole[(slice(None),) * axis + (slice(first, last),)] = part.read()
            first = last
        return whole

    return Tensor(tuple(shape), parts[0].dtype, read)


def transformed(
    tensor: Tensor, shape: tuple[int, ...], function: Callable[[np.ndarray], np.ndarray]
) -> Tensor:
    """`function` of a tensor, of the same dtype, when it is read; `shape` is the result's."""

    def read() -> np.ndarray:
        return np.ascontiguousarray(function(tensor.read())).reshape(shape)

    return Tensor(shape, tensor.dtype, read)


def _unwrapped(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in WRAPPERS]


class Shards:
    """The state dictionaries of all ranks of a model, taken apart name by name.

    Every tensor is asked for once, with the shape that the sizes of the model give it; `finish`
    then makes sure that nothing is left over.
    """

    def __init__(self, paths: Sequence[Path], states: Sequence[Any], skip: str):
        """Takes the state dictionaries of the ranks, in order.

        Args:
            paths: of the files, for messages.
            states: one dictionary of tensors for each.
            skip: regular expression of names to ignore.

        Raises:
            UserError: a state that is no dictionary of tensors.
        """
        self.paths = paths
        self.states: list[dict[str, Tensor]] = []
        self.skipped: dict[str, Any] = {}
        for path, state in zip(paths, states, strict=True):
            if not isinstance(state, Mapping) or not all(type(name) is str for name in state):
                raise UserError(f"{path}: expected a dictionary of tensors by name")
            named = [(".".join(_unwrapped(name)), value) for name, value in state.items()]
            kept = {name: value for name, value in named if not re.search(skip, name)}
            if len({name for name, _ in named}) < len(named):
                raise UserError(f"{path}: two names of it mean one tensor")
            for name, value in kept.items():
                if type(value) is not Tensor or value.dtype not in _WEIGHT_DTYPES:
                    raise UserError(
                        f"{path}: {name!r:.80} is not a tensor of bfloat16, float16 or float32"
                    )
            self.states.append(kept)
            self.skipped |= {name: value for name, value in named if name not in kept}

    def __len__(self) -> int:
        return len(self.states)

    def __contains__(self, name: str) -> bool:
        return name in self.states[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the first rank, which has to have it."""
        if name not in self.states[0]:
            raise UserError(f"{self.paths[0]}: {name!r} is missing")
        return self.states[0][name].shape

    def layers(self, pattern: str) -> int:
        """How many layers the names of the first rank speak of; `pattern` has one group, the index.

        Raises:
            UserError: layers are missing between the first and the last.
        """
        found = (re.match(pattern, name) for name in self.states[0])
        layers = {int(match[1]) for match in found if match and len(match[1]) < 6}
        if layers != set(range(len(layers))):
            raise UserError(
                f"{self.paths[0]}: {len(layers)} layers, but they are not numbered 0 to "
                f"{len(layers) - 1}: some are missing"
            )
        return len(layers)

    def take(self, name: str, shape: tuple[int, ...]) -> list[Tensor]:
        """One tensor of every rank.

        Args:
            name: of the tensor.
            shape: that each rank's part has to have.

        Raises:
            UserError: a rank without it, another shape, or different dtypes.
        """
        parts = []
        for path, state in zip(self.paths, self.states, strict=True):
            if name not in state:
                raise UserError(f"{path}: {name!r} is missing")
            part = state.pop(name)
            if part.shape != shape:
                raise UserError(
                    f"{path}: {name!r} has shape {part.shape}; the model's sizes and "
                    f"{len(self)} shard(s) ask for {shape}"
                )
            parts.append(part)
        if len({part.dtype for part in parts}) > 1:
            raise UserError(f"{self.paths[0]}: {name!r} has another dtype in other shards")
        return parts

    def replicated(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that every rank has whole; the first one's."""
        return self.take(name, shape)[0]

    def split(self, name: str, shape: tuple[int, ...], axis: int) -> Tensor:
        """A tensor that the ranks hold in equal parts along `axis`; `shape` is the whole's."""
        part = list(shape)
        part[axis] = self.divided(shape[axis], name)
        return concatenated(self.take(name, tuple(part)), axis)

    def split_heads(self, name: str, heads: int, head_dim: int, width: int) -> Tensor:
        """A projection onto heads, [heads * head_dim, width], that the ranks hold by heads.

        Where there are more ranks than heads, neighbours hold the same head, as in Llama 3.1 405B.

        Raises:
            UserError: heads do not divide among ranks or ranks among heads, or, when it is read,
                neighbours hold different ones.
        """
        if len(self) <= heads or len(self) % heads:
            return self.split(name, (heads * head_dim, width), axis=0)
        if self.shape(name) != (head_dim, width):
            raise UserError(
                f"{self.paths[0]}: {name!r} has shape {self.shape(name)}; n_kv_heads {heads} and "
                f"{len(self)} shard(s) ask for {(head_dim, width)}, a whole head in each"
            )
        copies, parts = len(self) // heads, self.take(name, (head_dim, width))
        folder = self.paths[0].parent

        def checked(first: int) -> Tensor:
            def read() -> np.ndarray:
                weight = parts[first].read()
                for other in parts[first + 1 : first + copies]:
                    if not np.array_equal(other.read(), weight):
                        raise UserError(
                            f"{folder}: {name!r} of {heads} heads is in {len(self)} shards, and "
                            f"those from {first} to {first + copies - 1} hold different rows; "
                            "expected the same head in each of them"
                        )
                return weight

            return dataclasses.replace(parts[first], read=read)

        return concatenated([checked(head * copies) for head in range(heads)], axis=0)

    def divided(self, size: int, what: str) -> int:
        """A size divided among the ranks.

        Raises:
            UserError: it does not divide.
        """
        if size % len(self):
            raise UserError(
                f"{self.paths[0].parent}: {size} rows or columns of {what!r} cannot be split among "
                f"{len(self)} shard(s), which is how many are there"
            )
        return size // len(self)

    def finish(self) -> None:
        """Make sure that every tensor was taken.

        Raises:
            UserError: tensors are left that a Llama does not have.
        """
        for path, state in zip(self.paths, self.states, strict=True):
            if state:
                raise UserError(
                    f"{path}: {len(state)} tensor(s) that a Llama of these sizes does not have, "
                    f"such as {min(state)!r:.80}: another architecture cannot be read"
                )
