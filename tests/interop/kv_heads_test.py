"""KV heads averaged on the way from one format to another, and both dialects of configs."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from dmc_jax.baselines.gqa import mean_pool_kv_heads
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source
from dmc_jax.interop.gates import with_gates
from dmc_jax.interop.huggingface_config import DIALECTS
from dmc_jax.interop.kv_heads import with_kv_heads
from dmc_jax.interop.parameters import read_params
from dmc_jax.policies.dmc import DMC
from tests.doors import runs_of
from tests.interop.checkpoint_files import assert_same_bits, read_safetensors, write_checkpoint
from tests.interop.gates_files import write_gates
from tests.interop.reference_llama import Sizes, random_weights

SIZES = Sizes(N=12, K=4, L=3, F=256)


@pytest.fixture
def source(tmp_path):
    write_checkpoint(tmp_path / "hf", SIZES, random_weights(SIZES, np.float32))
    return open_source(tmp_path / "hf")


def written(source, folder, **how):
    folder.mkdir()
    write_huggingface(source, folder, None, lambda _: None, **how)
    return folder


@pytest.mark.parametrize("kv_heads", [1, 3, (4, 2, 3)], ids=str)
def a_checkpoint_is_averaged_as_its_parameters_are_test(source, kv_heads, tmp_path):
    """Also to 3 of 12 queries, which does not divide the 4 heads that there are."""
    fewer = with_kv_heads(source, kv_heads)
    expected, config = mean_pool_kv_heads(read_params(source), source.config, kv_heads)
    ours = tmp_path / "ours"
    ours.mkdir()
    write_dmc_jax(fewer, ours, None, lambda _: None)
    for found in (fewer, open_source(ours), open_source(written(fewer, tmp_path / "back"))):
        assert found.config == config
        params = read_params(found)
        assert jax.tree.structure(params) == jax.tree.structure(expected)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, expected)


def the_dtype_stays_and_so_do_layers_that_keep_their_heads_test(tmp_path):
    weights = write_checkpoint(tmp_path / "hf", SIZES, random_weights(SIZES))
    fewer = with_kv_heads(open_source(tmp_path / "hf"), (4, 4, 2))
    found = {name: tensor.read() for name, tensor in fewer.tensors.items()}
    changed = [f"model.layers.2.self_attn.{name}_proj.weight" for name in "kv"]
    old, new = ({name: x.pop(name) for name in changed} for x in (weights, found))
    assert_same_bits(found, weights)
    for name in changed:
        assert new[name].dtype == ml_dtypes.bfloat16
        pairs = old[name].astype(np.float32).reshape(2, 2, SIZES.H, SIZES.D)
        mean = pairs.mean(axis=1).reshape(-1, SIZES.D)
        np.testing.assert_array_equal(new[name], mean.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    "dialect, kv_heads", [*((d, (4, 1, 2)) for d in DIALECTS), (DIALECTS[1], 2)]
)
def both_dialects_are_read_back_as_the_same_model_test(dialect, kv_heads, source, tmp_path):
    fewer = with_kv_heads(source, kv_heads)
    folder = written(fewer, tmp_path / "out", dialect=dialect)
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == ["DeciLMForCausalLM"]
    if dialect == "decilm":
        assert said["num_key_value_heads_per_layer"] == [4, 1, 2] and "block_configs" not in said
    else:
        groups = [block["attention"]["n_heads_in_group"] for block in said["block_configs"]]
        assert groups == ([3, 12, 6] if kv_heads != 2 else [6, 6, 6])
        assert "num_key_value_heads_per_layer" not in said
    back = open_source(folder)
    assert (back.config, back.notes) == (fewer.config, fewer.notes)
    tensors = {name: tensor.read() for name, tensor in fewer.tensors.items()}
    assert_same_bits(read_safetensors(folder), tensors)


def a_width_that_blocks_cannot_say_is_refused_test(tmp_path):
    write_checkpoint(tmp_path / "hf", Sizes(F=24))
    with pytest.raises(UserError, match="multiples of 256 for MLP widths, the model has 24"):
        written(open_source(tmp_path / "hf"), tmp_path / "out", dialect="nemotron")


def heads_that_merge_are_not_averaged_test(source):
    merging = dataclasses.replace(source, policy=DMC(DMCSettings(window=3, offset=0.0), 0.0))
    with pytest.raises(UserError, match="hf merges, .* before its retrofit"):
        with_kv_heads(merging, 1)


def gates_of_the_old_heads_stay_behind_test(source, tmp_path):
    gated = with_gates(source, write_gates(tmp_path / "some.safetensors", source))
    fewer = with_kv_heads(gated, 2)
    assert gated.gates is not None and fewer.gates is None
    assert "stay behind" in fewer.notes[-1]


def the_door_averages_and_says_what_it_cannot_test(source, tmp_path):
    there, out = f"--input={source.path}", f"--output={tmp_path / 'out'}"
    huggingface = ["--to=huggingface", "--dialect=nemotron"]
    cases = [
        (["--kv_heads=two"], "--kv_heads=two: expected one whole number for all layers"),
        (["--kv_heads="], "names 0 layers, the model has 3"),
        (["--kv_heads=5"], "12 query heads cannot share 5 KV heads"),
        (["--kv_heads=6"], "4 KV heads of layer 0 cannot be averaged into 6"),
        (["--kv_heads=2,1"], "names 2 layers, the model has 3"),
        (["--dialect=nemotron"], "--dialect is of a Hugging Face config"),
        (["--verify", "--against=x", "--prompt=x", "--kv_heads=1"], "--kv_heads is not for --ver"),
    ]
    runs = [[there, *flags, *([out] if "--verify" not in flags else [])] for flags, _ in cases]
    *refused, done = runs_of("convert", *runs, [there, out, "--kv_heads=4,1,2", *huggingface])
    for result, (_, message) in zip(refused, cases, strict=True):
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result
        assert result.stderr.startswith("error: ") and message in result.stderr
    assert done.returncode == 0, done.stderr
    assert "12 heads of 6, 4/1/2 KV heads" in done.stdout
    assert open_source(tmp_path / "out").config.kv_heads == (4, 1, 2)
