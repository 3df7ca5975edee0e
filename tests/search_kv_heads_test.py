"""`python -m dmc_jax.search_kv_heads`: what it finds, writes, refuses, and what is made of it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import dmc_jax as dmc
from dmc_jax.baselines.gqa import mean_pool_kv_heads
from dmc_jax.data.prepared import open_data
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from tests.doors import runs_of
from tests.tiny_run import make_data, save_model, tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), 320, 0)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    return save_model(data, tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def searched(base, data, tmp_path_factory):
    """Three of the four heads, in a folder of its own, and what was printed."""
    folder = tmp_path_factory.mktemp("searched")
    flags = [f"--checkpoint={base}", f"--data={data.path}", "--budget=0.75", "--windows=6"]
    [done] = runs_of("search_kv_heads", [*flags, "--output=found"], folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "found", done.stdout


def loss_of(params, config, data):
    return dmc.evaluate(
        params, config, data, "validation", policy=Dense(), length=32, batch=4, limit=6
    ).loss


def what_was_found_is_what_is_measured_of_pooled_models_test(base, data, searched):
    found = json.loads((searched[0] / "kv_heads.json").read_text())
    model, data = dmc.load(base), open_data(data.path)
    dense, *one_layer = (
        loss_of(*mean_pool_kv_heads(model.params, model.config, heads), data)
        for heads in ((2, 2), (1, 2), (2, 1))
    )
    changes = [of_layer["1"] for of_layer in found["changes"]]
    np.testing.assert_allclose(changes, np.array(one_layer) - dense, atol=2e-5)
    assert abs(changes[0] - changes[1]) > 1e-3  # or nothing would be chosen here
    rows = {row["name"]: row for row in found["rows"]}
    chosen = [1, 2] if changes[0] < changes[1] else [2, 1]
    assert [rows[x]["kv_heads"] for x in ("dense", "search", "uniform")] == [[2, 2], chosen, [1, 1]]
    assert [rows[x]["cache"] for x in ("dense", "search", "uniform")] == [1, 0.75, 0.5]
    np.testing.assert_allclose(rows["search"]["loss_measured"], min(one_layer), atol=2e-5)
    np.testing.assert_allclose(rows["search"]["loss_predicted"], min(one_layer), atol=2e-5)
    np.testing.assert_allclose(rows["uniform"]["loss_predicted"], dense + sum(changes), atol=5e-5)
    all_layers = loss_of(*mean_pool_kv_heads(model.params, model.config, 1), data)
    np.testing.assert_allclose(rows["uniform"]["loss_measured"], all_layers, atol=2e-5)
    assert (found["length"], found["windows"], found["split"]) == (32, 6, "validation")
    assert found["machine"]["command"].endswith("--windows=6 --output=found")


def the_model_that_is_written_has_the_heads_that_were_chosen_test(base, searched):
    folder, printed = searched
    chosen = tuple(json.loads((folder / "kv_heads.json").read_text())["rows"][-1]["kv_heads"])
    model, before = dmc.load(folder), dmc.load(base)
    expected, config = mean_pool_kv_heads(before.params, before.config, chosen)
    assert model.config == config and config.kv_heads == chosen
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), model.params, expected)
    assert model.tokenizer.is_file() and model.tokenizer.parent.parent == folder
    assert "layer 0: 2 -> 1 KV heads: " in printed and "layer 1: 2 -> 1 KV heads: " in printed
    assert "75.0 %" in printed and "/".join(map(str, chosen)) in printed


@pytest.mark.slow
def it_is_trained_on_retrofitted_and_decoded_from_test(searched, data, tmp_path):
    """GQA and DMC compose: heads of this model merge, of which layers have different numbers."""
    run, tiny = dmc.RunConfig.named(f"gqa:{searched[0]}"), tiny_run(data, tmp_path)
    assert (run.init_from, run.stages) == (str(searched[0]), "pretrain")
    assert run.model == dmc.load(searched[0]).config
    names = "dmc", "compression", "pretrain", "retrofit", "stages", "data", "output", "remat"
    run = dataclasses.replace(run, **{name: getattr(tiny, name) for name in names})
    directory = dmc.train(run)
    for stage, policy in (("pretrain", Dense), ("retrofit", DMC)):
        model = dmc.load(directory / stage)
        assert isinstance(model.policy, policy) and model.config == run.model
        by_head = model.metadata.validation["ratio_by_head"]
        assert tuple(map(len, by_head)) == run.model.kv_heads
    engine = dmc.Engine.from_checkpoint(model, kv_bytes=2**20, max_sequences=2)
    sampling = dmc.SamplingParams(16, temperature=0.0)
    [result] = engine.generate(["the cache merges a token into its newest slot"], sampling)
    assert len(result.tokens) > 0 and result.ratio > 1


def mistakes_are_a_line_each_and_leave_nothing_test(base, data, tmp_path):
    one_head = save_model(data, tmp_path / "one", kv_heads=1)
    other = make_data(tmp_path, 300, 1).path
    good = [f"--checkpoint={base}", f"--data={data.path}", f"--output={tmp_path / 'out'}"]
    cases = [
        ([good[0], good[2]], "--data must be given"),
        ([*good, "--budget=0.4"], "4 KV heads in 2 layers, and each needs one; choose from 0.5"),
        ([*good, "--budget=1.5"], "choose from 0.5 to below 1"),
        ([*good, f"--checkpoint={one_head}"], "one KV head in every layer"),
        ([*good, f"--data={tmp_path}"], "is not a prepared data folder"),
        ([*good, f"--data={other}"], "was made with another tokenizer"),
        ([*good, f"--output={base}"], "exists: choose another output"),
        ([*good, "--split=dev"], "no split 'dev'"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    results = runs_of("search_kv_heads", *(flags for flags, _ in cases))
    for result, (_, message) in zip(results, cases, strict=True):
        assert result.returncode == 2, result
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result
        assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
