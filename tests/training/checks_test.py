"""What can be known before the first step is said before it, all of it, and leaves nothing."""

import dataclasses
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.config import MeshConfig, RunConfig, StageConfig, named_configs
from dmc_jax.data import prepared
from dmc_jax.errors import Checklist, RunFailure, UserError
from dmc_jax.model.sharding import make_mesh
from dmc_jax.training import checks, loop, stages
from dmc_jax.training.loop import train
from tests.doors import runs_of

LARGE = sorted(name for name in named_configs() if re.match(r"\d+b_|llama3", name))
LARGE += ["paper:70b,ratio=2"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = checks.make_mesh
    monkeypatch.setattr(checks, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


@pytest.fixture
def short(tiny_run):
    """Two steps of pretraining."""
    return dataclasses.replace(
        tiny_run, stages="pretrain", pretrain=StageConfig(steps=2, learning_rate=1e-3)
    )


def with_data(run, **changes):
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **changes))


def refused(run, message):
    """Before anything is made, and before a step."""
    before = sorted(Path(run.output).rglob("*"))
    with pytest.raises(UserError, match=message):
        train(run, quiet=True)
    assert sorted(Path(run.output).rglob("*")) == before


def a_mesh_that_parameters_cannot_be_split_over_is_refused_test(short, monkeypatch):
    monkeypatch.setattr(checks, "make_mesh", make_mesh)
    model = dataclasses.replace(short.model, heads=4)
    refused(
        dataclasses.replace(short, model=model, mesh=MeshConfig(1, 1, 8)),
        r"mesh: 4 of the parameter run_0/o/kernel \(2 x 4 x 8 x 32\) cannot be split over tensor 8",
    )


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", "/tmp/elsewhere", "two\nlines"])
def a_name_that_leaves_the_output_is_refused_test(short, name):
    refused(dataclasses.replace(short, name=name), "name is .*; expected that of a folder inside")


def what_stands_in_the_outputs_way_is_refused_test(short, tmp_path):
    (tmp_path / "file").write_text("")
    refused(dataclasses.replace(short, output=str(tmp_path / "file" / "runs")), "it is no folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    refused(dataclasses.replace(short, output=str(tmp_path / "dangling")), "it is no folder")


def an_output_without_permission_is_refused_test(short, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(short, "no permission to write there")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eval_windows": 0}, "eval_windows must be at least 1"),
        ({"mesh": MeshConfig(3, 1, 1)}, "mesh data 3 x fsdp 1 x tensor 1 does not fit 1 devices"),
        ({"attention": "triton"}, "which cannot run here"),
    ],
)
def a_setting_that_only_a_stages_end_would_show_is_refused_test(short, change, message):
    refused(dataclasses.replace(short, **change), message)


def a_missing_package_is_named_before_a_directory_is_made_test(short, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused(dataclasses.replace(short, tensorboard=True), "pip install tensorboardX")


def a_split_that_holds_no_window_is_refused_test(short, tmp_path):
    refused(with_data(short, length=10**7, batch=1), "split 'train' of .* too few for a window")
    shutil.copytree(short.data.path, tmp_path / "data")
    manifest = (tmp_path / "data" / prepared.MANIFEST).read_text()
    tokens = prepared.read_manifest(tmp_path / "data")["splits"]["validation"]["tokens"]
    one = manifest.replace(f'"tokens": {tokens},', '"tokens": 1,')
    (tmp_path / "data" / prepared.MANIFEST).write_text(one)
    (tmp_path / "data" / "validation.tokens").write_bytes(b"\1\0")
    offsets = np.load(tmp_path / "data" / "validation.documents.npy")
    np.save(tmp_path / "data" / "validation.documents.npy", np.minimum(offsets, 1))
    os.utime(tmp_path / "data" / prepared.MANIFEST, (2**31, 2**31))
    refused(with_data(short, path=str(tmp_path / "data")), "split 'validation' of .* 1 tokens")


@pytest.mark.parametrize("weights", ["0", "-1", "nan", "inf"])
def a_weight_that_draws_nothing_is_refused_test(short, weights):
    refused(with_data(short, weights=weights), "expected a positive number")


def a_teacher_of_other_ids_is_refused_test(short, tmp_path):
    model = dataclasses.replace(short.model, vocab_size=300)
    teacher = dataclasses.replace(short, name="teacher", model=model)
    train(teacher, quiet=True)
    compression = dataclasses.replace(
        short.compression, distillation=1.0, teacher=f"{short.output}/teacher"
    )
    refused(
        dataclasses.replace(short, compression=compression), r"ids of .* \(300\) are not .* \(280\)"
    )


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 5e5}, {"norm_eps": 1e-6}, {"layers": 3}, {"tied_embeddings": True}],
    ids=str,
)
def constants_and_sizes_agree_with_our_own_checkpoints_too_test(short, change):
    ours = train(short, quiet=True)
    later = dataclasses.replace(
        short, name="later", stages="zero_out", init_from=str(ours), zero_out=short.pretrain
    )
    name, value = next(iter(change.items()))
    with pytest.raises(UserError, match=f"has {name} .*, config.model.{name} is {value}"):
        train(
            dataclasses.replace(later, model=dataclasses.replace(later.model, **change)), quiet=True
        )
    assert not Path(short.output, "later").exists()


# ---- all at once ------------------------------------------------------------------------------


def several_mistakes_are_said_at_once_test(short):
    run = dataclasses.replace(
        with_data(short, path="here, there"),
        eval_windows=0,
        init_from="nowhere",
        mesh=MeshConfig(1, 64, 1),
    )
    with pytest.raises(Checklist) as refusal:
        train(run, quiet=True)
    lines = str(refusal.value).splitlines()
    assert [line.strip()[:2] for line in lines[1:-1]] == ["1.", "2.", "3.", "4."]
    for line, expected in zip(
        lines[1:], ("eval_windows", "in nowhere", "here, there is not", "fsdp 64"), strict=False
    ):
        assert expected in line


def a_large_recipe_alone_says_all_that_it_needs_in_order_test(tmp_path):
    results = runs_of("train", *([f"--config={name}"] for name in LARGE), folder=tmp_path)
    assert len(LARGE) >= 8
    for name, result in zip(LARGE, results, strict=True):
        data = RunConfig.named(name).data.path
        said = result.stderr
        assert result.returncode == 2 and said.startswith("error: "), said
        wanted = (
            "1. stage zero_out continues a trained model",
            "Hugging Face",
            "--config.init_from=DIR",
            f"2. {data} is not a prepared data folder",
            "python -m dmc_jax.prepare_data --input=TEXT --tokenizer=DIR/tokenizer.model",
            f"--output={data}",
            "3. mesh data -1 x fsdp",
            "devices",
            "Then give this command again",
        )
        places = [said.index(text) for text in wanted]
        assert places == sorted(places)
    assert list(tmp_path.iterdir()) == []


def the_tokenizer_of_the_named_checkpoint_is_named_test(short, tmp_path):
    ours = train(short, quiet=True)
    later = with_data(
        dataclasses.replace(
            short, name="later", stages="zero_out", init_from=str(ours), zero_out=short.pretrain
        ),
        path=str(tmp_path / "text"),
    )
    tokenizer = Path(short.data.path) / "tokenizer.model"
    refused(later, f"prepare_data --input=TEXT --tokenizer={tokenizer} --output={tmp_path}/text")


# ---- allowed, and said ------------------------------------------------------------------------


def what_is_perhaps_not_meant_is_said_test(short, caplog):
    run = dataclasses.replace(
        with_data(short, length=64), pretrain=dataclasses.replace(short.pretrain, warmup=7)
    )
    train(run, quiet=True)
    assert "pretrain.warmup is 7 steps, the stage has 2" in caplog.text
    assert "data.length is 64 tokens, the model was made for 32" in caplog.text
    caplog.clear()
    train(dataclasses.replace(short, name="other"), quiet=True)
    assert caplog.text == ""


@pytest.mark.slow
def a_missed_target_is_said_at_the_end_of_the_stage_test(tiny_run, caplog):
    train(dataclasses.replace(tiny_run, compression=tiny_run.compression), quiet=True)
    said = [r.getMessage() for r in caplog.records if "target was missed" in r.getMessage()]
    assert [line.split(":")[0] for line in said] == ["end of retrofit", "end of finetune"]
    assert "tokens per slot where 3.000 were asked for" in said[0]


# ---- dry runs ---------------------------------------------------------------------------------


def a_dry_run_takes_one_step_and_leaves_nothing_test(short, monkeypatch):
    taken = []
    original = loop._to_devices
    monkeypatch.setattr(loop, "_to_devices", lambda *a: (taken.append(1), original(*a))[1])
    dry = dataclasses.replace(short, dry_run=True)
    train(dry, quiet=True)
    assert len(taken) == 1 and list(Path(short.output).iterdir()) == []
    refused(dataclasses.replace(dry, eval_windows=0), "eval_windows")
    directory = train(short, quiet=True)  # and of a run that there is, the next step
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
    more = dataclasses.replace(dry, stages="pretrain,zero_out")
    train(more, quiet=True)
    assert len(taken) == 4
    with pytest.raises(UserError, match="holds a run with another seed"):
        train(dataclasses.replace(more, seed=3), quiet=True)
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*")}


def a_step_that_gives_no_number_fails_a_dry_run_test(short):
    stage = dataclasses.replace(short.pretrain, learning_rate=1e-3)
    run = dataclasses.replace(short, dry_run=True, pretrain=stage)

    def poisoned(*_):
        return {"loss": np.float32("nan")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.jax, "device_get", poisoned)
        with pytest.raises(RunFailure, match="dry run, stage pretrain: loss = nan"):
            train(run, quiet=True)
    assert list(Path(short.output).iterdir()) == []


# ---- the divergence rule, and signals ---------------------------------------------------------


def a_validation_loss_beyond_any_perplexity_is_divergence_test(short, monkeypatch):
    assess = stages.assess

    def diverged(*arguments, **named):
        measured = assess(*arguments, **named)
        return measured | {
            "validation": measured["validation"] | {"loss": 800.0, "perplexity": float("inf")}
        }

    monkeypatch.setattr(stages, "assess", diverged)
    for _ in range(2):  # when it is resumed, too
        with pytest.raises(RunFailure, match="loss = 800, perplexity = inf: the model has diver"):
            train(short, quiet=True)
    assert latest(Path(short.output) / "run").step == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def what_asks_a_run_to_stop_leaves_a_checkpoint_test(short, monkeypatch, name):
    number = getattr(signal, name)
    # Whoever runs the tests may be under nohup.
    before = signal.signal(number, signal.default_int_handler)
    original = loop._to_devices
    monkeypatch.setattr(
        loop, "_to_devices", lambda *a: (signal.raise_signal(number), original(*a))[1]
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            train(short, quiet=True)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert latest(Path(short.output) / "run").step == 1


def nohup_is_respected_test(short, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    original = loop._to_devices
    monkeypatch.setattr(
        loop, "_to_devices", lambda *a: (signal.raise_signal(signal.SIGHUP), original(*a))[1]
    )
    try:
        train(short, quiet=True)
        assert latest(Path(short.output) / "run").step == 2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
