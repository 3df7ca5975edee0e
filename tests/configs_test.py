"""Every config builds, is accepted, and its training steps trace on abstract arrays."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.checkpoints.metadata import Metadata
from dmc_jax.checkpoints.states import open_for_saving
from dmc_jax.config import (
    MeshConfig,
    RunConfig,
    StageConfig,
    load_config,
    to_config_dict,
    to_dict,
)
from dmc_jax.core.schedules import compression_target
from dmc_jax.errors import UserError
from dmc_jax.evaluation import perplexity
from dmc_jax.evaluation.arena_config import ArenaConfig
from dmc_jax.fields import from_dict
from dmc_jax.model.sharding import make_mesh
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.training import gated, stages
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import abstract_batch, abstract_state
from dmc_jax.training.step import make_train_step
from tests.tiny_llama import build

ARGUED = ("paper", "gates", "gqa")  # take arguments
FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
FILES = [path for path in FILES if path.stem not in (*ARGUED, "arena_smollm2")]
STEPS = {"7b_2x": 6_000, "7b_4x": 18_000, "7b_8x": 42_000, "13b_4x": 18_000, "13b_8x": 42_000}
STEPS |= {"70b_4x": 18_000, "llama3_8b_4x": 18_000}
# Seconds of tracing each, of what 7b_4x has already in other sizes or for other numbers of steps.
SLOW_TO_TRACE = {"7b_2x", "7b_8x", "13b_4x", "13b_8x"}


def every_named_config_is_there_test():
    assert {*STEPS, "tiny_4x", "smollm2_gates"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def config_survives_the_command_line_form_test(path):
    run = RunConfig.named(str(path))
    assert from_dict(RunConfig, to_config_dict(run).to_dict()) == run


@pytest.mark.parametrize("name", ["tiny_4x", "70b_4x"])
def the_record_of_a_run_is_a_config_test(name, tmp_path):
    run = RunConfig.named(name)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run)))
    assert RunConfig.named(str(tmp_path / "config.json")) == run
    for text, message in (("{", "cannot read"), ("[]", "no run's"), ("{}", "missing")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            RunConfig.named(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match="cannot read"):
        RunConfig.named(str(tmp_path / "gone.json"))


@pytest.mark.parametrize("name", STEPS)
def recipe_is_the_papers_test(name):
    run = RunConfig.named(name)
    o, c = run.optimizer, run.compression
    assert (o.beta1, o.beta2, o.eps, o.weight_decay, o.clip) == (0.9, 0.95, 1e-5, 0.1, 1.0)
    assert (run.data.batch, run.data.length) == (1024, 4096)
    assert (run.dmc.window, run.dmc.temperature, run.dmc.offset) == (12, 0.1, 5.0)
    assert (c.weight, c.per_layer, c.decision_multiplier, c.calibration_windows) == (1, False, 1, 0)
    rate = 1.5e-5 if name.startswith("70b") else 3e-5
    assert run.zero_out.learning_rate == run.retrofit.learning_rate == rate
    assert (run.zero_out.steps, run.finetune.steps) == (250, 2_000)
    assert run.finetune.final_learning_rate == 3e-6
    assert run.retrofit.steps == STEPS[name]
    # 6,000 steps for every +1 of ratio
    assert compression_target(6_000, run.retrofit.steps, c.ratio)[0] == pytest.approx(2.0)


def a_path_a_name_and_the_papers_arguments_are_one_run_test(monkeypatch, tmp_path):
    by_path = RunConfig.named(str(FILES[0].parent / "7b_8x.py"))
    monkeypatch.chdir(tmp_path)
    assert RunConfig.named("7b_8x") == by_path == RunConfig.named("paper:7b,ratio=8")
    assert RunConfig.named("paper:13b,ratio=2.5").retrofit.steps == 9_000


def the_papers_recipe_takes_the_sizes_of_a_checkpoint_test(tmp_path, monkeypatch):
    """Of any format, whatever its name: that of a run cannot have a space."""
    params, config = build(kv_heads=(4, 2))
    folder = tmp_path / "my model"
    metadata = Metadata("", 0, dataclasses.replace(config, rope_theta=5e5), Dense(), "float32")
    with open_for_saving(folder, "pretrain", keep=1) as saver:
        saver.save(0, {"params": params}, {}, metadata)
    monkeypatch.chdir(tmp_path)
    run = RunConfig.named("paper:my model,ratio=3")
    assert (run.model, run.init_from) == (metadata.model, "my model")
    assert (run.name, run.data.path) == ("my_model_3x", "data/my_model")
    assert run.data.length == config.max_length and run.retrofit.steps == 12_000
    of_7b = RunConfig.named("paper:7b,ratio=3")
    for field in ("dmc", "compression", "zero_out", "retrofit", "finetune", "stages"):
        assert getattr(run, field) == getattr(of_7b, field)


@pytest.mark.parametrize(
    "name, message",
    [
        ("7b_9x", "no config named '7b_9x'; name a Python file, or one of 13b_4x, 13b_8x,"),
        ("configs/7b_9x.py", "no file 'configs/7b_9x.py'; name a Python file, or one of 13b_4x"),
        ("paper", "takes paper:MODEL,ratio=R with a model of 7b, 13b, 70b, llama3_8b"),
        ("paper:7b", "such as paper:7b,ratio=8 or paper:7b,ratio=8,gpus=16; got '7b'"),
        ("paper:8b,ratio=4", "or the path of a checkpoint, and a ratio above 1"),
        ("paper:tests,ratio=4", "no complete checkpoint in tests"),
        ("paper:7b,ratio=1", "a ratio above 1"),
        ("paper:7b,ratio=nan", "got '7b,ratio=nan'"),
        ("paper:70b,ratio=4,gpus=16", "70b is planned for 64 or 256 GPUs, not 16: `python -m"),
        ("paper:tests,ratio=4,gpus=8", "tests is planned for no GPUs, not 8: `python -m dmc_jax"),
        ("gates", "gates.py needs arguments"),
        ("gates:none", "no complete checkpoint in none"),
        ("gqa:none", "no complete checkpoint in none"),
        ("tiny_4x:7b", "tiny_4x.py takes no arguments; got 'tiny_4x:7b'"),
    ],
)
def a_config_that_cannot_be_loaded_says_why_test(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        RunConfig.named(name)


def a_file_without_get_config_says_so_test(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("run = 1\n")
    with pytest.raises(UserError, match="mine.py has no function get_config()"):
        RunConfig.named(str(file))
    file.write_text("def get_config(arguments):\n    raise AssertionError\n")
    with pytest.raises(UserError, match="mine.py needs arguments"):
        RunConfig.named(str(file))


def a_stage_without_settings_cannot_be_among_the_stages_test():
    run = RunConfig.named("7b_8x")
    assert run.pretrain is None
    with pytest.raises(UserError, match="stages names pretrain, and the config has no settings"):
        dataclasses.replace(run, stages="pretrain,zero_out,retrofit,finetune")


def a_run_saved_when_every_stage_had_settings_is_read_back_test():
    stage = StageConfig(steps=1, learning_rate=3e-5)
    saved = to_dict(RunConfig.named("7b_8x")) | {"pretrain": to_dict(stage)}
    run = from_dict(RunConfig, json.loads(json.dumps(saved)))
    assert run == dataclasses.replace(RunConfig.named("7b_8x"), pretrain=stage)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW_TO_TRACE)) for p in FILES],
    ids=lambda path: path.stem,
)
def every_stage_traces_abstractly_test(path):
    run = RunConfig.named(str(path))
    run = dataclasses.replace(run, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    mesh = make_mesh(run.mesh)
    optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
    state, other = abstract_state(run.model, optimizer, mesh), None
    batch = abstract_batch(max(4, run.data.batch), run.data.length, mesh)
    for stage in run.stage_names:
        if stage == "closed_form":  # which is no step
            continue
        if stage == "distill":
            other, optimizer = state.params, gated.make_optimizer(run)
            state = jax.eval_shape(lambda o=optimizer: gated.state_of(gated.empty(run), o))
            step = gated.make_distill_step(run, mesh, optimizer, np.zeros(run.model.vocab_size))
        else:
            step = make_train_step(run, stage, mesh, optimizer)
        after, metrics = jax.eval_shape(step, state, batch, other)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        assert metrics["distillation" if stage == "distill" else "loss"].shape == ()
        if stage in ("retrofit", "finetune"):
            assert metrics["merged"].shape == (run.model.layers,)


def bytes_a_device_needs(jitted, *arguments):
    """For arguments, results and temporaries of a program, as XLA plans them."""
    plan = jitted.lower(*arguments).compile().memory_analysis()
    given = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return given + plan.temp_size_in_bytes


def needs(name):
    """Bytes that evaluation and training need of each device of a config's own mesh."""
    run = RunConfig.named(name)
    mesh = make_mesh(run.mesh)
    optimizer = make_optimizer(run.optimizer, run.compression.decision_multiplier)
    state = abstract_state(run.model, optimizer, mesh)
    batch = abstract_batch(run.data.batch, run.data.length, mesh)
    trained = [
        bytes_a_device_needs(make_train_step(run, stage, mesh, optimizer), state, batch, None)
        for stage in ("zero_out", "retrofit")
    ]
    how = stages.evaluation_options(run, mesh)
    rest = -how["batch"] % (mesh.shape["data"] * mesh.shape["fsdp"])  # filled up by `evaluate`
    windows = abstract_batch(how["batch"] + rest, how["length"], mesh)
    static = run.model, how["dtype"], how["attention"], mesh
    measured = bytes_a_device_needs(
        perplexity._evaluate_batch, *static, state.params, windows, DMC(run.dmc)
    )
    return {"evaluation": measured, "training": min(trained), "evaluation_batch": how["batch"]}


def evaluation_fits_where_training_does_test():
    found = needs("tiny_4x")
    assert found["evaluation"] < found["training"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def evaluation_fits_where_training_of_a_large_recipe_does_test(name):
    """On as many devices as the recipe is for."""
    mesh = RunConfig.named(name).mesh
    flags = f"--xla_force_host_platform_device_count={mesh.fsdp * mesh.tensor}"
    program = (
        f"import json; from tests import configs_test as t; print(json.dumps(t.needs({name!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=FILES[0].parents[1],
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["evaluation"] < found["training"], found


def the_arena_is_set_by_its_config_and_flags_and_tells_what_cannot_be_test():
    def arena(**fields):
        return from_dict(ArenaConfig, load_config("arena_smollm2").to_dict() | fields)

    assert arena().gates == ("smollm2_135m_dms", "smollm2_135m_dmc_delay16")
    assert arena().text.windows == 32
    assert arena(contests=("text,passkey",)).contests == ("text", "passkey")
    assert arena(others=("",)).others == ()
    for field, value, complaint in (
        ("others", ("LRU",), "others: expected TOVA, .*got 'LRU'"),
        ("kv_dtypes", ("int4",), "kv_dtypes: expected float32, int8, got 'int4'"),
        ("budgets", ("half",), "budgets: expected grows, end, mean, got 'half'"),
        ("contests", ("chess",), "contests: expected text, .*got 'chess'"),
        ("ratios", (1.0,), "ratios: expected tokens per slot above 1"),
        ("margins", (-1.0,), "margins: expected logits, 0 or more"),
        ("sequences", 0, "sequences: expected 1 or more, got 0"),
        ("text", {"windows": 0}, "windows: expected 1 or more, got 0"),
        ("needles", {"lengths": (1024, 0)}, r"lengths: expected 1 or more, got \(1024, 0\)"),
    ):
        with pytest.raises(UserError, match=complaint):
            arena(**{field: value})
