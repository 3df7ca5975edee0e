"""Methods on single windows: against a dense model, at slots that were counted otherwise."""

import dataclasses

import numpy as np
import pytest

from dmc_jax.checkpoints.gates import load_gates
from dmc_jax.checkpoints.models import open_model
from dmc_jax.data.prepared import open_data
from dmc_jax.errors import UserError
from dmc_jax.evaluation.plots import quality_by_bytes
from dmc_jax.evaluation.side_by_side import (
    OTHERS,
    beside_others,
    budget_of_mean,
    growing,
    interval,
    joined,
    measure,
    side_by_side_table,
    single_windows,
)
from dmc_jax.interop.formats import open_source
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.window import Window
from tests.interop.gates_files import write_gates

T = 32


@pytest.fixture(scope="module")
def model(finished_run):
    return open_model(finished_run / "pretrain")


@pytest.fixture(scope="module")
def some(data):
    return single_windows(open_data(data.path), "train", T, 6)


def windows_lie_in_one_document_each_test(data, some):
    assert some["tokens"].shape == (6, T)
    np.testing.assert_array_equal(some["targets"][:, :-1], some["tokens"][:, 1:])
    np.testing.assert_array_equal(np.diff(some["positions"], axis=1), 1)
    assert joined([some, some])["tokens"].shape == (12, T)
    with pytest.raises(UserError, match="fills a window of 300 tokens"):
        single_windows(data, "train", 300, 1)


def the_dense_model_is_itself_and_a_budget_is_kept_test(model, some):
    run = {"params": model.params, "config": model.config, "some": some}
    dense = measure(**run, policy=Dense())
    np.testing.assert_allclose(dense.apart, 0.0, atol=1e-6)
    np.testing.assert_array_equal(dense.slots, np.broadcast_to(np.arange(1, T + 1), (6, T)))
    figures = dense.figures(dense)
    assert figures["ratio_of_means"] == figures["ratio_at_end"] == 1.0
    assert figures["perplexity_percent"] == 0.0
    assert figures["perplexity_percent_interval"] == [0.0, 0.0]

    few = measure(**run, policy=Window(8, sinks=2))
    np.testing.assert_array_equal(
        few.apart, measure(**run, policy=Window(8, sinks=2), dense=dense).apart
    )
    np.testing.assert_array_equal(few.slots, np.minimum(dense.slots, 8))
    np.testing.assert_allclose(few.apart[:, :8], 0.0, atol=1e-6)
    assert (few.apart[:, 8:].mean(axis=1) > 0).all()
    grows = measure(**run, policy=Window(4, ratio=2.0, sinks=2)).figures(dense)
    assert grows["ratio_at_end"] == pytest.approx(2.0)
    by_four = measure(**run, policy=Window(8, sinks=2), batch=4)
    for name in ("nats", "apart", "slots"):
        np.testing.assert_allclose(getattr(by_four, name), getattr(few, name), atol=1e-5)


@pytest.mark.parametrize("budget", [1, 7, 31, 32])
def a_budget_is_found_by_its_mean_test(budget):
    assert budget_of_mean(np.minimum(np.arange(1, T + 1), budget).mean(), T) == budget


def intervals_are_those_of_the_mean_over_windows_test(model, some):
    run = {"params": model.params, "config": model.config, "some": some}
    dense, few = measure(**run, policy=Dense()), measure(**run, policy=Window(8, sinks=2))
    apart = few.apart.mean(axis=1)
    figures = few.figures(dense)
    assert figures["divergence"] == pytest.approx(apart.mean(), abs=1e-4)
    # Of six windows drawn anew, 6**6 ways: the bootstrap without its chance.
    means = apart[np.stack(np.meshgrid(*6 * [np.arange(6)]))].mean(axis=0)
    ends = np.quantile(means, (0.025, 0.975))
    np.testing.assert_allclose(interval(apart), ends, rtol=0.02)
    assert figures["divergence_interval"] == np.round(interval(apart), 4).tolist()
    alone = dataclasses.replace(few, **{n: getattr(few, n)[:1] for n in ("nats", "apart", "slots")})
    assert np.isnan(alone.figures(alone)["divergence_interval"]).all()


def others_have_as_many_slots_as_the_gates_hold_test(finished_run, model, some, tmp_path):
    file = write_gates(tmp_path / "gates.safetensors", open_source(finished_run / "pretrain"))
    gates, told = load_gates(file, model.config), []
    run = {"params": model.params, "config": model.config, "some": some, "batch": 6}
    rows = beside_others(**run, gates=gates, ratios=(1.5,), report=told.append)
    budgets = [(name, how) for name in OTHERS for how in ("grows", "fixed")]
    budgets.remove(("Stride", "fixed"))
    assert [row["method"] for row in rows[:2]] == ["dense", "ours"]
    assert [(row["method"], row["budget"]) for row in rows[2:]] == budgets
    assert [row["method"] for row in growing(rows)] == ["dense", "ours", *OTHERS]
    dense = measure(**run, policy=Dense())
    ours, *others = rows[1:]
    again = measure(**run, policy=gates.at(ours["asked"])).figures(dense)
    for name, figure in again.items():
        assert ours[name] == pytest.approx(figure, abs=1e-3)
    for row in others:
        least = ours["end_slots"] - (1 if row["budget"] == "grows" else 0.5)
        most = ours["end_slots"] + (
            1 if row["method"] == "Stride" else 0.5
        )  # it begins with a slot
        assert least < row["end_slots"] <= most
        assert row["cache_bytes"] == round(row["end_slots"] * 2 * 8 * 4 * 4)
    assert len(told) == 5 and told[0] == f"{T} tokens, 1.5x: ours ..."
    lines = side_by_side_table(rows).splitlines()
    assert len(lines) == 2 + len(growing(rows)) and "| dense" in lines[2] and "1.00x" in lines[2]
    assert lines[2].endswith("|") and lines[2].split("|")[-2].strip() == ""
    assert lines[4].split("|")[-2].strip().endswith(" %")


def a_picture_has_a_line_a_method_in_every_panel_test():
    rows = [
        {"length": n, "method": method, "cache_bytes": size, "divergence": 1 / size}
        for n in (512, 2048)
        for method, sizes in (("dense", [8]), ("ours", [4, 2]), ("TOVA", [2, 4]))
        for size in sizes
    ]
    panels = quality_by_bytes(rows).axes
    assert [axes.get_title() for axes in panels] == ["512 tokens", "2,048 tokens"]
    for axes in panels:
        assert [line.get_label() for line in axes.lines] == ["ours", "TOVA", "dense"]
        x = axes.lines[1].get_xdata()
        assert list(x) == sorted(x)
