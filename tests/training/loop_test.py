"""Whole runs: resumed equals unbroken, stages follow each other, mistakes get one clear line."""

import dataclasses
import json
import os
import shutil
import signal
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from dmc_jax.checkpoints.metadata import load_metadata, write_metadata
from dmc_jax.checkpoints.models import open_model
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.checkpoints.states import Saver
from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    to_dict,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import RunFailure, UserError
from dmc_jax.fields import from_dict
from dmc_jax.policies.dense import Dense
from dmc_jax.training import checks, loop, ownership, starts
from dmc_jax.training.loop import train


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """The mesh of one: the others have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = checks.make_mesh
        patch.setattr(checks, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield make_mesh


@pytest.fixture(scope="module")
def unbroken(one_device, make_tiny_run, tmp_path_factory):
    """The directory of a whole run, which no test may change."""
    run = make_tiny_run(tmp_path_factory.mktemp("unbroken"))
    return train(run, quiet=True)


def metrics_of(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    timing = ("tokens_per_second", "goodput", "seconds_")
    return [{k: v for k, v in line.items() if not k.startswith(timing)} for line in lines]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def interrupted_at(monkeypatch, number):
    """Ctrl-C arrives while the given step of the process is being taken."""
    taken = 0
    to_devices = loop._to_devices

    def interrupting(batch, mesh):
        nonlocal taken
        taken += 1
        if taken == number:
            signal.raise_signal(signal.SIGINT)
        return to_devices(batch, mesh)

    monkeypatch.setattr(loop, "_to_devices", interrupting)


def resumed_run_equals_the_unbroken_one_bit_for_bit_test(tiny_run, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_at(patch, 11)  # the third step of retrofit
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run, quiet=True)
    assert latest(Path(tiny_run.output) / "run").stage == "retrofit"
    assert latest(Path(tiny_run.output) / "run").step == 3
    resumed = train(tiny_run, quiet=True)

    assert metrics_of(resumed) == metrics_of(unbroken)
    assert [line["step"] for line in metrics_of(resumed)] == list(range(1, 19))
    for stage in tiny_run.stage_names:
        ours, theirs = open_model(resumed / stage), open_model(unbroken / stage)
        assert_same(ours.params, theirs.params)
        assert ours.metadata.validation == theirs.metadata.validation
    before = {p: p.stat().st_mtime_ns for p in resumed.rglob("*") if p.is_file()}
    train(tiny_run, quiet=True)  # nothing is left to do
    after = {p: p.stat().st_mtime_ns for p in resumed.rglob("*") if p.is_file()}
    changed = {p.name for p in before if before[p] != after[p]}
    assert set(before) == set(after) and changed <= {"config.json"}


def a_damaged_end_is_set_aside_and_made_again_bit_for_bit_test(tiny_run, unbroken, caplog):
    directory = Path(tiny_run.output) / "run"
    shutil.copytree(unbroken, directory)
    end = latest(directory)
    data = max((end.path / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    whole = data.read_bytes()
    data.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    (directory / "finetune" / "9").mkdir()  # half of a step that was removed, say
    with caplog.at_level("WARNING"):
        train(tiny_run, quiet=True)
    told = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert len(told) == 2 and "parts of it are missing" in told[0]
    assert f"{data.name} is not as it was written" in told[1]
    aside = {path.name for path in (directory / "finetune").glob("*.damaged")}
    assert aside == {"9.damaged", f"{end.step}.damaged"}
    assert_same(open_model(directory).params, open_model(unbroken).params)
    assert metrics_of(directory) == metrics_of(unbroken)


def a_checkpoint_whose_text_stands_elsewhere_is_refused_test(tiny_run, unbroken):
    directory = Path(tiny_run.output) / "run"
    shutil.copytree(unbroken, directory)
    shutil.rmtree(latest(directory).path)
    begun = latest(directory)
    (begun.path / "digests.json").unlink()
    data = begun.path / "data" / "metadata"
    data.write_text(data.read_text().replace(f'"next_index": {begun.step}', '"next_index": 99'))
    with pytest.raises(UserError, match=f"after step {begun.step} the text stands at batch 99"):
        train(tiny_run, quiet=True)


def each_stage_can_start_from_the_checkpoint_of_the_one_before_test(tiny_run, unbroken):
    later = dataclasses.replace(
        tiny_run, name="later", stages="retrofit,finetune", init_from=str(unbroken / "zero_out")
    )
    directory = train(later, quiet=True)
    assert not (directory / "pretrain").exists()
    assert latest(directory).stage == "finetune"
    model = open_model(directory)
    assert model.policy.settings == tiny_run.dmc
    assert open_model(unbroken / "pretrain").policy == Dense()
    kernel = open_model(unbroken / "zero_out").params["run_0"]["k"]["kernel"]
    np.testing.assert_array_equal(kernel[..., -1], 0)
    assert load_metadata(latest(directory)).validation["ratio"] >= 1.0


def calibrated_threshold_meets_the_ratio_and_is_stored_test(tiny_run, unbroken):
    compression = dataclasses.replace(tiny_run.compression, calibration_windows=16, ratio=2.0)
    run = dataclasses.replace(
        tiny_run,
        stages="retrofit",
        init_from=str(unbroken / "zero_out"),
        compression=compression,
        dmc=dataclasses.replace(tiny_run.dmc, offset=0.5),
        retrofit=dataclasses.replace(tiny_run.retrofit, steps=30, learning_rate=1e-2),
    )
    metadata = load_metadata(latest(train(run, quiet=True)))
    assert metadata.policy.threshold != 0
    assert metadata.validation["ratio"] == pytest.approx(2.0, rel=0.25)


def a_loss_that_is_not_a_number_stops_the_run_test(tiny_run):
    run = dataclasses.replace(
        tiny_run,
        stages="pretrain",
        log_every=3,
        pretrain=dataclasses.replace(tiny_run.pretrain, steps=9, learning_rate=1e30),
    )
    with pytest.raises(RunFailure) as failure:
        train(run, quiet=True)
    message = str(failure.value)
    assert "stage pretrain, step" in message and " = nan" in message
    assert "Last good checkpoint: none" in message and "training documents [[" in message
    assert latest(Path(run.output) / "run") is None


def sigterm_saves_and_handlers_are_restored_test(tiny_run, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    original = loop._to_devices

    def terminate(batch, mesh):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, mesh)

    monkeypatch.setattr(loop, "_to_devices", terminate)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run, quiet=True)
    assert latest(Path(tiny_run.output) / "run").step == 1
    assert signal.getsignal(signal.SIGTERM) is before


def sigterm_while_the_last_step_is_saved_is_heard_test(tiny_run, monkeypatch):
    wait = Saver.wait

    def waiting(saver):
        if saver._pending is not None:  # of a stage of five steps or so, this is the last
            signal.raise_signal(signal.SIGTERM)
        return wait(saver)

    run = dataclasses.replace(tiny_run, save_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "wait", waiting)
        with pytest.raises(KeyboardInterrupt) as stop:
            train(run, quiet=True)
    assert stop.value.args == (signal.SIGTERM,)
    there = latest(Path(run.output) / "run")
    assert (there.stage, there.step) == ("pretrain", run.pretrain.steps)
    assert load_metadata(there).validation is None  # it goes on with measuring


def a_step_is_saved_by_the_clock_too_test(tiny_run, monkeypatch):
    clock, kept = iter(range(0, 10**6, 90)), []
    looks = types.SimpleNamespace(  # a minute and a half apart
        monotonic=lambda: next(clock), perf_counter=time.perf_counter
    )
    monkeypatch.setattr(loop, "time", looks)
    monkeypatch.setattr(
        Saver, "save", lambda self, step, *more: kept.append((self._directory.name, step))
    )
    run = dataclasses.replace(
        tiny_run, stages="pretrain", save_every=1000, log_every=1, save_minutes=3.0
    )
    monkeypatch.setattr(loop, "_measure_stage", lambda *_: None)
    train(run, quiet=True)
    # Begun at 0; looks at 1.5, 3.0 after that; the save itself looks once more.
    steps = range(2, run.pretrain.steps + 1, 2)
    assert kept == [("pretrain", step) for step in sorted({*steps, run.pretrain.steps})]


def documents_shorter_than_the_window_are_packed_test(tiny_run):
    (data,) = [data for data, _ in checks.open_datas(tiny_run)]
    longest = int(np.diff(data.documents["train"]).max())
    run = dataclasses.replace(
        tiny_run, data=dataclasses.replace(tiny_run.data, length=2 * longest, batch=2)
    )
    run = dataclasses.replace(
        run, stages="pretrain", pretrain=StageConfig(steps=1, learning_rate=1e-3)
    )
    train(run, quiet=True)
    assert latest(Path(run.output) / "run").step == 1


def ids_that_the_model_lacks_are_refused_and_rows_without_ids_are_not_test(tiny_run):
    def of_size(vocab_size):
        model = dataclasses.replace(tiny_run.model, vocab_size=vocab_size)
        return dataclasses.replace(tiny_run, model=model)

    with pytest.raises(UserError, match=r"280 ids, model.vocab_size is 279"):
        train(of_size(279), quiet=True)
    run = dataclasses.replace(
        of_size(300), stages="pretrain", pretrain=StageConfig(steps=1, learning_rate=1e-3)
    )
    train(run, quiet=True)
    assert latest(Path(run.output) / "run").step == 1


def a_directory_is_not_taken_over_by_another_run_test(tiny_run, unbroken):
    run = dataclasses.replace(tiny_run, output=str(unbroken.parent))
    held = (unbroken / "config.json").read_text()
    with pytest.raises(UserError, match="holds a run with another dmc, seed"):
        train(dataclasses.replace(run, seed=1, dmc=DMCSettings(window=7)), quiet=True)
    assert (unbroken / "config.json").read_text() == held


def attention_that_cannot_run_here_is_refused_and_leaves_nothing_test(tiny_run):
    with pytest.raises(UserError, match="'triton', which cannot run here"):
        train(dataclasses.replace(tiny_run, attention="triton"), quiet=True)
    assert not (Path(tiny_run.output) / tiny_run.name).exists()


@pytest.mark.parametrize("theirs", [{"attention": "triton"}, {}], ids=["another", "none"])
def a_run_goes_on_with_other_attention_test(tiny_run, tmp_path, theirs):
    """So does one that began before there was a choice."""
    config = to_dict(tiny_run)
    del config["attention"]
    directory = tmp_path / "begun"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | theirs))
    ownership.claim(directory, tiny_run, {})
    assert json.loads((directory / "config.json").read_text())["attention"] == "auto"


def a_stage_that_was_never_run_may_have_had_settings_test(tiny_run, unbroken, tmp_path):
    """As every stage had in configs written before `pretrain` could be left out."""
    silent = dataclasses.replace(tiny_run, stages="zero_out,retrofit,finetune", pretrain=None)
    directory = tmp_path / "begun"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(to_dict(tiny_run)))
    ownership.claim(directory, silent, {})
    assert json.loads((directory / "config.json").read_text())["pretrain"] is None

    held = (unbroken / "config.json").read_text()  # this one did pretrain
    with pytest.raises(UserError, match="holds a run with another pretrain"):
        ownership.claim(unbroken, silent, {})
    assert (unbroken / "config.json").read_text() == held


def a_checkpoint_of_another_shape_is_refused_test(tiny_run, unbroken):
    wider = dataclasses.replace(
        tiny_run,
        name="wider",
        stages="zero_out",
        init_from=str(unbroken / "pretrain"),
        model=dataclasses.replace(tiny_run.model, mlp_width=48),
    )
    with pytest.raises(UserError, match="has mlp_width 32, config.model.mlp_width is 48"):
        train(wider, quiet=True)
    assert latest(Path(tiny_run.output) / "wider") is None


def another_tokenizer_than_the_checkpoints_is_refused_test(tiny_run, unbroken, tmp_path):
    shutil.copytree(unbroken / "pretrain", tmp_path / "foreign" / "pretrain")
    ref = latest(tmp_path / "foreign")
    write_metadata(ref, dataclasses.replace(load_metadata(ref), tokenizer_sha256="0" * 64))
    later = dataclasses.replace(tiny_run, stages="zero_out", init_from=str(tmp_path / "foreign"))
    with pytest.raises(UserError, match="trained with another tokenizer"):
        train(later, quiet=True)


def a_stage_that_needs_a_model_asks_for_one_test(tiny_run):
    with pytest.raises(UserError, match="init_from=DIR"):
        train(dataclasses.replace(tiny_run, stages="retrofit"), quiet=True)
    nowhere = dataclasses.replace(tiny_run, stages="retrofit", init_from="nowhere")
    with pytest.raises(UserError, match="no complete checkpoint in nowhere"):
        train(nowhere, quiet=True)


def a_batch_that_the_mesh_cannot_split_is_refused_test(tiny_run, one_device, monkeypatch):
    monkeypatch.setattr(checks, "make_mesh", one_device)  # the real one, with all devices
    run = dataclasses.replace(
        tiny_run,
        mesh=dataclasses.replace(tiny_run.mesh, data=8),
        data=dataclasses.replace(tiny_run.data, batch=12),
    )
    with pytest.raises(UserError, match="12 windows cannot be split over 8 devices"):
        train(run, quiet=True)


def the_teacher_is_the_model_the_run_starts_from_test(tiny_run):
    mesh = checks.make_mesh(tiny_run.mesh)
    assert starts.load_teacher(tiny_run, "retrofit", mesh) == (None, None)
    compression = dataclasses.replace(tiny_run.compression, distillation=1.0)
    run = dataclasses.replace(tiny_run, compression=compression, stages="pretrain,retrofit")
    directory = train(run, quiet=True)
    assert starts.load_teacher(run, "pretrain", mesh) == (None, None)
    config, params = starts.load_teacher(run, "retrofit", mesh)
    assert config == run.model
    assert_same(params, open_model(directory / "pretrain").params)
    assert any("distillation" in line for line in metrics_of(directory)[4:])


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (CompressionConfig, {"ratio": 0.5}, "ratio must be at least 1"),
        (CompressionConfig, {"ratoi": 2.0}, "no field 'ratoi'"),
        (DataConfig, {"batch": "many"}, "field 'batch': expected"),
        (DMCSettings, {"window": -3}, "window must be >= 1"),
        (ModelConfig, {"width": 4}, "missing"),
        (CompressionConfig, {"ratio": float("nan")}, "field 'ratio': expected a finite number"),
        (CompressionConfig, {"weight": -1.0}, "compression.weight must be 0 or more"),
        (OptimizerConfig, {"clip": -1.0}, "optimizer.clip must be 0 or more"),
        (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay must be 0 or more"),
        (OptimizerConfig, {"beta2": 1.0}, "optimizer.beta2 must be from 0 to below 1"),
        (StageConfig, {"steps": 1, "learning_rate": -1e-3}, "learning_rate must be 0 or more"),
        (StageConfig, {"steps": 1, "learning_rate": float("inf")}, "expected a finite number"),
    ],
)
def bad_fields_get_one_clear_message_test(cls, values, message):
    with pytest.raises(UserError, match=message):
        from_dict(cls, values)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stages": "retrofit,pretrain"}, "in this order"),
        ({"stages": "anneal"}, "'anneal' is not one of"),
        ({"stages": ""}, "each once"),
        ({"remat": "some"}, "expected one of none, full, dots"),
        ({"compute_dtype": "float8"}, "expected one of float32, bfloat16"),
        ({"accumulation": 3}, "multiple of accumulation"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"initializer_range": 0.0}, "initializer_range must be above 0"),
        ({"initializer_range": float("inf")}, "initializer_range must be 0 or more, got inf"),
        ({"eval_every": -1}, "eval_every must be 0 or more"),
        ({"draws": 4}, "draws is 4"),
    ],
)
def impossible_runs_are_refused_test(tiny_run, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(tiny_run, **change)
    assert isinstance(tiny_run, RunConfig)
