"""GGUF, the format of llama.cpp: Llamas in one file, or in several that are numbered.

Quantised matrices are dequantised as they are read, and are the model that is meant: retrofitting
starts from them. llama.cpp rotates channels 2f and 2f + 1 of a head together, as Meta's checkpoints
do, so its converter moved the rows of W_q and W_k, which are moved back here.
"""

import collections
import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import Llama3Scaling, rotary_frequencies
from dmc_jax.errors import UserError
from dmc_jax.interop.fields import Fields, shown
from dmc_jax.interop.gguf_files import MAGIC, GGUFFile, open_gguf_file
from dmc_jax.interop.gguf_tokenizer import unpacked_tokenizer
from dmc_jax.interop.meta import to_huggingface_order
from dmc_jax.interop.parameters import check_tensors
from dmc_jax.interop.safetensors_files import listing
from dmc_jax.interop.shards import transformed
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.policies.dense import Dense

_ARCHITECTURE = "llama"  # of Llama, Mistral, SmolLM and others that are Llamas by another name
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SCALING = "rope_freqs.weight"
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_KNOWN_KEYS = (
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.causal",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
    "tensor_data_layout",
)


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path is a GGUF file, by its name or first bytes, or a folder with such a name."""
    path = Path(path)
    if path.is_dir():
        return any(path.glob("*.gguf"))
    if path.suffix == ".gguf":
        return path.is_file()
    try:
        with path.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: str | os.PathLike) -> Source:
    """Open a model of llama.cpp's; its tensors are dequantised when they are read.

    Its tokenizer is unpacked into the user's cache folder (`unpacked_tokenizer`).

    Args:
        path: the file, any one of several numbered ones, or a folder with no other.

    Raises:
        UserError: another architecture, a feature that our model does not have, a damaged or an
            incomplete file, or a quantised one where the package gguf is not installed.
    """
    files = _open_parts(_named_file(Path(path)))
    first = files[0]
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    if len(stored) != sum(len(file.tensors) for file in files):
        raise UserError(f"{first.path}: two of its {len(files)} parts hold the same tensor")
    fields = Fields(str(first.path), first.metadata)
    architecture = fields.text("general.architecture")
    if architecture != _ARCHITECTURE:
        raise UserError(
            f"{first.path}: the architecture (general.architecture) is {shown(architecture)}; only "
            f"{_ARCHITECTURE!r} can be read"
        )
    config = _config(fields, stored)
    tokenizer, said = _tokenizer(first)
    types = collections.Counter(kind for file in files for kind in file.types.values())
    quantised = [kind for kind in types if kind not in ("F32", "F16", "BF16")]
    if quantised:
        said = (f"its matrices are dequantised from {' and '.join(sorted(quantised))}", *said)
    return Source(
        format="gguf",
        path=first.path,
        config=config,
        policy=Dense(),
        tensors=_tensors(str(first.path), config, stored),
        tokenizer=tokenizer,
        notes=(*fields.notes(), *said),
    )


# ---- files --------------------------------------------------------------------------------------


def _named_file(path: Path) -> Path:
    """The file to begin with: a path itself, or the one model in a folder."""
    if not path.is_dir():
        return path
    names = sorted(file.name for file in path.glob("*.gguf"))
    models = {(match[1], match[3]) if (match := _PART_NAME.fullmatch(n)) else n for n in names}
    if len(models) != 1:
        raise UserError(f"{path} has {len(models)} GGUF models, name one of them: {listing(path)}")
    return path / names[0]


def _open_parts(path: Path) -> list[GGUFFile]:
    """All files of a model, the one with the metadata first."""
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        file = open_gguf_file(path)
        if (count := _count(file, "split.count", 1)) > 1:
            raise UserError(
                f"{path} is one of {count} parts (split.count), and its name does not say which: "
                "expected one as NAME-00001-of-00003.gguf"
            )
        return [file]
    stem, count = match[1], int(match[3])
    names = [f"{stem}-{part + 1:05}-of-{count:05}.gguf" for part in range(count)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or not names:
        raise UserError(
            f"{path} is one of {count} parts, and {len(missing)} are not beside it, such as "
            f"{', '.join(missing[:3])}: fetch them into its folder"
        )
    files = [open_gguf_file(path.parent / name) for name in names]
    for part, file in enumerate(files):
        said = _count(file, "split.no", -1), _count(file, "split.count", 1)
        if said != (part, count):
            raise UserError(
                f"{file.path}: split.no and split.count are {said[0]} and {said[1]}; by its name "
                f"they should be {part} and {count}"
            )
    found = sum(len(file.tensors) for file in files)
    wanted = _count(files[0], "split.tensors.count", found)
    if wanted != found:
        raise UserError(
            f"{files[0].path}: its {count} parts hold {found} tensors, split.tensors.count is "
            f"{wanted}"
        )
    return files


def _count(file: GGUFFile, name: str, default: int) -> int:
    fields = Fields(str(file.path), file.metadata)
    return fields.integer(name, least=0) if fields.has(name) else default


def _tokenizer(file: GGUFFile) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Its files, and what is to be said where it has none that can be read."""
    try:
        return unpacked_tokenizer(file), ()
    except UserError as error:  # the weights can still be used, with another file of the tokenizer
        return (), (f"its tokenizer cannot be read: {error}",)


# ---- sizes --------------------------------------------------------------------------------------


def _config(fields: Fields, stored: dict[str, Tensor]) -> ModelConfig:
    _refuse_unknown(fields)
    layers = fields.integer("llama.block_count")
    if layers > len(stored):
        raise UserError(
            f"{fields.where}: llama.block_count is {layers}, but the file has {len(stored)} tensors"
        )
    width = fields.integer("llama.embedding_length")
    heads = _for_all_layers(fields, "llama.attention.head_count", layers)
    grouped = fields.has("llama.attention.head_count_kv")
    sizes = {
        "vocab_size": _vocab_size(fields, stored),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": _by_layer(fields, "llama.attention.head_count_kv", layers)
        if grouped
        else heads,
        "head_dim": _head_dim(fields, width, heads),
        "mlp_width": _for_all_layers(fields, "llama.feed_forward_length", layers),
        "rope_theta": fields.number("llama.rope.freq_base", 10_000.0),
        "norm_eps": fields.number("llama.attention.layer_norm_rms_epsilon"),
        "max_length": fields.integer("llama.context_length"),
        "tied_embeddings": "output.weight" not in stored,
    }
    try:
        config = ModelConfig(**sizes)
    except UserError as error:
        raise UserError(f"{fields.where}: {error}") from None
    return dataclasses.replace(config, rope_scaling=_rope_scaling(fields, stored, config))


def _refuse_unknown(fields: Fields) -> None:
    """Refuse what another model than ours would be computed with."""
    for key, value in fields.values.items():
        name = key.removeprefix("llama.")
        plain = isinstance(value, bool | int | float) and value == 0
        if name != key and name not in _KNOWN_KEYS and not plain:
            raise UserError(
                f"{fields.where}: it has the key {key[:80]!r}, which a plain Llama has not, and "
                "what it changes cannot be computed here"
            )
    fields.require("llama.attention.causal", True)
    fields.require("llama.tensor_data_layout", "Meta AI original pth")
    length, window = fields.integer("llama.context_length"), "llama.attention.sliding_window"
    if fields.has(window) and 0 < fields.integer(window, least=0) < length:
        raise UserError(
            f"{fields.where}: {window} is {fields.values[window]}, but the model is for {length} "
            "tokens; attention over a sliding window cannot be computed here"
        )


def _by_layer(fields: Fields, name: str, layers: int) -> int | tuple[int, ...]:
    """A size that is given once or for every layer."""
    value = fields.values.get(name)
    if not isinstance(value, np.ndarray):
        return fields.integer(name)
    sizes = value.tolist()
    if len(sizes) != layers or not all(type(x) is int and 0 < x < 2**31 for x in sizes):
        raise UserError(
            f"{fields.where}: {name} has {len(sizes)} entries, such as {sizes[:3]}; expected "
            f"{layers} sizes of at least 1, one a layer"
        )
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def _for_all_layers(fields: Fields, name: str, layers: int) -> int:
    size = _by_layer(fields, name, layers)
    if not isinstance(size, int):
        raise UserError(f"{fields.where}: {name} differs by layer, which cannot be computed here")
    return size


def _head_dim(fields: Fields, width: int, heads: int) -> int:
    names = [f"llama.{n}" for n in ("attention.key_length", "attention.value_length")]
    given = {n: fields.integer(n) for n in (*names, "llama.rope.dimension_count") if fields.has(n)}
    if len(set(given.values())) > 1:
        said = ", ".join(f"{name} {size}" for name, size in given.items())
        raise UserError(
            f"{fields.where}: {said}; only heads that are alike and rotated whole can "
            "be computed here"
        )
    if given:
        return next(iter(given.values()))
    if width % heads:
        raise UserError(
            f"{fields.where}: llama.embedding_length {width} is no multiple of "
            f"llama.attention.head_count {heads}, and llama.attention.key_length is not given"
        )
    return width // heads


def _vocab_size(fields: Fields, stored: dict[str, Tensor]) -> int:
    """Rows of the embedding: some tokenizers have fewer ids."""
    rows = stored["token_embd.weight"].shape[0] if "token_embd.weight" in stored else 1
    given = fields.integer("llama.vocab_size") if fields.has("llama.vocab_size") else rows
    if "token_embd.weight" in stored and given != rows:
        raise UserError(
            f"{fields.where}: llama.vocab_size is {given}, token_embd.weight has {rows} rows"
        )
    return given


def _rope_scaling(
    fields: Fields, stored: dict[str, Tensor], config: ModelConfig
) -> Llama3Scaling | None:
    """Llama 3's scaling, which the file holds as what every rotary frequency is divided by."""
    kind = fields.text("llama.rope.scaling.type", "linear")
    named = [f"llama.rope.{name}" for name in ("scaling.factor", "scale_linear")]
    factor = next((fields.number(name) for name in named if fields.has(name)), 1.0)
    if kind != "none" and (kind != "linear" or factor != 1):
        raise UserError(
            f"{fields.where}: llama.rope.scaling.type is {shown(kind)} with a factor of "
            f"{factor:g}; only Llama 3's scaling, by the tensor {_SCALING}, can be read"
        )
    if _SCALING not in stored:
        return None
    tensor, count = stored[_SCALING], config.head_dim // 2
    if tensor.shape != (count,):
        raise UserError(
            f"{fields.where}: {_SCALING} has shape {list(tensor.shape)}, its heads ask for "
            f"{[count]}"
        )
    found = tensor.read().astype(np.float64)
    largest = float(found.max())
    if np.array_equal(found, np.ones(count)):
        return None
    # Llama 3.1, 3.2 and 3.3 differ in the factor alone, by which the slowest frequency is divided.
    if 1 < largest < 1e6:
        scaling = Llama3Scaling(factor=float(str(np.float32(largest))))
        plain, scaled = (
            np.asarray(rotary_frequencies(config.head_dim, config.rope_theta, x), np.float64)
            for x in (None, scaling)
        )
        if np.allclose(plain / scaled, found, rtol=1e-4):
            return scaling
    raise UserError(
        f"{fields.where}: {_SCALING} holds factors from {found.min():g} to {largest:g}, which are "
        f"not Llama 3's scaling of {count} frequencies (low 1, high 4, 8192 tokens)"
    )


# ---- tensors ------------------------------------------------------------------------------------


def _tensors(where: str, config: ModelConfig, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors in Hugging Face's names and layout."""
    names = {theirs: name for name, theirs in _NAMES.items()} | {
        f"model.layers.{layer}.{theirs}.weight": f"blk.{layer}.{name}.weight"
        for layer in range(config.layers)
        for name, theirs in _OF_LAYER.items()
    }
    theirs = {name: theirs for theirs, name in names.items()}
    found = {theirs.get(name, name): tensor for name, tensor in stored.items() if name != _SCALING}
    tensors = check_tensors(where, config, found, names)
    for layer, kv_heads in enumerate(config.kv_heads_by_layer):
        for projection, heads in (("q", config.heads), ("k", kv_heads)):
            name = f"model.layers.{layer}.self_attn.{projection}_proj.weight"
            tensors[name] = _reordered(tensors[name], heads)
    return tensors


def _reordered(tensor: Tensor, heads: int) -> Tensor:
    return transformed(tensor, tensor.shape, lambda weight: to_huggingface_order(weight, heads))
