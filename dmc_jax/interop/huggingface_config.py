"""`config.json` of Hugging Face's Llama and its relatives: read in every spelling, written in one.

transformers 5 writes `rope_parameters` and `dtype` where older versions write `rope_theta`,
`rope_scaling` and `torch_dtype`. What our model cannot compute is refused here, by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from dmc_jax.config import ModelConfig
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.errors import UserError
from dmc_jax.interop.fields import Fields
from dmc_jax.policies.choice import Trained
from dmc_jax.policies.dmc import DMC

ARCHITECTURES = (
    "LlamaForCausalLM",
    "LLaMAForCausalLM",  # as the first converted Llamas spelled it
    "MistralForCausalLM",
    "DeciLMForCausalLM",  # DeciLM, and NVIDIA's Llama-Nemotron
)
_MODEL_TYPES = ("llama", "mistral", "deci", "nemotron-nas")
# How configs say that layers have different KV heads: a list in DeciLM's, Llama-Nemotron's blocks.
DIALECTS = ("decilm", "nemotron")
_DYNAMIC = "dynamic"  # a type of scaling
_MLP_UNIT = 256  # of MLP widths in Llama-Nemotron's notation
_MOST_LAYERS = 10_000  # a limit for what a stranger's file may ask to be listed

# What must be absent or have this value for the model to be the one that we compute.
_PLAIN = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, 1),
    "quantization_config": (None,),
}


def model_config(where: str, raw: Mapping[str, Any]) -> tuple[ModelConfig, tuple[str, ...]]:
    """Sizes from a parsed `config.json`.

    Fields that may be absent take transformers' defaults for them.

    Args:
        where: the file, for messages.
        raw: its contents.

    Returns:
        The sizes, and what the user should know.

    Raises:
        UserError: another architecture, a feature that our model does not have, or a field that
            is missing, of another type or out of range.
    """
    fields = Fields(where, raw)
    _check_architecture(fields)
    for name, plain in _PLAIN.items():
        fields.require(name, *plain)
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers is {layers}; expected {_MOST_LAYERS} at most")
    max_length = fields.integer("max_position_embeddings", 2048)
    theta, scaling, notes = _rope(fields, max_length)
    _check_sliding_window(fields, max_length)
    mlp_width, kv_heads = _per_layer(fields, layers, heads, width)
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(fields, width, heads),
        mlp_width=mlp_width,
        rope_theta=theta,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_length=max_length,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        rope_scaling=scaling,
    )
    return config, fields.notes() + notes


def config_json(
    config: ModelConfig,
    dtype: str,
    policy: Trained,
    special: Mapping[str, Any],
    *,
    gated: bool = False,
    dialect: str | None = None,
) -> dict[str, Any]:
    """`config.json` for a model, in the spelling of transformers 4, which 5 reads too.

    Nothing is written twice, so that no edit of one place is lost to another; but beside blocks,
    which say it too, transformers wants the width of the MLP.

    Args:
        config: sizes.
        dtype: of the weights.
        policy: that it was trained for.
        special: ids of special tokens, such as `bos_token_id`.
        gated: whether gates go along.
        dialect: one of `DIALECTS`, for the KV heads of each layer; None: DeciLM's where layers
            differ, and else Llama's own.

    Returns:
        What to write as JSON.

    Raises:
        UserError: sizes that the dialect has no words for.
    """
    kv_heads = config.kv_heads_by_layer
    if dialect is None and len(set(kv_heads)) > 1:
        dialect = "decilm"
    rope = None
    if config.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_length,
        }
    written = {
        "architectures": ["LlamaForCausalLM" if dialect is None else "DeciLMForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": max(kv_heads),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "torch_dtype": dtype,
        **special,
    }
    if dialect == "decilm":
        written["num_key_value_heads_per_layer"] = list(kv_heads)
    if dialect == "nemotron":
        written["block_configs"] = _blocks_of(config)
    if isinstance(policy, DMC) or gated or dialect is not None:
        written["auto_map"] = {"AutoModelForCausalLM": "modeling_llama_dmc.LlamaDMCForCausalLM"}
    return written


# ---- parts ------------------------------------------------------------------------------------


def _check_architecture(fields: Fields) -> None:
    named = fields.values.get("architectures")
    if isinstance(named, list) and named:
        known = any(name in ARCHITECTURES for name in named)
        found = ", ".join(str(name)[:60] for name in named[:3])
    else:
        found = str(fields.values.get("model_type"))[:60]
        known = found in _MODEL_TYPES
    if not known:
        raise UserError(
            f"{fields.where}: the architecture is {found}; those that can be read are "
            f"{', '.join(ARCHITECTURES)}"
        )


def _rope(fields: Fields, max_length: int) -> tuple[float, Llama3Scaling | None, tuple[str, ...]]:
    """Base and scaling of the rotary embedding, from either spelling; both have to agree."""
    new, old = _table(fields, "rope_parameters"), _table(fields, "rope_scaling")
    bases = {
        spelling.number("rope_theta")
        for spelling in (new, old, fields)
        if spelling.has("rope_theta")
    }
    if len(bases) > 1:
        raise UserError(f"{fields.where}: two different values of rope_theta, {sorted(bases)}")
    theta = bases.pop() if bases else fields.number("rope_theta", 10_000.0)
    read = [(table, _scaling(table)) for table in (new, old) if table.values]
    if len({scaling for _, scaling in read}) > 1:
        said = " and ".join(f"{table.where.split(', ')[-1]} {what}" for table, what in read)
        raise UserError(
            f"{fields.where}: {said}, which disagree: make them equal, or leave one out"
        )
    scaling = read[0][1] if read else None
    if scaling == _DYNAMIC:  # no scaling up to the length that the model was trained on
        note = f"{read[0][0].where}: dynamic scaling, beyond {max_length:,} tokens, is left out"
        return theta, None, (note,)
    return theta, scaling, ()


def _scaling(table: Fields) -> Llama3Scaling | str | None:
    """The scaling that an object says, None or `_DYNAMIC`."""
    table.require("partial_rotary_factor", 1.0, 1)
    nested = [name for name, value in table.values.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"{table.where} differs by kind of layer ({nested[0]!r:.60})")
    said = [table.values[name] or "default" for name in ("rope_type", "type") if table.has(name)]
    kinds = {kind if isinstance(kind, str) else repr(kind) for kind in said}
    if len(kinds) > 1:
        raise UserError(f"{table.where} has two types, {' and '.join(sorted(map(repr, kinds)))}")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        return None
    if kind == _DYNAMIC:
        return _DYNAMIC
    if kind != "llama3":
        raise UserError(
            f"{table.where} is of type {str(kind)[:60]!r}; default, llama3 and dynamic can be read"
        )
    scaling = Llama3Scaling(
        factor=table.number("factor"),
        low_freq_factor=table.number("low_freq_factor"),
        high_freq_factor=table.number("high_freq_factor"),
        original_length=table.integer("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"{table.where}: expected low_freq_factor < high_freq_factor, got "
            f"{scaling.low_freq_factor} and {scaling.high_freq_factor}"
        )
    return scaling


def _check_sliding_window(fields: Fields, max_length: int) -> None:
    if fields.has("sliding_window") and fields.flag("use_sliding_window", True):
        window = fields.integer("sliding_window")
        if window < max_length:
            raise UserError(
                f"{fields.where}: sliding_window is {window}, but the model is for {max_length} "
                "tokens; attention over a sliding window cannot be computed here"
            )


def _per_layer(
    fields: Fields, layers: int, heads: int, width: int
) -> tuple[int, int | tuple[int, ...]]:
    """MLP width and KV heads, in one of three spellings."""
    if fields.has("block_configs"):
        return _nemotron_blocks(fields, layers, heads, width)
    mlp_width = fields.integer("intermediate_size")
    if not fields.has("num_key_value_heads_per_layer"):
        given = fields.has("num_key_value_heads")
        return mlp_width, fields.integer("num_key_value_heads") if given else heads
    kv_heads = fields.values["num_key_value_heads_per_layer"]
    if not isinstance(kv_heads, list) or not all(type(count) is int for count in kv_heads):
        raise UserError(
            f"{fields.where}: num_key_value_heads_per_layer is no list of whole numbers"
        )
    if len(kv_heads) != layers:
        raise UserError(
            f"{fields.where}: num_key_value_heads_per_layer names {len(kv_heads)} layers, the "
            f"model has {layers}"
        )
    return mlp_width, _one_if_equal(kv_heads)


def _nemotron_blocks(
    fields: Fields, layers: int, heads: int, width: int
) -> tuple[int, int | tuple[int, ...]]:
    """Llama-Nemotron's list of a (searched) architecture: what differs in attention is read."""
    blocks = fields.values["block_configs"]
    if not isinstance(blocks, list) or len(blocks) != layers:
        raise UserError(f"{fields.where}: block_configs is no list of {layers} layers")
    kv_heads, multiples = [], []
    for index, block in enumerate(blocks):
        where = f"{fields.where}, block_configs[{index}]"
        if not isinstance(block, Mapping):
            raise UserError(f"{where} is no object")
        attention, mlp = (_table(Fields(where, block), name) for name in ("attention", "ffn"))
        for part, plain in ((attention, "n_heads_in_group"), (mlp, "ffn_mult")):
            special = [name for name, value in part.values.items() if name != plain and value]
            if special:
                raise UserError(f"{part.where}: {special[0][:60]} is set, which cannot be read")
        group = attention.integer("n_heads_in_group")
        if heads % group:
            raise UserError(f"{where}: {heads} heads do not divide into groups of {group}")
        kv_heads.append(heads // group)
        multiples.append(mlp.number("ffn_mult"))
    if len(set(multiples)) > 1 or multiples[0] > 1000:
        raise UserError(
            f"{fields.where}: block_configs gives its layers MLPs of different or absurd "
            "widths, which cannot be read; different KV heads can"
        )
    return _mlp_width(multiples[0], width), _one_if_equal(kv_heads)


def _mlp_width(multiple: float, width: int) -> int:
    """Read a width as Llama-Nemotron writes it: so many times 2/3 of D, rounded up to 256s."""
    return math.ceil(int(2 * multiple * width / 3) / _MLP_UNIT) * _MLP_UNIT


def _blocks_of(config: ModelConfig) -> list[dict[str, Any]]:
    """Llama-Nemotron's list of layers; the inverse of `_nemotron_blocks`."""
    multiple = 3 * config.mlp_width / (2 * config.width)
    if _mlp_width(multiple, config.width) != config.mlp_width:
        raise UserError(
            f"block_configs, the dialect nemotron, has multiples of {_MLP_UNIT} for MLP widths, "
            f"the model has {config.mlp_width}: choose the dialect decilm"
        )
    plain = {"no_op": False, "replace_with_linear": False}
    return [
        {
            "attention": {"n_heads_in_group": config.heads // count} | plain,
            "ffn": {"ffn_mult": multiple} | plain,
        }
        for count in config.kv_heads_by_layer
    ]


def _one_if_equal(kv_heads: list[int]) -> int | tuple[int, ...]:
    return kv_heads[0] if len(set(kv_heads)) == 1 else tuple(kv_heads)


def _head_dim(fields: Fields, width: int, heads: int) -> int:
    if fields.has("head_dim"):
        return fields.integer("head_dim")
    if width % heads:
        raise UserError(
            f"{fields.where}: hidden_size {width} is no multiple of num_attention_heads {heads}, "
            "and head_dim is not given"
        )
    return width // heads


def _table(fields: Fields, name: str) -> Fields:
    """A field that is an object; empty where it is absent."""
    value = fields.values.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{fields.where}: {name} is no object")
    return Fields(f"{fields.where}, {name}", value or {})
