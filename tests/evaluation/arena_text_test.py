"""The arena's text on a tiny model: what is measured, against whom, how often, and its table."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.checkpoints.gates import load_gates, save_gates
from dmc_jax.checkpoints.models import open_model
from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.evaluation import arena
from dmc_jax.evaluation.arena import Arena, about_gates, with_margins
from dmc_jax.evaluation.arena_config import ArenaConfig, TextConfig
from dmc_jax.evaluation.arena_tables import bytes_table, points, position_table, text_table
from dmc_jax.evaluation.plots import quality_by_bytes
from dmc_jax.evaluation.record import Record, open_record
from dmc_jax.evaluation.side_by_side import (
    Measured,
    budget_of_mean,
    measure,
    single_windows,
)
from dmc_jax.interop.formats import open_source
from dmc_jax.model.llama import Llama
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import attend_whole
from tests.interop.gates_files import write_gates
from tests.tiny_run import make_data, save_model

T, WINDOWS, RATIO = 64, 4, 1.5
OTHERS = "TOVA", "StreamingLLM"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def data(folder):
    return make_data(folder, 320, seed=0, words=(150, 200))


@pytest.fixture(scope="module")
def model(folder, data):
    return open_model(save_model(data, folder / "model"))


@pytest.fixture(scope="module")
def files(folder, model):
    """Of two seeds, in the directories of their runs, under one name."""
    first, second = (folder / name / "gates.safetensors" for name in ("seed5", "seed6"))
    for file in (first, second):
        file.parent.mkdir()
    stored = load_gates(write_gates(first, open_source(model.path)), model.config)
    gates = dataclasses.replace(stored.policy.gates, weight=-stored.policy.gates.weight)
    policy = dataclasses.replace(stored.policy, gates=gates)
    save_gates(second, dataclasses.replace(stored, policy=policy))
    return [first, second]


@pytest.fixture
def run(model, data, monkeypatch):
    """Takes files of gates and a record's file; gives its JSON and the policies measured."""

    def main(files, output, **fields):
        policies, measure = [], arena.measure

        def counted(*args, **options):
            policies.append(args[3])
            return measure(*args, **options)

        config = ArenaConfig(
            others=OTHERS,
            ratios=(RATIO, 99.0),
            budgets=("grows", "end", "mean"),
            contests=("text",),
            text=TextConfig(split="train", lengths=(T,), windows=WINDOWS, batch=WINDOWS),
            **fields,
        )
        gates = tuple(load_gates(file, model.config) for file in files)
        about = {"gates": about_gates(gates)}
        record = open_record(output, about, (), joins=("gates",))
        with monkeypatch.context() as patch:
            patch.setattr(arena, "measure", counted)
            arena.run(Arena(config, model, None, None, gates, (data,), record, None, None))
        return json.loads(output.read_text()), policies

    return main


@pytest.fixture
def record(run, files, folder):
    return run(files, folder / "all.json")[0]


def a_ratio_is_measured_with_each_file_and_once_with_the_others_test(record):
    gated = [row for row in record["rows"] if "asked" in row]
    assert [(row["method"], row["asked"]) for row in gated] == [("seed5", RATIO), ("seed6", RATIO)]
    others = [(row["method"], row["budget"]) for row in record["rows"] if "like" in row]
    assert sorted(others) == [(n, b) for n in sorted(OTHERS) for b in ("end", "grows", "mean")]
    assert all(row["windows"] == WINDOWS == len(row["rises"]) for row in record["rows"])


def slots_are_those_that_the_budgets_name_test(record):
    ours = record["rows"][1]
    t = np.arange(1, T + 1)
    budgets = {
        "grows": np.maximum(16, t // ours["ratio_at_end"]),
        "end": round(ours["end_slots"]),
        "mean": budget_of_mean(ours["mean_slots"], T),
    }
    for row in record["rows"]:
        if "like" in row:
            assert row["slots_of"] == ours["method"]
            slots = np.minimum(t, budgets[row["budget"]])
            assert row["end_slots"] == slots[-1], row
            assert row["mean_slots"] == pytest.approx(slots.mean(), abs=1e-3)
            if row["budget"] == "mean":
                assert row["mean_slots"] == pytest.approx(ours["mean_slots"], abs=0.5)
            else:
                assert abs(row["end_slots"] - ours["end_slots"]) < 1


def rows_are_paired_with_the_dense_model_by_window_test(record, model, data, files):
    some = single_windows(data, "train", T, WINDOWS)

    def nats(policy):
        attend = attend_whole(policy, model.config, jnp.asarray(some["positions"]))
        tokens = jnp.asarray(some["tokens"])
        output = Llama(model.config).apply({"params": model.params}, tokens, attend=attend)
        rates = np.asarray(jax.nn.log_softmax(output.prediction.logits))
        return -np.take_along_axis(rates, some["targets"][..., None], 2)[..., 0]

    dense = nats(Dense())
    first, *rows = record["rows"]
    assert first["method"] == "dense" and first["rises"] == [0.0] * WINDOWS
    assert first["nats"] == pytest.approx(dense.mean(), abs=1e-3)
    for file, row in zip(files, rows[:2], strict=True):
        rises = (nats(load_gates(file, model.config).at(RATIO)) - dense).mean(axis=1)
        assert np.abs(rises).max() > 1e-3
        np.testing.assert_allclose(row["rises"], rises, atol=2e-5)
        percent = 100 * math.expm1(rises.mean())
        assert row["perplexity_percent"] == pytest.approx(percent, abs=5e-3)
        assert row["percent_by_position"] == {f"0-{T}": pytest.approx(percent, abs=5e-3)}
        assert row["peak_bytes"] == pytest.approx(row["end_slots"] * first["peak_bytes"] / T, abs=1)


def pages_of_int8_are_rows_of_their_own_test(run, files, model, data, tmp_path, monkeypatch):
    def upside_down(q, k, v, *bias, **how):  # an untrained model hardly tells int8
        return causal_attention(q, k, -v, *bias, **how)

    attention_over = {"float32": causal_attention, "int8": upside_down}.get
    monkeypatch.setattr(arena, "attention_over", attention_over)
    rows = run(files[:1], tmp_path / "int8.json", kv_dtypes=("int8",))[0]["rows"]
    told = [(row["method"], row["kv_dtype"]) for row in rows[:4]]
    name = files[0].parent.name
    assert told == [(n, kind) for n in ("dense", name) for kind in ("float32", "int8")]
    some = single_windows(data, "train", T, WINDOWS)
    gates, H = load_gates(files[0], model.config).at(RATIO), model.config.head_dim
    for policy, plain, other in ((Dense(), *rows[:2]), (gates, *rows[2:4])):
        again = measure(model.params, model.config, some, policy, attention=upside_down)
        assert other["nats"] == pytest.approx(again.nats.mean(), abs=1e-4)
        assert abs(other["nats"] - plain["nats"]) > 1e-3
        by_slot = [row["peak_bytes"] / row["end_slots"] for row in (plain, other)]
        assert by_slot[1] / by_slot[0] == pytest.approx((H + 4) / (4 * H), rel=1e-3)
    lines = [line.split("|")[2].strip() for line in bytes_table(rows[:4]).splitlines()[2:]]
    assert lines == ["dense", "dense, int8 pages", name, f"{name}, int8 pages"]


def a_second_run_measures_only_what_is_left_test(run, files, tmp_path):
    file = tmp_path / "gates.json"
    first, policies = run(files[:1], file)
    assert len(policies) == len(first["rows"]) == 1 + 1 + 3 * len(OTHERS)
    again, policies = run(files[:1], file)
    assert again["rows"] == first["rows"] and not policies
    both, policies = run(files, file)  # a seed more
    assert both["rows"][:-1] == first["rows"] and len(policies) == 2
    file.write_text(json.dumps(both | {"rows": both["rows"][:3]}))
    assert len(run(files, file)[1]) == 1 + len(both["rows"]) - 3


def the_picture_has_a_line_a_method_however_many_and_the_mean_of_seeds_test():
    def row(method, peak, divergence, **about):
        figures = {"peak_bytes": peak, "divergence": divergence, "ratio_at_end": 2.0}
        return {"contest": "text", "length": 64, "method": method} | figures | about

    others = [
        row(f"other {n}", 100.0, 0.5, budget=budget, like=2.0, slots_of="a0")
        for n in range(9)
        for budget in ("grows", "end")
    ]
    seeds = [row(f"a{n}", 100.0 + n, 0.1 * n, asked=2.0, kv_dtype="float32") for n in range(3)]
    rounded = row("a0", 30.0, 0.2, asked=2.0, kv_dtype="int8")
    about = {"gates": {f"a{n}": {"kind": "a"} for n in range(3)}}
    rows = [row("dense", 200.0, 0.0), *seeds, rounded, *others]
    drawn = points(Record(None, about, rows))
    mean = {"method": "a0", "length": 64, "cache_bytes": 101.0, "divergence": pytest.approx(0.1)}
    assert drawn[1] == mean and drawn[2]["method"] == "a0, int8 pages"
    assert len(drawn) == 2 + 1 + 2 * 9 and drawn[4]["method"] == "other 0, fixed"
    lines = [line for line in quality_by_bytes(drawn).axes[0].get_lines() if len(line.get_xdata())]
    styles = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(lines) == 21 and len(set(styles[:18])) == 18


def gates_that_cannot_be_told_apart_are_refused_test(run, files, tmp_path):
    with pytest.raises(UserError, match="cannot be told apart, got seed5, seed5"):
        run([files[0], files[0]], tmp_path / "one.json")


def without_gates_others_are_measured_at_the_ratio_itself_test(run, tmp_path):
    rows = run([], tmp_path / "none.json")[0]["rows"]
    told = [(row["method"], row.get("budget"), row.get("like")) for row in rows]
    assert told == [("dense", None, None)] + [
        (name, "grows", ratio) for ratio in (RATIO, 99.0) for name in OTHERS
    ]
    assert rows[1]["end_slots"] == T // RATIO


def gates_that_merge_take_part_again_with_margins_test(files, model):
    stored = load_gates(files[0], model.config)
    some = dataclasses.replace(stored.policy.gates, gamma=jnp.zeros(model.config.kv_rows))
    settings = DMCSettings(window=12, offset=0.0)
    merging = dataclasses.replace(stored, policy=DelayedDMC(some, 0.0, 4, settings))
    all_of_them = with_margins((stored, merging), (0.5, 2.0))
    assert [each.policy.name for each in all_of_them] == ["dms", "dmc", "dmc", "dmc"]
    kinds = [about["kind"] for about in about_gates(all_of_them[1:]).values()]
    names = [*about_gates(all_of_them[1:])]
    assert names == ["seed5", "seed5, margin 0.5", "seed5, margin 2"]
    assert [kind.split(", ")[2] for kind in kinds[1:]] == ["margin 0.5", "margin 2"]
    assert all(each.table == merging.table for each in all_of_them[2:])


def nats_are_told_by_where_a_token_stands_test():
    rng = np.random.default_rng(0)
    dense, one = (
        Measured(rng.normal(size=(3, 300)), np.zeros((3, 300)), np.ones((3, 300)), None)
        for _ in range(2)
    )
    row = arena.text_row(one, dense, 10)
    rises = one.nats - dense.nats
    places = {"0-128": (0, 128), "128-256": (128, 256), "256-300": (256, 300)}
    assert row["percent_by_position"] == {
        name: pytest.approx(100 * np.expm1(rises[:, a:b].mean()), abs=1e-3)
        for name, (a, b) in places.items()
    }
    assert row["mean_bytes"] == row["peak_bytes"] == 10
    table = position_table([{"length": 300, "method": "x", **row}]).splitlines()
    assert table[0].count("|") == table[2].count("|") == 8


def a_summary_has_means_over_seeds_and_differences_on_the_same_windows_test():
    def row(method, rises, **about):
        rises = np.array(rises)
        figures = {"perplexity_percent": 100 * math.expm1(rises.mean()), "ratio_at_end": 2.0}
        case = {"length": 512, "windows": 2, "method": method, "rises": rises.tolist()}
        return case | figures | {"ratio_of_means": 1.8} | about

    rows = [
        row("a0", [0.01, 0.03], asked=2.0),
        row("TOVA", [0.10, 0.14], like=2.0, budget="end", slots_of="a0"),
        row("H2O", [0.20, 0.20], like=2.0, budget="mean", slots_of="a0"),
        row("a1", [0.03, 0.05], asked=2.0),
        row("b", [0.5, 0.5], asked=4.0),
    ]
    table = text_table(rows, {"a": ["a0", "a1"], "b": ["b"]}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0][6:] == ["perplexity", "slots", "TOVA", "H2O"]
    # Means over seeds: 0.02 and 0.04; TOVA is 0.08 and 0.10 above them, H2O 0.18 and 0.16.
    about = ["512", "2", "2x", "a", "2.00x", "1.80x", "+3.0 % (2.0 to 4.1), seeds +2.0 to +4.1"]
    assert cells[2] == [*about, "end", "+9.4 % (8.3 to 10.5)", ""]
    assert cells[3] == [*about, "mean", "", "+18.5 % (17.4 to 19.7)"]
    about = ["512", "2", "4x", "b", "2.00x", "1.80x", "+64.9 % (64.9 to 64.9)"]
    assert cells[4] == [*about, "", "", ""]
    assert len(cells) == 5
