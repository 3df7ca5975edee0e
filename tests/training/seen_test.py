"""What a run shows: where its time went, validation on the way, a trace, what a step needs."""

import dataclasses
import json
import time
from types import SimpleNamespace

import jax
import pytest
from absl import logging

from dmc_jax.checkpoints.metadata import load_metadata
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.config import StageConfig
from dmc_jax.errors import UserError
from dmc_jax.evaluation import times
from dmc_jax.evaluation.report import write_report
from dmc_jax.model.llama import count_parameters
from dmc_jax.model.sharding import make_mesh
from dmc_jax.training import checks, spent
from dmc_jax.training.loop import train
from dmc_jax.training.spent import Spent, profiled_steps


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(checks, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


@pytest.fixture
def clock(monkeypatch):
    """Goes on by hand."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(spent, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def lines_of(directory):
    return [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]


def batches_that_take(clock, seconds):
    while True:
        clock.seconds += seconds
        yield "batch"


def what_nothing_else_claims_is_a_steps_test(clock):
    whole = Spent()
    clock.seconds += 4.0
    whole.began(lost=6.0)
    busy, idle = (SimpleNamespace(is_ready=lambda x=x: x) for x in (False, True))
    batches = batches_that_take(clock, 0.5)
    assert whole.fetch(batches, None) == "batch"  # nothing runs: a wait
    whole.fetch(batches, [idle, busy])  # the devices were busy all the while
    whole.fetch(batches, [idle])
    with whole.on("checkpoint"):
        clock.seconds += 2.0
    clock.seconds += 7.5
    told = whole.take()
    seconds = {"start": 4, "lost": 6, "data": 1, "checkpoint": 2, "step": 8}
    parts = {f"seconds_{part}": seconds.get(part, 0) for part in times.PARTS}
    assert told == parts | {"goodput": pytest.approx(8 / 21)}
    clock.seconds += 21.0
    told = whole.take()
    assert told["seconds_step"] == 21 and told["seconds_lost"] == 0
    assert told["goodput"] == pytest.approx(29 / 42)


def a_run_tells_where_its_time_went_and_validates_on_the_way_test(tiny_run):
    stage = StageConfig(steps=4, learning_rate=1e-3)
    run = dataclasses.replace(
        tiny_run,
        stages="pretrain,zero_out",
        pretrain=stage,
        zero_out=dataclasses.replace(stage, learning_rate=0.0),
        eval_every=2,
        save_every=2,
    )
    begun = time.perf_counter()
    directory = train(run, quiet=True)
    took = time.perf_counter() - begun
    lines = lines_of(directory)
    measured = {
        line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line
    }
    end = load_metadata(latest(directory / "pretrain")).validation["loss"]
    # Nothing is learnt in zero_out, and by its half most of the channel is gone: no merges yet.
    assert set(measured) == {2, 6} and measured[6] == pytest.approx(end, abs=0.05)
    assert lines[5]["validation_ratio"] == 1.0
    summed = times.sum_up(lines)
    for part in ("step", "checkpoint", "evaluation", "compile", "start"):
        assert summed["seconds"][part] > 0, part
    assert sum(summed["seconds"].values()) <= took
    assert lines[-1]["goodput"] == pytest.approx(summed["goodput"], abs=1e-3)
    tokens = sum(x["tokens_per_second"] * (x["seconds_step"] + x["seconds_data"]) for x in lines)
    assert tokens == pytest.approx(8 * run.data.batch * run.data.length, rel=0.05)
    report = write_report(directory)
    assert json.loads((report / "report.json").read_text())["time"] == summed
    assert f"goodput {100 * summed['goodput']:.1f} %" in (report / "report.md").read_text()

    # A process that was killed after its last save had taken steps for nothing.
    (directory / "zero_out" / "4").rename(directory / "gone")
    again = lines_of(train(run, quiet=True))
    assert again[6]["seconds_lost"] == pytest.approx(
        sum(line["seconds_step"] for line in lines[6:]), abs=1e-3
    )
    assert again[5] == lines[5] and again[7]["seconds_lost"] == 0


def times_and_skipped_steps_are_summed_up_over_stages_test():
    lines = [
        {f"seconds_{part}": 0.0 for part in times.PARTS} | {"seconds_step": 3.0} | more
        for more in (
            {"tokens_per_second": 10.0, "mfu": 0.5, "skipped": 2},
            {"tokens_per_second": 40.0, "mfu": 0.2, "seconds_step": 6.0, "seconds_lost": 2.0},
            {"tokens_per_second": None, "skipped": 3, "seconds_data": 1.0},
        )
    ]
    summed = times.sum_up([{"loss": 1.0}, *lines])
    assert summed["goodput"] == pytest.approx(12 / 15) and summed["skipped"] == 5
    assert summed["tokens_per_second"] == pytest.approx((3 * 10 + 6 * 40) / 9)
    assert summed["mfu"] == pytest.approx((3 * 0.5 + 6 * 0.2) / 9)
    text = "\n".join(times.section(summed))
    for told in ("goodput 80.0 %", "30 tokens a second", "MFU 30.0 %", "5 skipped steps"):
        assert told in text
    assert times.sum_up([{"step": 1, "loss": 2.0}]) is None


@pytest.mark.parametrize("text", ["5", "0:3", "3:0", "a:b", "3:-1", " 3:1"])
def a_profile_of_another_form_is_refused_test(tiny_run, text):
    with pytest.raises(UserError, match="expected STEP:COUNT"):
        train(dataclasses.replace(tiny_run, profile=text), quiet=True)
    assert list(profiled_steps("")) == [] and list(profiled_steps("3:2")) == [3, 4]


def a_trace_of_the_steps_that_were_asked_for_is_written_test(tiny_run):
    run = dataclasses.replace(
        tiny_run,
        stages="pretrain",
        pretrain=StageConfig(steps=3, learning_rate=1e-3),
        profile="2:1",
    )
    directory = train(run, quiet=True)
    (trace,) = (directory / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()


def a_dry_run_says_what_the_step_is_made_of_and_needs_test(tiny_run, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(checks, "make_mesh", lambda c: make_mesh(c, jax.devices()[:4]))
    mesh = dataclasses.replace(tiny_run.mesh, fsdp=2, tensor=2)
    train(dataclasses.replace(tiny_run, dry_run=True, mesh=mesh), quiet=True)
    said = [line.removeprefix("dry run: ") for line in said]
    assert "run_0/gate/kernel float32 2x32x32, 2x16x16 on a device" in said
    assert "batch tokens int32 8x32" in said
    numbers = count_parameters(tiny_run.model)
    assert any(line.startswith(f"parameters: {numbers:,} numbers, ") for line in said)
    assert any(line.startswith(f"optimizer: {2 * numbers + 1:,} numbers, ") for line in said)
    assert any(line.startswith("a step needs 0.") for line in said)
    assert any(line.startswith("one step of pretrain, loss ") for line in said)
