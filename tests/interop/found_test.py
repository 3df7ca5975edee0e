"""What people's files look like: what can be loaded is, and the rest is said as it was found."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.interop.dmc_jax import metadata_of, write_dmc_jax
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source, recognise
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from tests.interop.checkpoint_files import (
    assert_same_bits,
    config_of,
    header_of,
    write_checkpoint,
    write_raw,
    write_safetensors,
)
from tests.interop.reference_llama import Sizes, random_weights

WEIGHTS = random_weights(Sizes())
TIED = random_weights(Sizes(tied=True))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2336927755350\n"


def found(folder):
    return {name: tensor.read() for name, tensor in open_source(folder).tensors.items()}


def renamed(weights, function):
    return {function(name): array for name, array in weights.items()}


def without_model(name):
    return name.removeprefix("model.")


NAMES = {
    "torch.compile": lambda name: "_orig_mod." + name,
    "DistributedDataParallel": lambda name: "module." + name,
    "both": lambda name: "module._orig_mod." + name,
    "the body alone": without_model,
    "the body compiled": lambda name: "_orig_mod." + without_model(name),
    "a trainer's attribute": lambda name: "model." + name,
    "each layer compiled": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "recomputed layers": lambda name: name.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
    "FullyShardedDataParallel": lambda name: "_fsdp_wrapped_module." + name,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def wrapped_modules_have_the_names_of_what_they_wrap_test(name, tmp_path):
    write_checkpoint(tmp_path, weights=renamed(WEIGHTS, name))
    assert_same_bits(found(tmp_path), WEIGHTS)


def one_tensor_under_two_names_is_refused_test(tmp_path):
    write_checkpoint(tmp_path, weights=WEIGHTS | {f"module.{HEAD}": WEIGHTS[HEAD]})
    with pytest.raises(UserError, match=f"both '{HEAD}' and 'module.{HEAD}', which are one tensor"):
        open_source(tmp_path)


def what_is_missing_is_counted_and_nothing_is_guessed_test(tmp_path):
    other = renamed(WEIGHTS, lambda name: name.replace("q_proj", "query"))
    write_checkpoint(tmp_path, weights=other)
    with pytest.raises(UserError) as refusal:
        open_source(tmp_path)
    message = str(refusal.value)
    assert "2 of the 21 tensors that its config asks for, while the weights hold 21" in message
    assert "q_proj" in message and "query.weight" in message and "download" not in message


# ---- tied models --------------------------------------------------------------------------------


@pytest.mark.parametrize("kept, left_out", [(HEAD, EMBEDDING), (EMBEDDING, HEAD)])
@pytest.mark.parametrize("wrapped", ["", "_orig_mod."])
def a_tied_model_of_save_model_is_whole_by_its_metadata_test(kept, left_out, wrapped, tmp_path):
    weights = {kept: TIED[EMBEDDING]} | {n: a for n, a in TIED.items() if n != EMBEDDING}
    weights = renamed(weights, lambda name: wrapped + name)
    (tmp_path / "config.json").write_text(json.dumps(config_of(Sizes(tied=True))))
    metadata = {"format": "pt", wrapped + left_out: wrapped + kept}
    header = {"__metadata__": metadata} | header_of(weights)
    data = b"".join(array.tobytes() for array in weights.values())
    write_raw(tmp_path / "model.safetensors", header, data)
    assert_same_bits(found(tmp_path), TIED)
    assert open_source(tmp_path).config.tied_embeddings


def a_tied_model_may_store_its_embedding_as_head_test(tmp_path):
    weights = {HEAD: TIED[EMBEDDING]} | {n: a for n, a in TIED.items() if n != EMBEDDING}
    write_checkpoint(tmp_path, Sizes(tied=True), weights)
    assert_same_bits(found(tmp_path), TIED)
    assert any("to which its config ties it" in note for note in open_source(tmp_path).notes)


def a_head_that_differs_from_the_embedding_is_kept_and_said_test(tmp_path):
    write_checkpoint(tmp_path, Sizes(tied=True), WEIGHTS)
    source = open_source(tmp_path)
    assert not source.config.tied_embeddings
    assert_same_bits(found(tmp_path), WEIGHTS)
    [note] = source.notes
    assert "tie_word_embeddings is true" in note and "differs" in note


def an_equal_head_is_tied_without_a_word_test(tmp_path):
    write_checkpoint(tmp_path, Sizes(tied=True), TIED | {HEAD: TIED[EMBEDDING].astype(np.float32)})
    source = open_source(tmp_path)
    assert source.config.tied_embeddings and source.notes == ()
    assert_same_bits(found(tmp_path), TIED)


def an_index_may_list_a_tied_head_that_no_file_holds_test(tmp_path):
    write_checkpoint(tmp_path, Sizes(tied=True), TIED)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    index = {"weight_map": dict.fromkeys([*TIED, HEAD], "weights.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_bits(found(tmp_path), TIED)
    (tmp_path / "config.json").write_text(json.dumps(config_of(Sizes())))
    with pytest.raises(UserError, match=f"lacks '{HEAD}'"):
        open_source(tmp_path)


# ---- files --------------------------------------------------------------------------------------


def shards_without_an_index_are_read_if_all_are_there_test(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(Sizes())))
    names = list(WEIGHTS)
    for number, part in enumerate((names[:4], names[4:9], names[9:]), start=1):
        file = tmp_path / f"model-{number:05}-of-00003.safetensors"
        write_safetensors(file, {name: WEIGHTS[name] for name in part})
    assert recognise(tmp_path) == "huggingface"
    assert_same_bits(found(tmp_path), WEIGHTS)
    assert any("all its 3 shards are read" in note for note in open_source(tmp_path).notes)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="has 2 of 3 shards: those missing have the numbers 2"):
        open_source(tmp_path)


def a_single_file_of_another_name_is_read_and_said_test(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert_same_bits(found(tmp_path), WEIGHTS)
    assert any("weights.safetensors is read" in note for note in open_source(tmp_path).notes)
    (tmp_path / "weights.safetensors").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has no weights: .* found adapter_model.safetensors, conf"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json"],
)
def a_git_lfs_pointer_is_called_one_test(name, tmp_path):
    write_checkpoint(tmp_path)
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(POINTER)
    expected = f"{name} is a Git LFS pointer .* which has 2,336,927,755,350 bytes: .*git lfs pull"
    with pytest.raises(UserError, match=expected):
        open_source(tmp_path, "huggingface")


def what_stands_at_the_beginning_of_a_strange_file_is_shown_test(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>" + bytes(99))
    with pytest.raises(UserError, match="it begins with b'<!DOCTYPE html>"):
        open_source(tmp_path)


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_dmc_jax, write_huggingface])
@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float32])
def a_number_too_large_for_the_dtype_is_refused_by_name_test(write, stored, tmp_path):
    weights = random_weights(Sizes(), stored)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 2] = -131072.0
    write_checkpoint(tmp_path / "hf", weights=weights)
    (tmp_path / "out").mkdir()
    expected = f"{name} has the value -131072; the largest in float16 is 65504: choose another"
    with pytest.raises(UserError, match=expected):
        write(open_source(tmp_path / "hf"), tmp_path / "out", np.dtype(np.float16), lambda _: None)


@pytest.mark.parametrize(
    "stored, computed",
    [(np.float16, "float32"), (ml_dtypes.bfloat16, "bfloat16"), (np.float32, "float32")],
)
def weights_are_computed_with_in_a_dtype_that_holds_them_test(stored, computed, tmp_path):
    write_checkpoint(tmp_path, weights=random_weights(Sizes(), stored))
    assert metadata_of(open_source(tmp_path)).compute_dtype == computed


# ---- one model, two places that describe it -----------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 32.0}},
            "rope_parameters .*factor=8.0.* and rope_scaling .*factor=32.0.*disagree",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
            "rope_parameters None and rope_scaling .*disagree",
        ),
        ({"rope_scaling": {"rope_theta": 7.0}}, "two different values of rope_theta"),
        ({"rope_scaling": LLAMA3 | {"type": "dynamic"}}, "two types, 'dynamic' and 'llama3'"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "differs by kind of layer"),
    ],
)
def rotary_settings_that_disagree_are_refused_with_both_values_test(change, message, tmp_path):
    write_checkpoint(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def an_edit_of_an_export_is_never_lost_test(tmp_path):
    write_checkpoint(tmp_path / "hf", rope_scaling=LLAMA3)
    source = open_source(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    write_huggingface(source, tmp_path / "out", None, lambda _: None)
    file = tmp_path / "out" / "config.json"
    written = json.loads(file.read_text())
    assert not {"rope_parameters", "dtype"} & set(written)  # nothing stands there twice
    written["rope_scaling"]["factor"], written["rope_theta"] = 32.0, 77.0
    file.write_text(json.dumps(written))
    config = open_source(tmp_path / "out").config
    assert (config.rope_scaling.factor, config.rope_theta) == (32.0, 77.0)


def the_two_places_of_dmc_settings_have_to_agree_test(tmp_path):

    write_checkpoint(tmp_path / "hf")
    source = dataclasses.replace(open_source(tmp_path / "hf"), policy=DMC(DMCSettings()))
    (tmp_path / "out").mkdir()
    write_huggingface(source, tmp_path / "out", None, lambda _: None)
    file = tmp_path / "out" / "config.json"
    written = json.loads(file.read_text())
    written["dmc"]["threshold"] = 0.5
    file.write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"says threshold 0.0, config.json beside it \(dmc\) 0.5"):
        open_source(tmp_path / "out")
    (tmp_path / "out" / "dmc_config.json").unlink()
    assert open_source(tmp_path / "out").policy.threshold == 0.5
    del written["dmc"]
    file.write_text(json.dumps(written))
    assert open_source(tmp_path / "out").policy == Dense()
