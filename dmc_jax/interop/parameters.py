"""Names and layouts: one table between Hugging Face's Llama tensors and our parameters.

Hugging Face stores a projection as [out, in], we store [in, out] with the heads as an axis of their
own, and stack layers of equal shape. Both rotate channel f with f + H/2, so no channel moves.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.errors import UserError
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.model.llama import layer_stacks
from dmc_jax.model.sharding import spread

# Bytes of a part of a tensor that is transposed, converted or written at a time.
PART_BYTES = 2**24
_ROWS_AT_A_TIME = 16

# Rotary frequencies at Hugging Face, in Megatron and at Meta.
_FREQUENCIES = (".rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rope.freqs")

# Components of names that torch.compile, DistributedDataParallel, FullyShardedDataParallel,
# checkpoint_wrapper and DeepSpeed put before or between those of the model.
WRAPPERS = (
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)

# Hugging Face's name -> (our leaf, our axes). A leaf of more than one axis is transposed, except
# for the embedding, which both store as [V, D].
_OF_MODEL = {
    "model.embed_tokens.weight": ("embedding", "VD"),
    "model.norm.weight": ("final_norm.scale", "D"),
    "lm_head.weight": ("head", "DV"),
}
_OF_LAYER = {
    "input_layernorm.weight": ("attention_norm.scale", "D"),
    "self_attn.q_proj.weight": ("q.kernel", "DNH"),
    "self_attn.k_proj.weight": ("k.kernel", "DKH"),
    "self_attn.v_proj.weight": ("v.kernel", "DKH"),
    "self_attn.o_proj.weight": ("o.kernel", "NHD"),
    "post_attention_layernorm.weight": ("mlp_norm.scale", "D"),
    "mlp.gate_proj.weight": ("gate.kernel", "DF"),
    "mlp.up_proj.weight": ("up.kernel", "DF"),
    "mlp.down_proj.weight": ("down.kernel", "FD"),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of Hugging Face's Llama lies among our parameters."""

    leaf: str  # dotted path, such as "run_0.q.kernel"
    layer: int | None  # index in the leaf's first axis; None: the leaf is not stacked
    shape: tuple[int, ...]  # of the leaf, or of one layer of it
    foreign_shape: tuple[int, ...]  # of the tensor
    transposed: bool

    def rows(self, itemsize: int) -> int:
        """How many of our rows (indices of the first axis of `shape`) make up one part."""
        return max(1, PART_BYTES // max(1, math.prod(self.shape[1:]) * itemsize))


def places(config: ModelConfig) -> dict[str, Place]:
    """The table for a model: every tensor by its name at Hugging Face, in the order used there."""
    sizes = {
        "V": config.vocab_size,
        "D": config.width,
        "N": config.heads,
        "H": config.head_dim,
        "F": config.mlp_width,
    }

    def place(leaf: str, axes: str, layer: int | None, kv_heads: int = 0) -> Place:
        shape = tuple(kv_heads if axis == "K" else sizes[axis] for axis in axes)
        transposed = len(axes) > 1 and axes != "VD"
        foreign = shape
        if transposed:  # D is the only axis that may stand at either end
            inward = 2 if axes == "NHD" else 1
            foreign = math.prod(shape[inward:]), math.prod(shape[:inward])
        return Place(leaf, layer, shape, foreign, transposed)

    table = {"model.embed_tokens.weight": place(*_OF_MODEL["model.embed_tokens.weight"], None)}
    for stack, (first, length, kv_heads) in enumerate(layer_stacks(config)):
        for layer in range(length):
            for name, (leaf, axes) in _OF_LAYER.items():
                full = f"model.layers.{first + layer}.{name}"
                table[full] = place(f"run_{stack}.{leaf}", axes, layer, kv_heads)
    table["model.norm.weight"] = place(*_OF_MODEL["model.norm.weight"], None)
    if not config.tied_embeddings:
        table["lm_head.weight"] = place(*_OF_MODEL["lm_head.weight"], None)
    return table


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of our parameters, by dotted path."""
    lengths = {f"run_{stack}": length for stack, (_, length, _) in enumerate(layer_stacks(config))}
    return {
        place.leaf: place.shape
        if place.layer is None
        else (lengths[place.leaf.split(".")[0]], *place.shape)
        for place in places(config).values()
    }


def leaf_dtypes(source: Source, dtype: np.dtype | None) -> dict[str, np.dtype]:
    """The dtype of every leaf: `dtype`, or else the narrowest that holds its tensors exactly."""
    found: dict[str, np.dtype] = {}
    for name, place in places(source.config).items():
        ours = dtype or source.tensors[name].dtype
        found[place.leaf] = jnp.promote_types(found.get(place.leaf, ours), ours)
    return found


def to_ours(place: Place, tensor: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Rows `begin` to `end` of our array, from the whole tensor of Hugging Face's layout."""
    if not place.transposed:
        return tensor[begin:end]
    # A row of ours is a column of theirs, or a group of columns (o: one head).
    columns = place.foreign_shape[1] // place.shape[0]
    part = np.empty((end - begin, *place.shape[1:]), tensor.dtype)
    theirs = tensor[:, begin * columns : end * columns]
    _transpose_into(part.reshape((end - begin) * columns, -1), theirs)
    return part


def to_foreign(
    place: Place, read_rows: Callable[[int, int], np.ndarray], dtype: np.dtype
) -> np.ndarray:
    """The tensor in Hugging Face's layout, from our array read in parts.

    Args:
        place: of the tensor.
        read_rows: gives rows [begin, end) of our array, of shape `place.shape` but for the first.
        dtype: of the result.
    """
    tensor = np.empty(place.foreign_shape, dtype)
    step = place.rows(dtype.itemsize)
    for begin in range(0, place.shape[0], step):
        end = min(begin + step, place.shape[0])
        part = read_rows(begin, end)
        if place.transposed:
            columns = place.foreign_shape[1] // place.shape[0]
            to = slice(begin * columns, end * columns)
            _transpose_into(tensor[:, to], part.reshape(to.stop - to.start, -1))
        else:
            tensor[begin:end] = part
    return tensor


def _transpose_into(target: np.ndarray, matrix: np.ndarray) -> None:
    """`target[...] = matrix.T`, a few rows at a time: four times as fast, since caches suffice."""
    for row in range(0, len(matrix), _ROWS_AT_A_TIME):
        rows = slice(row, row + _ROWS_AT_A_TIME)
        target[:, rows] = matrix[rows].T


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Convert a part of a tensor to another dtype.

    Args:
        array: of a floating dtype.
        dtype: wanted.
        name: of the tensor, for messages.

    Raises:
        UserError: a number is too large for the dtype, which would make it infinite.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # said below, with its place
        converted = array.astype(dtype)
    largest = jnp.finfo(dtype).max
    if largest < jnp.finfo(array.dtype).max:
        lost = np.isfinite(array) & ~np.isfinite(converted)
        if lost.any():
            raise UserError(
                f"{name} has the value {float(array[lost][0]):g}; the largest in {dtype} is "
                f"{float(largest):g}: choose another --dtype, such as bfloat16"
            )
    return converted


def read_params(source: Source, abstract: Mapping | None = None) -> dict:
    """Load a checkpoint of any format as our parameters, a leaf at a time.

    Args:
        source: the checkpoint.
        abstract: dtype and sharding of every leaf, in a tree like the parameters'; without a
            sharding it goes to the first device. None: all are float32 there.

    Returns:
        The parameters as `Llama` takes them.

    Raises:
        UserError: a tensor cannot be read.
    """
    by_leaf: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places(source.config).items():
        by_leaf.setdefault(place.leaf, []).append((name, place))
    wanted = {} if abstract is None else flatten(abstract)
    shapes, params = leaf_shapes(source.config), {}
    for leaf, members in by_leaf.items():
        array = np.empty(shapes[leaf], getattr(wanted.get(leaf), "dtype", np.float32))
        for name, place in members:
            tensor = source.tensors[name].read()
            target = array if place.layer is None else array[place.layer]
            step = place.rows(array.itemsize)
            for begin in range(0, place.shape[0], step):
                end = min(begin + step, place.shape[0])
                target[begin:end] = to_ours(place, tensor, begin, end)
        first_device = SingleDeviceSharding(jax.local_devices()[0])
        params[leaf] = spread(array, getattr(wanted.get(leaf), "sharding", None) or first_device)
    return unflatten(params)


def flatten(tree: Mapping) -> dict:
    """Leaves of nested dictionaries by dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def unflatten(leaves: Mapping) -> dict:
    """Nested dictionaries from dotted paths; the inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *above, last = path.split(".")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def check_tensors(
    where: str,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    called: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Hold the tensors of a checkpoint against its config.

    Args:
        where: the checkpoint, for messages.
        config: sizes it claims.
        tensors: by their names at Hugging Face.
        called: what the checkpoint calls those of another name, for messages.

    Returns:
        The tensors of the model, in Hugging Face's order. Rotary frequencies, which old files
        hold although the config gives them, are left out.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or not of a floating dtype.
    """
    table = places(config)
    missing = [called.get(name, name) for name in table if name not in tensors]
    unknown = [name for name in tensors if name not in table and not is_frequencies(name)]
    if missing:
        hint, more = "", f" It has {_some(unknown)} besides." if unknown else ""
        if missing == ["lm_head.weight"]:
            hint = "; a model that reuses the embedding says so, tie_word_embeddings: true"
        raise UserError(
            f"{where} lacks {_some(missing)}{hint}: {len(missing)} of the {len(table)} tensors "
            f"that its config asks for, while the weights hold {len(tensors)}.{more}"
        )
    if unknown:
        raise UserError(
            f"{where} has {_some(unknown)}: {len(unknown)} tensors besides the {len(table)} that a "
            "Llama of its config has"
        )
    for name, place in table.items():
        tensor, shown = tensors[name], called.get(name, name)
        if tensor.shape != place.foreign_shape:
            raise UserError(
                f"{where}: {shown} has shape {list(tensor.shape)}, its config asks for "
                f"{list(place.foreign_shape)}"
            )
        if str(tensor.dtype) not in ("float32", "bfloat16", "float16"):
            raise UserError(
                f"{where}: {shown} is {tensor.dtype}; float32, bfloat16 and float16 can be read, "
                "quantised weights cannot: use the original checkpoint"
            )
    return {name: tensors[name] for name in table}


def canonical_name(name: str) -> str:
    """Return a tensor's name at Hugging Face, from one with other modules wrapped around it.

    Compiling, data parallelism, sharding and recomputation each add a component of their own, and
    who saves the body of a model alone leaves `model.` out.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts[:1] == ["model"]:
        parts = parts[1:]
    return ".".join(parts if parts[:1] == ["lm_head"] else ["model", *parts])


def canonical_tensors(where: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names that Hugging Face's Llama has for them, where they have others.

    Args:
        where: the checkpoint, for messages.
        tensors: by their names there.

    Raises:
        UserError: two names that mean the same tensor.
    """
    found: dict[str, str] = {}
    for name in tensors:
        ours = canonical_name(name)
        if ours in found:
            raise UserError(
                f"{where} has both {found[ours]!r:.100} and {name!r:.100}, which are one tensor"
            )
        found[ours] = name
    return {ours: tensors[name] for ours, name in found.items()}


def is_frequencies(name: str) -> bool:
    """Say whether a tensor holds rotary frequencies, which the config gives too."""
    return name.endswith(_FREQUENCIES)


def frequency_notes(config: ModelConfig, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Say of stored rotary frequencies that they are not those of the config, which count.

    Args:
        config: of the model.
        tensors: by name; those of other names are passed over.

    Returns:
        Notes for the user: one, or none.
    """
    stored = {n: x for n, x in tensors.items() if is_frequencies(n) and isinstance(x, Tensor)}
    for name, tensor in stored.items():
        # Some store what is before scaling. bfloat16 is off by up to 2**-9.
        expected = [
            rotary_frequencies(config.head_dim, config.rope_theta, scaling)
            for scaling in (config.rope_scaling, None)
        ]
        if tensor.shape != expected[0].shape or not any(
            np.allclose(tensor.read().astype(float), x, rtol=0.01) for x in expected
        ):
            return (
                f"its weights hold rotary frequencies ({name}) other than those of its config, "
                f"rope_theta {config.rope_theta:g}: the config's are taken",
            )
    return ()


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:100]) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
