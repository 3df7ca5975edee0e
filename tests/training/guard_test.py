"""A batch that gives no number, or a spike, costs a step and nothing else; too many end the run."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.checkpoints.models import open_model
from dmc_jax.checkpoints.run_directory import complete_steps, latest
from dmc_jax.checkpoints.states import open_for_saving
from dmc_jax.config import StageConfig
from dmc_jax.core.guard import GuardSettings, fresh_guard, judge
from dmc_jax.data.loader import training_batches
from dmc_jax.data.prepared import open_data
from dmc_jax.errors import RunFailure
from dmc_jax.model.sharding import batch_sharding, make_mesh
from dmc_jax.training import checks, loop
from dmc_jax.training.loop import train
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.ownership import _settings
from dmc_jax.training.stages import describe
from dmc_jax.training.state import abstract_state, init_state, restore
from dmc_jax.training.step import make_train_step

NAMES = ("tokens", "targets", "positions", "segment_ids", "loss_mask")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(checks, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


@pytest.fixture
def short(tiny_run):
    """A dozen steps of pretraining."""
    stage = StageConfig(steps=12, learning_rate=1e-3)
    return dataclasses.replace(tiny_run, stages="pretrain", pretrain=stage, save_every=3)


def spoiled(monkeypatch, *steps):
    """The batches of these steps (of a process, from 0) have a mask that is no number."""
    original, seen = loop._to_devices, iter(range(1000))

    def to_devices(batch, mesh):
        if next(seen) in steps:
            batch = batch | {"loss_mask": batch["loss_mask"] * np.float32("nan")}
        return original(batch, mesh)

    monkeypatch.setattr(loop, "_to_devices", to_devices)


def lines_of(directory):
    return [json.loads(x) for x in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def the_usual_loss_is_a_mean_and_what_is_far_above_it_is_skipped_test():
    rng = np.random.default_rng(0)
    losses = rng.uniform(2.0, 3.0, size=30).astype(np.float32)
    losses[[3, 17, 18, 25]] = 9.0, 9.0, np.nan, 6.1  # the first is too early to be told
    guard, taken = fresh_guard(), []
    for step, loss in enumerate(losses):
        good, guard = judge(guard, jnp.int32(step), jnp.float32(loss), [], 2.0)
        if good:
            taken.append(loss)
        assert (guard.in_row == 0) == bool(good)
        assert float(guard.usual) == pytest.approx(np.mean(taken), rel=1e-5)
    assert int(guard.skipped) == 3 and 9.0 in taken
    good, _ = judge(guard, jnp.int32(30), jnp.float32(2.5), [jnp.array([1.0, jnp.inf])], 2.0)
    assert not good


@pytest.mark.parametrize("settings", [{"spike": 0.5}, {"spike": float("inf")}, {"stop_after": 0}])
def settings_that_skip_everything_are_refused_test(settings):
    with pytest.raises(ValueError, match=f"guard.{next(iter(settings))} must be"):
        GuardSettings(**settings)


def a_skipped_step_leaves_parameters_and_optimizer_bit_for_bit_test(tiny_run):
    mesh = make_mesh(tiny_run.mesh, jax.devices()[:1])
    optimizer = make_optimizer(tiny_run.optimizer, 1.0)
    step = make_train_step(tiny_run, "retrofit", mesh, optimizer)
    state = init_state(tiny_run.model, optimizer, mesh, 0)
    batches = iter(
        training_batches([(open_data(tiny_run.data.path), 1.0)], length=32, batch=8, seed=0)
    )

    def take(state, **change):
        batch = next(batches)
        batch |= {name: batch[name] * x for name, x in change.items()}
        return step(state, {n: jax.device_put(batch[n], batch_sharding(mesh)) for n in NAMES}, None)

    state, _ = take(state)
    before = jax.device_get(state)
    state, told = take(state, loss_mask=np.float32("nan"))
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, before.optimizer)
    assert (after.step, after.guard.skipped, after.guard.in_row) == (2, 1, 1)
    assert told["skipped_in_row"] == 1 and np.isnan(told["loss"])
    state, told = take(state)
    assert (int(state.guard.skipped), int(told["skipped_in_row"])) == (1, 0)
    assert not np.array_equal(jax.device_get(state.params)["head"], before.params["head"])


def a_batch_that_is_no_number_is_skipped_named_and_counted_and_a_resumed_run_agrees_test(
    short, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        spoiled(patch, 4, 5)
        unbroken = train(short, quiet=True)
    told = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert len(told) == 2 and told[1].startswith("stage pretrain, step 5 is skipped (2 in a row): ")
    assert "loss = nan" in told[1]
    batches = loop._batches(short, "pretrain", checks.open_datas(short))
    read = [next(batches) for _ in range(6)][5]
    assert f"windows {read['window'].tolist()} cover" in told[1]
    assert f"training documents {read['documents'].tolist()}." in told[1]
    counted = [line.get("skipped", 0) for line in lines_of(unbroken)]
    assert counted == [0, 0, 0, 0, 1, *[2] * 7]

    other = dataclasses.replace(short, output=str(tmp_path / "other"), keep=9)
    with monkeypatch.context() as patch:
        spoiled(patch, 4, 5)
        halted = loop.Recent.log

        def dies(recent, **more):
            halted(recent, **more)
            if recent.in_row == 2:  # a save is due, and waits for a step that is taken
                raise SystemExit

        patch.setattr(loop.Recent, "log", dies)
        with pytest.raises(SystemExit):
            train(other, quiet=True)
    assert complete_steps(tmp_path / "other" / "run" / "pretrain") == [3]
    with monkeypatch.context() as patch:
        spoiled(patch, 1, 2)  # as the process counts
        resumed = train(other, quiet=True)
    assert complete_steps(resumed / "pretrain") == [3, 7, 9, 12]
    ours, theirs = open_model(resumed).params, open_model(unbroken).params
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert [line.get("skipped", 0) for line in lines_of(resumed)] == counted


def too_many_in_a_row_end_the_run_and_its_last_good_checkpoint_is_one_test(short, monkeypatch):
    """The state of step 6 gave nothing but skipped steps, so it is not known to be good."""
    run = dataclasses.replace(short, guard=GuardSettings(stop_after=3))
    with monkeypatch.context() as patch:
        spoiled(patch, *range(6, 12))
        with pytest.raises(RunFailure) as failure:
            train(run, quiet=True)
    message = str(failure.value)
    assert (
        "stage pretrain, step 8: " in message
        and "loss = nan, the last of 3 skipped in a row" in message
    )
    assert "Last good checkpoint: " in message and "/pretrain/3. The batch's windows [" in message
    assert latest(Path(run.output) / "run").step == 6
    more = dataclasses.replace(run, guard=GuardSettings(stop_after=9))  # may change
    assert latest(train(more, quiet=True)).step == 12


def a_spike_is_skipped_where_it_is_asked_for_test(short, monkeypatch, caplog):
    """A batch whose targets are noise has a loss to match."""
    original, seen = loop._to_devices, iter(range(1000))

    def to_devices(batch, mesh):
        if next(seen) == 10:
            foreign = np.random.default_rng(0).integers(0, 280, batch["targets"].shape, np.int32)
            batch = batch | {"targets": foreign}
        return original(batch, mesh)

    monkeypatch.setattr(loop, "_to_devices", to_devices)
    quick = dataclasses.replace(short.pretrain, learning_rate=3e-2)
    run = dataclasses.replace(short, guard=GuardSettings(spike=1.2), pretrain=quick)
    with caplog.at_level("WARNING"):
        directory = train(run, quiet=True)
    (told,) = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert "stage pretrain, step 10 is skipped (1 in a row): loss = " in told
    assert "the usual is " in told
    assert lines_of(directory)[-1]["skipped"] == 1


def a_checkpoint_from_before_steps_were_counted_goes_on_test(tiny_run, tmp_path):
    mesh = make_mesh(tiny_run.mesh, jax.devices()[:1])
    optimizer = make_optimizer(tiny_run.optimizer, 1.0)
    state = init_state(tiny_run.model, optimizer, mesh, 0)
    wanted = abstract_state(tiny_run.model, optimizer, mesh)
    data = open_data(tiny_run.data.path)
    for number, guard in enumerate((None, dataclasses.replace(state.guard, skipped=jnp.int32(3)))):
        with open_for_saving(tmp_path / str(number), "pretrain", keep=1) as saver:
            saved = dataclasses.replace(state, guard=guard)
            saver.save(1, saved, {}, describe(tiny_run, "pretrain", 1, data))
        found = restore(latest(tmp_path / str(number)), wanted)
        assert int(found.guard.skipped) == 3 * number
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
            lambda x: x.sharding, wanted
        )
        jax.tree.map(np.testing.assert_array_equal, found.params, state.params)


def spikes_are_of_the_run_and_when_to_stop_is_not_test(tiny_run):
    spiky = dataclasses.replace(tiny_run, guard=GuardSettings(spike=2.0))
    patient = dataclasses.replace(tiny_run, guard=GuardSettings(stop_after=50))
    own = _settings(tiny_run, set())
    assert _settings(spiky, set()) != own == _settings(patient, set())
