"""Hugging Face checkpoints: the same logits as transformers, and every bit there and back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dmc_jax.checkpoints.models import load_tokenizer_of, open_model
from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.data.tokenizer import train_sentencepiece
from dmc_jax.errors import UserError
from dmc_jax.interop.compare import logits_of
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source, recognise
from dmc_jax.interop.huggingface import open_huggingface
from dmc_jax.interop.huggingface_config import DIALECTS, config_json, model_config
from dmc_jax.interop.parameters import flatten, leaf_shapes, read_params
from dmc_jax.model.llama import Llama, init_params
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import attend_whole
from tests.interop.checkpoint_files import (
    RECORDED,
    assert_same_bits,
    config_of,
    read_safetensors,
    write_checkpoint,
    write_shards,
)
from tests.interop.reference_llama import Sizes, dmc_head, logits, random_weights, with_decisions

TOLERANCE = 1e-5  # float32 logits of about 5
VARIANTS = sorted(folder.name for folder in RECORDED.iterdir() if folder.is_dir())
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SETTINGS = DMCSettings(window=3, temperature=0.2, offset=1.0, eps=0.01)


def quiet(_):
    pass


def to_ours(source, folder, dtype=None):
    folder.mkdir()
    write_dmc_jax(source, folder, dtype, quiet)
    return folder


def to_huggingface(source, folder, dtype=None, **options):
    folder.mkdir()
    write_huggingface(source, folder, dtype, quiet, **options)
    return folder


# ---- against transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def recorded_checkpoints_give_the_logits_of_transformers_test(variant):
    recorded = np.load(RECORDED / variant / "logits.npz")
    [found] = logits_of(open_source(RECORDED / variant), [recorded["tokens"].tolist()])
    np.testing.assert_allclose(found, recorded["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def every_bit_survives_the_way_here_and_back_test(variant, tmp_path):
    source = open_source(RECORDED / variant)
    ours = open_source(to_ours(source, tmp_path / "ours"))
    back = to_huggingface(ours, tmp_path / "back")
    expected = {name: tensor.read() for name, tensor in source.tensors.items()}
    assert_same_bits(read_safetensors(back), expected)
    if not variant.endswith("_bin"):
        assert_same_bits(read_safetensors(back), read_safetensors(RECORDED / variant))
    assert open_source(back).config == ours.config == source.config


def both_spellings_of_a_config_mean_the_same_model_test():
    read = [
        json.loads((RECORDED / variant / "config.json").read_text())
        for variant in ("llama3", "llama3_old_config")
    ]
    assert "rope_parameters" in read[0] and "rope_parameters" not in read[1]
    configs = [model_config("config.json", raw) for raw in read]
    assert configs[0] == configs[1]
    scaling = Llama3Scaling(4.0, 1.0, 4.0, 16)
    assert (configs[0][0].rope_theta, configs[0][0].rope_scaling) == (500_000.0, scaling)


# ---- our parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def the_table_of_names_covers_every_parameter_test(preset):
    config = PRESETS[preset]
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    wanted = {name: leaf.shape for name, leaf in flatten(shapes).items()}
    assert leaf_shapes(config) == wanted


def layers_of_unequal_heads_go_to_runs_of_their_own_test(tmp_path):
    sizes = Sizes(L=4)
    weights = random_weights(sizes)
    for layer, kv_heads in enumerate((4, 1, 1, 2)):
        for name in ("k", "v"):
            rng = np.random.default_rng(layer)
            rows = rng.normal(size=(kv_heads * sizes.H, sizes.D)).astype(BFLOAT16)
            weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = rows
    write_checkpoint(
        tmp_path / "deci",
        sizes,
        weights,
        architectures=["DeciLMForCausalLM"],
        model_type="deci",
        num_key_value_heads=None,
        num_key_value_heads_per_layer=[4, 1, 1, 2],
        rope_scaling={"type": "dynamic", "factor": 2.0},
    )
    source = open_source(tmp_path / "deci")
    assert source.config.kv_heads == (4, 1, 1, 2)
    assert len(source.notes) == 1 and "dynamic scaling" in source.notes[0]
    params = read_params(source)
    kernel = np.asarray(params["run_1"]["k"]["kernel"])
    assert kernel.shape == (2, sizes.D, 1, sizes.H)
    third = weights["model.layers.2.self_attn.k_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(kernel[1, :, 0], third.T)
    ours = open_source(to_ours(source, tmp_path / "ours"))
    back = to_huggingface(ours, tmp_path / "back")
    assert_same_bits(read_safetensors(back), weights)
    assert open_source(back).config == source.config


def tensors_larger_than_a_part_are_put_together_test(tmp_path, monkeypatch):
    monkeypatch.setattr("dmc_jax.interop.parameters.PART_BYTES", 200)
    weights = write_checkpoint(tmp_path / "hf")
    ours = to_ours(open_source(tmp_path / "hf"), tmp_path / "ours")
    assert_same_bits(read_safetensors(to_huggingface(open_source(ours), tmp_path / "b")), weights)
    stack = open_model(ours).params["run_0"]["q"]["kernel"]
    rows = weights["model.layers.1.self_attn.q_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(stack[1].reshape(Sizes.D, -1), rows.T)


def a_dtype_asked_for_is_stored_and_loads_as_float32_test(tmp_path):
    weights = write_checkpoint(tmp_path / "hf", weights=random_weights(Sizes(), np.float32))
    source = open_source(tmp_path / "hf")
    ours = open_source(to_ours(source, tmp_path / "ours", BFLOAT16))
    narrow = {name: array.astype(BFLOAT16) for name, array in weights.items()}
    assert_same_bits(
        {name: t.read() for name, t in sorted(ours.tensors.items())}, dict(sorted(narrow.items()))
    )
    assert_same_bits(read_safetensors(to_huggingface(source, tmp_path / "n", BFLOAT16)), narrow)
    model = open_model(tmp_path / "ours")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        model.params["embedding"], narrow["model.embed_tokens.weight"].astype(np.float32)
    )


def mixed_dtypes_are_kept_where_layers_agree_and_widened_where_not_test(tmp_path):
    weights = random_weights(Sizes())
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        weights[name] = weights[name].astype(np.float32)
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.float16)
    write_checkpoint(tmp_path / "hf", weights=weights)
    ours = open_source(to_ours(open_source(tmp_path / "hf"), tmp_path / "ours"))
    weights["model.layers.0.input_layernorm.weight"] = weights[
        "model.layers.0.input_layernorm.weight"
    ].astype(np.float32)
    found = {name: ours.tensors[name].read() for name in weights}
    assert_same_bits(found, weights)


def a_converted_checkpoint_is_complete_for_whoever_loads_it_test(tmp_path):
    sizes = Sizes(V=300)
    write_checkpoint(tmp_path / "hf", sizes)
    train_sentencepiece(["the cache merges a token " * 50], 280, tmp_path / "hf/tokenizer.model")
    (tmp_path / "hf/tokenizer_config.json").write_text('{"chat_template": "x"}')
    to_ours(open_source(tmp_path / "hf"), tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "moved")
    model = open_model(tmp_path / "moved")
    assert model.policy == Dense() and model.metadata.run is None
    assert model.metadata.converted_from.format == "huggingface"
    assert model.metadata.compute_dtype == "bfloat16"
    assert load_tokenizer_of(model).encode("the cache")
    tokens = jnp.arange(12)[None]
    attend = attend_whole(Dense(), model.config, jnp.asarray(tokens))
    output = Llama(model.config).apply({"params": model.params}, tokens, attend=attend)
    expected = logits(random_weights(sizes), sizes, tokens[0], base=10_000.0)
    np.testing.assert_allclose(output.logits[0], expected, atol=TOLERANCE)
    back = to_huggingface(open_source(tmp_path / "moved"), tmp_path / "back")
    name = "tokenizer.model"
    assert (back / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    # The model's own configuration is kept, and what it leaves to guess is added.
    kept = json.loads((back / "tokenizer_config.json").read_text())
    assert (kept["chat_template"], kept["add_bos_token"], kept["eos_token"]) == ("x", True, "</s>")
    written = json.loads((back / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)


def a_converted_model_without_tokenizer_asks_for_one_test(tmp_path):
    write_checkpoint(tmp_path / "hf")
    to_ours(open_source(tmp_path / "hf"), tmp_path / "ours")
    model = open_model(tmp_path / "ours")
    with pytest.raises(UserError, match="name one with --tokenizer"):
        load_tokenizer_of(model)
    train_sentencepiece(["the cache merges a token " * 50], 280, tmp_path / "t.model")
    assert load_tokenizer_of(model, tmp_path / "t.model").vocab_size == 280


# ---- DMC models -------------------------------------------------------------------------------


def a_dmc_model_is_exported_with_a_warning_and_read_back_the_same_test(tmp_path):
    sizes = Sizes()
    weights = with_decisions(random_weights(sizes), sizes)
    write_checkpoint(tmp_path / "dense", sizes, weights)
    source = dataclasses.replace(open_source(tmp_path / "dense"), policy=DMC(SETTINGS, 0.1 + 0.2))
    first = to_huggingface(source, tmp_path / "first")
    ours = open_source(to_ours(open_source(first), tmp_path / "ours"))
    second = to_huggingface(ours, tmp_path / "second")
    for folder in (first, second):
        read = open_source(folder)
        assert read.policy == DMC(SETTINGS, 0.1 + 0.2)
        assert_same_bits(read_safetensors(folder), weights)
        written = json.loads((folder / "config.json").read_text())
        assert "ignores the merging" in written["dmc"]["warning"]
        assert "ignores the merging" in (folder / "README.md").read_text()
        module = written["auto_map"]["AutoModelForCausalLM"].split(".")[0]
        assert (
            f"class {written['auto_map']['AutoModelForCausalLM'].split('.')[1]}("
            in (folder / f"{module}.py").read_text()
        )
    assert open_model(tmp_path / "ours").policy.threshold == 0.1 + 0.2
    assert open_model(tmp_path / "ours").metadata.stage == "finetune"


def logits_of_an_imported_dmc_model_are_those_of_the_semantics_test(tmp_path):
    sizes = Sizes()
    weights = with_decisions(random_weights(sizes), sizes)
    write_checkpoint(tmp_path / "hf", sizes, weights)
    (tmp_path / "hf/dmc_config.json").write_text(
        json.dumps(
            {
                "format": "dmc_jax.dmc",
                "version": 1,
                "threshold": 0.0,
                **dataclasses.asdict(SETTINGS),
            }
        )
    )
    tokens = np.random.default_rng(0).integers(0, sizes.V, 24)
    record = []
    expected = logits(
        weights,
        sizes,
        tokens,
        head=dmc_head,
        base=10_000.0,
        window=SETTINGS.window,
        offset=SETTINGS.offset,
        eps=SETTINGS.eps,
        record=record,
    )
    assert 0.1 < np.mean(np.array(record) > 0) < 0.9 and np.abs(record).min() > 1e-4
    [found] = logits_of(open_source(tmp_path / "hf"), [tokens.tolist()])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def a_dense_export_has_no_trace_of_dmc_test(tmp_path):
    write_checkpoint(tmp_path / "hf")
    out = to_huggingface(open_source(tmp_path / "hf"), tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    written = json.loads((out / "config.json").read_text())
    assert "dmc" not in written and "auto_map" not in written


def large_exports_are_split_under_an_index_test(tmp_path):
    weights = write_checkpoint(tmp_path / "hf")
    out = to_huggingface(open_source(tmp_path / "hf"), tmp_path / "out", shard_bytes=1500)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_same_bits(read_safetensors(out), weights)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    assert set(index["weight_map"].values()) == set(files)
    assert open_huggingface(out).config == open_huggingface(tmp_path / "hf").config


# ---- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, dialect",
    [
        (preset, dialect)
        for preset, config in PRESETS.items()
        for dialect in (None, *DIALECTS)
        if dialect != "nemotron" or config.mlp_width % 256 == 0
    ],
)
def a_written_config_reads_back_as_the_same_sizes_test(preset, dialect):
    written = config_json(PRESETS[preset], "bfloat16", Dense(), {}, dialect=dialect)
    assert model_config("config.json", json.loads(json.dumps(written))) == (PRESETS[preset], ())


def llama_nemotron_blocks_are_read_for_their_attention_test():
    def block(group):
        return {
            "attention": {"n_heads_in_group": group, "no_op": False, "window_length": None},
            "ffn": {"ffn_mult": 5.25, "no_op": False, "replace_with_linear": False},
        }

    raw = config_of(
        Sizes(D=4096, L=3, N=32, H=128),
        architectures=["DeciLMForCausalLM"],
        model_type="nemotron-nas",
        intermediate_size=None,
        num_key_value_heads=None,
        block_configs=[block(8), block(16), block(8)],
    )
    config, _ = model_config("config.json", raw)
    assert config.kv_heads == (4, 2, 4)
    # Llama 3.1 8B's MLP, 14,336, has the multiple 5.25 in that notation.
    assert config.mlp_width == 14_336


def absent_fields_take_the_defaults_of_transformers_and_are_named_test():
    raw = config_of(Sizes())
    for name in ("rope_theta", "rms_norm_eps", "head_dim", "num_key_value_heads"):
        del raw[name]
    config, notes = model_config("config.json", raw)
    assert (config.rope_theta, config.norm_eps) == (10_000.0, 1e-6)
    assert (config.head_dim, config.kv_heads) == (Sizes.D // Sizes.N, Sizes.N)
    assert len(notes) == 2 and "rope_theta" in notes[0] + notes[1]


REFUSED = {
    "another architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architecture is GPT2"),
    "no architecture": ({"architectures": None, "model_type": "gpt2"}, "architecture is gpt2"),
    "sliding window": ({"sliding_window": 32}, "sliding_window is 32, but the model is for 64"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "bias": ({"attention_bias": True}, "attention_bias is True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'; default, llama3"),
    "two bases": ({"rope_parameters": {"rope_theta": 5.0}}, "two different values of rope_theta"),
    "scaling of a word": ({"rope_scaling": "linear"}, "rope_scaling is no object"),
    "incomplete scaling": ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
    "impossible heads": ({"num_key_value_heads": 3}, "cannot share 3 KV heads"),
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "a word for a number": ({"vocab_size": "many"}, "vocab_size is 'many'"),
    "infinite layers": ({"num_hidden_layers": 10**9}, "10000 at most"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "layers unlike heads": ({"num_key_value_heads_per_layer": [1]}, "names 1 layers"),
    "blocks without attention": (
        {"block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}}] * 2},
        "no_op is set",
    ),
    "unequal blocks": (
        {
            "block_configs": [
                {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": multiple}}
                for multiple in (1.0, 2.0)
            ]
        },
        "MLPs of different",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def what_our_model_cannot_compute_is_refused_by_name_test(change, message):
    with pytest.raises(UserError, match=message) as refusal:
        model_config("somewhere/config.json", config_of(Sizes(), **change))
    assert "\n" not in str(refusal.value)


def a_sliding_window_that_no_text_reaches_is_none_test():
    config, _ = model_config("config.json", config_of(Sizes(), sliding_window=64))
    assert isinstance(config, ModelConfig)


def formats_are_recognised_by_what_is_in_the_folder_test(tmp_path):
    write_checkpoint(tmp_path / "hf")
    to_ours(open_source(tmp_path / "hf"), tmp_path / "ours")
    write_shards(tmp_path / "shards", [random_weights(Sizes())])
    (tmp_path / "empty").mkdir()
    found = {folder.name: recognise(folder) for folder in tmp_path.iterdir()}
    assert found == {"hf": "huggingface", "shards": "huggingface", "ours": "dmc_jax", "empty": None}
    with pytest.raises(UserError, match="no checkpoint of a known format"):
        open_source(tmp_path / "empty")
    with pytest.raises(UserError, match="name the folder"):
        open_source(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "nowhere")
