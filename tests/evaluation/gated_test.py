"""Gates from a pretrained model and text, by the door: solved, distilled, measured, and taken."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dmc_jax.checkpoints.gates import FILE, check_base, load_gates
from dmc_jax.checkpoints.metadata import load_metadata
from dmc_jax.checkpoints.models import find_model, open_model
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.checkpoints.states import load_state
from dmc_jax.config import GatesConfig, MeshConfig, RunConfig, StageConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.loader import training_batches
from dmc_jax.data.prepared import open_data
from dmc_jax.errors import UserError
from dmc_jax.evaluation.report import write_report
from dmc_jax.model.sharding import make_mesh
from dmc_jax.training import gated
from dmc_jax.training.loop import train
from tests.doors import runs_of

FILES = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def run(finished_run, data, tmp_path_factory):
    named = RunConfig.named(f"{FILES}/gates.py:{finished_run}/pretrain")
    return dataclasses.replace(
        named,
        output=str(tmp_path_factory.mktemp("gates")),
        data=dataclasses.replace(named.data, path=str(data.path), length=48, batch=2),
        gates=GatesConfig(delay=3, windows=6, ratios=(1.5, 2.0, 3.0)),
        distill=StageConfig(steps=4, learning_rate=1e-2),
        mesh=MeshConfig(data=1),
        products="",
        eval_windows=4,
        save_every=2,
        log_every=1,
    )


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr("dmc_jax.training.checks.make_mesh", lambda c: make_mesh(c, devices))
        yield


@pytest.fixture(scope="module")
def directory(run):
    return train(run, quiet=True)


def state_at(run, step):
    optimizer = gated.make_optimizer(run)
    wanted = jax.eval_shape(lambda: gated.state_of(gated.empty(run), optimizer))
    ref = latest(Path(run.output) / run.name / "distill" / str(step))
    return load_state(ref, wanted)


def the_file_serves_the_model_it_was_made_for_test(run, directory):
    file = f"--gates={directory}/{FILE}"
    gates = load_gates(directory / FILE, run.model)
    assert gates.policy.delay == 3
    assert gates.table[0].ratio == pytest.approx(1.0)
    ratios = [entry.ratio for entry in gates.table]
    assert ratios == sorted(ratios) and ratios[-1] > 1.8
    assert gates.about["distilled_tokens"] == 4 * 2 * 48 and gates.about["seed"] == 0
    base = f"--checkpoint={run.init_from}", f"--data={run.data.path}", "--length=48", "--windows=4"
    wanted = 1.4
    measured, refused, alone, own = runs_of(
        "evaluate",
        [*base, file, f"--ratio={wanted}", "--json"],
        [*base, file, "--ratio=99"],
        [*base, "--ratio=2"],
        [f"--checkpoint={directory}"],
    )
    found = json.loads(measured.stdout)["evaluation"]
    assert found["ratio"] == pytest.approx(wanted, rel=0.15)
    assert refused.returncode == 2 and "these gates were measured from 1 to" in refused.stderr
    assert alone.returncode == 2 and "or a file of gates, not with dense" in alone.stderr
    assert own.returncode == 2 and f"({run.init_from})" in own.stderr
    with pytest.raises(UserError, match="holds gates, and no model"):
        find_model(directory)
    prompt = "--prompt=some words and more of them", "--max_new_tokens=20"
    [said] = runs_of("decode", [base[0], file, f"--ratio={wanted}", *prompt, "--json"])
    assert said.returncode == 0 and json.loads(said.stdout)["ratio"] > 1.1


def what_a_stage_came_to_is_measured_and_reported_test(run, directory):
    for stage in ("closed_form", "distill"):
        about = load_metadata(latest(directory / stage))
        assert about.validation["tokens"] > 0 and about.base_sha256
    report = json.loads((write_report(directory) / "report.json").read_text())
    assert [each["stage"] for each in report["stages"]] == ["closed_form", "distill"]
    assert (directory / "report" / "ratio_per_head.png").exists()


def a_stage_that_goes_on_ends_as_if_it_had_not_stopped_test(run, directory, tmp_path):
    again = dataclasses.replace(run, output=str(tmp_path))
    copy = tmp_path / run.name
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "distill" / "4")
    train(again, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, state_at(again, 4), state_at(run, 4))


def a_batch_in_parts_is_the_batch_test(run, directory):
    data, model = open_data(run.data.path), open_model(run.init_from)
    batch = next(iter(training_batches([(data, 1.0)], length=48, batch=4, seed=0)))
    batch = {name: batch[name] for name in gated.READ}
    mesh, optimizer = make_mesh(MeshConfig(data=1), jax.devices()[:1]), gated.make_optimizer(run)
    counts = gated.count_ids([(data, 1.0)], 320)
    states, metrics = zip(
        *(
            gated.make_distill_step(
                dataclasses.replace(run, accumulation=parts), mesh, optimizer, counts
            )(state_at(run, 4), batch, model.params)
            for parts in (1, 2)
        ),
        strict=True,
    )
    for a, b in zip(*map(jax.tree.leaves, (states[0].params, states[1].params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert metrics[0]["distillation"] == pytest.approx(float(metrics[1]["distillation"]), rel=1e-4)


@pytest.mark.slow
def products_of_half_the_bits_change_little_test(run, directory):
    data, model = open_data(run.data.path), open_model(run.init_from)
    batch = next(iter(training_batches([(data, 1.0)], length=48, batch=4, seed=0)))
    batch = {name: batch[name] for name in gated.READ}
    mesh, optimizer = make_mesh(MeshConfig(data=1), jax.devices()[:1]), gated.make_optimizer(run)
    counts, found = gated.count_ids([(data, 1.0)], 320), []
    for products in ("", "bfloat16"):
        other = dataclasses.replace(run, products=products)
        step = gated.make_distill_step(other, mesh, optimizer, counts)
        found.append(step(state_at(run, 4), batch, model.params)[1])
    wide, narrow = (float(metrics["distillation"]) for metrics in found)
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.1)


@pytest.mark.slow
def the_loss_is_that_of_the_weights_test(run, directory):
    """Of the next token over all ids, of the teacher over the likely ones; no teacher unasked."""
    data, model = open_data(run.data.path), open_model(run.init_from)
    batch = next(iter(training_batches([(data, 1.0)], length=48, batch=2, seed=0)))
    batch = {name: batch[name] for name in gated.READ}
    mesh, optimizer = make_mesh(MeshConfig(data=1), jax.devices()[:1]), gated.make_optimizer(run)
    counts, found = gated.count_ids([(data, 1.0)], 320), {}
    for weights in ((1.0, 0.0), (1.0, 0.5), (0.0, 0.5)):
        gates = dataclasses.replace(run.gates, distillation=weights[0], next_token=weights[1])
        step = gated.make_distill_step(
            dataclasses.replace(run, gates=gates), mesh, optimizer, counts
        )
        state, metrics = step(state_at(run, 4), batch, model.params)
        found[weights] = metrics | {"bias": np.asarray(state.params["policy"].gates.bias)}
    alone, both, never = found.values()
    assert "loss" not in alone and "distillation" not in never
    assert both["loss"] == pytest.approx(float(never["loss"]), rel=1e-5)
    assert np.log(320) * 0.5 < both["loss"] < np.log(320) * 1.5
    assert both["distillation"] == pytest.approx(float(alone["distillation"]), rel=0.05)
    moved = [each["bias"] - state_at(run, 4).params["policy"].gates.bias for each in found.values()]
    assert not np.allclose(moved[0], moved[1]) and not np.allclose(moved[1], moved[2])


def distillation_keeps_the_share_of_drops_and_lowers_the_divergence_test(run, directory):
    """Of a model that attends to something: one whose weights are larger than a fresh one's."""
    data, model = open_data(run.data.path), open_model(run.init_from)
    params = jax.tree.map(lambda x: 4.0 * x if x.ndim > 2 else x, model.params)
    run = dataclasses.replace(run, distill=StageConfig(steps=240, learning_rate=1e-2))
    mesh, optimizer = make_mesh(MeshConfig(data=1), jax.devices()[:1]), gated.make_optimizer(run)
    step = gated.make_distill_step(run, mesh, optimizer, gated.count_ids([(data, 1.0)], 320))
    batch = next(iter(training_batches([(data, 1.0)], length=48, batch=4, seed=0)))
    batch = {name: batch[name] for name in gated.READ}
    state = gated.state_of(state_at(run, 4).params, optimizer)
    frozen = jax.device_get(state.params["policy"].gates.mean)
    seen, prices = [], []
    for _ in range(run.distill.steps):
        state, metrics = step(state, batch, params)
        seen.append(jax.device_get((metrics["drawn_ratio"], metrics["distillation"])))
        prices.append(jax.device_get(state.params["prices"]))
    seen, third = np.asarray(seen), run.distill.steps // 3
    for ratio in run.gates.ratios:
        first, last = (
            part[part[:, 0] == ratio, 1].mean() for part in (seen[:third], seen[-third:])
        )
        assert last < 0.9 * first, (ratio, first, last)
    assert (np.diff(state.params["thresholds"]) < 0).all()
    assert (np.diff(np.mean(prices[-third:], axis=0)) > 0).all() and np.min(prices) >= 0
    np.testing.assert_array_equal(frozen, state.params["policy"].gates.mean)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["lora", "all"])
def a_model_may_learn_with_its_gates_test(run, trained):
    """It lies in the run; the gates serve it, and not the one that was; a stop loses nothing."""
    gates = dataclasses.replace(run.gates, model=trained, rank=2, delay=0, method="dmc")
    run = dataclasses.replace(run, name=trained, gates=gates)
    directory = train(run, quiet=True)
    base, model = open_model(run.init_from), open_model(directory / "model")
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: float(abs(a - b).max()), base.params, model.params)
        )
        if x > 0
    }
    if trained == "lora":
        assert changed == {f"run_0/{name}/kernel" for name in "qkvo"}
    else:
        assert {"embedding", "run_0/gate/kernel", "run_0/attention_norm/scale"} < changed
    stored = load_gates(directory / FILE, run.model)
    check_base(stored, model.params, model.config)
    with pytest.raises(UserError, match="made for another model"):
        check_base(stored, base.params, base.config)
    assert stored.policy.delay == 0
    with pytest.raises(UserError, match=f"were made for .{directory}/model., and beside it"):
        find_model(directory)

    before = state_at(run, 4)
    shutil.rmtree(directory / "distill" / "4")
    shutil.rmtree(directory / "model")
    train(run, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, state_at(run, 4), before)
    jax.tree.map(
        np.testing.assert_array_equal, open_model(directory / "model").params, model.params
    )


@pytest.mark.slow
@pytest.mark.parametrize("importance", [False, True])
def gates_that_merge_are_made_the_same_way_test(run, importance):
    gates = dataclasses.replace(run.gates, method="dmc", importance=importance)
    run = dataclasses.replace(
        run, name=f"merging_{importance}", gates=gates, dmc=DMCSettings(window=5)
    )
    directory = train(run, quiet=True)
    stored = load_gates(directory / FILE, run.model)
    assert stored.policy.name == "dmc" and stored.policy.settings.window == 5
    assert (np.asarray(stored.policy.gamma) != 0.5).all()
    assert (stored.policy.gates.importance_weight is not None) == importance
    figures = load_metadata(latest(directory)).validation
    assert figures["ratio"] > 1.5 and stored.table[-1].ratio > 1.8


def what_cannot_be_is_refused_in_a_line_test(finished_run, data, other_data, tmp_path):
    dense, merging = (f"{FILES}/gates.py:{finished_run}/{s}" for s in ("pretrain", "retrofit"))
    texts, output = f"--config.data.path={data.path}", f"--config.output={tmp_path}"
    short, one = "--config.data.length=30", "--config.gates.delay=0"
    cases = [
        (merging, [texts], "merges already"),
        (dense, [f"--config.data.path={other_data.path}"], "another tokenizer"),
        (dense, [texts, short], "windows of more than 48 tokens; got 30"),
        (dense, [texts, one], "gates.delay must be at least 1"),
        (dense, [texts, "--config.gates.method=tova"], "expected dms or dmc"),
        (dense, [texts, "--config.gates.model=some"], "expected frozen or lora or all"),
        (dense, [texts, "--config.gates.distillation=0"], "both weights of the loss are 0"),
        (dense, [texts, "--config.gates.margin=1"], "gates.margin must be 0 or more, for"),
        (dense, [texts, "--config.gates.ratios=(2.0,1.5)"], "above 1 that rise"),
        (dense, [texts, "--config.stages=distill"], "closed_form, which must stand before it"),
        (dense, [texts, "--config.stages=pretrain,distill"], "no other stage beside"),
        (f"{FILES}/gates.py:smollm2_135m", [texts], "--config.init_from=DIR"),
        (f"{FILES}/gates.py:{tmp_path}/none", [], "no complete checkpoint"),
        (f"{FILES}/gates.py", [], "needs arguments"),
    ]
    runs = ([f"--config={config}", output, *flags] for config, flags, _ in cases)
    for result, (*_, complaint) in zip(runs_of("train", *runs), cases, strict=True):
        assert result.returncode == 2 and complaint in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
