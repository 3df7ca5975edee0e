"""Megatron-LM checkpoints of DMC models: NVIDIA's released ones, and those its training writes.

One file a rank of tensor parallelism, `mp_rank_XX/model_optim_rng.pt`: in the folder itself
(released models), in `iter_NNNNNNN` (training) or in `release`. Arguments of the run are saved
beside the weights and give the sizes; names and defaults are those of branch `dmc` of
github.com/NVIDIA/Megatron-LM.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DECISION_CHANNEL, DMCSettings
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.data.tokenizer import load_tokenizer
from dmc_jax.errors import UserError
from dmc_jax.interop.fields import Fields
from dmc_jax.interop.parameters import frequency_notes
from dmc_jax.interop.pickles import Record
from dmc_jax.interop.shards import Shards, concatenated, transformed
from dmc_jax.interop.source import Source, Tensor
from dmc_jax.interop.torch_files import open_torch_file
from dmc_jax.policies.dmc import DMC

_WEIGHTS = "model_optim_rng.pt"
_LATEST = "latest_checkpointed_iteration.txt"
_RANK_NAME = re.compile(r"mp_rank_(\d{2})")
_PIPELINE_NAME = re.compile(r"mp_rank_\d{2}_\d{3}")
_ITERATION_NAME = re.compile(r"iter_\d{7}")
# State of Transformer Engine's layers (for 8-bit floats), and what is computed from the base.
_IGNORED_TENSORS = r"(^|\.)_extra_state$|rotary_pos_emb\.inv_freq$"
_ALLOWED = (
    "argparse Namespace",
    "megatron.core.enums ModelType",
    "_io BytesIO",  # in `_extra_state`
    "_codecs encode",  # bytes are text, encoded, in a pickle of protocol 2
    *(f"torch {dtype}" for dtype in ("bfloat16", "float16", "float32")),  # args.params_dtype
    # States of random generators, which training saves and we ignore.
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy ndarray",
    "numpy dtype",
)
# Arguments that must be absent or have one of these values for the model to be a Llama.
_PLAIN = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "apply_layernorm_1p": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_percent": (1.0, 1),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1, 1.0),
    "use_legacy_models": (False,),
    "pipeline_model_parallel_size": (1,),
    "expert_model_parallel_size": (1,),
    "multi_latent_attention": (False,),
}


def is_megatron(path: str | os.PathLike) -> bool:
    """True if a folder looks like a Megatron checkpoint; only names are looked at."""
    path = Path(path)
    return (path / _LATEST).is_file() or any(
        _RANK_NAME.fullmatch(child.name)
        or _PIPELINE_NAME.fullmatch(child.name)
        or _ITERATION_NAME.fullmatch(child.name)
        for child in (path.iterdir() if path.is_dir() else ())
    )


def open_megatron(path: str | os.PathLike) -> Source:
    """Open a Megatron checkpoint of a DMC model; tensors are put together when they are read.

    DMC settings are the run's `dmc_window_size`, `dmc_temp` and `dmc_init_val`; what a checkpoint
    leaves out has the training script's default (12, 0.1 and 5), and is named in the notes. The
    epsilon is never among them: it is that of bfloat16.

    Args:
        path: a released model, a training run (its latest checkpoint is taken) or one `iter_*`.

    Returns:
        A DMC model.

    Raises:
        UserError: no such checkpoint, a damaged or hostile file, another architecture, arguments
            that disagree with the weights, or a first stage that has not finished.
    """
    path = Path(path)
    folder = _checkpoint_folder(path)
    files = _rank_files(folder)
    states = [open_torch_file(file, _ALLOWED) for file in files]
    args = _arguments(files, states)
    shards = Shards(
        files, [_model(*pair) for pair in zip(files, states, strict=True)], _IGNORED_TENSORS
    )
    layers = shards.layers(r"decoder\.layers\.(\d+)\.")
    claimed = args.integer("num_layers")
    if claimed != layers:
        raise UserError(f"{args.where}: num_layers is {claimed}, the weights have {layers}")
    tokenizer = _tokenizer(path, folder)
    config = _config(args, shards, layers, tokenizer)
    tensors = _tensors(config, args.integer("padded_vocab_size"), shards)
    shards.finish()
    settings = _settings(args)
    if args.flag("dmc_is_stage_one", False):
        _check_stage_one(args, config, tensors)
    return Source(
        format="megatron",
        path=path,
        config=config,
        policy=DMC(settings),
        tensors=tensors,
        tokenizer=tokenizer,
        notes=(*args.notes(), *frequency_notes(config, shards.skipped)),
    )


# ---- files ------------------------------------------------------------------------------------


def _checkpoint_folder(path: Path) -> Path:
    """The folder with the ranks: `path` itself, or what its latest iteration is in."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected one with mp_rank_00 or iter_* in it")
    names = {child.name for child in path.iterdir()}
    if any(_RANK_NAME.fullmatch(name) or _PIPELINE_NAME.fullmatch(name) for name in names):
        return path
    if _LATEST in names:
        latest = (path / _LATEST).read_bytes()[:20].decode("ascii", "replace").strip()
        # Nothing but these two shapes: the file could name a folder anywhere.
        if latest != "release" and not (latest.isdecimal() and len(latest) <= 7):
            raise UserError(f"{path / _LATEST} says {latest!r}; expected a number or 'release'")
        folder = path / ("release" if latest == "release" else f"iter_{int(latest):07d}")
        if not folder.is_dir():
            raise UserError(f"{path / _LATEST} says {latest!r}, but {folder} does not exist")
        return folder
    iterations = sorted(name for name in names if _ITERATION_NAME.fullmatch(name))
    if len(iterations) != 1:
        raise UserError(
            f"{path}: found {len(iterations)} folders iter_* and no {_LATEST}; name one of them, "
            "or a folder with mp_rank_00 in it"
        )
    return path / iterations[0]


def _rank_files(folder: Path) -> list[Path]:
    names = sorted(child.name for child in folder.iterdir())
    if any(_PIPELINE_NAME.fullmatch(name) for name in names):
        raise UserError(
            f"{folder}: mp_rank_XX_YYY are shards of pipeline parallelism, which cannot be read: "
            "convert the checkpoint to pipeline size 1 with Megatron's tools"
        )
    ranks = [name for name in names if _RANK_NAME.fullmatch(name)]
    if not ranks:
        distributed = ".metadata" in names or "metadata.json" in names
        raise UserError(
            f"{folder}: "
            + ("it is in the distributed format; " if distributed else "no mp_rank_00 in it; ")
            + "Megatron saves what can be read here with --ckpt-format torch"
        )
    if ranks != [f"mp_rank_{rank:02d}" for rank in range(len(ranks))]:
        raise UserError(f"{folder}: found {', '.join(ranks)}; expected all from mp_rank_00 on")
    return [folder / rank / _WEIGHTS for rank in ranks]


def _tokenizer(path: Path, folder: Path) -> tuple[Path, ...]:
    files = (place / "tokenizer.model" for place in (folder, path))
    return tuple(file for file in files if file.is_file())[:1]


def _model(file: Path, state: Any) -> Any:
    """The weights in what a rank saved."""
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        several = isinstance(state, dict) and "model0" in state
        raise UserError(
            f"{file}: no weights under 'model'"
            + ("; virtual pipeline stages cannot be read" if several else "")
        )
    if "language_model" in model:
        raise UserError(
            f"{file} is of Megatron's legacy models, which cannot be read: convert it to core "
            "models with Megatron's tools"
        )
    return model


def _arguments(files: list[Path], states: list[Any]) -> Fields:
    """The run's arguments, from the first rank."""
    args = states[0].get("args") if isinstance(states[0], dict) else None
    if isinstance(args, Record) and args.name == "argparse Namespace":
        args = args.state
    if not isinstance(args, dict) or not all(type(name) is str for name in args):
        raise UserError(f"{files[0]}: no arguments of the run under 'args', which give the sizes")
    fields = Fields(f"{files[0]}, args", args)
    if fields.has("tensor_model_parallel_size"):
        ranks = fields.integer("tensor_model_parallel_size")
        if ranks != len(files):
            raise UserError(
                f"{files[0].parent.parent}: {len(files)} folder(s) mp_rank_XX, but the arguments "
                f"name {ranks} ranks of tensor parallelism: are all there, and no others?"
            )
    for name, values in _PLAIN.items():
        fields.require(name, *values)
    for name in ("num_experts", "window_size"):
        if fields.has(name):
            raise UserError(f"{fields.where}: {name} is set; only a plain Llama can be read")
    if not fields.flag("use_rotary_position_embeddings", False):
        fields.require("position_embedding_type", "rope")
    return fields


# ---- sizes ------------------------------------------------------------------------------------


def _config(args: Fields, shards: Shards, layers: int, tokenizer: tuple[Path, ...]) -> ModelConfig:
    width, heads = args.integer("hidden_size"), args.integer("num_attention_heads")
    if width % heads and not args.has("kv_channels"):
        raise UserError(
            f"{args.where}: hidden_size {width} is no multiple of num_attention_heads {heads}"
        )
    kv_heads = heads
    if args.flag("group_query_attention", False):
        kv_heads = args.integer("num_query_groups")
    # Older versions call it layernorm_epsilon.
    epsilon = "layernorm_epsilon" if args.has("layernorm_epsilon") else "norm_epsilon"
    tied = "output_layer.weight" not in shards
    if args.flag("untie_embeddings_and_output_weights", not tied) == tied:
        raise UserError(
            f"{args.where}: untie_embeddings_and_output_weights is {'' if tied else 'not '}set, "
            f"but the weights have {'no' if tied else 'a'} head of their own"
        )
    scaling = None
    if args.flag("use_rope_scaling", False):
        scaling = Llama3Scaling(factor=args.number("rope_scaling_factor", 8.0))
    return ModelConfig(
        vocab_size=_vocab_size(args, tokenizer),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=args.integer("kv_channels") if args.has("kv_channels") else width // heads,
        mlp_width=args.integer("ffn_hidden_size"),
        rope_theta=args.number("rotary_base", 10_000.0),
        norm_eps=args.number(epsilon, 1e-5),
        max_length=args.integer("max_position_embeddings"),
        tied_embeddings=tied,
        rope_scaling=scaling,
    )


def _vocab_size(args: Fields, tokenizer: tuple[Path, ...]) -> int:
    """Ids of the tokenizer, which training pads so that the ranks have equal parts."""
    padded = args.integer("padded_vocab_size")
    if tokenizer:
        size, source = load_tokenizer(tokenizer[0]).vocab_size, str(tokenizer[0])
    elif args.has("vocab_size"):
        size, source = args.integer("vocab_size"), f"{args.where}: vocab_size"
    else:
        args.defaulted.append(
            f"the vocabulary without padding: all {padded} ids kept; with the model's "
            "tokenizer.model in its folder, the padding is cut"
        )
        return padded
    if size > padded:
        raise UserError(f"{source} has {size} ids, but the model only {padded}: another model's")
    return size


def _settings(args: Fields) -> DMCSettings:
    if not any(name.startswith("dmc_") for name in args.values):
        args.defaulted.append(
            "a single DMC setting: it is read as a DMC model all the same, which a plain Llama "
            "would not survive"
        )
    window = args.integer("dmc_window_size", 12, least=0)
    return DMCSettings(
        window=window or None,
        temperature=args.number("dmc_temp", 0.1),
        offset=args.number("dmc_init_val", 5.0, least=-1e9),
    )


def _check_stage_one(args: Fields, c: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """The first stage fades the decision rows out and zeroes them in the weights at its end."""
    for name, heads in (("q_proj", c.heads), ("k_proj", c.kv_heads_by_layer[0])):
        weight = tensors[f"model.layers.0.self_attn.{name}.weight"].read()
        if weight.reshape(heads, c.head_dim, c.width)[:, DECISION_CHANNEL].any():
            raise UserError(
                f"{args.where}: this is a checkpoint from within the first stage of DMC training, "
                "when decisions are still being faded out: convert the one at its end, in "
                "final_output"
            )


# ---- tensors ----------------------------------------------------------------------------------


def _tensors(c: ModelConfig, padded: int, shards: Shards) -> dict[str, Tensor]:
    def vocabulary(name: str) -> Tensor:
        whole = shards.split(name, (padded, c.width), axis=0)
        return transformed(whole, (c.vocab_size, c.width), lambda weight: weight[: c.vocab_size])

    tensors = {
        "model.embed_tokens.weight": vocabulary("embedding.word_embeddings.weight"),
        "model.norm.weight": shards.replicated("decoder.final_layernorm.weight", (c.width,)),
    }
    if not c.tied_embeddings:
        tensors["lm_head.weight"] = vocabulary("output_layer.weight")
    for layer in range(c.layers):
        for name, tensor in _layer_tensors(c, f"decoder.layers.{layer}.", shards).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = tensor
    return tensors


def _layer_tensors(c: ModelConfig, prefix: str, shards: Shards) -> dict[str, Tensor]:
    D, F, H, N = c.width, c.mlp_width, c.head_dim, c.heads

    def norm(fused: str, alone: str) -> Tensor:
        """Transformer Engine keeps a norm with the matrix after it, Megatron's own layers don't."""
        name = prefix + fused if prefix + fused in shards else prefix + alone
        return shards.replicated(name, (D,))

    mlp = prefix + "mlp."
    F_part = shards.divided(F, "ffn_hidden_size")
    gate_over_up = shards.take(mlp + "linear_fc1.weight", (2 * F_part, D))

    def half(which: slice) -> Tensor:
        parts = [transformed(part, (F_part, D), lambda w: w[which]) for part in gate_over_up]
        return concatenated(parts, axis=0)

    attention = prefix + "self_attention."
    return {
        **_query_key_value(c, attention + "linear_qkv.weight", shards),
        "self_attn.o_proj": shards.split(attention + "linear_proj.weight", (D, N * H), axis=1),
        "mlp.gate_proj": half(slice(None, F_part)),
        "mlp.up_proj": half(slice(F_part, None)),
        "mlp.down_proj": shards.split(mlp + "linear_fc2.weight", (D, F), axis=1),
        "input_layernorm": norm(
            "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
        ),
        "post_attention_layernorm": norm(
            "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
        ),
    }


def _query_key_value(c: ModelConfig, name: str, shards: Shards) -> dict[str, Tensor]:
    """Takes the fused projection apart: a KV head has G heads of queries, its key, its value."""
    D, H, K = c.width, c.head_dim, c.kv_heads_by_layer[0]
    G, K_part = c.heads // K, shards.divided(K, "num_query_groups")
    parts = shards.take(name, (K_part * (G + 2) * H, D))

    def pick(heads: slice) -> Tensor:
        count = len(range(G + 2)[heads])

        def rows(weight: np.ndarray) -> np.ndarray:
            return weight.reshape(K_part, G + 2, H, D)[:, heads]

        shape = (K_part * count * H, D)
        return concatenated([transformed(part, shape, rows) for part in parts], axis=0)

    return {
        "self_attn.q_proj": pick(slice(0, G)),
        "self_attn.k_proj": pick(slice(G, G + 1)),
        "self_attn.v_proj": pick(slice(G + 1, G + 2)),
    }
