"""Each step is recorded once, and no utilisation is invented."""

import errno
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from dmc_jax.config import RunConfig
from dmc_jax.errors import UserError
from dmc_jax.model.llama import count_parameters
from dmc_jax.training import metrics, recent
from dmc_jax.training.flops import model_flops


def lines_of(run):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def log_steps(run, steps, first_step=0, **kwargs):
    with metrics.open_metrics(
        run, total_steps=10, first_step=first_step, quiet=True, **kwargs
    ) as logger:
        for step in steps:
            logger.log(step, {"loss": step / 2})


def package(**names):
    module = ModuleType("package")
    vars(module).update(names)
    return module


def a_line_is_on_disk_as_soon_as_it_is_logged_test(tmp_path):
    with metrics.open_metrics(tmp_path / "a" / "run", total_steps=3, quiet=True) as logger:
        logger.log(1, {"loss": jnp.float32(2.5), "tokens": 4096})
        assert lines_of(tmp_path / "a" / "run") == [{"step": 1, "loss": 2.5, "tokens": 4096}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), jnp.float32("nan")])
def a_number_that_is_not_finite_is_null_test(tmp_path, value):
    with metrics.open_metrics(tmp_path, total_steps=3, quiet=True) as logger:
        logger.log(1, {"loss": value})
    assert lines_of(tmp_path) == [{"step": 1, "loss": None}]


def a_resumed_run_has_each_step_once_test(tmp_path):
    log_steps(tmp_path, range(1, 8))
    log_steps(tmp_path, range(5, 11), first_step=5)
    assert lines_of(tmp_path) == [{"step": step, "loss": step / 2} for step in range(1, 11)]


def the_half_line_of_a_killed_run_is_dropped_test(tmp_path):
    log_steps(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    log_steps(tmp_path, [3], first_step=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def a_full_disk_is_no_mistake_of_the_users_test(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log_steps(tmp_path, [1])
    monkeypatch.setattr(metrics, "write_text", full)
    with pytest.raises(OSError, match="metrics.jsonl: No space left on device. Make room, then"):
        log_steps(tmp_path, [2], first_step=2)


def a_run_from_the_start_forgets_the_old_lines_test(tmp_path):
    log_steps(tmp_path, [1, 2])
    log_steps(tmp_path, [1])
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


def outside_a_terminal_a_step_is_one_log_line_test(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(logging, "info", lambda text, *values: shown.append(text % values))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with metrics.open_metrics(tmp_path, total_steps=10) as logger:
        logger.log(3, {"loss": 2.34567, "ratio": 4})
    assert shown == ["step 3/10  loss 2.346  ratio 4"]


def in_a_terminal_a_progress_bar_shows_the_step_test(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with metrics.open_metrics(tmp_path, total_steps=10, first_step=2) as logger:
        logger.log(3, {"loss": 2.34567})
        logger.log(10, {"loss": 1.5})
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "loss 1.5" in shown


def the_bar_starts_where_the_run_is_test(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for first, shown in ((1, "0/25"), (11, "10/25")):
        with metrics.open_metrics(tmp_path, total_steps=25, first_step=first):
            pass
        assert shown in capsys.readouterr().err


def a_line_sums_up_the_layers_and_the_file_has_them_all_test(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(logging, "info", lambda text, *values: shown.append(text % values))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    layers = {f"ratio_layer_{i:02d}": ratio for i, ratio in enumerate([4.0, 1.5, 9.0, 2.0])}
    with metrics.open_metrics(tmp_path, total_steps=10) as logger:
        logger.log(3, {"loss": 2.5, "ratio": 2.25, **layers, "tokens_per_second": 7})
    assert shown == [
        "step 3/10  loss 2.5  ratio 2.25  tokens_per_second 7  "
        "ratio of layers 1.5/3/9 (min/median/max)"
    ]
    assert layers.items() <= lines_of(tmp_path)[0].items()


def tensorboard_is_told_which_steps_a_resumed_run_takes_again_test(tmp_path, monkeypatch):
    told = []

    def writer(path, **options):
        (tmp_path / "tensorboard").mkdir(exist_ok=True)
        told.append(options)
        return SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)

    monkeypatch.setitem(sys.modules, "tensorboardX", package(SummaryWriter=writer))
    log_steps(tmp_path, range(1, 8), first_step=1, tensorboard=True)
    log_steps(tmp_path, range(5, 11), first_step=5, tensorboard=True)
    assert told == [{}, {"purge_step": 5}]


def a_missing_package_is_named_before_anything_is_written_test(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for setting, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        with pytest.raises(UserError, match=f"pip install {package}"):
            log_steps(tmp_path / "run", [1], **{setting: True})
    assert not (tmp_path / "run").exists()


def tensorboard_and_wandb_get_the_same_numbers_when_asked_test(tmp_path, monkeypatch):
    seen = []
    writer = SimpleNamespace(
        add_scalar=lambda name, x, step: seen.append(("tensorboard", step, name, x)),
        close=lambda: seen.append("tensorboard closed"),
    )
    run = SimpleNamespace(
        log=lambda numbers, step: seen.append(("wandb", step, numbers)),
        finish=lambda: seen.append("wandb finished"),
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", package(SummaryWriter=lambda path: writer))
    monkeypatch.setitem(sys.modules, "wandb", package(init=lambda **_: run))
    log_steps(tmp_path, [4], tensorboard=True, wandb=True)
    assert seen == [
        ("tensorboard", 4, "loss", 2.0),
        ("wandb", 4, {"loss": 2.0}),
        "wandb finished",
        "tensorboard closed",
    ]


def training_flops_equal_a_count_of_the_products_of_a_small_transformer_test():
    layers, heads, head_dim, length, width, hidden, vocabulary = 2, 3, 4, 8, 12, 20, 30
    weights = layers * (4 * width * heads * head_dim + 3 * width * hidden) + width * vocabulary
    # Multiply-adds of one window: each weight once a token, scores and values once a visible pair;
    # a token sees length / 2 others on average when its own pair counts half.
    visible = length * length / 2
    multiply_adds = length * weights + layers * heads * visible * head_dim * 2
    expected = 3 * 2 * multiply_adds / length  # the backward pass costs twice the forward one
    sizes = {
        "params_without_embedding": weights,
        "layers": layers,
        "heads": heads,
        "head_dim": head_dim,
        "length": length,
    }
    assert expected == metrics.flops_per_token(**sizes)
    assert expected / 3 == metrics.flops_per_token(**sizes, learns="nothing")
    # A third of what the products with weights cost is for the weights' own gradients.
    assert expected - 2 * weights == metrics.flops_per_token(**sizes, learns="beside")


@pytest.mark.parametrize("stage, frozen", [("retrofit", False), ("distill", True)])
def the_teachers_pass_is_work_of_the_device_too_test(monkeypatch, stage, frozen):
    run = RunConfig.named("tiny_4x")
    table = run.model.vocab_size * run.model.width * (not run.model.tied_embeddings)
    weights = count_parameters(run.model) - table
    one_pass = model_flops(run.model, run.data.length, "nothing")
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e12)
    for teacher, passes in ((None, 3), (run.model, 4)):
        told = recent.speed(run, stage, teacher, steps=3, seconds=2.0)
        rate = 3 * run.data.batch * run.data.length / 2.0
        work = rate * (passes * one_pass - 2 * frozen * weights)
        assert told["tokens_per_second"] == rate
        assert told["mfu"] == pytest.approx(work / jax.device_count() / 1e12)


def utilisation_is_the_share_of_the_peak_of_all_devices_test():
    assert metrics.mfu(1000.0, 2e9, 8, 1e12) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
    ],
)
def known_devices_have_their_data_sheets_peak_test(kind, peak):
    assert metrics.peak_flops(kind) == peak


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H200 NVL", "NVIDIA H100 NVL", "TPU v9"])
def an_unknown_device_has_no_peak_and_no_utilisation_test(kind):
    assert metrics.peak_flops(kind) is None
    assert metrics.mfu(1000.0, 2e9, 8, metrics.peak_flops(kind)) is None
