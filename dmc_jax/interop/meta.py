"""Meta's own Llama checkpoints: `params.json` and `consolidated.NN.pth`, one file a shard.

Meta rotates channels 2f and 2f + 1 of a head together, Hugging Face f and f + H/2, so the rows of
W_q and W_k stand in another order. The last channel, which DMC decides by, is the last in both.
"""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.errors import UserError
from dmc_jax.files import lfs_pointer
from dmc_jax.interop.fields import Fields
from dmc_jax.interop.parameters import frequency_notes
from dmc_jax.interop.shards import Shards, transformed
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.interop.torch_files import open_torch_file
from dmc_jax.policies.dense import Dense

_SHARD_NAME = re.compile(r"consolidated\.(\d{2})\.pth")
_IGNORED_TENSORS = r"rope\.freqs$"  # computed from the base anywhere
_IGNORED_FIELDS = ("max_batch_size", "rope_high_freq_factor")  # the second is always 4
_KNOWN_FIELDS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "hidden_dim",
    "multiple_of",
    "ffn_dim_multiplier",
    "vocab_size",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "max_seq_len",
    *_IGNORED_FIELDS,
)
# params.json says that the rotary frequencies are scaled, but not by what: known by (width, layers)
# from the published Hugging Face configurations of Llama 3.1 8B, 70B and 405B, and 3.2 1B and 3B.
_SCALING_FACTORS = {
    (4096, 32): 8.0,
    (8192, 80): 8.0,
    (16_384, 126): 8.0,
    (2048, 16): 32.0,
    (3072, 28): 32.0,
}
_LLAMA_3_BASE = 500_000.0  # of its rotary frequencies


def is_meta(path: str | os.PathLike) -> bool:
    """True if a folder looks like a checkpoint of Meta's; only names are looked at."""
    path = Path(path)
    return (path / "params.json").is_file() and bool(_shard_paths(path))


def open_meta(path: str | os.PathLike) -> Source:
    """Open a checkpoint of Meta's; tensors are merged and reordered when they are read.

    Args:
        path: the folder with `params.json`.

    Returns:
        A dense model. The head is tied to the embedding where the file leaves it out or repeats
        the embedding, as Llama 3.2's does.

    Raises:
        UserError: not such a folder, missing or damaged shards, sizes that disagree with the
            weights, or a scaling factor that cannot be known.
    """
    path = Path(path)
    fields = _read_params(path / "params.json")
    paths = _shard_paths(path)
    numbers = [int(_SHARD_NAME.fullmatch(shard.name)[1]) for shard in paths]
    if numbers != list(range(len(paths))) or not paths:
        raise UserError(
            f"{path}: found consolidated.NN.pth with NN = {numbers or 'nothing'}; expected all of "
            "00, 01 and so on"
        )
    shards = Shards(paths, [open_torch_file(shard) for shard in paths], _IGNORED_TENSORS)
    layers = shards.layers(r"layers\.(\d+)\.")
    claimed = fields.integer("n_layers")
    if claimed != layers:
        raise UserError(f"{fields.where}: n_layers is {claimed}, the weights have {layers}")
    config = _config(fields, shards, layers)
    tensors = _tensors(config, shards)
    shards.finish()
    if _SCALING_FACTORS.get((config.width, config.layers)) == 32.0 and _repeats_embedding(tensors):
        del tensors["lm_head.weight"]
    config = dataclasses.replace(config, tied_embeddings="lm_head.weight" not in tensors)
    return Source(
        format="meta",
        path=path,
        config=config,
        policy=Dense(),
        tensors=tensors,
        tokenizer=_tokenizer(path),
        notes=(*fields.notes(), *frequency_notes(config, shards.skipped)),
    )


def to_huggingface_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of W_q or W_k [heads * H, D] from Meta's order, (2f, 2f + 1), to (f, f + H/2)."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, width)


def to_meta_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_huggingface_order`."""
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.transpose(0, 2, 1, 3).reshape(rows, width)


# ---- sizes ------------------------------------------------------------------------------------


def _read_params(path: Path) -> Fields:
    try:
        data = path.read_bytes()
        if pointer := lfs_pointer(data):
            raise UserError(f"{path} {pointer}")
        values = json.loads(data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error)[:80]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with dim, n_layers and so on")
    for name, value in values.items():
        if name not in _KNOWN_FIELDS and value not in (None, False):
            raise UserError(
                f"{path} has the field {name[:60]!r}, which a plain Llama does not: another "
                "architecture, or a quantized or adapted model"
            )
    return Fields(str(path), values)


def _config(fields: Fields, shards: Shards, layers: int) -> ModelConfig:
    """Sizes; what params.json leaves out (vocabulary, MLP width) is taken from the weights."""
    width, heads = fields.integer("dim"), fields.integer("n_heads")
    if width % heads and not fields.has("head_dim"):
        raise UserError(f"{fields.where}: dim {width} is no multiple of n_heads {heads}")
    theta = fields.number("rope_theta", 10_000.0)
    scaled = fields.flag("use_scaled_rope", False)
    return ModelConfig(
        vocab_size=_vocab_size(fields, shards, width),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("n_kv_heads") if fields.has("n_kv_heads") else heads,
        head_dim=fields.integer("head_dim") if fields.has("head_dim") else width // heads,
        mlp_width=_mlp_width(fields, shards, width),
        rope_theta=theta,
        norm_eps=fields.number("norm_eps"),
        max_length=fields.integer("max_seq_len", _max_length(theta, scaled)),
        tied_embeddings=False,
        rope_scaling=_scaling(fields, width, layers) if scaled else None,
    )


def _vocab_size(fields: Fields, shards: Shards, width: int) -> int:
    """Rows of the embedding, which shards split by rows (Llama 3) or columns (Llama 2)."""
    rows, columns = _matrix(shards, "tok_embeddings.weight")
    found = rows * len(shards) if columns == width else rows
    given = fields.integer("vocab_size", least=-1) if fields.has("vocab_size") else -1
    if given not in (-1, found):  # -1: whatever the tokenizer has
        raise UserError(
            f"{fields.where}: vocab_size is {given}, the weights and {len(shards)} shard(s) make "
            f"{found}: are all files of the checkpoint there, and no others?"
        )
    return found


def _mlp_width(fields: Fields, shards: Shards, width: int) -> int:
    """Rows of the gate, which the numbers in params.json have to lead to."""
    found = _matrix(shards, "layers.0.feed_forward.w1.weight")[0] * len(shards)
    if fields.has("hidden_dim"):
        given = fields.integer("hidden_dim")
    elif fields.has("multiple_of"):
        # Two thirds of four times the width, as the gate is a third matrix; then stretched, then
        # rounded up.
        given = int(2 * 4 * width / 3)
        if fields.has("ffn_dim_multiplier"):
            given = int(fields.number("ffn_dim_multiplier") * given)
        multiple = fields.integer("multiple_of")
        given = -(-given // multiple) * multiple
    else:
        given = found
    if given != found:
        raise UserError(
            f"{fields.where} leads to an MLP {given} wide, the weights and {len(shards)} shard(s) "
            f"make {found}: are all files of the checkpoint there, and no others?"
        )
    return found


def _matrix(shards: Shards, name: str) -> tuple[int, int]:
    shape = shards.shape(name)
    if len(shape) != 2:
        raise UserError(f"{shards.paths[0]}: {name!r} has shape {shape}; expected a matrix")
    return shape


def _max_length(theta: float, scaled: bool) -> int:
    """Tokens that each family was trained on; params.json does not say."""
    if scaled:
        return 131_072  # Llama 3.1 and later
    return 8192 if theta == _LLAMA_3_BASE else 4096 if theta <= 10_000.0 else 16_384


def _scaling(fields: Fields, width: int, layers: int) -> Llama3Scaling:
    if fields.has("rope_scaling_factor"):
        return Llama3Scaling(factor=fields.number("rope_scaling_factor"))
    if (width, layers) not in _SCALING_FACTORS:
        raise UserError(
            f"{fields.where}: use_scaled_rope is set, but by which factor is not known for "
            f"{layers} layers {width} wide: add rope_scaling_factor (8 for Llama 3.1, 32 for 3.2)"
        )
    return Llama3Scaling(factor=_SCALING_FACTORS[width, layers])


# ---- tensors ----------------------------------------------------------------------------------


def _tensors(c: ModelConfig, shards: Shards) -> dict[str, Tensor]:
    D, F, H, V = c.width, c.mlp_width, c.head_dim, c.vocab_size
    N, K = c.heads, c.kv_heads_by_layer[0]
    if len(shards) <= K or len(shards) % K:
        shards.divided(K, "n_kv_heads")  # a head is never cut in two
    by_rows = shards.shape("tok_embeddings.weight")[1] == D
    tensors = {
        "model.embed_tokens.weight": shards.split(
            "tok_embeddings.weight", (V, D), axis=0 if by_rows else 1
        ),
        "model.norm.weight": shards.replicated("norm.weight", (D,)),
    }
    if "output.weight" in shards:
        tensors["lm_head.weight"] = shards.split("output.weight", (V, D), axis=0)
    for layer in range(c.layers):
        split = functools.partial(_split_in_layer, shards, layer)

        def heads(name: str, layer: int = layer) -> Tensor:
            return shards.split_heads(f"layers.{layer}.{name}.weight", K, H, D)

        tensors |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "self_attn.q_proj": _reordered(split("attention.wq", (N * H, D), axis=0), N),
                "self_attn.k_proj": _reordered(heads("attention.wk"), K),
                "self_attn.v_proj": heads("attention.wv"),
                "self_attn.o_proj": split("attention.wo", (D, N * H), axis=1),
                "mlp.gate_proj": split("feed_forward.w1", (F, D), axis=0),
                "mlp.up_proj": split("feed_forward.w3", (F, D), axis=0),
                "mlp.down_proj": split("feed_forward.w2", (D, F), axis=1),
                "input_layernorm": split("attention_norm", (D,), axis=None),
                "post_attention_layernorm": split("ffn_norm", (D,), axis=None),
            }.items()
        }
    return tensors


def _split_in_layer(
    shards: Shards, layer: int, name: str, shape: tuple[int, ...], axis: int | None
) -> Tensor:
    name = f"layers.{layer}.{name}.weight"
    return shards.replicated(name, shape) if axis is None else shards.split(name, shape, axis)


def _reordered(tensor: Tensor, heads: int) -> Tensor:
    return transformed(tensor, tensor.shape, lambda weight: to_huggingface_order(weight, heads))


def _repeats_embedding(tensors: dict[str, Tensor]) -> bool:
    """True if the head is the embedding once more, as Llama 3.2's 1B and 3B have it."""
    if "lm_head.weight" not in tensors:
        return False
    names = ("model.embed_tokens.weight", "lm_head.weight")
    embedding, head = (tensors[name].read() for name in names)
    return all(
        np.array_equal(embedding[at : at + 4096], head[at : at + 4096])
        for at in range(0, len(embedding), 4096)
    )


# ---- files ------------------------------------------------------------------------------------


def _shard_paths(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(file for file in path.iterdir() if _SHARD_NAME.fullmatch(file.name))


def _tokenizer(path: Path) -> tuple[Path, ...]:
    """Meta's downloads hold it beside the weights, or once for all sizes in the folder above."""
    candidates = (path / "tokenizer.model", path.resolve().parent / "tokenizer.model")
    return tuple(file for file in candidates if file.is_file())[:1]
